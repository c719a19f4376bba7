"""Sampling from logits against probabilities by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.inference.sampling import filter_logits, make_sampling, sample_token

PROBABILITIES = np.array([0.5, 0.3, 0.15, 0.05])


@pytest.mark.parametrize(
  "settings, num_kept",
  [
    pytest.param({"temperature": 1.0}, 4, id="all"),
    pytest.param({"temperature": 1.0, "top_k": 2}, 2, id="top_k=2"),
    pytest.param({"temperature": 1.0, "top_p": 0.8}, 2, id="top_p=0.8"),
    pytest.param({"temperature": 1.0, "top_p": 0.81}, 3, id="top_p=0.81"),
    pytest.param({"temperature": 1.0, "top_p": 0.01}, 1, id="top_p=0.01"),
    pytest.param({"temperature": 1.0, "min_p": 0.29}, 3, id="min_p=0.29"),
    pytest.param({"temperature": 1.0, "min_p": 0.31}, 2, id="min_p=0.31"),
    pytest.param({"temperature": 1.0, "min_p": 1.0}, 1, id="min_p=1"),
    # The temperature comes first, and squares the probabilities.
    pytest.param({"temperature": 0.5, "min_p": 0.31}, 2, id="temperature-min_p=0.31"),
    pytest.param({"temperature": 0.5, "min_p": 0.37}, 1, id="temperature-min_p=0.37"),
  ],
)
def test_filter_logits_keeps_the_most_probable_tokens(settings, num_kept):
  logits = filter_logits(jnp.log(jnp.array(PROBABILITIES[None])), make_sampling(**settings), None)
  assert np.isfinite(np.asarray(logits))[0].tolist() == [True] * num_kept + [False] * (4 - num_kept)


def test_filter_logits_penalizes_seen_tokens():
  logits = jnp.array([[-1.0, 2.0, -3.0, 4.0]])
  seen = jnp.array([[True, True, False, False]])
  penalized = filter_logits(logits, make_sampling(repetition_penalty=2.0), seen)
  np.testing.assert_allclose(penalized, [[-2.0, 1.0, -3.0, 4.0]])


def test_sample_token_follows_the_tempered_distribution():
  logits = jnp.tile(jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)), (20_000, 1))
  tokens = sample_token(logits, make_sampling(temperature=0.5), jax.random.split(jax.random.key(0), 20_000), None)
  expected = PROBABILITIES**2 / (PROBABILITIES**2).sum()
  np.testing.assert_allclose(np.bincount(tokens, minlength=4) / 20_000, expected, atol=0.015)

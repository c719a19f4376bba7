"""Cached decoding gives the tokens of the uncached forward; sampling draws what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from llmjax.config import ConfigError
from llmjax.generation import draw, filter_logits, generate, make_sampling, stream, until
from llmjax.models.transformer import Transformer, TransformerConfig
from llmjax.types import Batch

V = 31
CONFIGS = {
  "learned": TransformerConfig(V, 32, 2, 4, 64, init_stddev=0.3),
  "rotary": TransformerConfig(
    *(V, 32, 2, 4, 64), num_kv_heads=2, norm="rmsnorm", norm_bias=False, positions="rotary", gated=True, init_stddev=0.3
  ),
}


@functools.cache
def model_and_params(name, scan=True):
  cfg = CONFIGS[name]
  model = Transformer(cfg)
  return model, nn.unbox(model.init(jax.random.key(0), Batch.from_tokens(np.zeros((1, 4), np.int32))))["params"]


def prompts():
  """Three prompts of 9, 5 and 6 tokens, one padded on the left and one on the right."""
  ids = np.random.default_rng(0).integers(1, V, (3, 9))
  mask = np.ones_like(ids)
  mask[1, :4] = 0
  mask[2, 6:] = 0
  return ids, mask


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_the_uncached_forward_for_prompts_of_any_length(name):
  model, params = model_and_params(name)
  ids, mask = prompts()
  got = np.asarray(generate(model, params, ids, mask, max_new_tokens=10))
  np.testing.assert_array_equal(got[:, :9], ids)
  forward = jax.jit(lambda batch: model.apply({"params": params}, batch).logits)
  for row in range(3):
    tokens = list(ids[row][mask[row] == 1])
    for _ in range(10):
      padded = np.zeros((1, 32), np.int64)
      padded[0, : len(tokens)] = tokens
      logits = forward(Batch.from_tokens(padded, np.arange(32)[None] < len(tokens)))
      tokens.append(int(logits[0, len(tokens) - 1].argmax()))
    assert tokens[-10:] == got[row, 9:].tolist()


def test_streaming_gives_the_same_tokens_and_rows_do_not_depend_on_each_other():
  model, params = model_and_params("rotary")
  ids, mask = prompts()
  how = {"max_new_tokens": 8, "temperature": 1.0, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 5}
  together = np.asarray(generate(model, params, ids, mask, **how))[:, 9:]
  np.testing.assert_array_equal(np.stack(list(stream(model, params, ids, mask, **how)), axis=1), together)
  np.testing.assert_array_equal(np.asarray(generate(model, params, ids[:1], mask[:1], **how))[:, 9:], together[:1])


def test_a_row_ends_at_eos_and_the_others_go_on():
  model, params = model_and_params("learned")
  ids, mask = prompts()
  free = np.asarray(generate(model, params, ids, mask, max_new_tokens=10))[:, 9:]
  eos = int(free[0, 3])
  got = np.asarray(generate(model, params, ids, mask, max_new_tokens=10, eos_id=eos, pad_id=0))[:, 9:]
  for row in range(3):
    end = free[row].tolist().index(eos) + 1 if eos in free[row] else 10
    np.testing.assert_array_equal(got[row, :end], free[row, :end])
    assert not got[row, end:].any()


def test_filters_keep_what_they_say():
  logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
  kept = lambda **how: np.isfinite(np.asarray(filter_logits(logits, make_sampling(**how), None)))[0].tolist()  # noqa: E731
  assert kept(temperature=1.0) == [True] * 4
  assert kept(temperature=1.0, top_k=2) == [True, True, False, False]
  assert kept(temperature=1.0, top_p=0.8) == [True, True, False, False]
  assert kept(temperature=1.0, top_p=0.81) == [True, True, True, False]
  assert kept(temperature=1.0, top_p=0.01) == [True, False, False, False]
  seen = jnp.array([[True, False, False, False]])
  penalised = filter_logits(logits, make_sampling(repetition_penalty=2.0), seen)
  np.testing.assert_allclose(penalised, logits * jnp.array([[2.0, 1, 1, 1]]))


def test_draws_follow_the_tempered_distribution():
  probabilities = np.array([0.5, 0.3, 0.15, 0.05])
  logits = jnp.tile(jnp.log(jnp.asarray(probabilities, jnp.float32)), (20_000, 1))
  tokens = draw(logits, make_sampling(temperature=0.5), jax.random.split(jax.random.key(0), 20_000), None)
  want = probabilities**2 / (probabilities**2).sum()
  np.testing.assert_allclose(np.bincount(tokens, minlength=4) / 20_000, want, atol=0.015)


def test_stop_strings_are_found_across_pieces_and_never_shown():
  assert "".join(until(iter(["ab", "cS", "TO", "x", "ST", "OP", "zz"]), ("STOP",))) == "abcSTOx"
  assert "".join(until(iter(["a\n", "\n", "b"]), ("\n\n", "b"))) == "a"
  assert "".join(until(iter(["no", "ne"]), ())) == "none"


@pytest.mark.parametrize(
  "how, words",
  [
    ({"ids": np.zeros((1, 0), np.int32)}, "L > 0"),
    ({"mask": np.zeros((1, 4), np.int32)}, "empty"),
    ({"max_new_tokens": 100}, "context of 64"),
    ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ({"temperature": -1.0}, "temperature"),
    ({"top_p": 0.0, "temperature": 1.0}, "top_p"),
    ({"top_k": 0, "temperature": 1.0}, "top_k"),
  ],
)
def test_bad_requests_are_refused_in_one_line(how, words):
  model, params = model_and_params("learned")
  with pytest.raises(ConfigError, match=words):
    generate(model, params, **{"ids": np.ones((1, 4), np.int32), **how})

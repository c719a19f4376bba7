"""Cached decoding gives the tokens of the uncached forward; sampling draws what it says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.config.model import TransformerConfig
from llmjax.inference.generation import generate, stream, until
from llmjax.inference.sampling import filter_logits, make_sampling, sample_token
from llmjax.interop.generation_config import read_settings, write_settings
from llmjax.models.transformer import Transformer
from llmjax.types import Batch
from tests.support.cases import parameters

V = 31
PLAIN = {"qkv_bias": False, "mlp_bias": False, "norm": "rmsnorm", "norm_bias": False, "init_stddev": 0.3}
CONFIGS = {
  "learned": TransformerConfig(V, 32, 2, 4, 64, init_stddev=0.3),
  "rotary": TransformerConfig(
    *(V, 32, 2, 4, 64), num_kv_heads=2, norm="rmsnorm", norm_bias=False, positions="rotary", gated=True, init_stddev=0.3
  ),
}
CONFIGS["windowed"] = TransformerConfig(
  V, 32, 3, 4, 64, **PLAIN, positions="rotary", attention_pattern=("local", "global"), window=4
)
CONFIGS["prefix"] = dataclasses.replace(CONFIGS["rotary"], bidirectional_prompt=True)
CONFIGS["encoder–decoder"] = TransformerConfig(
  V, 32, 2, 4, 64, 2, **PLAIN, positions="relative", relative_buckets=8, relative_max_distance=16
)


@functools.cache
def model_and_params(name):
  return Transformer(CONFIGS[name]), parameters(CONFIGS[name])[0]


def prompts():
  """Three prompts of 9, 5 and 6 tokens, one padded on the left and one on the right."""
  ids = np.random.default_rng(0).integers(1, V, (3, 9))
  mask = np.ones_like(ids)
  mask[1, :4] = 0
  mask[2, 6:] = 0
  return ids, mask


DECODERS = ["learned", "rotary", "windowed", "prefix"]


@pytest.mark.parametrize("name", DECODERS)
def test_generate_greedy_equals_the_uncached_forward(name):
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
      batch = Batch.from_tokens(padded, np.arange(32)[None] < len(tokens))
      prefix = jnp.asarray(np.arange(32)[None] < mask[row].sum()) if name == "prefix" else None
      batch = dataclasses.replace(batch, inputs=dataclasses.replace(batch.inputs, prefix=prefix))
      logits = forward(batch)
      tokens.append(int(logits[0, len(tokens) - 1].argmax()))
    assert tokens[-10:] == got[row, 9:].tolist()


def test_generate_with_bidirectional_prompt_sees_all_of_it():
  """The same parameters continue the same prompt otherwise where it is a prefix."""
  ids, mask = prompts()
  outputs = [
    np.asarray(generate(*model_and_params(name), ids, mask, max_new_tokens=10)) for name in ("rotary", "prefix")
  ]
  assert (outputs[0] != outputs[1]).any()


def test_generate_of_encoder_decoder_equals_the_uncached_forward():
  model, params = model_and_params("encoder–decoder")
  ids, mask = prompts()
  got = np.asarray(generate(model, params, ids, mask, max_new_tokens=10, start_id=3))
  assert got.shape == (3, 11) and (got[:, 0] == 3).all()
  forward = jax.jit(lambda batch: model.apply({"params": params}, batch).logits)
  tokens = np.zeros((3, 11), np.int64)
  tokens[:, 0] = 3
  for i in range(10):
    tokens[:, i + 1] = forward(Batch.from_tokens(ids, mask, target_ids=tokens))[:, i].argmax(-1)
  np.testing.assert_array_equal(got, tokens)
  streamed = np.stack(list(stream(model, params, ids, mask, max_new_tokens=10, start_id=3)), axis=1)
  np.testing.assert_array_equal(streamed, got[:, 1:])


def test_generate_with_an_encoder_is_refused():
  cfg = TransformerConfig(V, 32, 0, 4, 64, 2)
  with pytest.raises(ConfigError, match=r"encoder.*llmjax embed"):
    generate(Transformer(cfg), {}, *prompts())


def test_stream_equals_generate_and_rows_are_independent():
  model, params = model_and_params("rotary")
  ids, mask = prompts()
  how = {"max_new_tokens": 8, "temperature": 1.0, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 5}
  together = np.asarray(generate(model, params, ids, mask, **how))[:, 9:]
  np.testing.assert_array_equal(np.stack(list(stream(model, params, ids, mask, **how)), axis=1), together)
  np.testing.assert_array_equal(np.asarray(generate(model, params, ids[:1], mask[:1], **how))[:, 9:], together[:1])


@pytest.mark.parametrize("several", [False, True])
def test_generate_row_stops_at_eos_while_others_continue(several):
  model, params = model_and_params("learned")
  ids, mask = prompts()
  free = np.asarray(generate(model, params, ids, mask, max_new_tokens=10))[:, 9:]
  ends = [int(free[0, 3]), *([int(free[1, 5])] if several else [])]
  eos = tuple(ends) if several else ends[0]
  got = np.asarray(generate(model, params, ids, mask, max_new_tokens=10, eos_id=eos, pad_id=0))[:, 9:]
  for row in range(3):
    end = next((i + 1 for i, token in enumerate(free[row]) if token in ends), 10)
    np.testing.assert_array_equal(got[row, :end], free[row, :end])
    assert not got[row, end:].any()


def test_filter_logits_keeps_top_k_top_p_and_min_p():
  logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
  kept = lambda **how: np.isfinite(np.asarray(filter_logits(logits, make_sampling(**how), None)))[0].tolist()  # noqa: E731
  assert kept(temperature=1.0) == [True] * 4
  assert kept(temperature=1.0, top_k=2) == [True, True, False, False]
  assert kept(temperature=1.0, top_p=0.8) == [True, True, False, False]
  assert kept(temperature=1.0, top_p=0.81) == [True, True, True, False]
  assert kept(temperature=1.0, top_p=0.01) == [True, False, False, False]
  assert kept(temperature=1.0, min_p=0.29) == [True, True, True, False]
  assert kept(temperature=1.0, min_p=0.31) == [True, True, False, False]
  assert kept(temperature=0.5, min_p=0.31) == [True, True, False, False]  # of tempered probabilities, squared here
  assert kept(temperature=0.5, min_p=0.37) == [True, False, False, False]
  assert kept(temperature=1.0, min_p=1.0) == [True, False, False, False]
  seen = jnp.array([[True, False, False, False]])
  penalised = filter_logits(logits, make_sampling(repetition_penalty=2.0), seen)
  np.testing.assert_allclose(penalised, logits * jnp.array([[2.0, 1, 1, 1]]))


def test_draw_follows_the_tempered_distribution():
  probabilities = np.array([0.5, 0.3, 0.15, 0.05])
  logits = jnp.tile(jnp.log(jnp.asarray(probabilities, jnp.float32)), (20_000, 1))
  tokens = sample_token(logits, make_sampling(temperature=0.5), jax.random.split(jax.random.key(0), 20_000), None)
  want = probabilities**2 / (probabilities**2).sum()
  np.testing.assert_allclose(np.bincount(tokens, minlength=4) / 20_000, want, atol=0.015)


def test_stop_strings_across_pieces_are_never_printed():
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
    ({"min_p": 1.1, "temperature": 1.0}, "min_p"),
  ],
)
def test_bad_generation_settings_are_one_line(how, words):
  model, params = model_and_params("learned")
  with pytest.raises(ConfigError, match=words):
    generate(model, params, **{"ids": np.ones((1, 4), np.int32), **how})


T5 = {"is_encoder_decoder": True, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


@pytest.mark.parametrize(
  "generation_config, config, settings",
  [
    ({}, {}, {"temperature": 0.0}),
    ({}, {"eos_token_id": 5, "temperature": 0.7}, {"temperature": 0.0, "eos_id": 5, "pad_id": 5}),
    ({}, T5, {"temperature": 0.0, "eos_id": 1, "pad_id": 0, "start_id": 0}),
    (
      {"max_length": 21, "num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
      T5,
      {
        **{"temperature": 0.0, "eos_id": 1, "pad_id": 0, "start_id": 0, "max_new_tokens": 20},
        **{"num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
      },
    ),
    (
      {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096, "eos_token_id": [7, 9]},
      {"eos_token_id": 7, "pad_token_id": None},
      {"temperature": 0.6, "top_k": 50, "top_p": 0.9, "eos_id": (7, 9), "pad_id": 7},
    ),
    ({"do_sample": True, "top_k": 0, "min_p": 0.1}, {}, {"temperature": 1.0, "top_k": None, "min_p": 0.1}),
    ({"do_sample": False, "top_p": 0.9, "typical_p": 0.5, "length_penalty": 2.0}, {}, {"temperature": 0.0}),
    ({"bos_token_id": 1}, {"num_beams": 4}, {"temperature": 0.0}),
    ({}, {"text_config": {"eos_token_id": 3, "pad_token_id": 4}}, {"temperature": 0.0, "eos_id": 3, "pad_id": 4}),
  ],
)
def test_generation_config_is_read_and_written_as_transformers(generation_config, config, settings):
  assert read_settings(generation_config, config) == settings
  separate = {"is_encoder_decoder": "start_id" in settings}
  assert read_settings(write_settings({**settings, "seed": 3}), separate) == settings


def test_max_length_of_a_decoder_includes_its_prompt():
  assert read_settings({"max_length": 50}, {}, prompt_length=30)["max_new_tokens"] == 20
  both = {"max_length": 50, "max_new_tokens": 7}
  assert read_settings(both, {}, prompt_length=30)["max_new_tokens"] == 7


def test_unsupported_generation_settings_are_named():
  neutral = {"no_repeat_ngram_size": 0, "suppress_tokens": [], "typical_p": 1.0, "forced_bos_token_id": None}
  assert read_settings(neutral, {}) == {"temperature": 0.0}
  with pytest.raises(ConfigError, match="forced_bos_token_id=0, no_repeat_ngram_size=3"):
    read_settings({"no_repeat_ngram_size": 3, "forced_bos_token_id": 0}, {})
  with pytest.raises(ConfigError, match=r"typical_p=0\.5"):
    read_settings({"do_sample": True, "typical_p": 0.5}, {})
  with pytest.raises(ConfigError, match="num_beam_groups=2"):
    read_settings({"num_beams": 4, "num_beam_groups": 2}, {})

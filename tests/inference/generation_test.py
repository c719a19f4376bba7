"""Generation over a cache against the uncached forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.config.model import TransformerConfig
from llmjax.inference.generation import generate, stop_before, stream_tokens
from llmjax.models.transformer import Transformer
from llmjax.types import Batch
from tests.support.decoding_models import VOCAB_SIZE, model_and_params, padded_prompts


@pytest.mark.parametrize("name", ["learned", "rotary", "windowed", "prefix"])
def test_generate_greedy_equals_the_uncached_forward(name):
  model, params = model_and_params(name)
  ids, mask = padded_prompts()
  generated = np.asarray(generate(model, params, ids, mask, max_new_tokens=10))
  np.testing.assert_array_equal(generated[:, :9], ids)
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
    assert tokens[-10:] == generated[row, 9:].tolist()


def test_generate_with_bidirectional_prompt_differs_from_causal():
  ids, mask = padded_prompts()
  outputs = [
    np.asarray(generate(*model_and_params(name), ids, mask, max_new_tokens=10)) for name in ("rotary", "prefix")
  ]
  assert (outputs[0] != outputs[1]).any()


def test_generate_of_encoder_decoder_equals_the_uncached_forward():
  model, params = model_and_params("encoder–decoder")
  ids, mask = padded_prompts()
  generated = np.asarray(generate(model, params, ids, mask, max_new_tokens=10, start_id=3))
  assert generated.shape == (3, 11) and (generated[:, 0] == 3).all()
  forward = jax.jit(lambda batch: model.apply({"params": params}, batch).logits)
  tokens = np.zeros((3, 11), np.int64)
  tokens[:, 0] = 3
  for i in range(10):
    tokens[:, i + 1] = forward(Batch.from_tokens(ids, mask, target_ids=tokens))[:, i].argmax(-1)
  np.testing.assert_array_equal(generated, tokens)


def test_stream_tokens_of_encoder_decoder_equals_generate():
  model, params = model_and_params("encoder–decoder")
  ids, mask = padded_prompts()
  generated = np.asarray(generate(model, params, ids, mask, max_new_tokens=10, start_id=3))
  streamed = np.stack(list(stream_tokens(model, params, ids, mask, max_new_tokens=10, start_id=3)), axis=1)
  np.testing.assert_array_equal(streamed, generated[:, 1:])


def test_generate_with_an_encoder_raises():
  cfg = TransformerConfig(VOCAB_SIZE, 32, 0, 4, 64, 2)
  with pytest.raises(ConfigError, match=r"encoder.*llmjax embed"):
    generate(Transformer(cfg), {}, *padded_prompts())


SAMPLED = {"max_new_tokens": 8, "temperature": 1.0, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 5}


def test_stream_tokens_equals_generate_with_sampling():
  model, params = model_and_params("rotary")
  ids, mask = padded_prompts()
  generated = np.asarray(generate(model, params, ids, mask, **SAMPLED))[:, 9:]
  streamed = np.stack(list(stream_tokens(model, params, ids, mask, **SAMPLED)), axis=1)
  np.testing.assert_array_equal(streamed, generated)


def test_generate_with_sampling_does_not_depend_on_other_rows():
  model, params = model_and_params("rotary")
  ids, mask = padded_prompts()
  together = np.asarray(generate(model, params, ids, mask, **SAMPLED))
  alone = np.asarray(generate(model, params, ids[:1], mask[:1], **SAMPLED))
  np.testing.assert_array_equal(alone, together[:1])


@pytest.mark.parametrize("several", [False, True])
def test_generate_row_stops_at_eos_while_others_continue(several):
  model, params = model_and_params("learned")
  ids, mask = padded_prompts()
  free = np.asarray(generate(model, params, ids, mask, max_new_tokens=10))[:, 9:]
  ends = [int(free[0, 3]), *([int(free[1, 5])] if several else [])]
  eos = tuple(ends) if several else ends[0]
  generated = np.asarray(generate(model, params, ids, mask, max_new_tokens=10, eos_id=eos, pad_id=0))[:, 9:]
  for row in range(3):
    end = next((i + 1 for i, token in enumerate(free[row]) if token in ends), 10)
    np.testing.assert_array_equal(generated[row, :end], free[row, :end])
    assert not generated[row, end:].any()


@pytest.mark.parametrize(
  "pieces, stops, text",
  [
    pytest.param(["ab", "cS", "TO", "x", "ST", "OP", "zz"], ("STOP",), "abcSTOx", id="across pieces"),
    pytest.param(["a\n", "\n", "b"], ("\n\n", "b"), "a", id="first of two"),
    pytest.param(["no", "ne"], (), "none", id="none"),
  ],
)
def test_stop_before_yields_no_part_of_a_stop_string(pieces, stops, text):
  assert "".join(stop_before(iter(pieces), stops)) == text


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
def test_generate_with_bad_settings_raises(how, words):
  model, params = model_and_params("learned")
  with pytest.raises(ConfigError, match=words):
    generate(model, params, **{"ids": np.ones((1, 4), np.int32), **how})

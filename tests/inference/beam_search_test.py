"""Beam search against Transformers, against a reference without a cache, and against all possible texts."""

import functools
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from llmjax.config import ConfigError
from llmjax.inference.decoding import decode_beams
from llmjax.inference.generation import beam_search, generate
from llmjax.types import Batch, Outputs
from tests.support.beam_search_reference import (
  PAD_ID,
  VOCAB_SIZE,
  biased_logits,
  log_softmax,
  reference_beam_search,
)
from tests.support.decoding_models import model_and_params, padded_prompts

STORED = np.load(Path(__file__).parents[1] / "testdata" / "beam_search" / "transformers.npz")
NUM_STORED = sum(key.endswith("/settings") for key in STORED.files)


class TableConfig(NamedTuple):
  stacks: str = "decoder"
  max_len: int = 64
  bidirectional_prompt: bool = False


class Table(nn.Module):
  """A model whose logits are read from a table by the last two tokens; its cache holds the last one."""

  vocabulary: int = VOCAB_SIZE
  cfg: TableConfig = TableConfig()

  def setup(self):
    self.table = self.param("table", nn.initializers.normal(), (self.vocabulary,) * 3)

  @nn.compact
  def __call__(self, batch, *, cache_length=None, logits=True):
    ids = batch.inputs.ids
    last = self.variable("cache", "last", jnp.zeros_like, ids[:, :1])
    hidden = jnp.stack([jnp.concatenate([last.value, ids[:, :-1]], axis=1), ids], axis=-1)
    last.value = ids[:, -1:]
    return Outputs(hidden=hidden, logits=self.unembed(hidden) if logits else None)

  def unembed(self, hidden):
    return self.table[hidden[..., 0], hidden[..., 1]]


@pytest.mark.parametrize("case", range(NUM_STORED))
def test_beam_search_equals_transformers(case):
  names = ("prompts", "mask", "new", "scores")
  prompts, mask, new, scores = (STORED[f"{case}/{name}"] for name in names)
  settings = json.loads(str(STORED[f"{case}/settings"]))
  table = biased_logits(STORED["tables"][settings.pop("table")], settings.pop("bias"), settings["eos_id"])
  got, got_scores = beam_search(
    Table(),
    {"table": jnp.asarray(table)},
    *(prompts, mask),
    **settings,
    pad_id=PAD_ID,
    num_return_sequences=settings["num_beams"],
  )
  np.testing.assert_allclose(got_scores, scores, rtol=2e-5)
  np.testing.assert_array_equal(got[:, 0, : prompts.shape[1]], prompts)
  np.testing.assert_array_equal(got[:, :, prompts.shape[1] :], new)


ENDS = (3, 7, 11, 15)
HOW = [
  {"num_beams": 4, "eos_id": ENDS},
  {"num_beams": 3, "eos_id": ENDS[:1], "length_penalty": 2.0, "early_stopping": "never", "repetition_penalty": 1.3},
]


@functools.cache
def uncached(name):
  """Return a function: tokens (and an encoder-decoder's input) -> Float[V], by a forward pass over 32 tokens."""
  model, params = model_and_params(name)

  @jax.jit
  def forward(ids, length, source=None, mask=None):
    real = (jnp.arange(32) < length)[None]
    batch = Batch.from_tokens(ids, real) if source is None else Batch.from_tokens(source, mask, target_ids=ids)
    return model.apply({"params": params}, batch).logits[0, length - 1]

  def next_logits(tokens, *source):
    ids = np.zeros((1, 32), np.int32)
    ids[0, : len(tokens)] = tokens
    return np.asarray(forward(ids, len(tokens), *source))

  return next_logits


@pytest.mark.parametrize(
  "name, how",
  [
    pytest.param("scanned", HOW[0], id="scanned-0"),
    pytest.param("encoder–decoder", HOW[1], id="encoder–decoder-1"),
    pytest.param("unrolled", HOW[0], id="unrolled-0", marks=pytest.mark.slow),
    pytest.param("periods", HOW[1], id="periods-1", marks=pytest.mark.slow),
    *(
      pytest.param(name, HOW[i], id=f"{name}-{i}", marks=pytest.mark.full("families"))
      for name, i in (("scanned", 1), ("encoder–decoder", 0), ("unrolled", 1), ("periods", 0))
    ),
  ],
)
def test_beam_search_over_a_cache_equals_the_uncached_reference(name, how):
  model, params = model_and_params(name)
  ids, mask = padded_prompts()
  start, separate = 5, name == "encoder–decoder"
  how = {**how, "max_new_tokens": 8}
  beams = how["num_beams"]
  got, scores = beam_search(model, params, ids, mask, **how, num_return_sequences=beams, pad_id=1, start_id=start)
  assert got.shape == (3, beams, 9 if separate else 17)
  for row in range(3):
    source = (ids[row : row + 1], mask[row : row + 1]) if separate else ()
    prompt = [start] if separate else ids[row][mask[row] == 1].tolist()
    want = reference_beam_search(lambda tokens, source=source: uncached(name)(tokens, *source), prompt, **how)
    np.testing.assert_allclose(scores[row], [score for score, _ in want], rtol=1e-4)
    for beam, (_, tokens) in enumerate(want):
      assert got[row, beam, -8:].tolist() == tokens + [1] * (8 - len(tokens))
  best = generate(model, params, ids, mask, **how, pad_id=1, start_id=start)
  np.testing.assert_array_equal(best, got[:, 0])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.5])
def test_beam_search_with_all_beams_finds_the_global_optimum(length_penalty):
  vocabulary, limit, ends = 5, 4, (2, 4)
  model = Table(vocabulary)
  table = np.random.default_rng(1).normal(size=(vocabulary,) * 3).astype(np.float32)
  texts = []
  for tokens in itertools.product(range(vocabulary), repeat=limit):
    end = next((i + 1 for i, token in enumerate(tokens) if token in ends), limit)
    path = [0, 1, *tokens[:end]]
    total = sum(log_softmax(table[a, b])[c] for a, b, c in zip(path, path[1:], path[2:]))
    texts.append((total / end**length_penalty, [*tokens[:end], *[0] * (limit - end)]))
  texts = sorted({tuple(tokens): score for score, tokens in texts}.items(), key=lambda item: -item[1])
  got, scores = beam_search(
    *(model, {"table": jnp.asarray(table)}, np.array([[0, 1]])),
    num_beams=vocabulary**limit,
    num_return_sequences=len(texts) + 1,
    max_new_tokens=limit,
    length_penalty=length_penalty,
    early_stopping="never",
    eos_id=ends,
  )
  np.testing.assert_allclose(scores[0, :-1], [score for _, score in texts], rtol=1e-5)
  np.testing.assert_array_equal(got[0, 0, 2:], texts[0][0])
  assert scores[0, -1] == -np.inf  # more hypotheses than texts


def test_beam_search_row_does_not_depend_on_other_rows():
  ids = np.random.default_rng(2).integers(0, PAD_ID, (16, 2))
  params = {"table": jnp.asarray(biased_logits(STORED["tables"][0], 1.0, (2, 5)))}
  how = {"num_beams": 3, "max_new_tokens": 12, "eos_id": (2, 5), "early_stopping": True, "length_penalty": 2.0}
  together = generate(Table(), params, ids, **how)
  alone = [generate(Table(), params, ids[row : row + 1], **how) for row in range(len(ids))]
  np.testing.assert_array_equal(together, np.concatenate(alone))


def test_beam_search_with_other_penalties_does_not_recompile():
  model, ids = Table(), np.array([[0, 1]])
  params = {"table": jnp.asarray(STORED["tables"][0])}
  sizes = []
  for length_penalty, repetition_penalty in [(1.0, 1.1), (0.5, 1.2)]:
    how = {"length_penalty": length_penalty, "repetition_penalty": repetition_penalty, "early_stopping": "never"}
    beam_search(model, params, ids, num_beams=2, max_new_tokens=3, **how)
    sizes.append(decode_beams._cache_size())
  assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
  "how, words",
  [
    ({"num_beams": 0}, "num_beams=0"),
    ({"temperature": 0.8}, "num_beams=1 to sample"),
    ({"early_stopping": "always"}, '"never"'),
    ({"length_penalty": float("nan")}, "length_penalty"),
    ({"max_new_tokens": 100}, "context of 64"),
  ],
)
def test_beam_search_with_bad_settings_raises(how, words):
  with pytest.raises(ConfigError, match=words):
    generate(Table(), {}, np.ones((1, 4), np.int32), **{"num_beams": 2, **how})


def test_beam_search_returning_more_than_beams_raises():
  with pytest.raises(ConfigError, match=r"num_return_sequences=3.*num_beams=2"):
    beam_search(Table(), {}, np.ones((1, 4), np.int32), num_beams=2, num_return_sequences=3)

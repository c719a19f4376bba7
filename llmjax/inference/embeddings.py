"""Embeddings of texts, which do not depend on the batches, the order of the texts, or the mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from llmjax.checkpoints.sources.base import abstract_params
from llmjax.config import ConfigError, suggest_name
from llmjax.config.mesh import RULES, Rules
from llmjax.config.model import ModelConfig, TransformerConfig
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.distributed import sharding
from llmjax.inference.batches import BATCH_TOKENS, BatchSettings, PlannedBatch, map_batches
from llmjax.objectives.contrastive import POOLINGS, Contrastive, pool_embeddings
from llmjax.objectives.weighted_sum import WeightedSum
from llmjax.trees import Params
from llmjax.types import Array, Batch, Model, Objective, Outputs, Tokens


def embed(
  model: Model,
  params: Params,
  tokenizer: Tokenizer,
  texts: Sequence[str],
  *,
  pooling: str = "mean",
  max_len: int | None = None,
  batch_tokens: int = BATCH_TOKENS,
  mesh: Mesh | None = None,
  rules: Rules = RULES,
) -> Float[np.ndarray, "n D"]:
  """Return an embedding of length 1 for each text, float32.

  Args:
    model: an encoder, a decoder, or an encoder-decoder, of which only the encoder is used.
    params: its parameters.
    tokenizer: its tokenizer.
    texts: n texts.
    pooling: how hidden states become one vector, see `llmjax.objectives.contrastive.pool_embeddings`.
    max_len: maximum number of tokens of a text, including bos and eos; longer texts are truncated at the end. None: the
      model's maximum.
    batch_tokens: maximum of rows times length of a batch, padding included.
    mesh: devices that share the texts, and the parameters by `rules`. None: the devices of the parameters.
    rules: sharding rules of the model.

  Raises:
    ConfigError: a text has no tokens, or the settings do not fit the model.
  """
  settings = BatchSettings(batch_tokens, mesh, rules)
  check_pooling(model.cfg, pooling)
  max_len = model.cfg.max_len if max_len is None else max_len
  if max_len > model.cfg.max_len:
    raise ConfigError(f"max_len={max_len} exceeds the {model.cfg.max_len} tokens that the model reads; lower it")
  if mesh is not None:
    params = jax.device_put(params, jax.tree.map(lambda s: s.sharding, abstract_params(model, mesh, rules)))
  rows = tokenize_texts(tokenizer, texts, max_len)
  return embed_tokens(model, params, rows, pooling, settings)


def check_pooling(cfg: ModelConfig, pooling: str) -> None:
  """Raise ConfigError if a pooling is unknown, or if a model does not support it."""
  if pooling not in POOLINGS:
    raise ConfigError(f"pooling={pooling!r}; {suggest_name(pooling, POOLINGS)}")
  if pooling == "pooler" and isinstance(cfg, TransformerConfig) and not cfg.pooler:
    raise ConfigError("pooling='pooler' needs an encoder with model.pooler=True; set it to 'mean' or 'last'")
  if pooling == "cls" and cfg.stacks == "decoder":
    raise ConfigError(
      "pooling='cls' needs an encoder: the first token of a decoder attends to no other; set it to 'mean' or 'last'"
    )


def tokenize_texts(tokenizer: Tokenizer, texts: Sequence[str], max_len: int) -> list[Int[np.ndarray, " length"]]:
  """Return the tokens of each text as in training: truncated to `max_len`, with bos and eos if the tokenizer has them.

  Raises:
    ConfigError: a text has no tokens, or `max_len` leaves no room for any.
  """
  room = max_len - len(tokenizer.frame(np.zeros(0, np.int32)))
  if room < 1:
    raise ConfigError(f"max_len={max_len} leaves no room for text between bos and eos; raise it")
  rows = [tokenizer.encode(text)[:room] for text in texts]
  for number, row in enumerate(rows):
    if not len(row):
      raise ConfigError(f"text {number} (from 0), {texts[number]!r}, has no tokens, so it has no embedding; remove it")
  return [tokenizer.frame(row) for row in rows]


def embed_tokens(
  model: Model,
  params: Params,
  rows: Sequence[Int[np.ndarray, " length"]],
  pooling: str,
  settings: BatchSettings,
) -> Float[np.ndarray, "n D"]:
  """Return the embeddings of texts that `tokenize_texts` has encoded.

  Args:
    model: see `embed`.
    params: its parameters, on the mesh of `settings`.
    rows: tokens of n texts.
    pooling: see `embed`.
    settings: size of the batches and devices.
  """
  embeddings = np.empty((len(rows), model.cfg.d_model), np.float32)

  def make_batch(planned: PlannedBatch) -> Batch:
    return make_embedding_batch([rows[i] for i in planned.indices], planned.num_rows, planned.length)

  def encode(batch: Batch) -> Array:
    vectors: Array = _encode(model, params, batch, pooling=pooling)
    return vectors

  lengths = np.array([len(row) for row in rows], int)
  for indices, vectors in map_batches(encode, make_batch, lengths, model.cfg.max_len, settings):
    embeddings[indices] = vectors
  return embeddings


@functools.partial(jax.jit, static_argnames=("model", "pooling"))
def _encode(model: Model, params: Params, batch: Batch, *, pooling: str) -> Float[Array, "B D"]:
  """Return the embeddings of a batch, replicated on every device."""
  out: Outputs = model.apply({"params": params}, batch, logits=False)
  hidden = out.hidden if out.encoder_hidden is None else out.encoder_hidden
  vectors = pool_embeddings(dataclasses.replace(out, hidden=hidden), batch.inputs, pooling)
  return sharding.constrain(vectors, None, None)


def make_embedding_batch(rows: Sequence[Int[np.ndarray, " length"]], num_rows: int, length: int) -> Batch:
  """Return a batch of texts, padded on the right and with empty rows at the end.

  Args:
    rows: tokens of each text.
    num_rows: rows of the batch.
    length: tokens of a row.
  """
  ids, segments = np.zeros((2, num_rows, length), np.int32)
  for i, row in enumerate(rows):
    ids[i, : len(row)], segments[i, : len(row)] = row, 1
  positions = np.arange(length, dtype=np.int32) * segments
  zero = np.zeros((num_rows, 1), np.int32)
  # The decoder of an encoder-decoder has to read something, too.
  targets = Tokens(zero, zero, zero + 1)
  return Batch(Tokens(ids, positions, segments), targets, rows=np.arange(num_rows, dtype=np.int32))


def contrastive_objective(objective: Objective) -> Contrastive | None:
  """Return the objective, or its component, that trains embeddings; None if there is none."""
  parts = objective.parts.values() if isinstance(objective, WeightedSum) else [objective]
  return next((part for part in parts if isinstance(part, Contrastive)), None)

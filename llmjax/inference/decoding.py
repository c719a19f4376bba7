"""Decoding over a key/value cache, compiled: prefill, one token at a time, and beam search."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from llmjax.config import ConfigError
from llmjax.inference.beam_search import BeamSettings, beam_search_loop
from llmjax.inference.sampling import Sampling, filter_logits, sample_token
from llmjax.models.layers import row_keys
from llmjax.trees import Params, PyTree
from llmjax.types import Batch, Leaf, Model, Tokens


@struct.dataclass
class DecodingState:
  """The state between two tokens."""

  cache: PyTree  # the model's variables of the collection "cache"
  token: Leaf  # Int[B], the last token sampled, not in the cache yet
  position: Leaf  # Int[B], position of that token
  seen: Leaf  # Bool[B V], tokens that a repetition penalty applies to; None: no penalty
  keys: Leaf  # Key[B]
  count: Leaf  # Int[], tokens sampled


@struct.dataclass
class _BeamMemory:
  """The state of B * K beams between two tokens, `DecodingState` without what beam search itself holds."""

  cache: PyTree
  position: Leaf  # Int[B*K], position of the next token
  seen: Leaf  # Bool[B*K V] or None


def is_encoder_decoder(model: Model) -> bool:
  """Whether the decoder writes a text of its own. Raises ConfigError for an encoder, which writes none."""
  if model.cfg.stacks == "encoder":
    raise ConfigError("the model is an encoder, which generates no text; `llmjax embed` writes its embeddings")
  return bool(model.cfg.stacks == "both")


@functools.partial(jax.jit, static_argnames=("model", "cache_length"))
def prefill(
  model: Model, params: Params, batch: Batch, key: Array, sampling: Sampling, *, cache_length: int
) -> DecodingState:
  """Read the prompts into a fresh cache and sample the first token of every row.

  Args:
    model: a decoder or an encoder-decoder.
    params: its parameters.
    batch: prompts, padded on either side.
    key: random key.
    sampling: settings.
    cache_length: tokens that the cache can hold per row.
  """
  cache, position, seen, logits = _read_prompts(model, params, batch, sampling, cache_length)
  state = DecodingState(cache, position, position, seen, row_keys(key, batch.rows), jnp.zeros((), jnp.int32))
  return _sample_next(state, logits, sampling)


@functools.partial(jax.jit, static_argnames=("model", "cache_length"), donate_argnames="state")
def decode_step(
  model: Model, params: Params, state: DecodingState, sampling: Sampling, *, cache_length: int
) -> DecodingState:
  """Read the last token into the cache and sample the next one."""
  return _decode_step(model, params, state, sampling, cache_length)


@functools.partial(jax.jit, static_argnames=("model", "cache_length", "count", "ends", "pad_id"))
def decode_loop(
  model: Model,
  params: Params,
  state: DecodingState,
  sampling: Sampling,
  *,
  cache_length: int,
  count: int,
  ends: tuple[int, ...],
  pad_id: int,
) -> Int[Array, "B count"]:
  """Return all new tokens; stops early when every row has ended.

  Args:
    model: a decoder or an encoder-decoder.
    params: its parameters.
    state: the state after `prefill`.
    sampling: settings.
    cache_length: tokens that the cache can hold per row.
    count: number of new tokens.
    ends: a row ends after any of these tokens.
    pad_id: the token after the end of a row.
  """

  def has_ended(token: Array) -> Array:
    return jnp.isin(token, jnp.asarray(ends, jnp.int32))

  def is_unfinished(carry: tuple[DecodingState, Array, Array]) -> Array:
    state, _, done = carry
    unfinished: Array = (state.count < count) & ~jnp.all(done)
    return unfinished

  def step(carry: tuple[DecodingState, Array, Array]) -> tuple[DecodingState, Array, Array]:
    state, out, done = carry
    state = _decode_step(model, params, state, sampling, cache_length)
    out = out.at[:, state.count - 1].set(jnp.where(done, pad_id, state.token))
    return state, out, done | has_ended(state.token)

  out = jnp.full((len(state.token), count), pad_id, jnp.int32).at[:, 0].set(state.token)
  tokens: Array = jax.lax.while_loop(is_unfinished, step, (state, out, has_ended(state.token)))[1]
  return tokens


@functools.partial(jax.jit, static_argnames=("model", "cache_length", "max_new_tokens", "pad_id"))
def decode_beams(
  model: Model,
  params: Params,
  batch: Batch,
  sampling: Sampling,
  settings: BeamSettings,
  *,
  cache_length: int,
  max_new_tokens: int,
  pad_id: int,
) -> tuple[Int[Array, "B K T"], Float[Array, "B K"]]:
  """Run beam search over a cache, whose rows are reordered as their beams are.

  Args:
    model: a decoder or an encoder-decoder.
    params: its parameters.
    batch: prompts, padded on either side.
    sampling: of which only the repetition penalty counts.
    settings: settings of beam search.
    cache_length: tokens that the cache can hold per row.
    max_new_tokens: T.
    pad_id: the token after the end of a hypothesis.

  Returns:
    New tokens and scores, see `beam_search_loop`.
  """
  axes = _cache_row_axes(model, params, batch, cache_length)

  def take(cache: PyTree, rows: Array) -> PyTree:
    return jax.tree.map(lambda x, axis: x if axis < 0 else jnp.take(x, rows, axis=axis), cache, axes)

  def log_probs(logits: Array, seen: Array | None) -> Array:
    return filter_logits(jax.nn.log_softmax(logits), sampling, seen)  # in this order, as in Transformers

  def read_tokens(memory: _BeamMemory, tokens: Array, parents: Array) -> tuple[_BeamMemory, Array]:
    position, seen = memory.position, memory.seen
    cache, logits = _read_token(model, params, take(memory.cache, parents), tokens, position, cache_length)
    seen = seen if seen is None else seen[parents].at[jnp.arange(len(tokens)), tokens].set(True)
    return _BeamMemory(cache, position + 1, seen), log_probs(logits, seen)

  cache, position, seen, logits = _read_prompts(model, params, batch, sampling, cache_length)
  rows = jnp.repeat(jnp.arange(len(position)), settings.num_beams)
  memory = _BeamMemory(take(cache, rows), position[rows] + 1, seen if seen is None else seen[rows])
  return beam_search_loop(
    read_tokens, memory, log_probs(logits, seen), settings, max_new_tokens=max_new_tokens, pad_id=pad_id
  )


def _decode_step(
  model: Model, params: Params, state: DecodingState, sampling: Sampling, cache_length: int
) -> DecodingState:
  cache, logits = _read_token(model, params, state.cache, state.token, state.position, cache_length)
  return _sample_next(dataclasses.replace(state, cache=cache), logits, sampling)


def _sample_next(state: DecodingState, logits: Float[Array, "B V"], sampling: Sampling) -> DecodingState:
  """Sample a token from logits and advance the state."""
  keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, state.count)
  token = sample_token(logits, sampling, keys, state.seen)
  seen = state.seen if state.seen is None else state.seen.at[jnp.arange(len(token)), token].set(True)
  return dataclasses.replace(state, token=token, position=state.position + 1, seen=seen, count=state.count + 1)


def _read_prompts(
  model: Model, params: Params, batch: Batch, sampling: Sampling, cache_length: int
) -> tuple[PyTree, Array, Array | None, Array]:
  """Read prompts into a fresh cache.

  Returns:
    The cache, the position Int[B] of the last token of every row, the tokens seen Bool[B V], and the logits
    Float[B V] of the next token.
  """
  tokens: Tokens = batch.inputs if batch.targets is None else batch.targets  # what the decoder continues
  out, variables = model.apply({"params": params}, batch, cache_length=cache_length, logits=False, mutable=["cache"])
  last = tokens.ids.shape[1] - 1 - jnp.argmax(tokens.segments[:, ::-1], axis=1)  # the last real token of a row
  hidden = jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)
  logits: Array = model.apply({"params": params}, hidden, method="unembed")[:, 0]
  seen = None
  if sampling.has_penalty:
    rows = jnp.arange(tokens.ids.shape[0])[:, None]
    ids = jnp.where(tokens.segments > 0, tokens.ids, logits.shape[-1])  # padding is out of range and dropped
    seen = jnp.zeros(logits.shape, bool).at[rows, ids].set(True, mode="drop")
  position = jnp.take_along_axis(tokens.positions, last[:, None], axis=1)[:, 0]
  return variables["cache"], position, seen, logits


def _read_token(
  model: Model, params: Params, cache: PyTree, token: Int[Array, " B"], position: Int[Array, " B"], cache_length: int
) -> tuple[PyTree, Array]:
  """Read one token per row into the cache; return the cache and the logits Float[B V] of the next token."""
  column = Tokens(token[:, None], position[:, None], jnp.ones_like(token)[:, None])
  batch = Batch(inputs=None, targets=column) if is_encoder_decoder(model) else Batch(inputs=column)
  out, variables = model.apply({"params": params, "cache": cache}, batch, cache_length=cache_length, mutable=["cache"])
  return variables["cache"], out.logits[:, 0]


def _cache_row_axes(model: Model, params: Params, batch: Batch, cache_length: int) -> PyTree:
  """Return the axis of the rows of every leaf of the cache: the axis that grows with the batch, or -1."""

  def read(copies: int) -> Mapping[str, PyTree]:
    longer = jax.tree.map(lambda x: jnp.concatenate([x] * copies), batch)
    variables: Mapping[str, PyTree] = model.apply(
      {"params": params}, longer, cache_length=cache_length, logits=False, mutable=["cache"]
    )[1]
    return variables

  def growing_axis(once: jax.ShapeDtypeStruct, twice: jax.ShapeDtypeStruct) -> int:
    return next((axis for axis, (a, b) in enumerate(zip(once.shape, twice.shape)) if a != b), -1)

  return jax.tree.map(growing_axis, *(jax.eval_shape(functools.partial(read, copies))["cache"] for copies in (1, 2)))

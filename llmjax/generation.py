"""Generation: prefill, then one token at a time over the cache. Same tokens as the uncached forward.

A decoder continues its prompt. An encoder–decoder reads the prompt with its encoder, once, and its decoder begins with
`start_id`.

`generate` is one compiled loop that returns when all rows are done; `stream` yields every token as it comes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from llmjax.config import ConfigError
from llmjax.models.layers import row_keys
from llmjax.types import Batch, Tokens


@struct.dataclass
class Sampling:
  """How the next token is drawn from logits. Numbers are traced, so that changing them compiles nothing."""

  temperature: Any  # Float[], > 0
  top_p: Any  # Float[], 1 = off
  repetition_penalty: Any  # Float[], 1 = off
  greedy: bool = struct.field(pytree_node=False)
  top_k: int | None = struct.field(pytree_node=False)
  nucleus: bool = struct.field(pytree_node=False)
  penalise: bool = struct.field(pytree_node=False)


@struct.dataclass
class Decoding:
  """The state between two tokens."""

  cache: Any
  token: Array  # Int[B], the last one drawn, not yet in the cache
  position: Array  # Int[B], of that token
  seen: Array | None  # Bool[B V], tokens that a repetition penalty counts
  keys: Array  # Key[B]
  count: Array  # Int[], tokens drawn


def make_sampling(
  temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, repetition_penalty: float = 1.0
) -> Sampling:
  """Checked sampling settings; temperature 0 is greedy.

  Raises:
    ConfigError: a value out of range.
  """
  if not 0 <= temperature < math.inf:
    raise ConfigError(f"temperature={temperature} must be a number that is not negative; 0 is greedy")
  if top_k is not None and top_k < 1:
    raise ConfigError(f"top_k={top_k} must be at least 1")
  if top_p is not None and not 0 < top_p <= 1:
    raise ConfigError(f"top_p={top_p} must be in (0, 1]")
  if not 0 < repetition_penalty < math.inf:
    raise ConfigError(f"repetition_penalty={repetition_penalty} must be positive; 1 is none")
  return Sampling(
    temperature=np.float32(temperature or 1.0),
    top_p=np.float32(1.0 if top_p is None else top_p),
    repetition_penalty=np.float32(repetition_penalty),
    greedy=temperature == 0,
    top_k=top_k,
    nucleus=top_p is not None and top_p < 1,
    penalise=repetition_penalty != 1.0,
  )


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling, seen: Bool[Array, "B V"] | None) -> Array:
  """Logits after repetition penalty, temperature, top-k and top-p, in this order; what is ruled out is -inf.

  The penalty divides positive logits of seen tokens and multiplies negative ones (Keskar et al. 2019); top-p keeps
  the smallest set of tokens whose probability reaches p (Holtzman et al. 2020).
  """
  if seen is not None:
    penalised = jnp.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
    logits = jnp.where(seen, penalised, logits)
  if sampling.greedy:
    return logits
  logits = logits / sampling.temperature
  if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if sampling.nucleus:
    order = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(order, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # the mass of all likelier tokens
    least = jnp.min(jnp.where(before < sampling.top_p, order, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return logits


def draw(
  logits: Float[Array, "B V"], sampling: Sampling, keys: Key[Array, " B"], seen: Bool[Array, "B V"] | None
) -> Int[Array, " B"]:
  """The next token of every row, each with a key of its own."""
  logits = filter_logits(logits, sampling, seen)
  if sampling.greedy:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _next(model: nn.Module, params: Any, state: Decoding, logits: Array, sampling: Sampling) -> Decoding:
  """Draws a token from `logits` [B V] and advances the state."""
  keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, state.count)
  token = draw(logits, sampling, keys, state.seen)
  seen = state.seen if state.seen is None else state.seen.at[jnp.arange(len(token)), token].set(True)
  return dataclasses.replace(state, token=token, position=state.position + 1, seen=seen, count=state.count + 1)


@functools.partial(jax.jit, static_argnames=("model", "cache_length"))
def prefill(
  model: nn.Module, params: Any, batch: Batch, key: Array, sampling: Sampling, *, cache_length: int
) -> Decoding:
  """Reads the prompts (padding on either side) into a fresh cache and draws the first token of every row."""
  tokens = _read(batch)
  out, variables = model.apply({"params": params}, batch, cache_length=cache_length, logits=False, mutable=["cache"])
  last = tokens.ids.shape[1] - 1 - jnp.argmax(tokens.segments[:, ::-1], axis=1)  # the last real token of a row
  hidden = jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)
  logits = cast(Array, model.apply({"params": params}, hidden, method="unembed"))[:, 0]
  seen = None
  if sampling.penalise:
    rows = jnp.arange(tokens.ids.shape[0])[:, None]
    ids = jnp.where(tokens.segments > 0, tokens.ids, logits.shape[-1])  # padding falls outside and is dropped
    seen = jnp.zeros(logits.shape, bool).at[rows, ids].set(True, mode="drop")
  position = jnp.take_along_axis(tokens.positions, last[:, None], axis=1)[:, 0]
  state = Decoding(variables["cache"], last, position, seen, row_keys(key, batch.rows), jnp.zeros((), jnp.int32))
  return _next(model, params, state, logits, sampling)


def _decode(model: nn.Module, params: Any, state: Decoding, sampling: Sampling, cache_length: int) -> Decoding:
  column = Tokens(state.token[:, None], state.position[:, None], jnp.ones_like(state.token)[:, None])
  batch = Batch(inputs=None, targets=column) if _is_encoder_decoder(model) else Batch(inputs=column)
  out, variables = model.apply(
    {"params": params, "cache": state.cache}, batch, cache_length=cache_length, mutable=["cache"]
  )
  return _next(model, params, dataclasses.replace(state, cache=variables["cache"]), out.logits[:, 0], sampling)


@functools.partial(jax.jit, static_argnames=("model", "cache_length"), donate_argnames="state")
def decode(model: nn.Module, params: Any, state: Decoding, sampling: Sampling, *, cache_length: int) -> Decoding:
  """Puts the last token into the cache and draws the next."""
  return _decode(model, params, state, sampling, cache_length)


@functools.partial(jax.jit, static_argnames=("model", "cache_length", "count", "eos_id", "pad_id"))
def _loop(
  model: nn.Module,
  params: Any,
  state: Decoding,
  sampling: Sampling,
  *,
  cache_length: int,
  count: int,
  eos_id: int | None,
  pad_id: int,
) -> Int[Array, "B count"]:
  """All tokens after the first; stops early when every row has ended."""

  def ended(token):
    return jnp.zeros(token.shape, bool) if eos_id is None else token == eos_id

  def more(carry):
    state, _, done = carry
    return (state.count < count) & ~jnp.all(done)

  def step(carry):
    state, out, done = carry
    state = _decode(model, params, state, sampling, cache_length)
    out = out.at[:, state.count - 1].set(jnp.where(done, pad_id, state.token))
    return state, out, done | ended(state.token)

  out = jnp.full((len(state.token), count), pad_id, jnp.int32).at[:, 0].set(state.token)
  return jax.lax.while_loop(more, step, (state, out, ended(state.token)))[1]


def _is_encoder_decoder(model: Any) -> bool:
  """Raises ConfigError for an encoder."""
  if model.cfg.stacks == "encoder":
    raise ConfigError("the model is an encoder, which writes no text; `llmjax embed` gives its vectors")
  return model.cfg.stacks == "both"


def _read(batch: Batch) -> Tokens:
  """The tokens that the decoder continues."""
  return batch.inputs if batch.targets is None else batch.targets


def _prepare(model: Any, ids: Any, mask: Any, max_new_tokens: int, start_id: int) -> tuple[Batch, int]:
  """The prompt, padded on the left to a power of two so that few lengths compile, and the cache's length."""
  both = _is_encoder_decoder(model)
  ids = np.asarray(ids, np.int32)
  mask = np.ones_like(ids) if mask is None else np.asarray(mask, np.int32)
  if ids.ndim != 2 or mask.shape != ids.shape or not ids.size:
    raise ConfigError(
      f"prompt ids must be [B, L] with L > 0 and a mask of the same shape, got {ids.shape}, {mask.shape}"
    )
  if not mask.any(axis=1).all():
    raise ConfigError(f"prompt {int(np.argmin(mask.any(axis=1)))} is empty; give at least one token (such as BOS)")
  if max_new_tokens < 1:
    raise ConfigError(f"max_new_tokens={max_new_tokens} must be at least 1")
  longest, context = int(mask.sum(axis=1).max()), model.cfg.max_len
  if max(longest, 1 + max_new_tokens) > context if both else longest + max_new_tokens > context:
    raise ConfigError(
      f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's context of {context}; "
      "shorten one of them"
    )
  extra = (1 << (ids.shape[1] - 1).bit_length()) - ids.shape[1]
  ids, mask = (np.pad(x, ((0, 0), (extra, 0))) for x in (ids, mask))
  if both:
    start = np.full((len(ids), 1), start_id, np.int32)
    return Batch.from_tokens(ids, mask, target_ids=start), 1 + max_new_tokens
  batch = Batch.from_tokens(ids, mask)
  if model.cfg.bidirectional_prompt:
    batch = dataclasses.replace(batch, inputs=dataclasses.replace(batch.inputs, prefix=batch.inputs.segments))
  return batch, ids.shape[1] + max_new_tokens


def encode_prompt(model: Any, tokenizer: Any, text: str) -> np.ndarray:
  """Int32[n]: a prompt as the model has learned to read it.

  A decoder gets the beginning of a document. An encoder gets a text and its end, in which <extra_id_0>, <extra_id_1>,
  ... stand for the spans to be written.
  """
  if not _is_encoder_decoder(model):
    return tokenizer.prompt(text)
  end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
  return np.append(tokenizer.parse(text), end).astype(np.int32)


def generate(
  model: nn.Module,
  params: Any,
  ids: Int[Any, "B L"],
  mask: Int[Any, "B L"] | None = None,
  *,
  max_new_tokens: int = 20,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  repetition_penalty: float = 1.0,
  eos_id: int | None = None,
  pad_id: int = 0,
  start_id: int = 0,
  seed: int = 0,
) -> Int[Array, "B out"]:
  """Prompts and their continuations, [B, L + max_new_tokens]; of an encoder–decoder what its decoder reads and writes,
  [B, 1 + max_new_tokens].

  Args:
    ids: prompts; `mask` is 1 where a token is real, padding on either side, lengths may differ.
    temperature: 0 is greedy.
    eos_id: a row ends after this token; `pad_id` fills what follows.
    start_id: what the decoder of an encoder–decoder begins with: the tokenizer's `pad_id`, as T5 has it.
    seed: of the sampling; every row has randomness of its own, whatever else is in the batch.
  Raises:
    ConfigError: an empty prompt, or more tokens than the model's context holds.
  """
  sampling = make_sampling(temperature, top_k, top_p, repetition_penalty)
  batch, cache_length = _prepare(model, ids, mask, max_new_tokens, start_id)
  state = prefill(model, params, batch, jax.random.key(seed), sampling, cache_length=cache_length)
  new = _loop(
    model, params, state, sampling, cache_length=cache_length, count=max_new_tokens, eos_id=eos_id, pad_id=pad_id
  )
  before = jnp.asarray(ids, jnp.int32) if batch.targets is None else batch.targets.ids
  return jnp.concatenate([before, new], axis=1)


def stream(
  model: nn.Module,
  params: Any,
  ids: Int[Any, "B L"],
  mask: Int[Any, "B L"] | None = None,
  *,
  max_new_tokens: int = 20,
  start_id: int = 0,
  seed: int = 0,
  **sampling: Any,
) -> Iterator[np.ndarray]:
  """The tokens of `generate`, each Int[B], as they are drawn; the caller stops when it has enough."""
  settings = make_sampling(**sampling)
  batch, cache_length = _prepare(model, ids, mask, max_new_tokens, start_id)
  state = prefill(model, params, batch, jax.random.key(seed), settings, cache_length=cache_length)
  for i in range(max_new_tokens):
    if i:
      state = decode(model, params, state, settings, cache_length=cache_length)
    yield np.asarray(state.token)


def until(pieces: Iterator[str], stops: tuple[str, ...]) -> Iterator[str]:
  """Passes text on until a stop string appears; never emits a part of one."""
  held = ""
  for piece in pieces:
    held += piece
    ends = [held.index(s) for s in stops if s in held]
    if ends:
      yield held[: min(ends)]
      return
    keep = max((n for s in stops for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
    yield held[: len(held) - keep]
    held = held[len(held) - keep :]
  yield held

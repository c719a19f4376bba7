"""Generation: prefill, then one token at a time over the cache. Same tokens as the uncached forward.

A decoder continues its prompt. An encoder–decoder reads the prompt with its encoder, once, and its decoder begins with
`start_id`.

`generate` is one compiled loop that returns when all rows are done; `stream` yields every token as it comes.
`beam_search` looks for the likeliest continuations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from llmjax.config import ConfigError
from llmjax.inference import beam_search as beams
from llmjax.inference.sampling import Sampling, filter_logits, make_sampling, sample_token
from llmjax.models.layers import row_keys
from llmjax.types import Batch, Model, Tokens


@struct.dataclass
class Decoding:
  """The state between two tokens."""

  cache: Any
  token: Array  # Int[B], the last one drawn, not yet in the cache
  position: Array  # Int[B], of that token
  seen: Array | None  # Bool[B V], tokens that a repetition penalty counts
  keys: Array  # Key[B]
  count: Array  # Int[], tokens drawn


def _next(state: Decoding, logits: Array, sampling: Sampling) -> Decoding:
  """Draws a token from `logits` [B V] and advances the state."""
  keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, state.count)
  token = sample_token(logits, sampling, keys, state.seen)
  seen = state.seen if state.seen is None else state.seen.at[jnp.arange(len(token)), token].set(True)
  return dataclasses.replace(state, token=token, position=state.position + 1, seen=seen, count=state.count + 1)


def _read_prompts(
  model: Model, params: Any, batch: Batch, sampling: Sampling, cache_length: int
) -> tuple[Any, Array, Array | None, Array]:
  """Prompts (padding on either side) into a fresh cache: that, the position Int[B] of the last token of every row, the
  tokens seen Bool[B V] and the logits Float[B V] of the next."""
  tokens = _continued(batch)
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
  return variables["cache"], position, seen, logits


def _read_token(
  model: Model, params: Any, cache: Any, token: Array, position: Array, cache_length: int
) -> tuple[Any, Array]:
  """A token [B] at its position [B] into the cache: that and the logits Float[B V] of the next."""
  column = Tokens(token[:, None], position[:, None], jnp.ones_like(token)[:, None])
  batch = Batch(inputs=None, targets=column) if _is_encoder_decoder(model) else Batch(inputs=column)
  out, variables = model.apply({"params": params, "cache": cache}, batch, cache_length=cache_length, mutable=["cache"])
  return variables["cache"], out.logits[:, 0]


@functools.partial(jax.jit, static_argnames=("model", "cache_length"))
def prefill(
  model: Model, params: Any, batch: Batch, key: Array, sampling: Sampling, *, cache_length: int
) -> Decoding:
  """Reads the prompts into a fresh cache and draws the first token of every row."""
  cache, position, seen, logits = _read_prompts(model, params, batch, sampling, cache_length)
  state = Decoding(cache, position, position, seen, row_keys(key, batch.rows), jnp.zeros((), jnp.int32))
  return _next(state, logits, sampling)


def _decode(model: Model, params: Any, state: Decoding, sampling: Sampling, cache_length: int) -> Decoding:
  cache, logits = _read_token(model, params, state.cache, state.token, state.position, cache_length)
  return _next(dataclasses.replace(state, cache=cache), logits, sampling)


@functools.partial(jax.jit, static_argnames=("model", "cache_length"), donate_argnames="state")
def decode(model: Model, params: Any, state: Decoding, sampling: Sampling, *, cache_length: int) -> Decoding:
  """Puts the last token into the cache and draws the next."""
  return _decode(model, params, state, sampling, cache_length)


@functools.partial(jax.jit, static_argnames=("model", "cache_length", "count", "ends", "pad_id"))
def _loop(
  model: Model,
  params: Any,
  state: Decoding,
  sampling: Sampling,
  *,
  cache_length: int,
  count: int,
  ends: tuple[int, ...],
  pad_id: int,
) -> Int[Array, "B count"]:
  """All tokens after the first; stops early when every row has ended."""

  def ended(token):
    return jnp.isin(token, jnp.asarray(ends, jnp.int32))

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


def _row_axes(model: Model, params: Any, batch: Batch, cache_length: int) -> Any:
  """The axis of every leaf of the cache that counts rows, -1 where none does: the one that more rows make longer."""

  def cache(copies: int) -> Any:
    longer = jax.tree.map(lambda x: jnp.concatenate([x] * copies), batch)
    return model.apply({"params": params}, longer, cache_length=cache_length, logits=False, mutable=["cache"])[1]

  def longer_axis(once: jax.ShapeDtypeStruct, twice: jax.ShapeDtypeStruct) -> int:
    return next((axis for axis, (a, b) in enumerate(zip(once.shape, twice.shape)) if a != b), -1)

  return jax.tree.map(longer_axis, *(jax.eval_shape(functools.partial(cache, copies))["cache"] for copies in (1, 2)))


@functools.partial(jax.jit, static_argnames=("model", "cache_length", "max_new_tokens", "pad_id"))
def _search(
  model: Model,
  params: Any,
  batch: Batch,
  sampling: Sampling,
  settings: beams.BeamSettings,
  *,
  cache_length: int,
  max_new_tokens: int,
  pad_id: int,
) -> tuple[Int[Array, "B K new"], Float[Array, "B K"]]:
  """Beam search over the cache, whose rows follow their beams."""
  axes = _row_axes(model, params, batch, cache_length)

  def take(cache: Any, rows: Array) -> Any:
    return jax.tree.map(lambda x, axis: x if axis < 0 else jnp.take(x, rows, axis=axis), cache, axes)

  def log_probs(logits: Array, seen: Array | None) -> Array:
    return filter_logits(jax.nn.log_softmax(logits), sampling, seen)  # in this order, as Transformers has it

  def read(memory, tokens, parents):
    cache, position, seen = memory
    cache, logits = _read_token(model, params, take(cache, parents), tokens, position, cache_length)
    seen = seen if seen is None else seen[parents].at[jnp.arange(len(tokens)), tokens].set(True)
    return (cache, position + 1, seen), log_probs(logits, seen)

  cache, position, seen, logits = _read_prompts(model, params, batch, sampling, cache_length)
  each = jnp.repeat(jnp.arange(len(position)), settings.num_beams)
  memory = (take(cache, each), position[each] + 1, seen if seen is None else seen[each])
  return beams.beam_search_loop(
    read, memory, log_probs(logits, seen), settings, max_new_tokens=max_new_tokens, pad_id=pad_id
  )


def _is_encoder_decoder(model: Any) -> bool:
  """Raises ConfigError for an encoder."""
  if model.cfg.stacks == "encoder":
    raise ConfigError("the model is an encoder, which writes no text; `llmjax embed` gives its vectors")
  return model.cfg.stacks == "both"


def _continued(batch: Batch) -> Tokens:
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


def _ends(eos_id: int | Sequence[int] | None) -> tuple[int, ...]:
  return () if eos_id is None else tuple(np.atleast_1d(eos_id).tolist())


def generate(
  model: Model,
  params: Any,
  ids: Int[Any, "B L"],
  mask: Int[Any, "B L"] | None = None,
  *,
  max_new_tokens: int = 20,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float = 0.0,
  repetition_penalty: float = 1.0,
  num_beams: int = 1,
  length_penalty: float = 1.0,
  early_stopping: bool | str = False,
  eos_id: int | Sequence[int] | None = None,
  pad_id: int = 0,
  start_id: int = 0,
  seed: int = 0,
) -> Int[Array, "B out"]:
  """Prompts and their continuations, [B, L + max_new_tokens]; of an encoder–decoder what its decoder reads and writes,
  [B, 1 + max_new_tokens].

  Args:
    ids: prompts; `mask` is 1 where a token is real, padding on either side, lengths may differ.
    temperature: 0 is greedy.
    num_beams: more than 1 is the best that `beam_search` finds, with `length_penalty` and `early_stopping`.
    eos_id: a row ends after this token, or any of these; `pad_id` fills what follows.
    start_id: what the decoder of an encoder–decoder begins with: the tokenizer's `pad_id`, as T5 has it.
    seed: of the sampling; every row has randomness of its own, whatever else is in the batch.
  Raises:
    ConfigError: an empty prompt, or more tokens than the model's context holds.
  """
  sampling = make_sampling(temperature, top_k, top_p, repetition_penalty, min_p)
  if num_beams != 1:
    if temperature:
      raise ConfigError(
        f"num_beams={num_beams} with temperature={temperature}: beam search draws nothing; set temperature=0, or "
        "num_beams=1 to sample"
      )
    found, _ = beam_search(
      model,
      params,
      ids,
      mask,
      num_beams=num_beams,
      max_new_tokens=max_new_tokens,
      length_penalty=length_penalty,
      early_stopping=early_stopping,
      repetition_penalty=repetition_penalty,
      eos_id=eos_id,
      pad_id=pad_id,
      start_id=start_id,
    )
    return found[:, 0]
  batch, cache_length = _prepare(model, ids, mask, max_new_tokens, start_id)
  state = prefill(model, params, batch, jax.random.key(seed), sampling, cache_length=cache_length)
  new = _loop(
    model, params, state, sampling, cache_length=cache_length, count=max_new_tokens, ends=_ends(eos_id), pad_id=pad_id
  )
  before = jnp.asarray(ids, jnp.int32) if batch.targets is None else batch.targets.ids
  return jnp.concatenate([before, new], axis=1)


def beam_search(
  model: Model,
  params: Any,
  ids: Int[Any, "B L"],
  mask: Int[Any, "B L"] | None = None,
  *,
  num_beams: int,
  num_return_sequences: int = 1,
  max_new_tokens: int = 20,
  length_penalty: float = 1.0,
  early_stopping: bool | str = False,
  repetition_penalty: float = 1.0,
  eos_id: int | Sequence[int] | None = None,
  pad_id: int = 0,
  start_id: int = 0,
) -> tuple[Int[Array, "B R out"], Float[Array, "B R"]]:
  """The best continuations that beam search finds, best first, as `generate` returns them, and their scores.

  A score is the sum of the log-probabilities of the new tokens, the end token among them, over their number to the
  power of `length_penalty`. Results are those of Transformers 5 (`do_sample=False`), which also says when to stop.

  Args:
    num_beams: K, hypotheses that are continued at a time; the first R = `num_return_sequences` are returned.
    length_penalty: above 0 favours long continuations.
    early_stopping: True stops a row as soon as K continuations have ended; False when the best live one would be worse
      than all of them if it ended now; "never" when it would be so at whatever length is worth most.
    repetition_penalty: of the log-probabilities of tokens seen, which no longer sum to 1 then.
  Raises:
    ConfigError: as `generate`.
  """
  settings = beams.make_settings(num_beams, length_penalty, early_stopping, _ends(eos_id))
  if not 1 <= num_return_sequences <= num_beams:
    raise ConfigError(f"num_return_sequences={num_return_sequences} must be from 1 to num_beams={num_beams}")
  sampling = make_sampling(repetition_penalty=repetition_penalty)
  batch, cache_length = _prepare(model, ids, mask, max_new_tokens, start_id)
  lengths = {"cache_length": cache_length, "max_new_tokens": max_new_tokens}
  new, scores = _search(model, params, batch, sampling, settings, **lengths, pad_id=pad_id)
  before = jnp.asarray(ids, jnp.int32) if batch.targets is None else batch.targets.ids
  before = jnp.broadcast_to(before[:, None], (*new.shape[:2], before.shape[1]))
  return jnp.concatenate([before, new], axis=2)[:, :num_return_sequences], scores[:, :num_return_sequences]


def stream(
  model: Model,
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

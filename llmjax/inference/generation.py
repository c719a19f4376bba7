"""Generation of text: `generate`, `beam_search` and `stream_tokens`. All give the tokens of the uncached forward pass.

A decoder continues its prompt. An encoder-decoder reads the prompt once with its encoder, and its decoder begins with
`start_id`. `generate` is one compiled loop, which ends when all rows have ended; `stream_tokens` yields each token as
soon as it is sampled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from llmjax.config import ConfigError
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.inference.beam_search import EarlyStopping, make_beam_settings
from llmjax.inference.decoding import decode_beams, decode_loop, decode_step, is_encoder_decoder, prefill
from llmjax.inference.sampling import make_sampling
from llmjax.trees import Params
from llmjax.types import Batch, Model


def encode_prompt(model: Model, tokenizer: Tokenizer, text: str) -> Int[np.ndarray, " n"]:
  """Return the ids of a prompt in the form that the model was trained on.

  A decoder gets the beginning of a document. An encoder-decoder gets a whole text with its end token, in which
  <extra_id_0>, <extra_id_1>, ... stand for the spans to be written.
  """
  if not is_encoder_decoder(model):
    return tokenizer.prompt(text)
  end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
  return np.append(tokenizer.parse(text), end).astype(np.int32)


def end_token_ids(eos_id: int | Sequence[int] | None) -> tuple[int, ...]:
  """Return the end tokens that None, one id or several ids stand for."""
  return () if eos_id is None else tuple(np.atleast_1d(eos_id).tolist())


def generate(
  model: Model,
  params: Params,
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
  early_stopping: EarlyStopping = False,
  eos_id: int | Sequence[int] | None = None,
  pad_id: int = 0,
  start_id: int = 0,
  seed: int = 0,
) -> Int[Array, "B out"]:
  """Generate a continuation of every prompt.

  Args:
    model: a decoder or an encoder-decoder.
    params: its parameters.
    ids: prompts, which may differ in length.
    mask: 1 for tokens, 0 for padding on either side. None: no padding.
    max_new_tokens: maximum number of new tokens.
    temperature: divides the logits, 0: greedy decoding.
    top_k: see `make_sampling`.
    top_p: see `make_sampling`.
    min_p: see `make_sampling`.
    repetition_penalty: see `make_sampling`.
    num_beams: if more than 1, return the best hypothesis of `beam_search`.
    length_penalty: see `beam_search`.
    early_stopping: see `beam_search`.
    eos_id: a row ends after this token, or after any of these tokens.
    pad_id: the token after the end of a row.
    start_id: first token of an encoder-decoder's decoder. T5 uses the tokenizer's `pad_id`.
    seed: seed of the sampling. Each row has its own random key, so it does not depend on the other rows.

  Returns:
    Prompts and continuations, [B, L + max_new_tokens]. For an encoder-decoder the decoder's tokens,
    [B, 1 + max_new_tokens].

  Raises:
    ConfigError: a prompt is empty, the tokens exceed the model's context, or a setting is out of range.
  """
  sampling = make_sampling(temperature, top_k, top_p, repetition_penalty, min_p)
  if num_beams != 1:
    if temperature:
      raise ConfigError(
        f"num_beams={num_beams} with temperature={temperature}: beam search does not sample; set temperature=0, or "
        "num_beams=1 to sample"
      )
    tokens, _ = beam_search(
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
    return tokens[:, 0]
  batch, cache_length = _prompt_batch(model, ids, mask, max_new_tokens, start_id)
  state = prefill(model, params, batch, jax.random.key(seed), sampling, cache_length=cache_length)
  ends = end_token_ids(eos_id)
  new = decode_loop(
    model, params, state, sampling, cache_length=cache_length, count=max_new_tokens, ends=ends, pad_id=pad_id
  )
  before = jnp.asarray(ids, jnp.int32) if batch.targets is None else batch.targets.ids
  return jnp.concatenate([before, new], axis=1)


def beam_search(
  model: Model,
  params: Params,
  ids: Int[Any, "B L"],
  mask: Int[Any, "B L"] | None = None,
  *,
  num_beams: int,
  num_return_sequences: int = 1,
  max_new_tokens: int = 20,
  length_penalty: float = 1.0,
  early_stopping: EarlyStopping = False,
  repetition_penalty: float = 1.0,
  eos_id: int | Sequence[int] | None = None,
  pad_id: int = 0,
  start_id: int = 0,
) -> tuple[Int[Array, "B R out"], Float[Array, "B R"]]:
  """Generate the R best continuations of every prompt that beam search finds, in descending order of their scores.

  A score is the sum of the log-probabilities of the new tokens, including the end token, divided by their number to
  the power of `length_penalty`. Results equal those of Transformers 5 with `do_sample=False`.

  Args:
    model: a decoder or an encoder-decoder.
    params: its parameters.
    ids: prompts, which may differ in length.
    mask: 1 for tokens, 0 for padding on either side. None: no padding.
    num_beams: K, hypotheses that are continued at a time.
    num_return_sequences: R, at most K.
    max_new_tokens: maximum number of new tokens.
    length_penalty: values above 0 favour long continuations.
    early_stopping: True: a row stops as soon as K hypotheses have ended. False: it stops when the best live hypothesis
      would score less than all of them if it ended now. "never": when it would score less at any length.
    repetition_penalty: factor for the log-probabilities of tokens seen, which then no longer sum to 1.
    eos_id: a hypothesis ends after this token, or after any of these tokens.
    pad_id: the token after the end of a hypothesis.
    start_id: first token of an encoder-decoder's decoder.

  Returns:
    Tokens as `generate` returns them, for each of the R continuations; and their scores, -inf if there are fewer.

  Raises:
    ConfigError: as `generate`.
  """
  settings = make_beam_settings(num_beams, length_penalty, early_stopping, end_token_ids(eos_id))
  if not 1 <= num_return_sequences <= num_beams:
    raise ConfigError(f"num_return_sequences={num_return_sequences} must be from 1 to num_beams={num_beams}")
  sampling = make_sampling(repetition_penalty=repetition_penalty)
  batch, cache_length = _prompt_batch(model, ids, mask, max_new_tokens, start_id)
  new, scores = decode_beams(
    model, params, batch, sampling, settings, cache_length=cache_length, max_new_tokens=max_new_tokens, pad_id=pad_id
  )
  before = jnp.asarray(ids, jnp.int32) if batch.targets is None else batch.targets.ids
  before = jnp.broadcast_to(before[:, None], (*new.shape[:2], before.shape[1]))
  return jnp.concatenate([before, new], axis=2)[:, :num_return_sequences], scores[:, :num_return_sequences]


def stream_tokens(
  model: Model,
  params: Params,
  ids: Int[Any, "B L"],
  mask: Int[Any, "B L"] | None = None,
  *,
  max_new_tokens: int = 20,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float = 0.0,
  repetition_penalty: float = 1.0,
  start_id: int = 0,
  seed: int = 0,
) -> Iterator[Int[np.ndarray, " B"]]:
  """Yield the next token of every row as soon as it is sampled: the new tokens of `generate`, without an end token.

  The caller stops iterating when it has enough. Arguments are those of `generate`.
  """
  sampling = make_sampling(temperature, top_k, top_p, repetition_penalty, min_p)
  batch, cache_length = _prompt_batch(model, ids, mask, max_new_tokens, start_id)
  state = prefill(model, params, batch, jax.random.key(seed), sampling, cache_length=cache_length)
  for i in range(max_new_tokens):
    if i:
      state = decode_step(model, params, state, sampling, cache_length=cache_length)
    yield np.asarray(state.token)


def stop_before(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
  """Yield pieces of text up to the first stop string, of which no part is yielded.

  Args:
    pieces: a text in pieces; a stop string may span several.
    stops: none of them empty.
  """
  pending = ""
  for piece in pieces:
    pending += piece
    ends = [pending.index(stop) for stop in stops if stop in pending]
    if ends:
      yield pending[: min(ends)]
      return
    # Hold back the longest end that may be the beginning of a stop string.
    held = max((n for stop in stops for n in range(1, len(stop)) if pending.endswith(stop[:n])), default=0)
    yield pending[: len(pending) - held]
    pending = pending[len(pending) - held :]
  yield pending


def _prompt_batch(
  model: Model, ids: ArrayLike, mask: ArrayLike | None, max_new_tokens: int, start_id: int
) -> tuple[Batch, int]:
  """Return the prompts as a batch, and the number of tokens that the cache has to hold.

  Prompts are padded on the left to a power of two, so that few lengths are compiled.
  """
  is_separate = is_encoder_decoder(model)
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
  if max(longest, 1 + max_new_tokens) > context if is_separate else longest + max_new_tokens > context:
    raise ConfigError(
      f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's context of {context}; "
      "shorten one of them"
    )
  extra = (1 << (ids.shape[1] - 1).bit_length()) - ids.shape[1]
  ids, mask = (np.pad(x, ((0, 0), (extra, 0))) for x in (ids, mask))
  if is_separate:
    start = np.full((len(ids), 1), start_id, np.int32)
    return Batch.from_tokens(ids, mask, target_ids=start), 1 + max_new_tokens
  batch = Batch.from_tokens(ids, mask)
  if model.cfg.bidirectional_prompt:
    batch = dataclasses.replace(batch, inputs=dataclasses.replace(batch.inputs, prefix=batch.inputs.segments))
  return batch, ids.shape[1] + max_new_tokens

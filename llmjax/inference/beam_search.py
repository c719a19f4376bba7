"""Beam search over log-probabilities: hypotheses, their scores, and when a row stops.

This module knows neither model nor cache: `beam_search_loop` is given a function that reads one token per beam.
Candidates, scores and stopping follow Transformers 5, so that the settings of a checkpoint mean the same here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from llmjax.config import ConfigError
from llmjax.types import Leaf

EarlyStopping: TypeAlias = bool | str  # True, False or "never"
Memory = TypeVar("Memory")


@struct.dataclass
class Beams:
  """K hypotheses per row, in descending order of their scores."""

  tokens: Leaf  # Int[B K T], generated tokens, then padding
  scores: Leaf  # Float[B K], -inf: this hypothesis does not exist


@struct.dataclass
class BeamSearchState:
  """The state of the search after some tokens."""

  live: Beams  # scores are sums of log-probabilities
  finished: Beams  # scores are these sums over the length to the power of `length_penalty`
  parents: Leaf  # Int[B K], the beam that each live hypothesis continues
  improvable: Leaf  # Bool[B], False: the finished hypotheses of the row are final
  length: Leaf  # Int[], tokens of each live hypothesis


@struct.dataclass
class BeamSettings:
  """Settings of a search; see `llmjax.inference.generation.beam_search` for their meaning."""

  length_penalty: Leaf  # Float[], traced, so that a change does not recompile
  num_beams: int = dataclasses.field(metadata={"pytree_node": False})
  early_stopping: EarlyStopping = dataclasses.field(metadata={"pytree_node": False})
  ends: tuple[int, ...] = dataclasses.field(metadata={"pytree_node": False})


def make_beam_settings(
  num_beams: int, length_penalty: float = 1.0, early_stopping: EarlyStopping = False, ends: tuple[int, ...] = ()
) -> BeamSettings:
  """Check settings of beam search and return them.

  Args:
    num_beams: K, hypotheses that are continued at a time.
    length_penalty: exponent of the length in a score.
    early_stopping: True, False or "never".
    ends: a hypothesis ends at any of these tokens.

  Raises:
    ConfigError: a value is out of range.
  """
  if num_beams < 1:
    raise ConfigError(f"num_beams={num_beams} must be at least 1")
  if not math.isfinite(length_penalty):
    raise ConfigError(f"length_penalty={length_penalty} must be a finite number; 0 turns it off")
  if early_stopping not in (False, True, "never"):
    raise ConfigError(f'early_stopping={early_stopping!r} must be False, True or "never"')
  early_stopping = early_stopping if early_stopping == "never" else bool(early_stopping)
  return BeamSettings(np.float32(length_penalty), num_beams, early_stopping, ends)


def advance_beams(state: BeamSearchState, log_probs: Float[Array, "B K V"], settings: BeamSettings) -> BeamSearchState:
  """Return the state after one more token.

  Args:
    state: the state before.
    log_probs: of the next token after every live hypothesis.
    settings: settings of the search.
  """
  rows, beams, vocabulary = log_probs.shape
  limit = state.live.tokens.shape[-1]
  # Of this many candidates, at least K do not end.
  count = min(beams * (1 + max(1, len(settings.ends))), beams * vocabulary)
  totals = (state.live.scores[:, :, None] + log_probs).reshape(rows, -1)
  scores, candidates = jax.lax.top_k(totals, count)
  parents, token = candidates // vocabulary, candidates % vocabulary
  tokens = _take_beams(state.live.tokens, parents).at[:, :, state.length].set(token)
  length = state.length + 1
  ended = jnp.isin(token, jnp.asarray(settings.ends, jnp.int32)) | (length == limit)

  live_scores, chosen = jax.lax.top_k(jnp.where(ended, -jnp.inf, scores), beams)
  live = Beams(_take_beams(tokens, chosen), live_scores)

  # A candidate that ends counts only if it is among the K best, as in Transformers.
  counts = ended & (jnp.arange(count) < beams)[None] & state.improvable[:, None]
  power = length.astype(jnp.float32) ** settings.length_penalty
  pool = jnp.concatenate([state.finished.scores, jnp.where(counts, scores / power, -jnp.inf)], axis=1)
  finished_scores, best = jax.lax.top_k(pool, beams)
  finished = Beams(_take_beams(jnp.concatenate([state.finished.tokens, tokens], axis=1), best), finished_scores)

  # Upper bound of what the best live hypothesis can score: if it ended now, or with "never" at the best length.
  bound_length = length.astype(jnp.float32)
  if settings.early_stopping == "never":
    bound_length = jnp.where(settings.length_penalty > 0, float(limit), bound_length)
  worst = finished_scores[:, -1]
  improvable = state.improvable & (live_scores[:, 0] / bound_length**settings.length_penalty > worst)
  if settings.early_stopping is True:
    improvable &= worst == -jnp.inf
  return BeamSearchState(live, finished, jnp.take_along_axis(parents, chosen, axis=1), improvable, length)


def _take_beams(tokens: Int[Array, "B N T"], indices: Int[Array, "B M"]) -> Int[Array, "B M T"]:
  return jnp.take_along_axis(tokens, indices[:, :, None], axis=1)


def beam_search_loop(
  read_tokens: Callable[[Memory, Array, Array], tuple[Memory, Array]],
  memory: Memory,
  log_probs: Float[Array, "B V"],
  settings: BeamSettings,
  *,
  max_new_tokens: int,
  pad_id: int,
) -> tuple[Int[Array, "B K T"], Float[Array, "B K"]]:
  """Return the K best hypotheses of every row in descending order, and their scores; T is `max_new_tokens`.

  Args:
    read_tokens: (memory, tokens Int[B*K], parents Int[B*K]) -> (memory, log-probabilities Float[B*K V]). Beam i of the
      new memory is beam parents[i] of the old one with one more token.
    memory: tree of arrays for B * K beams; the beams of a row are adjacent.
    log_probs: log-probabilities of the first token.
    settings: settings of the search.
    max_new_tokens: maximum number of tokens.
    pad_id: the token after the end of a hypothesis.
  """
  rows, vocabulary = log_probs.shape
  num_beams = settings.num_beams
  shape = (rows, num_beams)
  no_tokens = jnp.full((*shape, max_new_tokens), pad_id, jnp.int32)
  no_scores = jnp.full(shape, -jnp.inf)
  start = BeamSearchState(
    # All beams of a row begin alike, so only the first of them exists.
    live=Beams(no_tokens, no_scores.at[:, 0].set(0.0)),
    finished=Beams(no_tokens, no_scores),
    parents=jnp.zeros(shape, jnp.int32),
    improvable=jnp.ones(rows, bool),
    length=jnp.zeros((), jnp.int32),
  )
  state = advance_beams(start, jnp.broadcast_to(log_probs[:, None], (*shape, vocabulary)), settings)

  def is_unfinished(carry: tuple[BeamSearchState, Memory]) -> Array:
    state, _ = carry
    unfinished: Array = (state.length < max_new_tokens) & jnp.any(state.improvable)
    return unfinished

  def step(carry: tuple[BeamSearchState, Memory]) -> tuple[BeamSearchState, Memory]:
    state, memory = carry
    parents = (num_beams * jnp.arange(rows)[:, None] + state.parents).reshape(-1)
    memory, log_probs = read_tokens(memory, state.live.tokens[:, :, state.length - 1].reshape(-1), parents)
    return advance_beams(state, log_probs.reshape(*shape, vocabulary), settings), memory

  state, _ = jax.lax.while_loop(is_unfinished, step, (state, memory))
  return state.finished.tokens, state.finished.scores

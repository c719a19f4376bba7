"""Beam search over log-probabilities: which continuations live on, which are finished, and when nothing can improve.

Knows no model and no cache: `search` is given a function that reads a token into every beam. Candidates, scores and
stopping are those of Transformers 5, so that a checkpoint's settings mean here what they mean there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from llmjax.config import ConfigError


@struct.dataclass
class Beams:
  """K hypotheses a row, best first."""

  tokens: Any  # Int[B K T], what was generated, then padding
  scores: Any  # Float[B K], -inf = there is no such hypothesis


@struct.dataclass
class Search:
  """What is known after some tokens."""

  live: Beams  # scored by their sum of log-probabilities
  finished: Beams  # scored by that sum over a power of their length
  parents: Any  # Int[B K], the beam that each live one continues
  improvable: Any  # Bool[B], what is finished may still change
  length: Any  # Int[], tokens in each live hypothesis


@struct.dataclass
class BeamSettings:
  """What is searched for; `llmjax.inference.generation.beam_search` tells what they mean."""

  length_penalty: Any  # Float[], traced, so that changing it compiles nothing
  num_beams: int = struct.field(pytree_node=False)
  early_stopping: bool | str = struct.field(pytree_node=False)
  ends: tuple[int, ...] = struct.field(pytree_node=False)


def make_settings(
  num_beams: int, length_penalty: float = 1.0, early_stopping: bool | str = False, ends: tuple[int, ...] = ()
) -> BeamSettings:
  """Checked settings; a hypothesis ends at any of the tokens `ends`.

  Raises:
    ConfigError: a value out of range.
  """
  if num_beams < 1:
    raise ConfigError(f"num_beams={num_beams} must be at least 1")
  if not math.isfinite(length_penalty):
    raise ConfigError(f"length_penalty={length_penalty} must be a finite number; 0 is none")
  if early_stopping not in (False, True, "never"):
    raise ConfigError(f'early_stopping={early_stopping!r} must be False, True or "never"')
  early_stopping = early_stopping if early_stopping == "never" else bool(early_stopping)
  return BeamSettings(np.float32(length_penalty), num_beams, early_stopping, ends)


def advance(state: Search, log_probs: Float[Array, "B K V"], settings: BeamSettings) -> Search:
  """The state after one more token, whose log-probabilities after every live hypothesis are given.

  The best candidates of a row's K * V are enough that K of them do not end. Those that do are finished, if they are
  among the K best: a worse one would never have been looked at with a narrower choice.
  """
  rows, beams, vocabulary = log_probs.shape
  limit = state.live.tokens.shape[-1]
  count = min(beams * (1 + max(1, len(settings.ends))), beams * vocabulary)
  totals = (state.live.scores[:, :, None] + log_probs).reshape(rows, -1)
  scores, candidates = jax.lax.top_k(totals, count)
  parents, token = candidates // vocabulary, candidates % vocabulary
  tokens = _pick(state.live.tokens, parents).at[:, :, state.length].set(token)
  length = state.length + 1
  ended = jnp.isin(token, jnp.asarray(settings.ends, jnp.int32)) | (length == limit)

  live_scores, chosen = jax.lax.top_k(jnp.where(ended, -jnp.inf, scores), beams)
  live = Beams(_pick(tokens, chosen), live_scores)

  counts = ended & (jnp.arange(count) < beams)[None] & state.improvable[:, None]
  power = length.astype(jnp.float32) ** settings.length_penalty
  pool = jnp.concatenate([state.finished.scores, jnp.where(counts, scores / power, -jnp.inf)], axis=1)
  finished_scores, best = jax.lax.top_k(pool, beams)
  finished = Beams(_pick(jnp.concatenate([state.finished.tokens, tokens], axis=1), best), finished_scores)

  # What the best live hypothesis would be worth if it ended now; "never" hopes for the length that is worth most.
  hoped = length.astype(jnp.float32)
  if settings.early_stopping == "never":
    hoped = jnp.where(settings.length_penalty > 0, float(limit), hoped)
  worst = finished_scores[:, -1]
  improvable = state.improvable & (live_scores[:, 0] / hoped**settings.length_penalty > worst)
  if settings.early_stopping is True:
    improvable &= worst == -jnp.inf
  return Search(live, finished, jnp.take_along_axis(parents, chosen, axis=1), improvable, length)


def _pick(tokens: Int[Array, "B N T"], which: Int[Array, "B M"]) -> Int[Array, "B M T"]:
  return jnp.take_along_axis(tokens, which[:, :, None], axis=1)


def beam_search_loop(
  read: Callable[[Any, Array, Array], tuple[Any, Array]],
  memory: Any,
  log_probs: Float[Array, "B V"],
  settings: BeamSettings,
  *,
  max_new_tokens: int,
  pad_id: int,
) -> tuple[Int[Array, "B K T"], Float[Array, "B K"]]:
  """The K best hypotheses of every row, best first, and their scores; T is `max_new_tokens`.

  Args:
    read: (memory, tokens Int[B*K], parents Int[B*K]) -> (memory, log-probabilities Float[B*K V]): beam i becomes the
      one that beam parents[i] was, with a token more.
    memory: what `read` needs, of B * K beams, those of a row side by side.
    log_probs: of the first token.
  """
  rows, vocabulary = log_probs.shape
  num_beams = settings.num_beams
  shape = (rows, num_beams)
  empty = jnp.full((*shape, max_new_tokens), pad_id, jnp.int32)
  none = jnp.full(shape, -jnp.inf)
  first = jnp.zeros(shape, jnp.int32)
  # All beams of a row begin alike, so only one of them counts.
  start = Search(
    Beams(empty, none.at[:, 0].set(0.0)), Beams(empty, none), first, jnp.ones(rows, bool), jnp.zeros((), jnp.int32)
  )
  state = advance(start, jnp.broadcast_to(log_probs[:, None], (*shape, vocabulary)), settings)

  def more(carry):
    state, _ = carry
    return (state.length < max_new_tokens) & jnp.any(state.improvable)

  def step(carry):
    state, memory = carry
    parents = (num_beams * jnp.arange(rows)[:, None] + state.parents).reshape(-1)
    memory, log_probs = read(memory, state.live.tokens[:, :, state.length - 1].reshape(-1), parents)
    return advance(state, log_probs.reshape(*shape, vocabulary), settings), memory

  state, _ = jax.lax.while_loop(more, step, (state, memory))
  return state.finished.tokens, state.finished.scores

"""Linear-chain conditional random fields: the tags of a sentence are scored together, not each for itself.

The score of a chain of tags y is start[y_1] + sum_t scores[t, y_t] + sum_t matrix[y_t-1, y_t] + end[y_n], and
p(y) = exp(score) / Z (Lafferty, McCallum & Pereira 2001). All is computed in float32, whatever the inputs are.

Arguments are the same everywhere:
  scores: Float[B L C], what a model says of each tag at each position.
  transitions: what it says of neighbouring tags.
  mask: Bool or Int[B L], 1 where a position has a tag, such as at the first token of a word. The others, which may be
    anywhere, are skipped as if they were not there.
  segments: Int[B L], the sentences of a row. Where the number changes from one position with a tag to the next, a chain
    ends and another begins. Values of a row are sums over its chains, 0 where it has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from llmjax.objectives.losses import label_logits

# What a transition scores that must not be. Finite, so that no difference of two is NaN.
FORBIDDEN = -1e9

Mask = Bool[Array, "B L"] | Int[Array, "B L"]


@struct.dataclass
class Transitions:
  """Scores of the first tag of a chain, of each tag behind each other one, and of the last tag."""

  start: Any  # Float[C]
  matrix: Any  # Float[C C], from, to
  end: Any  # Float[C]


def add_transition(a: Transitions, b: Transitions) -> Transitions:
  """The sum of two, such as learned transitions and `tag_scheme.constraints`."""
  return jax.tree.map(jnp.add, a, b)


def log_partition(
  scores: Float[Array, "B L C"], transitions: Transitions, mask: Mask, segments: Int[Array, "B L"]
) -> Float[Array, " B"]:
  """log Z, the log of the sum of exp(score) over all ways to tag the row, by the forward algorithm."""
  transitions = _float32(transitions)
  forward = _forward(scores, transitions, mask, segments, jax.nn.logsumexp)
  last = jax.nn.logsumexp(forward + transitions.end[None, None], axis=-1)
  return jnp.sum(jnp.where(_ends(mask, segments), last, 0.0), axis=1)


def path_score(
  scores: Float[Array, "B L C"],
  tags: Int[Array, "B L"],
  transitions: Transitions,
  mask: Mask,
  segments: Int[Array, "B L"],
) -> Float[Array, " B"]:
  """The score of `tags`; those at positions without a tag count for nothing, whatever number they are."""
  emissions = jnp.where(mask.astype(bool), label_logits(scores.astype(jnp.float32), tags), 0.0)
  return jnp.sum(emissions, axis=1) + _transition_score(tags, transitions, mask, segments)


def negative_log_likelihood(
  scores: Float[Array, "B L C"],
  tags: Int[Array, "B L"],
  transitions: Transitions,
  mask: Mask,
  segments: Int[Array, "B L"],
) -> Float[Array, " B"]:
  """-log p(tags) = `log_partition` - `path_score`, in nats."""
  scores = scores.astype(jnp.float32)
  # Relative to the scores of `tags`, so that a long row's loss is no small difference of two large numbers.
  relative = scores - label_logits(scores, tags)[..., None]
  return log_partition(relative, transitions, mask, segments) - _transition_score(tags, transitions, mask, segments)


def viterbi(
  scores: Float[Array, "B L C"], transitions: Transitions, mask: Mask, segments: Int[Array, "B L"]
) -> tuple[Int[Array, "B L"], Float[Array, " B"]]:
  """The tags with the highest score, 0 where there is no tag, and that score (Viterbi 1967)."""
  transitions = _float32(transitions)
  real, ends = mask.astype(bool), _ends(mask, segments)
  best = _forward(scores, transitions, mask, segments, jnp.max)
  at_end = best + transitions.end[None, None]
  before = jnp.pad(best, ((0, 0), (1, 0), (0, 0)))[:, :-1]

  def step(tag: Array, xs: tuple[Array, ...]) -> tuple[Array, Array]:
    before, last, end, real = xs
    tag = jnp.where(end, last, tag)
    previous = jnp.argmax(before + transitions.matrix.T[tag], axis=-1)
    return jnp.where(real, previous, tag), jnp.where(real, tag, 0)

  last = jnp.argmax(at_end, axis=-1)
  xs = (before, last, ends, real)
  _, tags = jax.lax.scan(step, last[:, -1], tuple(x.swapaxes(0, 1) for x in xs), reverse=True)
  return tags.swapaxes(0, 1), jnp.sum(jnp.where(ends, jnp.max(at_end, axis=-1), 0.0), axis=1)


def marginals(
  scores: Float[Array, "B L C"], transitions: Transitions, mask: Mask, segments: Int[Array, "B L"]
) -> Float[Array, "B L C"]:
  """p(tag at position), 0 where there is no tag: the gradient of `log_partition` by the scores."""

  def total(scores: Array) -> Array:
    return jnp.sum(log_partition(scores, transitions, mask, segments))

  return jax.grad(total)(scores.astype(jnp.float32))


def _float32(transitions: Transitions) -> Transitions:
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), transitions)


def _forward(
  scores: Float[Array, "B L C"],
  transitions: Transitions,
  mask: Mask,
  segments: Int[Array, "B L"],
  reduce: Callable[..., Array],
) -> Float[Array, "B L C"]:
  """What all beginnings of a chain that end in a tag at a position score together; `reduce` is what together means.

  Where there is no tag, it stands as at the last position with one.
  """
  scores = scores.astype(jnp.float32)

  def step(before: Array, xs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    score, begin, real = xs
    inside = reduce(before[:, :, None] + transitions.matrix[None], axis=1)
    here = score + jnp.where(begin[:, None], transitions.start[None], inside)
    here = jnp.where(real[:, None], here, before)
    return here, here

  xs = (scores, _previous(mask, segments)[1], mask.astype(bool))
  # The gradient makes the [B C C] of a step again: kept for all L they would be the largest arrays of all.
  step = jax.checkpoint(step, prevent_cse=False)
  _, forward = jax.lax.scan(step, jnp.zeros_like(scores[:, 0]), tuple(x.swapaxes(0, 1) for x in xs))
  return forward.swapaxes(0, 1)


def _transition_score(
  tags: Int[Array, "B L"], transitions: Transitions, mask: Mask, segments: Int[Array, "B L"]
) -> Float[Array, " B"]:
  """The score of `tags` but for what the positions say."""
  transitions = _float32(transitions)
  previous, begins = _previous(mask, segments)
  matrix = transitions.matrix
  # Products with one-hot vectors: their gradient sums in the same order on every run, that of a gather does not.
  one_hot = jax.nn.one_hot(jnp.take_along_axis(tags, previous, axis=1), len(matrix), dtype=jnp.float32)
  inside = jnp.einsum("blc,cd->bld", one_hot, matrix, precision="highest")
  here = jnp.where(begins[..., None], transitions.start[None, None], inside)
  here += jnp.where(_ends(mask, segments)[..., None], transitions.end[None, None], 0.0)
  return jnp.sum(jnp.where(mask.astype(bool), label_logits(here, tags), 0.0), axis=1)


def _previous(mask: Mask, segments: Int[Array, "B L"]) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
  """The last position with a tag before each (0 where there is none), and whether a chain begins at a position."""
  real = mask.astype(bool)
  places = jnp.where(real, jnp.arange(real.shape[1])[None], -1)
  last = jnp.pad(jax.lax.cummax(places, axis=1), ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  previous = jnp.maximum(last, 0)
  return previous, real & ((last < 0) | (jnp.take_along_axis(segments, previous, axis=1) != segments))


def _ends(mask: Mask, segments: Int[Array, "B L"]) -> Bool[Array, "B L"]:
  """Whether a chain ends at a position: where one would begin if the row were read from its end."""
  return _previous(mask[:, ::-1], segments[:, ::-1])[1][:, ::-1]

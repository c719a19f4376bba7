"""Linear-chain conditional random fields (Lafferty, McCallum & Pereira 2001).

The score of a tag sequence y is start[y_1] + sum_t scores[t, y_t] + sum_t matrix[y_t-1, y_t] + end[y_n], and p(y) =
exp(score) / Z. Everything is computed in float32.

Arguments are the same in all functions:
  scores: Float[B L C], the model's score of each tag at each position (emissions).
  transitions: scores of neighbouring tags.
  mask: Bool or Int[B L], 1 for positions that have a tag, for example the first token of each word. All other
    positions are skipped, wherever they are.
  segments: Int[B L], the sentences of a row. A chain ends, and the next one begins, where the segment changes between
    two positions with a tag. Values of a row are sums over its chains, 0 if it has none.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from llmjax.objectives.losses import label_logits
from llmjax.types import Leaf

# Score of a forbidden transition. Finite, so that no difference of two scores is NaN.
FORBIDDEN_SCORE = -1e9

Mask = Bool[Array, "B L"] | Int[Array, "B L"]


@struct.dataclass
class Transitions:
  """Scores of the first tag of a chain, of each tag after each other tag, and of the last tag."""

  start: Leaf  # Float[C]
  matrix: Leaf  # Float[C C], from, to
  end: Leaf  # Float[C]


def add_transitions(a: Transitions, b: Transitions) -> Transitions:
  """Return the sum of two, for example of trained scores and `tag_scheme.transition_constraints`."""
  return Transitions(jnp.add(a.start, b.start), jnp.add(a.matrix, b.matrix), jnp.add(a.end, b.end))


def log_partition(
  scores: Float[Array, "B L C"], transitions: Transitions, mask: Mask, segments: Int[Array, "B L"]
) -> Float[Array, " B"]:
  """Return log Z, the log of the sum of exp(score) over all tag sequences, by the forward algorithm."""
  transitions = _as_float32(transitions)
  forward = _forward_scores(scores, transitions, mask, segments, jax.nn.logsumexp)
  last = jax.nn.logsumexp(forward + transitions.end[None, None], axis=-1)
  return jnp.sum(jnp.where(_chain_ends(mask, segments), last, 0.0), axis=1)


def path_score(
  scores: Float[Array, "B L C"],
  tags: Int[Array, "B L"],
  transitions: Transitions,
  mask: Mask,
  segments: Int[Array, "B L"],
) -> Float[Array, " B"]:
  """Return the score of `tags`, whose values at positions without a tag are ignored."""
  emissions = jnp.where(mask.astype(bool), label_logits(scores.astype(jnp.float32), tags), 0.0)
  return jnp.sum(emissions, axis=1) + _transition_score(tags, transitions, mask, segments)


def negative_log_likelihood(
  scores: Float[Array, "B L C"],
  tags: Int[Array, "B L"],
  transitions: Transitions,
  mask: Mask,
  segments: Int[Array, "B L"],
) -> Float[Array, " B"]:
  """Return -log p(tags) = `log_partition` - `path_score`, in nats."""
  scores = scores.astype(jnp.float32)
  # Relative to the scores of `tags`: otherwise the loss of a long row is a small difference of two large numbers.
  relative = scores - label_logits(scores, tags)[..., None]
  return log_partition(relative, transitions, mask, segments) - _transition_score(tags, transitions, mask, segments)


def viterbi(
  scores: Float[Array, "B L C"], transitions: Transitions, mask: Mask, segments: Int[Array, "B L"]
) -> tuple[Int[Array, "B L"], Float[Array, " B"]]:
  """Return the tags with the highest score, 0 at positions without a tag, and that score (Viterbi 1967)."""
  transitions = _as_float32(transitions)
  real, ends = mask.astype(bool), _chain_ends(mask, segments)
  best = _forward_scores(scores, transitions, mask, segments, jnp.max)
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
  """Return p(tag at position), 0 at positions without a tag: the gradient of `log_partition` by the scores."""

  def total(scores: Array) -> Array:
    return jnp.sum(log_partition(scores, transitions, mask, segments))

  gradient: Array = jax.grad(total)(scores.astype(jnp.float32))
  return gradient


def _as_float32(transitions: Transitions) -> Transitions:
  return Transitions(*(jnp.asarray(x, jnp.float32) for x in (transitions.start, transitions.matrix, transitions.end)))


def _forward_scores(
  scores: Float[Array, "B L C"],
  transitions: Transitions,
  mask: Mask,
  segments: Int[Array, "B L"],
  reduce: Callable[..., Array],
) -> Float[Array, "B L C"]:
  """Return the score of all partial chains that end with each tag at each position.

  Positions without a tag repeat the last position that has one.

  Args:
    scores: see above, as the other arguments.
    transitions: see above.
    mask: see above.
    segments: see above.
    reduce: how the scores of several chains are combined: logsumexp for their sum, maximum for the best.
  """
  scores = scores.astype(jnp.float32)

  def step(before: Array, xs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    score, begin, real = xs
    inside = reduce(before[:, :, None] + transitions.matrix[None], axis=1)
    here = score + jnp.where(begin[:, None], transitions.start[None], inside)
    here = jnp.where(real[:, None], here, before)
    return here, here

  xs = (scores, _previous_positions(mask, segments)[1], mask.astype(bool))
  # The backward pass recomputes the [B C C] of a step: saved for all L they would be the largest arrays of all.
  step = jax.checkpoint(step, prevent_cse=False)
  forward: Array
  _, forward = jax.lax.scan(step, jnp.zeros_like(scores[:, 0]), tuple(x.swapaxes(0, 1) for x in xs))
  return forward.swapaxes(0, 1)


def _transition_score(
  tags: Int[Array, "B L"], transitions: Transitions, mask: Mask, segments: Int[Array, "B L"]
) -> Float[Array, " B"]:
  """Return the part of `path_score` that is due to transitions."""
  transitions = _as_float32(transitions)
  previous, begins = _previous_positions(mask, segments)
  matrix = transitions.matrix
  # Products with one-hot vectors have a deterministic gradient; the scatter-add of a gather's gradient has not.
  one_hot = jax.nn.one_hot(jnp.take_along_axis(tags, previous, axis=1), len(matrix), dtype=jnp.float32)
  inside = jnp.einsum("blc,cd->bld", one_hot, matrix, precision="highest")
  here = jnp.where(begins[..., None], transitions.start[None, None], inside)
  here += jnp.where(_chain_ends(mask, segments)[..., None], transitions.end[None, None], 0.0)
  return jnp.sum(jnp.where(mask.astype(bool), label_logits(here, tags), 0.0), axis=1)


def _previous_positions(mask: Mask, segments: Int[Array, "B L"]) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
  """Return the last position with a tag before each position, 0 if there is none, and whether a chain begins there."""
  real = mask.astype(bool)
  positions = jnp.where(real, jnp.arange(real.shape[1])[None], -1)
  last = jnp.pad(jax.lax.cummax(positions, axis=1), ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  previous = jnp.maximum(last, 0)
  return previous, real & ((last < 0) | (jnp.take_along_axis(segments, previous, axis=1) != segments))


def _chain_ends(mask: Mask, segments: Int[Array, "B L"]) -> Bool[Array, "B L"]:
  """Whether a chain ends at a position, which is where one begins in the reversed row."""
  return _previous_positions(mask[:, ::-1], segments[:, ::-1])[1][:, ::-1]

"""The data that flows through a step, and the one legend of dimension letters.

  B batch (global sequences)   L length            S source or cache length   D model width
  H query heads                K key/value heads   F feed-forward width       V vocabulary
  N layers                     E experts           C classes                  A head width

Signatures of public functions carry these letters as jaxtyping annotations, einsum strings use the same ones.
Here the dimensions are comments: annotated fields of a pytree dataclass would be checked on every tree
transformation, where leaves are specs, shardings or scan slices rather than arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array
Sums = dict[str, Array]  # {term: scalar sum}
Metrics = dict[str, tuple[Array, Array]]  # {name: (sum, weight)}: added over microbatches, batches and hosts


@struct.dataclass
class Tokens:
  """One stream of token sequences; several documents may share a row.

  Masks are made from `segments` and `positions`, never from token values.
  """

  ids: Any  # Int[B L]
  positions: Any  # Int[B L], counted from 0 inside each segment
  segments: Any  # Int[B L], 0 = padding, 1, 2, ... = the documents of a row

  @classmethod
  def from_ids(cls, ids, mask=None) -> Tokens:
    """One document a row. `mask` [B L] is 1 where a token is real; padding may be on either side."""
    ids = jnp.asarray(ids, jnp.int32)
    if ids.ndim != 2:
      raise ValueError(f"ids must have shape [B, L], got {ids.shape}")
    mask = jnp.ones_like(ids) if mask is None else jnp.asarray(mask, jnp.int32)
    if mask.shape != ids.shape:
      raise ValueError(f"mask {mask.shape} must have the shape of ids {ids.shape}")
    return cls(ids=ids, positions=jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0), segments=mask)


@struct.dataclass
class Batch:
  """What a step consumes. Every leaf has the (global) batch as its first axis."""

  inputs: Tokens
  labels: Mapping[str, Any] = struct.field(default_factory=dict)  # {term: Int[B L]}
  weights: Mapping[str, Any] = struct.field(default_factory=dict)  # {term: Float[B L]}, 0 = bears no loss
  rows: Any = None  # Int[B]: the row's number in the global batch; dropout is keyed by it

  @classmethod
  def from_tokens(cls, ids, mask=None) -> Batch:
    """A batch for inference. ids: Int[B L]; mask: 1 where real, default all."""
    tokens = Tokens.from_ids(ids, mask)
    return cls(inputs=tokens, rows=jnp.arange(tokens.ids.shape[0], dtype=jnp.int32))


@struct.dataclass
class Outputs:
  """What a model returns; None where it has no such output."""

  logits: Any = None  # Float[B L V]
  hidden: Any = None  # Float[B L D], after the final norm
  all_hidden: Any = None  # Float[N+1 B L D]: the embeddings, then every layer's output; on request


Forward = Callable[..., Outputs]  # (batch, rngs={}) -> Outputs
Features = Mapping[str, Any]  # {"inputs": Int[n], "labels": {term: Int[n]}, "weights": {term: Float[n]}}


class Objective(Protocol):
  """What is learned. Host and device halves stand side by side in one file and must agree."""

  coefficients: Mapping[str, float]  # loss = sum over terms of coefficient * sum / weight

  def window(self, ids: np.ndarray, length: int) -> list[np.ndarray]:
    """Cuts a document's ids into pieces whose features are at most `length` long (host)."""

  def features(self, example: Mapping[str, Any], rng: np.random.Generator, corpus: Any) -> Features:
    """One example (`example["ids"]`: Int[n]) to aligned one-dimensional features (host)."""

  def weights(self, batch: Batch) -> Sums:
    """The denominators, taken once on the whole global batch (device)."""

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    """Named sums over a microbatch, and metrics as (sum, weight) (device, pure)."""

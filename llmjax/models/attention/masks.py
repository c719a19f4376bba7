"""What every attention kernel computes of a query and a key: whether it sees it, their score, and what is dropped.

Kernels call these on whole rows or on blocks of them, and so agree by construction.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from llmjax.types import Tokens

MASK_VALUE = float(np.finfo(np.float32).min)  # the score of a key that is not seen


@dataclasses.dataclass(frozen=True)
class AttentionSettings:
  """What of attention is known when a program is compiled.

  Attributes:
    scale: of query-key products.
    causal, window: see `attention_mask`.
    softcap: scores become softcap * tanh(scores / softcap) (Gemma Team 2024).
    buckets, max_distance: of relative positions, see `relative_buckets`.
    dropout: the probability that an attention weight is dropped.
  """

  scale: float
  causal: bool = False
  window: int | None = None
  softcap: float | None = None
  buckets: int = 0
  max_distance: int = 0
  dropout: float = 0.0


def attention_mask(query: Tokens, key: Tokens, *, causal: bool, window: int | None = None) -> Bool[Array, "B L S"]:
  """Which keys a query sees: those of its own document, and of them, `causal`, those not later or in the prefix.

  Padding (segment 0) is seen by none. A `window` W leaves the W latest keys up to the query where `causal` (Beltagy et
  al. 2020, Jiang et al. 2023), else those at most W // 2 away on either side (Warner et al. 2024).
  """
  same = query.segments[:, :, None] == key.segments[:, None, :]
  visible = same & (key.segments[:, None, :] > 0)
  ahead = key.positions[:, None, :] - query.positions[:, :, None]
  if causal:
    visible &= ahead <= 0 if key.prefix is None else (ahead <= 0) | (key.prefix[:, None, :] > 0)
  if window is not None:
    visible &= jnp.abs(ahead) < window if causal else jnp.abs(ahead) <= window // 2
  return visible


def relative_buckets(
  query: Int[Array, "B L"], key: Int[Array, "B S"], *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[Array, "B L S"]:
  """The bucket of every pair of positions (Raffel et al. 2020): exact for near keys, then logarithmically wider.

  Where `bidirectional`, one half is for keys that come later; else those share the bucket of distance 0.
  """
  ahead = key[:, None, :] - query[:, :, None]
  later = jnp.zeros_like(ahead)
  distance = jnp.maximum(-ahead, 0)
  if bidirectional:
    num_buckets //= 2
    later = num_buckets * (ahead > 0)
    distance = jnp.abs(ahead)
  exact = num_buckets // 2
  # The formula in float32, as T5 has it, for every distance beforehand: the least distance of each wide bucket.
  distances = np.arange(exact, max_distance + 1, dtype=np.float32)
  wide = np.log(distances / np.float32(exact)) / np.float32(math.log(max_distance / exact)) * (num_buckets - exact)
  wide = np.minimum(exact + wide.astype(np.int32), num_buckets - 1)
  bucket = jnp.minimum(distance, exact)
  for least in range(exact + 1, num_buckets):
    bucket += distance >= exact + int(np.argmax(wide >= least))
  return later + bucket


def relative_bias(
  table: Float[Array, "R H"], query: Tokens, key: Tokens, settings: AttentionSettings
) -> Float[Array, "B H L S"]:
  """What a head's row of the table adds to the score of each pair."""
  sizes = {"num_buckets": settings.buckets, "max_distance": settings.max_distance}
  buckets = relative_buckets(query.positions, key.positions, bidirectional=not settings.causal, **sizes)
  return jnp.moveaxis(jnp.take(table, buckets, axis=0), -1, 1)


def attention_scores(
  query: Float[Array, "B L H A"],
  key: Float[Array, "B S K A"],
  relative: Float[Array, "R H"] | None,
  queries: Tokens,
  keys: Tokens,
  mask: Bool[Array, "B L S"],
  settings: AttentionSettings,
) -> Float[Array, "B K G L S"]:
  """scale query key^T, capped, with the relative bias, float32; H = K G query heads share K key heads."""
  batch, length, heads, width = query.shape
  shared = key.shape[2]
  grouped = query.reshape(batch, length, shared, heads // shared, width)
  scores = settings.scale * jnp.einsum("BLKGA,BSKA->BKGLS", grouped, key, preferred_element_type=jnp.float32)
  if settings.softcap is not None:
    scores = settings.softcap * jnp.tanh(scores / settings.softcap)
  if relative is not None:
    bias = relative_bias(relative, queries, keys, settings)
    scores = scores + bias.astype(jnp.float32).reshape(scores.shape)
  return jnp.where(mask[:, None, None], scores, MASK_VALUE)


def dropout_keep_mask(
  row_keys: Key[Array, " B"],
  heads: Int[Array, " H"],
  queries: Int[Array, "B L"],
  keys: Int[Array, "B S"],
  rate: float,
) -> Bool[Array, "B H L S"]:
  """Which attention weights dropout leaves.

  It depends on the row's key, the head and the two tokens' indices in the row alone: how heads and rows are cut over
  devices or into blocks cannot change it.
  """
  fold = jax.random.fold_in

  def row(key: Array, query: Array, other: Array) -> Array:
    each_query = jax.vmap(lambda head: jax.vmap(lambda i: fold(fold(key, head), i))(query))(heads)
    return jax.vmap(jax.vmap(jax.vmap(fold, (None, 0)), (0, None)), (0, None))(each_query, other)

  bits = jax.random.key_data(jax.vmap(row)(row_keys, queries, keys))[..., 0]
  return bits >= np.uint32(rate * 2**32)


def with_row_indices(tokens: Tokens) -> Tokens:
  """What of tokens attention needs, with their indices in the row as ids."""
  index = jnp.broadcast_to(jnp.arange(tokens.segments.shape[1]), tokens.segments.shape)
  return Tokens(ids=index, positions=tokens.positions, segments=tokens.segments, prefix=tokens.prefix)

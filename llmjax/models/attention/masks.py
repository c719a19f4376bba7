"""Masks, scores and dropout of attention, as functions of a query and a key.

All kernels call these functions, on whole rows or on blocks of them, and so agree by construction.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from llmjax.types import Tokens

MASK_VALUE = float(np.finfo(np.float32).min)  # score of a key that the mask hides


@dataclasses.dataclass(frozen=True)
class AttentionSettings:
  """The static settings of an attention: those that are known when a program is compiled.

  Attributes:
    scale: factor of query-key products.
    causal: see `attention_mask`.
    window: see `attention_mask`; None: no window.
    softcap: scores become softcap * tanh(scores / softcap) (Gemma Team 2024, arXiv:2408.00118); None: no bound.
    buckets: number R of relative buckets, see `relative_buckets`; 0: no relative biases.
    max_distance: see `relative_buckets`.
    dropout: probability that an attention weight is dropped.
  """

  scale: float
  causal: bool = False
  window: int | None = None
  softcap: float | None = None
  buckets: int = 0
  max_distance: int = 0
  dropout: float = 0.0


def attention_mask(query: Tokens, key: Tokens, *, causal: bool, window: int | None = None) -> Bool[Array, "B L S"]:
  """Return which keys each query attends to. Queries attend within their document; nothing attends to padding.

  Args:
    query: tokens of the queries, [B L].
    key: tokens of the keys, [B S].
    causal: hide later keys, except those of the prefix.
    window: W. If causal, keep the latest W keys up to the query (Beltagy et al. 2020, arXiv:2004.05150; Jiang et al.
      2023, arXiv:2310.06825). Otherwise keep keys at most W // 2 away on either side (Warner et al. 2024,
      arXiv:2412.13663). None: no window.

  Returns:
    Bool[B L S], True where the query attends to the key.
  """
  same = query.segments[:, :, None] == key.segments[:, None, :]
  visible: Array = same & (key.segments[:, None, :] > 0)
  ahead = key.positions[:, None, :] - query.positions[:, :, None]
  if causal:
    visible &= ahead <= 0 if key.prefix is None else (ahead <= 0) | (key.prefix[:, None, :] > 0)
  if window is not None:
    visible &= jnp.abs(ahead) < window if causal else jnp.abs(ahead) <= window // 2
  return visible


def relative_buckets(
  query: Int[Array, "B L"], key: Int[Array, "B S"], *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Int[Array, "B L S"]:
  """Return the bucket of each pair of positions (T5, Raffel et al. 2020, arXiv:1910.10683).

  Near keys have a bucket for each distance. The buckets of farther keys grow logarithmically.

  Args:
    query: positions of the queries.
    key: positions of the keys.
    bidirectional: use half of the buckets for later keys. If False, later keys share the bucket of distance 0.
    num_buckets: R.
    max_distance: distances from here on share a bucket.
  """
  ahead = key[:, None, :] - query[:, :, None]
  later = jnp.zeros_like(ahead)
  distance = jnp.maximum(-ahead, 0)
  if bidirectional:
    num_buckets //= 2
    later = num_buckets * (ahead > 0)
    distance = jnp.abs(ahead)
  exact = num_buckets // 2
  # Evaluate T5's formula in float32 for all distances on the host. Rounding on the device could move a limit by one.
  distances = np.arange(exact, max_distance + 1, dtype=np.float32)
  wide = np.log(distances / np.float32(exact)) / np.float32(math.log(max_distance / exact)) * (num_buckets - exact)
  wide = np.minimum(exact + wide.astype(np.int32), num_buckets - 1)
  # Each wide bucket adds 1 from its smallest distance on.
  bucket = jnp.minimum(distance, exact)
  for number in range(exact + 1, num_buckets):
    bucket += distance >= exact + int(np.argmax(wide >= number))
  return later + bucket


def relative_bias(
  table: Float[Array, "R H"], query: Tokens, key: Tokens, settings: AttentionSettings
) -> Float[Array, "B H L S"]:
  """Return the relative bias of each pair of tokens, which is added to its score."""
  sizes = {"num_buckets": settings.buckets, "max_distance": settings.max_distance}
  buckets = relative_buckets(query.positions, key.positions, bidirectional=not settings.causal, **sizes)
  return jnp.moveaxis(jnp.take(table, buckets, axis=0), -1, 1)


def attention_scores(
  query: Float[Array, "B L H A"],
  key: Float[Array, "B S K A"],
  relative: Float[Array, "R H"] | None,
  query_tokens: Tokens,
  key_tokens: Tokens,
  mask: Bool[Array, "B L S"],
  settings: AttentionSettings,
) -> Float[Array, "B K G L S"]:
  """Return softcap(scale * query key^T) + relative bias in float32, and MASK_VALUE for hidden keys.

  Args:
    query: queries. H = K G: each key head is shared by G consecutive query heads (Ainslie et al. 2023,
      arXiv:2305.13245).
    key: keys.
    relative: table of relative biases, or None.
    query_tokens: tokens of the queries, for the relative bias.
    key_tokens: tokens of the keys, for the relative bias.
    mask: True where the query attends to the key.
    settings: static settings.
  """
  batch, length, heads, width = query.shape
  kv_heads = key.shape[2]
  grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, width)
  scores = settings.scale * jnp.einsum("BLKGA,BSKA->BKGLS", grouped, key, preferred_element_type=jnp.float32)
  if settings.softcap is not None:
    scores = settings.softcap * jnp.tanh(scores / settings.softcap)
  if relative is not None:
    bias = relative_bias(relative, query_tokens, key_tokens, settings)
    scores = scores + bias.astype(jnp.float32).reshape(scores.shape)
  return jnp.where(mask[:, None, None], scores, MASK_VALUE)


def dropout_keep_mask(
  row_keys: Key[Array, " B"],
  heads: Int[Array, " H"],
  query_index: Int[Array, "B L"],
  key_index: Int[Array, "B S"],
  rate: float,
) -> Bool[Array, "B H L S"]:
  """Return which attention weights dropout keeps, keyed by row, head, query and key.

  The mask of a weight depends on nothing else. The division of rows and heads over devices, and of sequences into
  blocks, therefore cannot change it.

  Args:
    row_keys: the random key of each row.
    heads: numbers of the query heads.
    query_index: index of each query in its row.
    key_index: index of each key in its row.
    rate: probability that a weight is dropped.
  """
  fold = jax.random.fold_in

  def row_keep_keys(row_key: Array, query: Array, key: Array) -> Array:
    query_keys = jax.vmap(lambda head: jax.vmap(lambda i: fold(fold(row_key, head), i))(query))(heads)
    return jax.vmap(jax.vmap(jax.vmap(fold, (None, 0)), (0, None)), (0, None))(query_keys, key)

  # The first word of each key is a uniform random integer. Drawing bits from the key would cost a second hash.
  bits = jax.random.key_data(jax.vmap(row_keep_keys)(row_keys, query_index, key_index))[..., 0]
  return bits >= np.uint32(rate * 2**32)


def with_row_indices(tokens: Tokens) -> Tokens:
  """Return the tokens as attention needs them, with each token's index in its row as its id."""
  index = jnp.broadcast_to(jnp.arange(tokens.segments.shape[1]), tokens.segments.shape)
  return Tokens(ids=index, positions=tokens.positions, segments=tokens.segments, prefix=tokens.prefix)

"""Attention by its formula, compiled by XLA: the reference for all other kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from llmjax.models.attention import masks
from llmjax.models.attention.masks import AttentionSettings
from llmjax.types import Tokens


def xla_attention(
  query: Float[Array, "B L H A"],
  key: Float[Array, "B S K A"],
  value: Float[Array, "B S K A"],
  query_tokens: Tokens,
  key_tokens: Tokens,
  mask: Bool[Array, "B L S"],
  settings: AttentionSettings,
  relative: Float[Array, "R H"] | None = None,
  dropout_keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B L H A"]:
  """Return softmax(scores) value; see `select.dot_product_attention` for the arguments."""
  scores = masks.attention_scores(query, key, relative, query_tokens, key_tokens, mask, settings)
  weights = jax.nn.softmax(scores, axis=-1)
  if dropout_keys is not None and settings.dropout > 0.0:
    indices = masks.with_row_indices(query_tokens).ids, masks.with_row_indices(key_tokens).ids
    keep = masks.dropout_keep_mask(dropout_keys, jnp.arange(query.shape[2]), *indices, rate=settings.dropout)
    weights = jnp.where(keep.reshape(weights.shape), weights / (1.0 - settings.dropout), 0.0)
  out = jnp.einsum("BKGLS,BSKA->BLKGA", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
  return out.astype(value.dtype).reshape(query.shape)

"""Attention: masks from segments and positions, rotary positions, grouped heads, the decoding cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from llmjax.models import layers
from llmjax.sharding import constrain
from llmjax.types import Tokens

if TYPE_CHECKING:
  from llmjax.models.transformer import TransformerConfig


@struct.dataclass
class Context:
  """What every layer of a stack shares; made once a forward pass."""

  mask: Array  # Bool[B L S]: query l may attend to key s
  rotary: tuple[Array, Array] | None  # sin and cos, each Float[B L A/2]
  dropout_keys: Array | None  # Key[B]
  cache_index: Array | None = None  # Int[]: where in the cache this call's keys go
  cache_length: int | None = struct.field(pytree_node=False, default=None)  # S, while decoding


def causal_mask(query: Tokens, key: Tokens) -> Bool[Array, "B L S"]:
  """Same document, and not later. Padding (segment 0) is attended by none."""
  same = query.segments[:, :, None] == key.segments[:, None, :]
  real = key.segments[:, None, :] > 0
  return same & real & (query.positions[:, :, None] >= key.positions[:, None, :])


def rotary_angles(positions: Int[Array, "B L"], width: int, base: float) -> tuple[Array, Array]:
  """sin and cos of the rotary angles, each Float[B L width/2] (Su et al. 2021)."""
  frequencies = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
  angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None]
  return jnp.sin(angles), jnp.cos(angles)


def rotate(
  x: Float[Array, "B L H A"], sin: Float[Array, "B L half"], cos: Float[Array, "B L half"]
) -> Float[Array, "B L H A"]:
  """Rotates the pairs (i, i + A/2) of every head, the layout of GPT-NeoX and Llama checkpoints; in float32."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  sin, cos = sin[:, :, None], cos[:, :, None]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def dot_product_attention(
  query: Float[Array, "B L H A"],
  key: Float[Array, "B S K A"],
  value: Float[Array, "B S K A"],
  mask: Bool[Array, "B L S"],
  dropout_rate: float = 0.0,
  dropout_keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B L H A"]:
  """softmax(query key^T / sqrt(A)) value (Vaswani et al. 2017); H query heads share K key/value heads.

  Scores and softmax are float32. A query that may attend to nothing (padding) gets a finite, meaningless value.
  """
  B, L, H, A = query.shape
  K = key.shape[2]
  grouped = (query * A**-0.5).reshape(B, L, K, H // K, A)
  scores = jnp.einsum("BLKGA,BSKA->BKGLS", grouped, key).astype(jnp.float32)
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  weights = layers.dropout(weights, dropout_rate, dropout_keys)
  return jnp.einsum("BKGLS,BSKA->BLKGA", weights, value).reshape(B, L, H, A)


class Attention(nn.Module):
  """Self-attention with its four projections; with a cache, over all that was decoded before."""

  cfg: TransformerConfig

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"], ctx: Context, keys: Key[Array, " B"] | None) -> Float[Array, "B L D"]:
    c = self.cfg

    def project(name, heads, axis):
      axes, features = ("embed", axis, "head_dim"), (heads, c.head_width)
      dense = layers.Projection(features, axes, c.kernel_stddev, c.qkv_bias, c.dtype, c.param_dtype, name=name)
      return constrain(dense(x), "act_batch", "act_len", f"act_{axis}", "act_head_dim")

    query = project("query", c.num_heads, "heads")
    key = project("key", c.kv_heads, "kv_heads")
    value = project("value", c.kv_heads, "kv_heads")
    if c.qk_norm:
      query = layers.norm(c, "query_norm", axis="head_dim")(query)
      key = layers.norm(c, "key_norm", axis="head_dim")(key)
    if ctx.rotary is not None:
      query, key = rotate(query, *ctx.rotary), rotate(key, *ctx.rotary)
    if ctx.cache_length is not None:
      key, value = self.append("keys", key, ctx), self.append("values", value, ctx)
    out = dot_product_attention(query, key, value, ctx.mask, c.attention_dropout, layers.fold(keys, 0))
    axes = ("heads", "head_dim", "embed")
    return layers.Projection(
      (c.d_model,), axes, c.residual_stddev, c.attention_out_bias, c.dtype, c.param_dtype, contracted=2, name="out"
    )(out)

  def append(self, name: str, new: Float[Array, "B L K A"], ctx: Context) -> Float[Array, "B S K A"]:
    """Writes this call's keys or values into the cache and returns all of it."""
    assert ctx.cache_length is not None and ctx.cache_index is not None
    batch, _, heads, width = new.shape
    cached = self.variable("cache", name, jnp.zeros, (batch, ctx.cache_length, heads, width), new.dtype)
    cached.value = jax.lax.dynamic_update_slice(cached.value, new, (0, ctx.cache_index, 0, 0))
    return cached.value


class CachedTokens(nn.Module):
  """Positions and segments of all that the cache holds; unwritten slots are padding (segment 0)."""

  @nn.compact
  def __call__(self, new: Tokens, length: int) -> tuple[Tokens, Int[Array, ""]]:
    """Appends `new`; returns all keys' tokens (S of them) and the slot where the new ones begin."""
    shape = (new.ids.shape[0], length)
    index = self.variable("cache", "index", jnp.zeros, (), jnp.int32)
    positions = self.variable("cache", "positions", jnp.zeros, shape, jnp.int32)
    segments = self.variable("cache", "segments", jnp.zeros, shape, jnp.int32)
    start = index.value
    positions.value = jax.lax.dynamic_update_slice(positions.value, new.positions, (0, start))
    segments.value = jax.lax.dynamic_update_slice(segments.value, new.segments, (0, start))
    index.value = start + new.ids.shape[1]
    return Tokens(ids=segments.value, positions=positions.value, segments=segments.value), start

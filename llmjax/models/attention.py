"""Attention: masks from segments, positions and prefix; relative positions; the decoding cache."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from llmjax.models import layers
from llmjax.models.rotary import rotate
from llmjax.sharding import constrain
from llmjax.types import Tokens

if TYPE_CHECKING:
  from llmjax.models.config import TransformerConfig

KV = ("key", "value")


@struct.dataclass
class Context:
  """What every layer of a stack shares; made once a forward pass. `kind` is "global" or "local"."""

  query: Tokens  # the tokens of this call
  key: Tokens  # what self-attention sees: the same, or while decoding all that is in the cache
  masks: dict[str, Array]  # {kind: Bool[B L S]}: query l may attend to key s
  rotary: dict[str, tuple[Array, Array]]  # {kind: sin and cos, each Float[B L A/2]}; empty without rotary positions
  dropout_keys: Array | None  # Key[B]
  relative: Array | None = None  # Float[R H], the table of relative biases
  memory: Array | None = None  # Float[B S D], the encoder's output; None while decoding, when caches hold what it gave
  memory_mask: Array | None = None  # Bool[B L S] of cross-attention
  cache_index: Array | None = None  # Int[]: where in the cache this call's keys go
  cache_length: int | None = struct.field(pytree_node=False, default=None)  # S, while decoding
  causal: bool = struct.field(pytree_node=False, default=True)


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


def cross_mask(query: Tokens, key: Tokens) -> Bool[Array, "B L S"]:
  """A target sees all of the input of its own example."""
  return attention_mask(query, key, causal=False)


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


def dot_product_attention(
  query: Float[Array, "B L H A"],
  key: Float[Array, "B S K A"],
  value: Float[Array, "B S K A"],
  mask: Bool[Array, "B L S"],
  *,
  scale: float | None = None,
  softcap: float | None = None,
  bias: Float[Array, "B H L S"] | None = None,
  dropout_rate: float = 0.0,
  dropout_keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B L H A"]:
  """softmax(scale query key^T + bias) value (Vaswani et al. 2017); H query heads share K key/value heads.

  Scores and softmax are float32. A query that may attend to nothing (padding) gets a finite, meaningless value.

  Args:
    scale: None is 1 / sqrt(A).
    softcap: scores become softcap * tanh(scores / softcap) (Gemma Team 2024).
    bias: added to the scores of every head.
  """
  B, L, H, A = query.shape
  S, K = key.shape[1], key.shape[2]
  grouped = (query * (A**-0.5 if scale is None else scale)).reshape(B, L, K, H // K, A)
  scores = jnp.einsum("BLKGA,BSKA->BKGLS", grouped, key).astype(jnp.float32)
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  if bias is not None:
    scores = scores + bias.astype(jnp.float32).reshape(B, K, H // K, L, S)
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  weights = layers.dropout(weights, dropout_rate, dropout_keys)
  return jnp.einsum("BKGLS,BSKA->BLKGA", weights, value).reshape(B, L, H, A)


class Attention(nn.Module):
  """Attention with its four projections: over the layer's own input, or with `cross` over the encoder's output.

  With a cache, self-attention is over all that was decoded before, and cross-attention makes its keys and values once.
  """

  cfg: TransformerConfig
  kind: str = "global"
  cross: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"], ctx: Context, keys: Key[Array, " B"] | None) -> Float[Array, "B L D"]:
    c = self.cfg

    def project(name, source, heads, axis, scale=1.0):
      dense = layers.projection(c, name, (heads, c.head_width), ("embed", axis, "head_dim"), c.qkv_bias, scale=scale)
      y = dense(source, layers.fold(keys, 1 + ("query", *KV).index(name)))
      y = constrain(y, "act_batch", "act_len", f"act_{axis}", "act_head_dim")
      if c.qk_norm and name != "value":
        y = layers.norm(c, f"{name}_norm", axis="head_dim")(y)
      return y

    query = project("query", x, c.num_heads, "heads", c.query_scale)
    if self.cross:
      make = functools.partial(project, source=ctx.memory, heads=c.kv_heads, axis="kv_heads")
      key, value = (self.once(f"{name}s", functools.partial(make, name), ctx) for name in KV)
      mask, bias = ctx.memory_mask, None
    else:
      key, value = (project(name, x, c.kv_heads, "kv_heads") for name in KV)
      if ctx.rotary:
        query, key = rotate(query, *ctx.rotary[self.kind]), rotate(key, *ctx.rotary[self.kind])
      if ctx.cache_length is not None:
        key, value = self.append("keys", key, ctx), self.append("values", value, ctx)
      mask, bias = ctx.masks[self.kind], self.bias(ctx)
    assert mask is not None
    out = dot_product_attention(
      query,
      key,
      value,
      mask,
      scale=c.attention_scale,
      softcap=c.attention_softcap,
      bias=bias,
      dropout_rate=c.attention_dropout,
      dropout_keys=layers.fold(keys, 0),
    )
    axes = ("heads", "head_dim", "embed")
    dense = layers.projection(c, "out", (c.d_model,), axes, c.attention_out_bias, scale=c.residual_scale, contracted=2)
    return dense(out, layers.fold(keys, 4))

  def bias(self, ctx: Context) -> Float[Array, "B H L S"] | None:
    """The relative bias of every head, made from the table in each layer rather than kept for all of them."""
    if ctx.relative is None:
      return None
    c = self.cfg
    sizes = {"num_buckets": c.relative_buckets, "max_distance": c.relative_max_distance}
    buckets = relative_buckets(ctx.query.positions, ctx.key.positions, bidirectional=not ctx.causal, **sizes)
    return jnp.moveaxis(jnp.take(ctx.relative, buckets, axis=0), -1, 1)

  def once(self, name: str, make: Callable[[], Array], ctx: Context) -> Float[Array, "B S K A"]:
    """Keys or values of the encoder's output; while decoding, made by the first call and kept."""
    return make() if ctx.cache_length is None else self.variable("cache", name, make).value

  def append(self, name: str, new: Float[Array, "B L K A"], ctx: Context) -> Float[Array, "B S K A"]:
    """Writes this call's keys or values into the cache and returns all of it."""
    assert ctx.cache_length is not None and ctx.cache_index is not None
    batch, _, heads, width = new.shape
    cached = self.variable("cache", name, jnp.zeros, (batch, ctx.cache_length, heads, width), new.dtype)
    cached.value = jax.lax.dynamic_update_slice(cached.value, new, (0, ctx.cache_index, 0, 0))
    return cached.value


class CachedTokens(nn.Module):
  """Positions, segments and prefix of all that the cache holds; unwritten slots are padding (segment 0)."""

  @nn.compact
  def __call__(self, new: Tokens, length: int) -> tuple[Tokens, Int[Array, ""]]:
    """Appends `new`; returns all keys' tokens (S of them) and the slot where the new ones begin."""
    index = self.variable("cache", "index", jnp.zeros, (), jnp.int32)
    start = index.value

    def append(name: str, values: Array) -> Array:
      seen = self.variable("cache", name, jnp.zeros, (new.ids.shape[0], length), jnp.int32)
      seen.value = jax.lax.dynamic_update_slice(seen.value, values.astype(jnp.int32), (0, start))
      return seen.value

    positions, segments = append("positions", new.positions), append("segments", new.segments)
    prefix = None
    if new.prefix is not None or self.has_variable("cache", "prefix"):
      prefix = append("prefix", jnp.zeros_like(new.ids) if new.prefix is None else new.prefix)
    index.value = start + new.ids.shape[1]
    return Tokens(ids=segments, positions=positions, segments=segments, prefix=prefix), start


class CachedMemory(nn.Module):
  """The tokens of the encoder's output, of which cross-attention needs the segments; kept by the first call."""

  @nn.compact
  def __call__(self, tokens: Tokens | None) -> Tokens:
    segments = self.variable("cache", "segments", lambda: None if tokens is None else tokens.segments).value
    return Tokens(ids=segments, positions=segments, segments=segments)

"""The attention of a layer: its projections, what it gives a kernel (see `kernels`), and the decoding cache."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int, Key

from llmjax.config.model import TransformerConfig
from llmjax.distributed.sharding import constrain
from llmjax.models import layers
from llmjax.models.attention import kernels
from llmjax.models.attention.masks import AttentionSettings
from llmjax.models.rotary import rotate
from llmjax.types import Tokens

KV = ("key", "value")


@struct.dataclass
class Context:
  """What every layer of a stack shares; made once a forward pass. `kind` is "global" or "local"."""

  query: Tokens  # the tokens of this call
  key: Tokens  # what self-attention sees: the same, or while decoding all that is in the cache
  masks: dict[str, Array]  # {kind or "cross": Bool[B L S]}: query l may attend to key s; of kernels that read one
  rotary: dict[str, tuple[Array, Array]]  # {kind: sin and cos, each Float[B L A/2]}; empty without rotary positions
  dropout_keys: Array | None  # Key[B]
  relative: Array | None = None  # Float[R H], the table of relative biases
  memory: Array | None = None  # Float[B S D], the encoder's output; None while decoding, when caches hold what it gave
  memory_tokens: Tokens | None = None  # what cross-attention sees
  cache_index: Array | None = None  # Int[]: where in the cache this call's keys go
  cache_length: int | None = struct.field(pytree_node=False, default=None)  # S, while decoding
  causal: bool = struct.field(pytree_node=False, default=True)
  kernel: str = struct.field(pytree_node=False, default="xla")  # of self-attention, a name in `kernels.KERNELS`
  cross_kernel: str = struct.field(pytree_node=False, default="xla")


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
      dense = layers.make_projection(
        c, name, (heads, c.head_width), ("embed", axis, "head_dim"), c.qkv_bias, scale=scale
      )
      y = dense(source, layers.fold_in_rows(keys, 1 + ("query", *KV).index(name)))
      y = constrain(y, "act_batch", "act_len", f"act_{axis}", "act_head_dim")
      if c.qk_norm and name != "value":
        y = layers.make_norm(c, f"{name}_norm", axis="head_dim")(y)
      return y

    query = project("query", x, c.num_heads, "heads", c.query_scale)
    if self.cross:
      make = functools.partial(project, source=ctx.memory, heads=c.kv_heads, axis="kv_heads")
      key, value = (self.cached_cross_kv(f"{name}s", functools.partial(make, name), ctx) for name in KV)
    else:
      key, value = (project(name, x, c.kv_heads, "kv_heads") for name in KV)
      if ctx.rotary:
        query, key = rotate(query, *ctx.rotary[self.kind]), rotate(key, *ctx.rotary[self.kind])
      if ctx.cache_length is not None:
        key, value = self.update_cache("keys", key, ctx), self.update_cache("values", value, ctx)
    out = self.attend(query, key, value, ctx, layers.fold_in_rows(keys, 0))
    axes = ("heads", "head_dim", "embed")
    dense = layers.make_projection(
      c, "out", (c.d_model,), axes, c.attention_out_bias, scale=c.residual_scale, contracted=2
    )
    return dense(out, layers.fold_in_rows(keys, 4))

  def attend(
    self, query: Array, key: Array, value: Array, ctx: Context, keys: Key[Array, " B"] | None
  ) -> Float[Array, "B L H A"]:
    """What the kernel gives; `keys` are for dropout."""
    c, kind = self.cfg, "cross" if self.cross else self.kind
    seen = ctx.memory_tokens if self.cross else ctx.key
    assert seen is not None
    settings = AttentionSettings(
      scale=c.score_scale,
      causal=ctx.causal and not self.cross,
      window=c.window if kind == "local" else None,
      softcap=c.attention_softcap,
      buckets=c.relative_buckets,
      max_distance=c.relative_max_distance,
      dropout=c.attention_dropout,
    )
    return kernels.dot_product_attention(
      ctx.cross_kernel if self.cross else ctx.kernel,
      *(query, key, value, ctx.query, seen, settings),
      mask=ctx.masks.get(kind),
      relative=None if self.cross else ctx.relative,
      dropout_keys=keys,
    )

  def cached_cross_kv(self, name: str, make: Callable[[], Array], ctx: Context) -> Float[Array, "B S K A"]:
    """Keys or values of the encoder's output; while decoding, made by the first call and kept."""
    return make() if ctx.cache_length is None else self.variable("cache", name, make).value

  def update_cache(self, name: str, new: Float[Array, "B L K A"], ctx: Context) -> Float[Array, "B S K A"]:
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

"""The attention of a layer as a Linen module: projections, rotary positions, decoding cache, and the kernel's call."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Key

from llmjax.config.model import TransformerConfig
from llmjax.distributed.sharding import constrain
from llmjax.models import layers
from llmjax.models.attention.masks import AttentionSettings
from llmjax.models.attention.select import dot_product_attention
from llmjax.models.rotary import apply_rotary
from llmjax.types import Tokens


@struct.dataclass
class AttentionContext:
  """Inputs that all layers of a stack share, computed once per forward pass. A layer's kind is "global" or "local"."""

  query: Tokens  # tokens of this call, [B L]
  key: Tokens  # tokens that self-attention attends to, [B S]: those of this call, or all in the decoding cache
  masks: dict[str, Array]  # {kind or "cross": Bool[B L S]}, see `attention_mask`; only for kernels that read masks
  rotary: dict[str, tuple[Array, Array]]  # {kind: sin and cos, each Float[B L A/2]}; empty without rotary positions
  dropout_keys: Array | None  # Key[B]; None: no dropout
  relative: Array | None = None  # Float[R H], table of relative biases
  memory: Array | None = None  # Float[B S D], output of the encoder; None in decoding steps, which use the cache
  memory_tokens: Tokens | None = None  # tokens that cross-attention attends to, [B S]
  cache_index: Array | None = None  # Int[], slot of the cache where this call's keys and values begin
  cache_length: int | None = struct.field(pytree_node=False, default=None)  # number of slots; None: not decoding
  causal: bool = struct.field(pytree_node=False, default=True)
  kernel: str = struct.field(pytree_node=False, default="xla")  # of self-attention, a name in `select.KERNELS`
  cross_kernel: str = struct.field(pytree_node=False, default="xla")


class Attention(nn.Module):
  """Multi-head attention with its four projections (Vaswani et al. 2017, arXiv:1706.03762).

  While decoding, self-attention attends to all cached tokens, and cross-attention computes its keys and values once.

  Attributes:
    cfg: the model's config.
    kind: "global" or "local".
    cross: attend to the encoder's output instead of the layer's input.
  """

  cfg: TransformerConfig
  kind: str = "global"
  cross: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], ctx: AttentionContext, dropout_keys: Key[Array, " B"] | None
  ) -> Float[Array, "B L D"]:
    """Return the output of the attention, before it is added to the residual stream."""
    c = self.cfg
    query = self._project("query", x, dropout_keys)
    if self.cross:
      key = self.cached_cross_kv("keys", lambda: self._project("key", ctx.memory, dropout_keys), ctx)
      value = self.cached_cross_kv("values", lambda: self._project("value", ctx.memory, dropout_keys), ctx)
    else:
      key, value = self._project("key", x, dropout_keys), self._project("value", x, dropout_keys)
      if ctx.rotary:
        query, key = apply_rotary(query, *ctx.rotary[self.kind]), apply_rotary(key, *ctx.rotary[self.kind])
      if ctx.cache_length is not None:
        key, value = self.update_cache("keys", key, ctx), self.update_cache("values", value, ctx)
    out = self._attend(query, key, value, ctx, layers.fold_in_rows(dropout_keys, 0))
    axes = ("heads", "head_dim", "embed")
    out_projection = layers.make_projection(
      c, "out", (c.d_model,), axes, c.attention_out_bias, scale=c.residual_scale, contracted=2
    )
    return out_projection(out, layers.fold_in_rows(dropout_keys, 4))

  def _project(self, name: str, x: Array | None, dropout_keys: Array | None) -> Float[Array, "B L H A"]:
    """Return the "query", "key" or "value" of each head."""
    assert x is not None  # the encoder's output is None in decoding steps only, which use the cache
    c = self.cfg
    heads, axis = (c.num_heads, "heads") if name == "query" else (c.kv_heads, "kv_heads")
    scale = c.query_scale if name == "query" else 1.0
    axes = ("embed", axis, "head_dim")
    projection = layers.make_projection(c, name, (heads, c.head_width), axes, c.qkv_bias, scale=scale)
    y = projection(x, layers.fold_in_rows(dropout_keys, 1 + ("query", "key", "value").index(name)))
    y = constrain(y, "act_batch", "act_len", f"act_{axis}", "act_head_dim")
    if c.qk_norm and name != "value":
      y = layers.make_norm(c, f"{name}_norm", axis="head_dim")(y)
    return y

  def _attend(
    self, query: Array, key: Array, value: Array, ctx: AttentionContext, dropout_keys: Array | None
  ) -> Float[Array, "B L H A"]:
    c, kind = self.cfg, "cross" if self.cross else self.kind
    key_tokens = ctx.memory_tokens if self.cross else ctx.key
    assert key_tokens is not None
    settings = AttentionSettings(
      scale=c.score_scale,
      causal=ctx.causal and not self.cross,
      window=c.window if kind == "local" else None,
      softcap=c.attention_softcap,
      buckets=c.relative_buckets,
      max_distance=c.relative_max_distance,
      dropout=c.attention_dropout,
    )
    return dot_product_attention(
      ctx.cross_kernel if self.cross else ctx.kernel,
      query,
      key,
      value,
      ctx.query,
      key_tokens,
      settings,
      mask=ctx.masks.get(kind),
      relative=None if self.cross else ctx.relative,
      dropout_keys=dropout_keys,
    )

  def cached_cross_kv(self, name: str, compute: Callable[[], Array], ctx: AttentionContext) -> Float[Array, "B S K A"]:
    """Return keys or values of the encoder's output; while decoding, the first call computes and caches them."""
    return compute() if ctx.cache_length is None else self.variable("cache", name, compute).value

  def update_cache(self, name: str, new: Float[Array, "B L K A"], ctx: AttentionContext) -> Float[Array, "B S K A"]:
    """Write this call's keys or values into the cache, and return those of all slots."""
    assert ctx.cache_length is not None and ctx.cache_index is not None
    batch, _, heads, width = new.shape
    cached = self.variable("cache", name, jnp.zeros, (batch, ctx.cache_length, heads, width), new.dtype)
    cached.value = jax.lax.dynamic_update_slice(cached.value, new, (0, ctx.cache_index, 0, 0))
    return cached.value

"""A stack of Blocks, the encoder or the decoder of a Transformer, scanned or unrolled.

See `transformer.py` for the names of the parameters.
"""

from __future__ import annotations

import dataclasses
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
from llmjax.models.attention.module import Attention, AttentionContext
from llmjax.models.moe import MixtureOfExperts, Routing
from llmjax.models.remat import CHECKPOINT_POLICIES


@struct.dataclass
class LayerOutputs:
  """Outputs of a layer that the model returns; leaves of a stack are [N ...]."""

  hidden: Array  # Float[B L D], the residual stream after the layer
  routing: Routing | None = None  # None without experts


class Block(nn.Module):
  """One layer: self-attention, cross-attention if `cross`, and the MLP, each added to the residual stream.

  Attributes:
    cfg: the model's config.
    kind: "global" or "local", of the self-attention.
    cross: whether the layer attends to an encoder's output.
    attention_norm: whether there is a norm before the self-attention.
  """

  cfg: TransformerConfig
  kind: str = "global"
  cross: bool = False
  attention_norm: bool = True

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], ctx: AttentionContext, layer: Int[Array, ""]
  ) -> tuple[Float[Array, "B L D"], LayerOutputs]:
    """Return the residual stream after the layer, and the layer's outputs.

    Args:
      x: residual stream.
      ctx: inputs that all layers share.
      layer: number of the layer in its stack, on which dropout depends.
    """
    c = self.cfg
    site_keys = functools.partial(layers.fold_in_rows, layers.fold_in_rows(ctx.dropout_keys, layer))
    x = block_input = constrain(x, "act_batch", "act_len", "act_embed")

    h = Attention(c, self.kind, name="attention")(self._pre_norm(x, "attention"), ctx, site_keys(0))
    x = self._add_to_stream(x, h, "attention", site_keys(1))
    if self.cross:
      h = Attention(c, cross=True, name="cross_attention")(self._pre_norm(x, "cross"), ctx, site_keys(3))
      x = self._add_to_stream(x, h, "cross", site_keys(4))

    h = self._pre_norm(block_input if c.parallel_residual else x, "mlp")
    routing = None
    if c.num_experts:
      h, routing = MixtureOfExperts(c, name="mlp")(h, site_keys(5), ctx.query.segments)
    else:
      h = layers.Mlp(c, c.ff_width, name="mlp")(h, site_keys(5))
    x = self._add_to_stream(x, h, "mlp", site_keys(2))
    return x, LayerOutputs(x, routing)

  def _pre_norm(self, x: Array, name: str) -> Float[Array, "B L D"]:
    """Return the input of a sublayer, which is called "attention", "cross" or "mlp"."""
    has_norm = self.cfg.norm_placement != "post" and (self.attention_norm or name != "attention")
    return layers.make_norm(self.cfg, f"{name}_norm")(x) if has_norm else x

  def _add_to_stream(
    self, x: Array, h: Array, name: str, dropout_keys: Key[Array, " B"] | None
  ) -> Float[Array, "B L D"]:
    """Return the residual stream x with the output h of a sublayer added."""
    c = self.cfg
    if c.norm_placement == "sandwich":
      h = layers.make_norm(c, f"{name}_post_norm")(h)
    x = x + layers.dropout(h, c.dropout, dropout_keys)
    return layers.make_norm(c, f"{name}_norm")(x) if c.norm_placement == "post" else x


class LayerGroup(nn.Module):
  """Consecutive layers of different kinds, such as ("local", "global"): the unit that a scanned stack repeats.

  Attributes:
    kinds: kind of each layer.
    make_block: Block with all attributes but `kind` and `name`.
  """

  kinds: tuple[str, ...]
  make_block: Callable[..., Block]

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], ctx: AttentionContext, layer: Int[Array, ""]
  ) -> tuple[Float[Array, "B L D"], LayerOutputs]:
    """Return the residual stream after the group, and the outputs of its layers [n ...].

    Args:
      x: residual stream.
      ctx: inputs that all layers share.
      layer: number of the group's first layer in its stack.
    """
    outputs = []
    for i, kind in enumerate(self.kinds):
      x, layer_outputs = self.make_block(kind=kind, name=f"sublayer_{i}")(x, ctx, layer + i)
      outputs.append(layer_outputs)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


class LayerStack(nn.Module):
  """N Blocks and the final norm.

  Attributes:
    cfg: the model's config.
    depth: N.
    cross: whether layers attend to an encoder's output.
  """

  cfg: TransformerConfig
  depth: int
  cross: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"], ctx: AttentionContext) -> tuple[Float[Array, "B L D"], LayerOutputs]:
    """Return the hidden states after the final norm, and the outputs of all layers [N ...].

    Args:
      x: embeddings.
      ctx: inputs that all layers share.
    """
    c = self.cfg
    block = Block
    if c.remat != "none":
      # Inside a scan, XLA cannot undo rematerialisation by common subexpression elimination.
      block = nn.remat(Block, prevent_cse=not c.scan, policy=CHECKPOINT_POLICIES[c.remat])
    make_block = functools.partial(block, c, cross=self.cross)
    if c.positions == "relative":
      axes = ("buckets", "heads")
      table = layers.Embedding(
        c.relative_buckets, c.num_heads, axes, c.bias_stddev, c.dtype, c.param_dtype, name="relative"
      )
      ctx = dataclasses.replace(ctx, relative=table.table)

    outputs: list[LayerOutputs] = []  # leaves [n ...] of n consecutive layers each

    def apply_layer(x: Array, i: int, name: str) -> Array:
      attention_norm = c.first_attention_norm or i > 0
      x, layer_outputs = make_block(kind=c.kind(i), name=name, attention_norm=attention_norm)(x, ctx, jnp.asarray(i))
      outputs.append(jax.tree.map(lambda y: y[None], layer_outputs))
      return x

    num_first, period, repeats = c.layout(self.depth) if c.scan else (self.depth, 1, 0)
    for i in range(num_first):
      x = apply_layer(x, i, "first" if c.scan else f"layers_{i}")
    if repeats:
      kinds = tuple(c.kind(num_first + i) for i in range(period))
      scan = functools.partial(
        nn.scan,
        variable_axes={"params": 0, "cache": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=repeats,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      if period == 1:
        scanned: nn.Module = scan(block)(c, kinds[0], self.cross, name="layers")
      else:
        scanned = scan(LayerGroup)(kinds, make_block, name="layers")
      x, scanned_outputs = scanned(x, ctx, num_first + period * jnp.arange(repeats))
      if period > 1:  # [groups, layers of a group, ...]
        scanned_outputs = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), scanned_outputs)
      outputs.append(scanned_outputs)
    for i in range(num_first + period * repeats, self.depth):
      x = apply_layer(x, i, f"last_{i - num_first - period * repeats}")
    x = layers.make_norm(c, "final_norm")(x) if c.norm_placement != "post" else x
    return x, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)

"""The parts of a Block that are not attention: projections, norms, embeddings, the MLP, keyed dropout."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from llmjax.config.model import LoraConfig, TransformerConfig
from llmjax.distributed.sharding import constrain, num_shards
from llmjax.models.mup import kernel_init_scale, kernel_input_multiplier

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu": lambda x: nn.gelu(x, approximate=True),  # GPT-2's tanh form
  "gelu_exact": lambda x: nn.gelu(x, approximate=False),
  "relu": nn.relu,
  "relu_squared": lambda x: jnp.square(nn.relu(x)),  # So et al. 2021, Primer
  "silu": nn.silu,
}


def normal_initializer(stddev: float) -> nn.initializers.Initializer:
  """Normal initialisation; a standard deviation of 0 is zeros."""
  return nn.initializers.normal(stddev) if stddev else nn.initializers.zeros


def declare_parameter(
  module: nn.Module,
  name: str,
  init: nn.initializers.Initializer,
  axes: tuple[str, ...],
  shape: tuple[int, ...],
  dtype: str,
) -> Array:
  """A parameter of `module` with a logical name for each of its dimensions."""
  return cast(Array, module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(dtype)))


def scale(x: Array, multiplier: float) -> Array:
  """x * multiplier; where that is 1, the same program as without."""
  return x if multiplier == 1 else x * multiplier


class Projection(nn.Module):
  """y[..., *features] = x[..., *inputs] kernel + bias, contracting the last `contracted` dimensions of x.

  The product runs on flattened matrices: XLA's CPU and GPU libraries are quickest there, and the parameter keeps
  its meaningful shape, such as [D H A].
  """

  features: tuple[int, ...]
  axes: tuple[str, ...]  # logical names of the kernel's dimensions: inputs, then features
  stddev: float | None  # of the kernel; None = 1 / sqrt(inputs)
  use_bias: bool
  dtype: str
  param_dtype: str
  scale: float = 1.0  # multiplies the standard deviation
  contracted: int = 1
  lora: LoraConfig | None = None
  multiplier: float = 1.0  # of x

  @nn.compact
  def __call__(self, x: Array, keys: Key[Array, " B"] | None = None) -> Array:
    """`keys` are for the dropout of an adapter."""
    n = self.contracted
    inputs, batch = x.shape[x.ndim - n :], x.shape[: x.ndim - n]
    stddev = self.scale * (math.prod(inputs) ** -0.5 if self.stddev is None else self.stddev)
    kernel = declare_parameter(
      self, "kernel", normal_initializer(stddev), self.axes, inputs + self.features, self.param_dtype
    )
    matrix = kernel.astype(self.dtype).reshape(math.prod(inputs), math.prod(self.features))
    x = scale(x.astype(self.dtype), self.multiplier)
    rows = batch if num_shards("act_len") > 1 else (-1,)  # a length that is cut would be gathered to be flattened
    y = x.reshape(*rows, math.prod(inputs)) @ matrix
    if self.lora is not None and re.fullmatch(self.lora.targets, "/".join(self.path)):
      y = y + self.adapt(dropout(x, self.lora.dropout, keys).reshape(*rows, math.prod(inputs)), inputs)
    y = y.reshape(*batch, *self.features)
    if self.use_bias:
      bias = declare_parameter(self, "bias", nn.initializers.zeros, self.axes[n:], self.features, self.param_dtype)
      y = y + bias.astype(self.dtype).reshape((1,) * len(batch) + self.features)
    return y

  def adapt(self, x: Float[Array, "*T I"], inputs: tuple[int, ...]) -> Float[Array, "*T O"]:
    """alpha / rank * x A B of a low-rank adapter (Hu et al. 2021); B begins as zeros."""
    assert self.lora is not None
    rank, n = self.lora.rank, self.contracted
    first = normal_initializer(math.prod(inputs) ** -0.5)
    a = declare_parameter(self, "lora_a", first, (*self.axes[:n], "lora"), (*inputs, rank), self.param_dtype)
    last = nn.initializers.zeros
    b = declare_parameter(self, "lora_b", last, ("lora", *self.axes[n:]), (rank, *self.features), self.param_dtype)
    x = x @ a.astype(self.dtype).reshape(-1, rank) @ b.astype(self.dtype).reshape(rank, -1)
    return x * jnp.asarray(self.lora.scale, x.dtype)


def make_projection(
  cfg: TransformerConfig,
  name: str | None,
  features: tuple[int, ...],
  axes: tuple[str, ...],
  use_bias: bool,
  *,
  scale: float = 1.0,
  contracted: int = 1,
) -> Projection:
  """A projection initialised as the config says, its standard deviation times `scale`."""
  settings = (features, axes, cfg.init_stddev, use_bias, cfg.dtype, cfg.param_dtype)
  return Projection(
    *settings, scale * kernel_init_scale(cfg, axes), contracted, cfg.lora, kernel_input_multiplier(cfg, axes), name=name
  )


class Norm(nn.Module):
  """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the last dimension; statistics in float32."""

  kind: str
  epsilon: float
  use_bias: bool
  zero_centered: bool
  dtype: str
  param_dtype: str
  axis: str = "norm"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (1,) * (x.ndim - 1) + x.shape[-1:]

    def vector(name, init):
      return (
        declare_parameter(self, name, init, (self.axis,), x.shape[-1:], self.param_dtype)
        .astype(jnp.float32)
        .reshape(shape)
      )

    y = x.astype(jnp.float32)
    if self.kind == "layernorm":
      y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
    if self.zero_centered:
      y = y * (1 + vector("scale", nn.initializers.zeros))
    else:
      y = y * vector("scale", nn.initializers.ones)
    if self.use_bias:
      y = y + vector("bias", nn.initializers.zeros)
    return y.astype(self.dtype)


def make_norm(cfg: TransformerConfig, name: str | None, axis: str = "norm") -> Norm:
  """The norm that the config asks for."""
  return Norm(
    *(cfg.norm, cfg.norm_epsilon, cfg.norm_bias, cfg.norm_zero_centered, cfg.dtype, cfg.param_dtype, axis), name=name
  )


class Bias(nn.Module):
  """A vector added to the last dimension."""

  size: int
  axis: str
  param_dtype: str

  @nn.compact
  def __call__(self, x: Array) -> Array:
    bias = declare_parameter(self, "bias", nn.initializers.zeros, (self.axis,), (self.size,), self.param_dtype)
    return x + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (self.size,))


class Embedding(nn.Module):
  """A table with a row an entry. Also the tied output projection, by `attend`."""

  size: int
  width: int
  axes: tuple[str, str]  # logical names of rows and columns
  stddev: float
  dtype: str
  param_dtype: str

  def setup(self) -> None:
    self.table = declare_parameter(
      self, "table", normal_initializer(self.stddev), self.axes, (self.size, self.width), self.param_dtype
    )

  def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    # Gathering rows of a table cut along its width costs two all-to-alls a step; so it is laid out whole first.
    table = constrain(self.table.astype(self.dtype), self.axes[0], None)
    return constrain(jnp.take(table, ids, axis=0), "act_batch", "act_len", "act_embed")

  def attend(self, x: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
    return jnp.einsum("BLD,VD->BLV", x.astype(self.dtype), self.table.astype(self.dtype))


def row_keys(key: Key[Array, ""], rows: Int[Array, " B"]) -> Key[Array, " B"]:
  """A key for every global row, so that meshes, hosts and microbatches cannot change what is dropped."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def fold_in_rows(keys: Key[Array, " B"] | None, data: int | Int[Array, ""]) -> Key[Array, " B"] | None:
  """Every row's key, folded with a layer number or the number of a place inside a layer."""
  return None if keys is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def dropout(x: Array, rate: float, keys: Key[Array, " B"] | None) -> Array:
  """Drops with probability `rate` and rescales; runs iff keys are given. The first dimension of x is the row."""
  if keys is None or rate == 0.0:
    return x
  keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1.0 - rate, x.shape[1:]))(keys)
  return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)


class Mlp(nn.Module):
  """activation(x W_up) W_down, or with a gate activation(x W_gate) * (x W_up) W_down (Shazeer 2020)."""

  cfg: TransformerConfig
  width: int  # F

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"], keys: Key[Array, " B"] | None) -> Float[Array, "B L D"]:
    c = self.cfg

    def up(name, place):
      return make_projection(c, name, (self.width,), ("embed", "mlp"), c.mlp_bias)(x, fold_in_rows(keys, place))

    h = ACTIVATIONS[c.activation](up("gate", 1)) * up("up", 2) if c.gated else ACTIVATIONS[c.activation](up("up", 2))
    h = dropout(constrain(h, "act_batch", "act_len", "act_mlp"), c.mlp_dropout, keys)
    down = make_projection(c, "down", (c.d_model,), ("mlp", "embed"), c.mlp_bias, scale=c.residual_scale)
    return down(h, fold_in_rows(keys, 3))

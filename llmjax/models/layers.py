"""The layers of a Block besides attention: projections, norms, embeddings, the MLP, and dropout keyed by row."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from llmjax.config.model import LoraConfig, TransformerConfig
from llmjax.distributed.sharding import constrain, num_shards
from llmjax.models.mup import kernel_init_scale, kernel_input_multiplier

# {name in model.activation: function}
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
  "gelu": lambda x: nn.gelu(x, approximate=True),  # the tanh approximation of GPT-2
  "gelu_exact": lambda x: nn.gelu(x, approximate=False),
  "relu": nn.relu,
  "relu_squared": lambda x: jnp.square(nn.relu(x)),  # Primer, So et al. 2021, arXiv:2109.08668
  "silu": nn.silu,
}


def normal_initializer(stddev: float) -> nn.initializers.Initializer:
  """Return a normal initializer with this standard deviation; zeros for 0."""
  return nn.initializers.normal(stddev) if stddev else nn.initializers.zeros


def declare_parameter(
  module: nn.Module,
  name: str,
  init: nn.initializers.Initializer,
  axes: tuple[str, ...],
  shape: tuple[int, ...],
  dtype: str,
) -> Array:
  """Declare a parameter of a Linen module.

  Args:
    module: the module.
    name: name of the parameter.
    init: initializer.
    axes: logical axis name of each dimension.
    shape: shape.
    dtype: dtype in which the parameter is stored.
  """
  return cast(Array, module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(dtype)))


def scale(x: Array, multiplier: float) -> Array:
  """Return x * multiplier. No-op (unchanged jaxpr) if the multiplier is 1."""
  return x if multiplier == 1 else x * multiplier


class Projection(nn.Module):
  """Linear map y[..., *features] = x[..., *inputs] kernel + bias, optionally with a low-rank adapter.

  The product runs on matrices, which XLA's libraries on CPU and GPU compute fastest. The parameter keeps its shape,
  such as [D H A].

  Attributes:
    features: output dimensions.
    axes: logical axis names of the kernel's dimensions: inputs, then features.
    stddev: initial standard deviation of the kernel; None: 1 / sqrt(fan-in).
    use_bias: add a bias [*features].
    dtype: dtype of the computation.
    param_dtype: dtype of the parameters.
    scale: factor of the initial standard deviation.
    contracted: number of input dimensions, the last ones of x.
    lora: adapters of the model; applied if `targets` matches the projection's path.
    multiplier: factor of x (muP).
  """

  features: tuple[int, ...]
  axes: tuple[str, ...]
  stddev: float | None
  use_bias: bool
  dtype: str
  param_dtype: str
  scale: float = 1.0
  contracted: int = 1
  lora: LoraConfig | None = None
  multiplier: float = 1.0

  @nn.compact
  def __call__(self, x: Float[Array, ...], dropout_keys: Key[Array, " B"] | None = None) -> Float[Array, ...]:
    """Return the projection of x [B ... *inputs]; `dropout_keys` are for the adapter's dropout."""
    n = self.contracted
    inputs, batch = x.shape[x.ndim - n :], x.shape[: x.ndim - n]
    fan_in = math.prod(inputs)
    stddev = self.scale * (fan_in**-0.5 if self.stddev is None else self.stddev)
    kernel = declare_parameter(
      self, "kernel", normal_initializer(stddev), self.axes, inputs + self.features, self.param_dtype
    )
    matrix = kernel.astype(self.dtype).reshape(fan_in, math.prod(self.features))
    x = scale(x.astype(self.dtype), self.multiplier)
    # Flattening rows and positions into one dimension would gather a sharded sequence.
    rows = batch if num_shards("act_len") > 1 else (-1,)
    y = x.reshape(*rows, fan_in) @ matrix
    if self.lora is not None and re.fullmatch(self.lora.targets, "/".join(self.path)):
      adapter_input = dropout(x, self.lora.dropout, dropout_keys).reshape(*rows, fan_in)
      y = y + self._low_rank_product(self.lora, adapter_input, inputs)
    y = y.reshape(*batch, *self.features)
    if self.use_bias:
      bias = declare_parameter(self, "bias", nn.initializers.zeros, self.axes[n:], self.features, self.param_dtype)
      y = y + bias.astype(self.dtype).reshape((1,) * len(batch) + self.features)
    return y

  def _low_rank_product(
    self, lora: LoraConfig, x: Float[Array, "*T I"], inputs: tuple[int, ...]
  ) -> Float[Array, "*T O"]:
    """Return alpha / rank * x A B (LoRA, Hu et al. 2021, arXiv:2106.09685). B is initially zero."""
    n = self.contracted
    init_a, init_b = normal_initializer(math.prod(inputs) ** -0.5), nn.initializers.zeros
    axes_a, axes_b = (*self.axes[:n], "lora"), ("lora", *self.axes[n:])
    lora_a = declare_parameter(self, "lora_a", init_a, axes_a, (*inputs, lora.rank), self.param_dtype)
    lora_b = declare_parameter(self, "lora_b", init_b, axes_b, (lora.rank, *self.features), self.param_dtype)
    x = x @ lora_a.astype(self.dtype).reshape(-1, lora.rank) @ lora_b.astype(self.dtype).reshape(lora.rank, -1)
    return x * jnp.asarray(lora.scale, x.dtype)


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
  """Return a projection with the initial values, dtypes, muP factors and adapters of a config.

  Args:
    cfg: the model's config.
    name: name of the submodule; None in `setup`, where Linen names it after the attribute.
    features: see `Projection`.
    axes: see `Projection`.
    use_bias: see `Projection`.
    scale: factor of the initial standard deviation, besides that of muP.
    contracted: see `Projection`.
  """
  return Projection(
    features=features,
    axes=axes,
    stddev=cfg.init_stddev,
    use_bias=use_bias,
    dtype=cfg.dtype,
    param_dtype=cfg.param_dtype,
    scale=scale * kernel_init_scale(cfg, axes),
    contracted=contracted,
    lora=cfg.lora,
    multiplier=kernel_input_multiplier(cfg, axes),
    name=name,
  )


class Norm(nn.Module):
  """LayerNorm (Ba et al. 2016, arXiv:1607.06450) or RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467).

  Statistics over the last dimension are float32.

  Attributes:
    kind: "layernorm" or "rmsnorm".
    epsilon: added to the variance.
    use_bias: add a bias.
    zero_centered: the scale is stored minus 1 (Gemma).
    dtype: dtype of the output.
    param_dtype: dtype of the parameters.
    axis: logical axis name of the parameters.
  """

  kind: str
  epsilon: float
  use_bias: bool
  zero_centered: bool
  dtype: str
  param_dtype: str
  axis: str = "norm"

  @nn.compact
  def __call__(self, x: Float[Array, ...]) -> Float[Array, ...]:
    """Return x normalised over its last dimension."""
    shape = (1,) * (x.ndim - 1) + x.shape[-1:]

    def vector(name: str, init: nn.initializers.Initializer) -> Array:
      parameter = declare_parameter(self, name, init, (self.axis,), x.shape[-1:], self.param_dtype)
      return parameter.astype(jnp.float32).reshape(shape)

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
  """Return the norm of a config.

  Args:
    cfg: the model's config.
    name: name of the submodule; None in `setup`.
    axis: logical axis name of the parameters.
  """
  return Norm(
    kind=cfg.norm,
    epsilon=cfg.norm_epsilon,
    use_bias=cfg.norm_bias,
    zero_centered=cfg.norm_zero_centered,
    dtype=cfg.dtype,
    param_dtype=cfg.param_dtype,
    axis=axis,
    name=name,
  )


class Bias(nn.Module):
  """A bias that is added to the last dimension.

  Attributes:
    size: length of the last dimension.
    axis: its logical axis name.
    param_dtype: dtype of the parameter.
  """

  size: int
  axis: str
  param_dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, ...]) -> Float[Array, ...]:
    """Return x + bias."""
    bias = declare_parameter(self, "bias", nn.initializers.zeros, (self.axis,), (self.size,), self.param_dtype)
    return x + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (self.size,))


class Embedding(nn.Module):
  """An embedding table, which is also the output projection of a model with tied embeddings (`attend`).

  Attributes:
    size: number of rows.
    width: length of a row.
    axes: logical axis names of rows and columns.
    stddev: initial standard deviation.
    dtype: dtype of the computation.
    param_dtype: dtype of the table.
  """

  size: int
  width: int
  axes: tuple[str, str]
  stddev: float
  dtype: str
  param_dtype: str

  def setup(self) -> None:
    self.table = declare_parameter(
      self, "table", normal_initializer(self.stddev), self.axes, (self.size, self.width), self.param_dtype
    )

  def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Return the embeddings of ids."""
    # Looking up rows of a table that is sharded along its width costs two all-to-alls per step. Gather the width first.
    table = constrain(self.table.astype(self.dtype), self.axes[0], None)
    return constrain(jnp.take(table, ids, axis=0), "act_batch", "act_len", "act_embed")

  def attend(self, x: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
    """Return the logits of hidden states: their products with all rows of the table."""
    return jnp.einsum("BLD,VD->BLV", x.astype(self.dtype), self.table.astype(self.dtype))


def row_keys(key: Key[Array, ""], rows: Int[Array, " B"]) -> Key[Array, " B"]:
  """Return a random key for each row, which depends on the row's number in the global batch only.

  The mesh, the number of processes and microbatches therefore cannot change which values dropout drops.

  Args:
    key: key of the step.
    rows: numbers of the rows in the global batch.
  """
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def fold_in_rows(keys: Key[Array, " B"] | None, data: int | Int[Array, ""]) -> Key[Array, " B"] | None:
  """Fold a number, such as that of a layer or of a dropout site in a layer, into the key of each row."""
  return None if keys is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def dropout(x: Float[Array, "B ..."], rate: float, keys: Key[Array, " B"] | None) -> Float[Array, "B ..."]:
  """Return x after dropout (Srivastava et al. 2014), rescaled by 1 / (1 - rate).

  Args:
    x: activations; the first dimension is the row.
    rate: probability that a value is dropped.
    keys: random key of each row; None: no dropout.
  """
  if keys is None or rate == 0.0:
    return x
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
  return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)


class Mlp(nn.Module):
  """activation(x W_up) W_down; gated: (activation(x W_gate) * (x W_up)) W_down (Shazeer 2020, arXiv:2002.05202).

  Attributes:
    cfg: the model's config.
    width: F.
  """

  cfg: TransformerConfig
  width: int

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"], dropout_keys: Key[Array, " B"] | None) -> Float[Array, "B L D"]:
    """Return the output of the MLP."""
    c = self.cfg

    def project_up(name: str, site: int) -> Array:
      projection = make_projection(c, name, (self.width,), ("embed", "mlp"), c.mlp_bias)
      return projection(x, fold_in_rows(dropout_keys, site))

    activation = ACTIVATIONS[c.activation]
    h = activation(project_up("gate", 1)) * project_up("up", 2) if c.gated else activation(project_up("up", 2))
    h = dropout(constrain(h, "act_batch", "act_len", "act_mlp"), c.mlp_dropout, dropout_keys)
    down = make_projection(c, "down", (c.d_model,), ("mlp", "embed"), c.mlp_bias, scale=c.residual_scale)
    return down(h, fold_in_rows(dropout_keys, 3))

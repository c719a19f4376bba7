"""Sparse mixture of experts, which replaces the MLP of a Block: each token is processed by the k experts of its router.

Experts have no capacity, and no token is dropped. The output of a token therefore depends on nothing but the token,
unless `model.expert_capacity` bounds what devices send each other. Each device sorts its own tokens by expert. If
experts are sharded, an all-to-all sends tokens to the devices of their experts, and another one returns the results
(GShard, Lepikhin et al. 2020, arXiv:2006.16668).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int, Key

from llmjax.config.model import TransformerConfig
from llmjax.distributed import sharding
from llmjax.distributed.sharding import constrain
from llmjax.models import layers
from llmjax.models.mup import kernel_init_scale


@struct.dataclass
class Routing:
  """Routing statistics of a layer over the tokens of a batch, without padding; leaves of a stack are [N ...]."""

  counts: Array  # Float[E], number of tokens that are routed to each expert
  probabilities: Array  # Float[E], sum over tokens of the router's probabilities
  tokens: Array  # Float[], number of tokens


def route_tokens(
  logits: Float[Array, "T E"], experts_per_token: int, normalize: bool
) -> tuple[Float[Array, "T k"], Int[Array, "T k"], Float[Array, "T E"]]:
  """Return the k most probable experts of each token (Shazeer et al. 2017, arXiv:1701.06538).

  Args:
    logits: scores of the router.
    experts_per_token: k.
    normalize: weights of a token's experts sum to 1.

  Returns:
    Weights of the chosen experts, their numbers, and the probabilities of all experts.
  """
  probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
  weights, experts = jax.lax.top_k(probabilities, experts_per_token)
  if normalize:
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
  return weights, experts, probabilities


def mixture_of_experts(
  x: Float[Array, "B L D"],
  weights: Float[Array, "B L k"],
  experts: Int[Array, "B L k"],
  kernels: Mapping[str, Float[Array, "E I O"]],
  *,
  activation: Callable[[Array], Array],
  capacity: float | None = None,
  expert_axes: tuple[str, ...] = (),
  width_axes: tuple[str, ...] = (),
) -> Float[Array, "B L D"]:
  """Return the weighted sum of the outputs of each token's experts, for the tokens of one device.

  Args:
    x: inputs.
    weights: weights of the chosen experts.
    experts: numbers of the chosen experts.
    kernels: "up" [E D F], "down" [E F D] and, if gated, "gate" [E D F]. E and F are this device's parts.
    activation: activation function.
    capacity: see `exchange_tokens`.
    expert_axes: mesh axes that shard E, inside `sharding.per_device`.
    width_axes: mesh axes that shard F.
  """
  B, L, k = experts.shape
  num_experts = kernels["up"].shape[0] * math.prod(map(jax.lax.axis_size, expert_axes))
  order, sizes = sort_by_expert(experts.reshape(-1), num_experts)
  rows = jnp.take(x.reshape(B * L, -1), order // k, axis=0)  # a token has k rows, one for each of its experts
  local_experts = functools.partial(apply_experts, kernels=kernels, activation=activation)
  if expert_axes:
    out = exchange_tokens(rows, sizes, local_experts, capacity, expert_axes)
  else:
    out = local_experts(rows, sizes)
  out = jnp.take(out, jnp.argsort(order), axis=0).reshape(B, L, k, -1)
  y = jnp.sum(out * weights[..., None], axis=2)
  return jax.lax.psum(y, width_axes) if width_axes else y


def sort_by_expert(experts: Int[Array, " R"], num_experts: int) -> tuple[Int[Array, " R"], Int[Array, " E"]]:
  """Return the order that sorts rows by expert, and the number of rows of each expert."""
  return jnp.argsort(experts, stable=True), jnp.bincount(experts, length=num_experts).astype(jnp.int32)


def apply_experts(
  rows: Float[Array, "R D"],
  sizes: Int[Array, " E"],
  *,
  kernels: Mapping[str, Float[Array, "E I O"]],
  activation: Callable[[Array], Array],
) -> Float[Array, "R D"]:
  """Return each row after the MLP of its expert: one matrix product per expert, over a run of rows.

  Args:
    rows: sorted by expert.
    sizes: number of rows of each expert.
    kernels: see `mixture_of_experts`.
    activation: activation function.
  """
  up = jax.lax.ragged_dot(rows, kernels["up"], sizes)
  h = activation(jax.lax.ragged_dot(rows, kernels["gate"], sizes)) * up if "gate" in kernels else activation(up)
  return jax.lax.ragged_dot(h, kernels["down"], sizes)


def exchange_tokens(
  rows: Float[Array, "R D"],
  sizes: Int[Array, " E"],
  local_experts: Callable[[Array, Array], Array],
  capacity: float | None,
  axes: tuple[str, ...],
) -> Float[Array, "R D"]:
  """Send each row to the device of its expert, apply the experts there, and return the results to the row's device.

  Args:
    rows: sorted by expert.
    sizes: number of rows of each expert, over all E experts.
    local_experts: `apply_experts` with the kernels of this device.
    capacity: capacity factor per pair of devices. A device sends each of n devices at most capacity * R / n rows, and
      the rows that overflow get zeros. None: a device may send R rows to each, so that no row is dropped.
    axes: mesh axes that shard experts.
  """
  devices = math.prod(map(jax.lax.axis_size, axes))
  R, slots = rows.shape[0], rows.shape[0]
  if capacity is not None:
    slots = min(R, math.ceil(capacity * R / devices))
  all_to_all = functools.partial(jax.lax.all_to_all, axis_name=axes, split_axis=0, concat_axis=0)

  # Write each row into a slot of the send buffer of its expert's device.
  expert_sizes = sizes.reshape(devices, -1)  # [devices, experts of a device]
  device_sizes = jnp.sum(expert_sizes, axis=1)
  device = jnp.repeat(jnp.arange(devices), device_sizes, total_repeat_length=R)
  slot = jnp.arange(R) - jnp.take(jnp.cumsum(device_sizes) - device_sizes, device)
  sent = jnp.zeros((devices, slots, rows.shape[1]), rows.dtype).at[device, slot].set(rows, mode="drop")
  expert_ends = jnp.minimum(jnp.cumsum(expert_sizes, axis=1), slots)
  received, expert_ends = all_to_all(sent), all_to_all(expert_ends)  # from each device, its rows for experts here

  # Slots beyond the last row of a device get a number past the last expert; they are sorted to the end and ignored.
  expert = jnp.sum(jnp.arange(slots)[None, :, None] >= expert_ends[:, None, :], axis=2)
  order, counts = sort_by_expert(expert.reshape(-1), expert_ends.shape[1] + 1)
  out = local_experts(jnp.take(received.reshape(devices * slots, -1), order, axis=0), counts[:-1])
  out = jnp.take(out, jnp.argsort(order), axis=0).reshape(sent.shape)
  returned: Array = all_to_all(out)
  return returned.at[device, slot].get(mode="fill", fill_value=0)


class MixtureOfExperts(nn.Module):
  """Sum over a token's k experts of weight * expert(x), and sigmoid(x w) * shared(x) if there is a shared expert.

  Attributes:
    cfg: the model's config.
  """

  cfg: TransformerConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], dropout_keys: Key[Array, " B"] | None, segments: Int[Array, "B L"]
  ) -> tuple[Float[Array, "B L D"], Routing]:
    """Return the output and the routing statistics.

    Args:
      x: inputs.
      dropout_keys: random key of each row; None: no dropout.
      segments: 0 for padding, which is not counted in the statistics.
    """
    c = self.cfg
    B, L, D = x.shape
    E, F, k = c.num_experts, c.expert_width, c.experts_per_token
    router = layers.make_projection(c, "router", (E,), ("embed", "experts"), False)
    weights, experts, probabilities = route_tokens(router(x).reshape(B * L, E), k, c.normalize_router)

    shapes = {"up": (D, F), "gate": (D, F), "down": (F, D)}
    axes = {"up": ("embed", "mlp"), "gate": ("embed", "mlp"), "down": ("mlp", "embed")}
    names = ("up", "gate", "down") if c.gated else ("up", "down")
    kernels = {name: self._declare_kernel(name, (E, *shapes[name]), axes[name]) for name in names}
    # Each device needs the whole width D of its tokens.
    kernel_axes = {name: ("experts", *(None if axis == "embed" else axis for axis in axes[name])) for name in names}
    token_axes = (sharding.axis_if_divisible("act_batch", B), sharding.axis_if_divisible("act_len", L), None)
    apply: Callable[..., Array] = functools.partial(
      mixture_of_experts, activation=layers.ACTIVATIONS[c.activation], capacity=c.expert_capacity
    )
    if not self.is_initializing():
      mesh_axes = {"expert_axes": sharding.mesh_axes_of("experts"), "width_axes": sharding.mesh_axes_of("mlp")}
      arguments = (token_axes, token_axes, token_axes, kernel_axes)
      apply = sharding.per_device(functools.partial(apply, **mesh_axes), arguments, token_axes)
    y = apply(x.astype(c.dtype), weights.reshape(B, L, k).astype(c.dtype), experts.reshape(B, L, k), kernels)
    y = constrain(y, "act_batch", "act_len", "act_embed")
    if c.shared_expert_d_ff:
      gate = layers.make_projection(c, "shared_gate", (1,), ("embed", "classes"), False)(x)
      y = y + jax.nn.sigmoid(gate) * layers.Mlp(c, c.shared_expert_d_ff, name="shared")(x, None)

    is_token = (segments.reshape(-1) > 0).astype(jnp.float32)
    chosen = jax.nn.one_hot(experts, E, dtype=jnp.float32).sum(axis=1)
    routing = Routing(is_token @ chosen, is_token @ probabilities, jnp.sum(is_token))
    return layers.dropout(y, c.mlp_dropout, dropout_keys), routing

  def _declare_kernel(self, name: str, shape: tuple[int, int, int], axes: tuple[str, str]) -> Float[Array, "E I O"]:
    """Declare the kernels of all experts, cast to the dtype of the computation.

    Args:
      name: "up", "gate" or "down".
      shape: (E, inputs, outputs).
      axes: logical axis names of inputs and outputs.
    """
    c = self.cfg
    scale = c.residual_scale if name == "down" else 1.0
    scale *= kernel_init_scale(c, axes)
    init = layers.normal_initializer(scale * (shape[1] ** -0.5 if c.init_stddev is None else c.init_stddev))
    return layers.declare_parameter(self, name, init, ("experts", *axes), shape, c.param_dtype).astype(c.dtype)

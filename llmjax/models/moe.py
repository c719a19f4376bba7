"""A sparse mixture of experts in the place of a Block's MLP: every token goes through the k experts it is routed to.

Dropless and exact: no expert has a capacity, so a token's output depends on nothing but the token, unless
`expert_capacity` bounds what devices send each other. Each device sorts its own tokens; where experts are cut over
devices, tokens go to theirs and back by all-to-all (Lepikhin et al. 2021, GShard).
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
  """Where a layer's router sent the real tokens of a batch; leaves are stacked [N ...] over layers."""

  counts: Array  # Float[E], how many of them each expert got
  probabilities: Array  # Float[E], the sum of the router's probabilities over them
  tokens: Array  # Float[], how many there are


def route(
  logits: Float[Array, "T E"], experts_per_token: int, normalize: bool
) -> tuple[Float[Array, "T k"], Int[Array, "T k"], Float[Array, "T E"]]:
  """(weights, experts, probabilities) of the k likeliest experts of every token (Shazeer et al. 2017).

  Weights are their probabilities among all experts; with `normalize`, among the k.
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
  """The weighted sum of the experts of every token.

  Args:
    kernels: "up" [E D F], "down" [E F D] and maybe "gate" [E D F]; of them this device has its part of E and F.
    capacity: see `exchange`.
    expert_axes, width_axes: mesh axes that E and F are cut over, inside `sharding.per_device`.
  """
  B, L, k = experts.shape
  order, sizes = by_expert(experts.reshape(-1), kernels["up"].shape[0] * math.prod(map(jax.lax.axis_size, expert_axes)))
  rows = jnp.take(x.reshape(B * L, -1), order // k, axis=0)
  run = functools.partial(run_experts, kernels=kernels, activation=activation)
  out = exchange(rows, sizes, run, capacity, expert_axes) if expert_axes else run(rows, sizes)
  out = jnp.take(out, jnp.argsort(order), axis=0).reshape(B, L, k, -1)
  y = jnp.sum(out * weights[..., None], axis=2)
  return jax.lax.psum(y, width_axes) if width_axes else y


def by_expert(experts: Int[Array, " R"], count: int) -> tuple[Int[Array, " R"], Int[Array, " E"]]:
  """The order that sorts rows by expert, and how many each has."""
  return jnp.argsort(experts, stable=True), jnp.bincount(experts, length=count).astype(jnp.int32)


def run_experts(
  rows: Float[Array, "R D"],
  sizes: Int[Array, " E"],
  *,
  kernels: Mapping[str, Float[Array, "E I O"]],
  activation: Callable[[Array], Array],
) -> Float[Array, "R D"]:
  """Rows sorted by expert, `sizes` of each, through them: each expert is one product over a run of rows."""
  up = jax.lax.ragged_dot(rows, kernels["up"], sizes)
  h = activation(jax.lax.ragged_dot(rows, kernels["gate"], sizes)) * up if "gate" in kernels else activation(up)
  return jax.lax.ragged_dot(h, kernels["down"], sizes)


def exchange(
  rows: Float[Array, "R D"],
  sizes: Int[Array, " E"],
  run: Callable[[Array, Array], Array],
  capacity: float | None,
  axes: tuple[str, ...],
) -> Float[Array, "R D"]:
  """Sends each of its rows to the device that has the expert, and what that device makes of it back.

  Args:
    rows: sorted by expert; `sizes`: of all experts.
    run: `run_experts` of this device's.
    capacity: a device sends each of n others at most capacity R / n rows, and the others add nothing; None keeps R
      places for every device, so that none is lost.
    axes: mesh axes that experts are cut over.
  """
  devices = math.prod(map(jax.lax.axis_size, axes))
  R, slots = rows.shape[0], rows.shape[0]
  if capacity is not None:
    slots = min(R, math.ceil(capacity * R / devices))
  swap = functools.partial(jax.lax.all_to_all, axis_name=axes, split_axis=0, concat_axis=0)
  mine = sizes.reshape(devices, -1)  # [devices experts-of-one]
  each = jnp.sum(mine, axis=1)
  device = jnp.repeat(jnp.arange(devices), each, total_repeat_length=R)
  place = jnp.arange(R) - jnp.take(jnp.cumsum(each) - each, device)
  sent = jnp.zeros((devices, slots, rows.shape[1]), rows.dtype).at[device, place].set(rows, mode="drop")
  ends = jnp.minimum(jnp.cumsum(mine, axis=1), slots)
  came, ends = swap(sent), swap(ends)  # from every device, its rows for experts here, sorted
  expert = jnp.sum(jnp.arange(slots)[None, :, None] >= ends[:, None, :], axis=2)  # one past the last: an empty place
  order, counts = by_expert(expert.reshape(-1), ends.shape[1] + 1)
  done = run(jnp.take(came.reshape(devices * slots, -1), order, axis=0), counts[:-1])
  done = jnp.take(done, jnp.argsort(order), axis=0).reshape(sent.shape)
  return swap(done).at[device, place].get(mode="fill", fill_value=0)


class MixtureMlp(nn.Module):
  """sum over the k experts of weight * expert(x), and where there is a shared expert, sigmoid(x w) * shared(x)."""

  cfg: TransformerConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B L D"], keys: Key[Array, " B"] | None, real: Int[Array, "B L"]
  ) -> tuple[Float[Array, "B L D"], Routing]:
    """`real`: 0 for padding, which is not counted."""
    c = self.cfg
    B, L, D = x.shape
    E, F, k = c.num_experts, c.expert_width, c.experts_per_token
    router = layers.make_projection(c, "router", (E,), ("embed", "experts"), False)
    weights, experts, probabilities = route(router(x).reshape(B * L, E), k, c.normalize_router)

    def kernel(name, inputs, outputs, *axes):
      scale = c.residual_scale if name == "down" else 1.0
      scale *= kernel_init_scale(c, axes)
      init = layers.normal_initializer(scale * (inputs**-0.5 if c.init_stddev is None else c.init_stddev))
      return layers.declare_parameter(self, name, init, ("experts", *axes), (E, inputs, outputs), c.param_dtype).astype(
        c.dtype
      )

    names = ("up", "gate", "down") if c.gated else ("up", "down")
    shapes = {"up": (D, F, "embed", "mlp"), "gate": (D, F, "embed", "mlp"), "down": (F, D, "mlp", "embed")}
    kernels = {name: kernel(name, *shapes[name]) for name in names}
    cut = {name: ("experts", *(None if axis == "embed" else axis for axis in shapes[name][2:])) for name in names}
    tokens = (sharding.axis_if_divisible("act_batch", B), sharding.axis_if_divisible("act_len", L), None)
    apply: Callable[..., Array] = functools.partial(
      mixture_of_experts, activation=layers.ACTIVATIONS[c.activation], capacity=c.expert_capacity
    )
    if not self.is_initializing():
      across = {"expert_axes": sharding.mesh_axes_of("experts"), "width_axes": sharding.mesh_axes_of("mlp")}
      apply = sharding.per_device(functools.partial(apply, **across), (tokens, tokens, tokens, cut), tokens)
    y = apply(x.astype(c.dtype), weights.reshape(B, L, k).astype(c.dtype), experts.reshape(B, L, k), kernels)
    y = constrain(y, "act_batch", "act_len", "act_embed")
    if c.shared_expert_d_ff:
      gate = layers.make_projection(c, "shared_gate", (1,), ("embed", "classes"), False)(x)
      y = y + jax.nn.sigmoid(gate) * layers.Mlp(c, c.shared_expert_d_ff, name="shared")(x, None)

    seen = (real.reshape(-1) > 0).astype(jnp.float32)
    chosen = jax.nn.one_hot(experts, E, dtype=jnp.float32).sum(axis=1)
    routing = Routing(seen @ chosen, seen @ probabilities, jnp.sum(seen))
    return layers.dropout(y, c.mlp_dropout, keys), routing

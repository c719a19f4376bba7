"""A sparse mixture of experts in the place of a Block's MLP: every token goes through the k experts it is routed to.

Dropless and exact: no expert has a capacity, so a token's output depends on nothing but the token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int, Key

from llmjax.models import layers
from llmjax.sharding import constrain

if TYPE_CHECKING:
  from llmjax.models.config import TransformerConfig


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
    E, k = c.num_experts, c.experts_per_token
    router = layers.projection(c, "router", (E,), ("embed", "experts"), False)
    weights, experts, probabilities = route(router(x).reshape(B * L, E), k, c.normalize_router)

    def kernel(name, inputs, outputs, axes, scale=1.0):
      stddev = scale * (inputs**-0.5 if c.init_stddev is None else c.init_stddev)
      init = layers.normal(stddev)
      return layers.parameter(self, name, init, ("experts", *axes), (E, inputs, outputs), c.param_dtype).astype(c.dtype)

    # Tokens sorted by expert: each expert is then one product over a run of rows.
    order = jnp.argsort(experts.reshape(-1), stable=True)
    sizes = jnp.bincount(experts.reshape(-1), length=E).astype(jnp.int32)
    rows = jnp.take(x.reshape(B * L, D), order // k, axis=0).astype(c.dtype)
    activation = layers.ACTIVATIONS[c.activation]
    up = jax.lax.ragged_dot(rows, kernel("up", D, c.expert_width, ("embed", "mlp")), sizes)
    if c.gated:
      gate = jax.lax.ragged_dot(rows, kernel("gate", D, c.expert_width, ("embed", "mlp")), sizes)
      h = activation(gate) * up
    else:
      h = activation(up)
    out = jax.lax.ragged_dot(h, kernel("down", c.expert_width, D, ("mlp", "embed"), c.residual_scale), sizes)
    back = jnp.take(out, jnp.argsort(order), axis=0).reshape(B * L, k, D)
    y = jnp.sum(back * weights[..., None].astype(c.dtype), axis=1).reshape(B, L, D)
    y = constrain(y, "act_batch", "act_len", "act_embed")
    if c.shared_expert_d_ff:
      gate = layers.projection(c, "shared_gate", (1,), ("embed", "classes"), False)(x)
      y = y + jax.nn.sigmoid(gate) * layers.Mlp(c, c.shared_expert_d_ff, name="shared")(x, None)

    seen = (real.reshape(-1) > 0).astype(jnp.float32)
    chosen = jax.nn.one_hot(experts, E, dtype=jnp.float32).sum(axis=1)
    routing = Routing(seen @ chosen, seen @ probabilities, jnp.sum(seen))
    return layers.dropout(y, c.mlp_dropout, keys), routing

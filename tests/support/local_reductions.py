"""A loss and an optimizer that reduce over devices by hand, with the mistakes that `llmjax verify` has to detect."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from llmjax.distributed import sharding
from llmjax.objectives.causal_lm import CausalLM
from llmjax.objectives.losses import cross_entropy


@dataclasses.dataclass(frozen=True, eq=False)
class LocalLoss(CausalLM):
  """A causal LM loss of each device's tokens, combined by `reduction`: "sum" is right, "none" and "mean" are not."""

  reduction: str = "sum"

  def loss(self, forward, batch, rngs):
    tokens = ("act_batch", "act_len")
    axes = sharding.mesh_axes_of("act_batch") + sharding.mesh_axes_of("act_len")

    def total(logits, labels, weight):
      nll = jnp.sum(cross_entropy(logits, labels)[1] * weight)
      if not axes or self.reduction == "none":
        return nll
      if self.reduction == "sum":
        return jax.lax.psum(nll, axes)
      count = jnp.sum(weight)
      return jax.lax.pmean(nll / count, axes) * jax.lax.psum(count, axes)

    local = sharding.per_device(total, ((*tokens, None), tokens, tokens), ())
    value = local(forward(batch, rngs=rngs).logits, batch.labels["nll"], batch.weights["nll"])
    return {"nll": value}, {"loss": (value, jnp.sum(batch.weights["nll"]))}


def clip_each_parameter(axes, norm):
  """Gradient descent that clips by each parameter's norm: "global" is right, "local" is that of a shard."""

  def update(grad, param):
    def clip(shard):
      square = jnp.sum(jnp.square(shard))
      sharded = tuple(axis for name in axes for axis in sharding.mesh_axes_of(name))
      whole = jnp.sqrt(jax.lax.psum(square, sharded) if norm == "global" and sharded else square)
      return shard / jnp.maximum(whole / 1e-3, 1.0)

    return sharding.per_device(clip, (axes,), axes)(grad)

  return optax.stateless(update)

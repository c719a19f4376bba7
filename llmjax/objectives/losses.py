"""Losses as values per token; objectives turn them into named sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
  logits: Float[Array, "B L V"], labels: Int[Array, "B L"], label_smoothing: float = 0.0
) -> tuple[Float[Array, "B L"], Float[Array, "B L"], Float[Array, "B L"]]:
  """Softmax cross-entropy in float32, in nats.

  Args:
    logits: scores before the softmax.
    labels: the right class.
    label_smoothing: share of the target spread evenly over all V classes (Szegedy et al. 2016).
  Returns:
    the smoothed loss that is trained on; the plain negative log-likelihood; log Z, for the z-loss.
  """
  logits = logits.astype(jnp.float32)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  nll = log_z - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  if not label_smoothing:
    return nll, nll, log_z
  uniform = log_z - jnp.mean(logits, axis=-1)
  return (1 - label_smoothing) * nll + label_smoothing * uniform, nll, log_z

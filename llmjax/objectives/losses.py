"""Losses as values per token; objectives turn them into named sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def label_logits(logits: Float[Array, "B L V"], labels: Int[Array, "B L"]) -> Float[Array, "B L"]:
  """logits[b, l, labels[b, l]], as a masked sum: gathering along a sharded V would move it all."""
  chosen = jnp.arange(logits.shape[-1])[None, None] == labels[..., None]
  return jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)


def correct(logits: Float[Array, "B L V"], labels: Int[Array, "B L"]) -> Bool[Array, "B L"]:
  """Whether no class scores higher than the label (a tie counts); a maximum is far cheaper than an argmax on CPU."""
  return label_logits(logits, labels) >= jnp.max(logits, axis=-1)


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
  nll = log_z - label_logits(logits, labels)
  if not label_smoothing:
    return nll, nll, log_z
  uniform = log_z - jnp.mean(logits, axis=-1)
  return (1 - label_smoothing) * nll + label_smoothing * uniform, nll, log_z

"""Losses as values per token; objectives turn them into named sums."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llmjax.config import ConfigError
from llmjax.types import Batch, Forward, Metrics, Outputs, Sums


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


def balance_loss(routing: Any) -> Float[Array, ""]:
  """E * the sum over experts of (share of the tokens routed there) * (mean probability), averaged over layers.

  Its least is k, where all experts get the same (Fedus et al. 2021, Switch Transformer, where k is 1).

  Args:
    routing: a stack's `models.moe.Routing`, leaves [N ...].
  """
  tokens = jnp.maximum(routing.tokens, 1.0)[:, None]
  shares, probabilities = routing.counts / tokens, routing.probabilities / tokens
  return jnp.mean(routing.counts.shape[1] * jnp.sum(shares * probabilities, axis=1))


@dataclasses.dataclass(frozen=True, eq=False)
class TokenLoss:
  """Cross-entropy of tokens as named sums, shared by all objectives that predict tokens.

  Attributes:
    term: the entry of `batch.labels` and `batch.weights`.
    label_smoothing: see `cross_entropy`.
    z_loss: coefficient of log(Z)^2, which keeps logits near normalised (Chowdhery et al. 2022).
    tokenizer: where given, bits per byte are measured, comparable over tokenizers.
  """

  term: str
  label_smoothing: float = 0.0
  z_loss: float = 0.0
  tokenizer: Any = None

  def __post_init__(self) -> None:
    if not 0 <= self.label_smoothing < 1:
      raise ConfigError(f"objective.label_smoothing={self.label_smoothing} must be in [0, 1)")
    if self.z_loss < 0:
      raise ConfigError(f"objective.z_loss={self.z_loss} must not be negative")

  @property
  def coefficients(self) -> dict[str, float]:
    return {self.term: 1.0, "z_loss": self.z_loss} if self.z_loss else {self.term: 1.0}

  def weights(self, batch: Batch) -> Sums:
    return dict.fromkeys(self.coefficients, jnp.sum(batch.weights[self.term]))

  def __call__(
    self, forward: Forward, out: Outputs, batch: Batch, parts: Mapping[str, Float[Array, "B L"]] | None = None
  ) -> tuple[Sums, Metrics]:
    """Sums of loss and z-loss; metrics loss, accuracy and bits_per_byte.

    Args:
      out: what `forward` gave for the batch.
      parts: {metric: weights} of further accuracies.
    """
    labels, weight = batch.labels[self.term], batch.weights[self.term]

    def each(logits: Array, labels: Array) -> tuple[Array, ...]:
      return *cross_entropy(logits, labels, self.label_smoothing), correct(logits, labels)

    smoothed, nll, log_z, right = forward.per_token(each, out, labels)
    sums = {self.term: jnp.sum(smoothed * weight)}
    if self.z_loss:
      sums["z_loss"] = jnp.sum(jnp.square(log_z) * weight)
    total, tokens = jnp.sum(nll * weight), jnp.sum(weight)
    metrics = {"loss": (total, tokens)}
    for name, weights in {"accuracy": weight, **(parts or {})}.items():
      metrics[name] = (jnp.sum(right * weights), jnp.sum(weights))
    if self.tokenizer is not None:
      lengths = jnp.take(jnp.asarray(self.tokenizer.byte_lengths(), jnp.float32), labels, axis=0)
      metrics["bits_per_byte"] = (total / math.log(2), jnp.sum(lengths * weight))
    return sums, metrics

"""Losses per token, and `TokenLoss`, which sums them for objectives that predict tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llmjax.config import ConfigError
from llmjax.examples import TextTokenizer
from llmjax.types import Batch, Forward, Metrics, Outputs, Sums


def label_logits(logits: Float[Array, "B L V"], labels: Int[Array, "B L"]) -> Float[Array, "B L"]:
  """Return logits[b, l, labels[b, l]]."""
  # A masked sum: a gather along a sharded V would move all logits.
  chosen = jnp.arange(logits.shape[-1])[None, None] == labels[..., None]
  return jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)


def is_correct(logits: Float[Array, "B L V"], labels: Int[Array, "B L"]) -> Bool[Array, "B L"]:
  """Whether no class has a higher logit than the label; ties count as correct."""
  # Not an argmax: on CPU a maximum is far cheaper.
  return label_logits(logits, labels) >= jnp.max(logits, axis=-1)


def cross_entropy(
  logits: Float[Array, "B L V"], labels: Int[Array, "B L"], label_smoothing: float = 0.0
) -> tuple[Float[Array, "B L"], Float[Array, "B L"], Float[Array, "B L"]]:
  """Softmax cross-entropy in float32, in nats.

  Args:
    logits: unnormalised log-probabilities.
    labels: the correct class.
    label_smoothing: share of the target distribution that is uniform over all V classes (Szegedy et al. 2016).

  Returns:
    (the smoothed loss, the negative log-likelihood, log Z for a z-loss).
  """
  logits = logits.astype(jnp.float32)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  nll = log_z - label_logits(logits, labels)
  if not label_smoothing:
    return nll, nll, log_z
  uniform = log_z - jnp.mean(logits, axis=-1)
  return (1 - label_smoothing) * nll + label_smoothing * uniform, nll, log_z


@runtime_checkable  # type checks in tests need it
class RoutingSums(Protocol):
  """Routing statistics of a stack with experts, `llmjax.models.moe.Routing`."""

  counts: Array  # Float[N E], tokens that each expert is chosen for
  probabilities: Array  # Float[N E], sum over tokens of the router's probabilities
  tokens: Array  # Float[N], number of tokens


def balance_loss(routing: RoutingSums) -> Float[Array, ""]:
  """Load-balancing loss of a mixture of experts, averaged over layers.

  E * the sum over experts of (share of tokens routed to it) * (its mean probability); see Fedus et al. 2021 (Switch
  Transformer). The minimum is the number of experts per token, reached if all experts have equal shares.
  """
  tokens = jnp.maximum(routing.tokens, 1.0)[:, None]
  shares, probabilities = routing.counts / tokens, routing.probabilities / tokens
  return jnp.mean(routing.counts.shape[1] * jnp.sum(shares * probabilities, axis=1))


@dataclasses.dataclass(frozen=True, eq=False)
class TokenLoss:
  """Cross-entropy of tokens as named sums, for all objectives that predict tokens.

  Attributes:
    term: key of `batch.labels` and `batch.weights`.
    label_smoothing: see `cross_entropy`.
    z_loss: coefficient of log(Z)^2, which keeps logits nearly normalised (Chowdhery et al. 2022, PaLM).
    tokenizer: if given, `bits_per_byte` is a metric; it is comparable between tokenizers.
  """

  term: str
  label_smoothing: float = 0.0
  z_loss: float = 0.0
  tokenizer: TextTokenizer | None = None

  def __post_init__(self) -> None:
    if not 0 <= self.label_smoothing < 1:
      raise ConfigError(f"objective.label_smoothing: must be in [0, 1), got {self.label_smoothing}")
    if self.z_loss < 0:
      raise ConfigError(f"objective.z_loss: must not be negative, got {self.z_loss}")

  @property
  def coefficients(self) -> dict[str, float]:
    """See `Objective.coefficients`."""
    return {self.term: 1.0, "z_loss": self.z_loss} if self.z_loss else {self.term: 1.0}

  def weights(self, batch: Batch) -> Sums:
    """See `Objective.weights`."""
    return dict.fromkeys(self.coefficients, jnp.sum(batch.weights[self.term]))

  def __call__(
    self,
    forward: Forward,
    out: Outputs,
    batch: Batch,
    accuracy_weights: Mapping[str, Float[Array, "B L"]] | None = None,
  ) -> tuple[Sums, Metrics]:
    """Return the sums of loss and z-loss, and the metrics loss, accuracy and bits_per_byte.

    Args:
      forward: the model.
      out: its outputs for the batch.
      batch: labels and weights of `term`.
      accuracy_weights: {metric: weights} of further accuracies.
    """
    labels, weight = batch.labels[self.term], batch.weights[self.term]

    def losses(logits: Array, labels: Array) -> tuple[Array, Array, Array, Array]:
      return *cross_entropy(logits, labels, self.label_smoothing), is_correct(logits, labels)

    smoothed, nll, log_z, correct = forward.per_token(losses, out, labels)
    sums = {self.term: jnp.sum(smoothed * weight)}
    if self.z_loss:
      sums["z_loss"] = jnp.sum(jnp.square(log_z) * weight)
    total, tokens = jnp.sum(nll * weight), jnp.sum(weight)
    metrics = {"loss": (total, tokens)}
    for name, weights in {"accuracy": weight, **(accuracy_weights or {})}.items():
      metrics[name] = (jnp.sum(correct * weights), jnp.sum(weights))
    if self.tokenizer is not None:
      lengths = jnp.take(jnp.asarray(self.tokenizer.byte_lengths(), jnp.float32), labels, axis=0)
      metrics["bits_per_byte"] = (total / math.log(2), jnp.sum(lengths * weight))
    return sums, metrics

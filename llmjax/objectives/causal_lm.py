"""Causal language modelling: predict each token from those before it in its document (Radford et al. 2018)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llmjax.config import ConfigError
from llmjax.objectives.losses import correct, cross_entropy
from llmjax.types import Batch, Features, Forward, Metrics, Sums


@dataclasses.dataclass(frozen=True, eq=False)
class CausalLM:
  """Negative log-likelihood of the next token.

  Attributes:
    label_smoothing: see `losses.cross_entropy`.
    z_loss: coefficient of log(Z)^2, which keeps logits near normalised (Chowdhery et al. 2022).
    byte_lengths: UTF-8 bytes that each token stands for, Int[V]; gives bits per byte, comparable over tokenizers.
  """

  label_smoothing: float = 0.0
  z_loss: float = 0.0
  byte_lengths: np.ndarray | None = None

  def __post_init__(self) -> None:
    if not 0 <= self.label_smoothing < 1:
      raise ConfigError(f"objective.label_smoothing={self.label_smoothing} must be in [0, 1)")
    if self.z_loss < 0:
      raise ConfigError(f"objective.z_loss={self.z_loss} must not be negative")

  @property
  def coefficients(self) -> dict[str, float]:
    return {"nll": 1.0, "z_loss": self.z_loss} if self.z_loss else {"nll": 1.0}

  def window(self, ids: np.ndarray, length: int) -> list[np.ndarray]:
    """Pieces that overlap by one token, so that every token but the document's first is a label exactly once."""
    return [ids[i : i + length + 1] for i in range(0, len(ids) - 1, length)]

  def features(self, example: Mapping[str, Any], rng: np.random.Generator, corpus: Any) -> Features:
    ids = example["ids"]
    labels = ids[1:]
    return {"inputs": ids[:-1], "labels": {"nll": labels}, "weights": {"nll": np.ones(len(labels), np.float32)}}

  def weights(self, batch: Batch) -> Sums:
    tokens = jnp.sum(batch.weights["nll"])
    return dict.fromkeys(self.coefficients, tokens)

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    logits = forward(batch, rngs=rngs).logits
    labels, weight = batch.labels["nll"], batch.weights["nll"]
    smoothed, nll, log_z = cross_entropy(logits, labels, self.label_smoothing)
    sums = {"nll": jnp.sum(smoothed * weight)}
    if self.z_loss:
      sums["z_loss"] = jnp.sum(jnp.square(log_z) * weight)
    total, tokens = jnp.sum(nll * weight), jnp.sum(weight)
    right = correct(logits, labels) * weight
    metrics = {"loss": (total, tokens), "accuracy": (jnp.sum(right), tokens)}
    if self.byte_lengths is not None:
      lengths = jnp.take(jnp.asarray(self.byte_lengths, jnp.float32), labels, axis=0)
      metrics["bits_per_byte"] = (total / math.log(2), jnp.sum(lengths * weight))
    return sums, metrics

"""Causal language modelling: predict each token from those before it in its document (Radford et al. 2018)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llmjax.config import ConfigError
from llmjax.objectives.losses import TokenLoss, balance_loss
from llmjax.types import Batch, Features, Forward, Metrics, Objective, Sums


@dataclasses.dataclass(frozen=True, eq=False)
class CausalLM(Objective):
  """Negative log-likelihood of the next token.

  Attributes:
    tokenizer: whose tokens are predicted; gives bits per byte.
    label_smoothing, z_loss: see `losses.TokenLoss`.
    balance: coefficient of `losses.balance_loss`, for models with experts. It is of a microbatch, not of the batch: the
      one loss here that `accum` changes.
  """

  tokenizer: Any = None
  label_smoothing: float = 0.0
  z_loss: float = 0.0
  balance: float = 0.0

  packing = "split"
  stacks = ("decoder",)

  def __post_init__(self) -> None:
    _ = self.token_loss  # checks
    if self.balance < 0:
      raise ConfigError(f"objective.balance={self.balance} must not be negative")

  @property
  def token_loss(self) -> TokenLoss:
    return TokenLoss("nll", self.label_smoothing, self.z_loss, self.tokenizer)

  @property
  def coefficients(self) -> dict[str, float]:
    return self.token_loss.coefficients | ({"balance": self.balance} if self.balance else {})

  def check_model(self, cfg: Any) -> None:
    if self.balance and not cfg.num_experts:
      raise ConfigError(
        f"objective.balance={self.balance} is for models with experts, and model.num_experts=0; set one of them"
      )

  def window(self, ids: np.ndarray, length: int) -> list[np.ndarray]:
    """Pieces that overlap by one token, so that every token but the document's first is a label exactly once."""
    return [ids[i : i + length + 1] for i in range(0, len(ids) - 1, length)]

  def features(self, example: Mapping[str, Any], rng: np.random.Generator, corpus: Any) -> Features | None:
    ids = example["ids"]
    labels = ids[1:]
    return {"inputs": ids[:-1], "labels": {"nll": labels}, "weights": {"nll": np.ones(len(labels), np.float32)}}

  def weights(self, batch: Batch) -> Sums:
    weights = self.token_loss.weights(batch)
    return weights | ({"balance": _tokens(batch)} if self.balance else {})

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    out = forward(batch, rngs=rngs)
    sums, metrics = self.token_loss(forward, out, batch)
    if self.balance:
      count = _tokens(batch)
      sums["balance"] = count * sum(map(balance_loss, out.routing))
      metrics["balance"] = (sums["balance"], count)
    return sums, metrics


def _tokens(batch: Batch) -> Array:
  """Float[], real ones."""
  return jnp.sum(batch.inputs.segments > 0).astype(jnp.float32)

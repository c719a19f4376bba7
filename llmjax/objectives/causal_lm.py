"""Causal language modelling: predict each token from those before it in its document (Radford et al. 2018)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array

from llmjax.objectives.losses import TokenLoss
from llmjax.types import Batch, Features, Forward, Metrics, Objective, Sums


@dataclasses.dataclass(frozen=True, eq=False)
class CausalLM(Objective):
  """Negative log-likelihood of the next token.

  Attributes:
    tokenizer: whose tokens are predicted; gives bits per byte.
    label_smoothing, z_loss: see `losses.TokenLoss`.
  """

  tokenizer: Any = None
  label_smoothing: float = 0.0
  z_loss: float = 0.0

  packing = "split"
  stacks = ("decoder",)

  def __post_init__(self) -> None:
    _ = self.token_loss  # checks

  @property
  def token_loss(self) -> TokenLoss:
    return TokenLoss("nll", self.label_smoothing, self.z_loss, self.tokenizer)

  @property
  def coefficients(self) -> dict[str, float]:
    return self.token_loss.coefficients

  def window(self, ids: np.ndarray, length: int) -> list[np.ndarray]:
    """Pieces that overlap by one token, so that every token but the document's first is a label exactly once."""
    return [ids[i : i + length + 1] for i in range(0, len(ids) - 1, length)]

  def features(self, example: Mapping[str, Any], rng: np.random.Generator, corpus: Any) -> Features | None:
    ids = example["ids"]
    labels = ids[1:]
    return {"inputs": ids[:-1], "labels": {"nll": labels}, "weights": {"nll": np.ones(len(labels), np.float32)}}

  def weights(self, batch: Batch) -> Sums:
    return self.token_loss.weights(batch)

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    return self.token_loss(forward(batch, rngs=rngs).logits, batch)

"""Causal language modelling: predict each token from the tokens before it in its document (Radford et al. 2018)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llmjax.config import ConfigError
from llmjax.config.model import ModelConfig, TransformerConfig
from llmjax.examples import Example, RecordSource, TextTokenizer, TokenSequence, Window
from llmjax.objectives.losses import TokenLoss, balance_loss
from llmjax.types import Batch, Forward, Metrics, Objective, Sums


@dataclasses.dataclass(frozen=True, eq=False)
class CausalLM(Objective):
  """Negative log-likelihood of the next token.

  Attributes:
    tokenizer: tokenizer of the run, for the metric `bits_per_byte`; None: without that metric.
    label_smoothing: see `losses.cross_entropy`.
    z_loss: see `losses.TokenLoss`.
    balance: coefficient of `losses.balance_loss`, for models with experts. That loss is not linear in the tokens: it is
      computed per microbatch, and is the only loss here that depends on `accum`.
  """

  tokenizer: TextTokenizer | None = None
  label_smoothing: float = 0.0
  z_loss: float = 0.0
  balance: float = 0.0

  packing = "split"
  stacks = ("decoder",)

  def __post_init__(self) -> None:
    _ = self.token_loss  # checks its settings
    if self.balance < 0:
      raise ConfigError(f"objective.balance: must not be negative, got {self.balance}")

  @property
  def token_loss(self) -> TokenLoss:
    """The loss of the next token."""
    return TokenLoss("nll", self.label_smoothing, self.z_loss, self.tokenizer)

  @property
  def coefficients(self) -> dict[str, float]:
    return self.token_loss.coefficients | ({"balance": self.balance} if self.balance else {})

  def check_model(self, cfg: ModelConfig) -> None:
    if self.balance and isinstance(cfg, TransformerConfig) and not cfg.num_experts:
      raise ConfigError(
        f"objective.balance: needs a model with experts, got {self.balance} and model.num_experts=0. Set one of them"
      )

  # Host.

  def split_ids(self, ids: np.ndarray, seq_len: int) -> list[np.ndarray]:
    """Return windows that overlap by one token: every token but the document's first is a label exactly once."""
    return [ids[i : i + seq_len + 1] for i in range(0, len(ids) - 1, seq_len)]

  def make_example(self, window: Window, rng: np.random.Generator, corpus: RecordSource) -> Example | None:
    ids = window.ids
    labels = ids[1:]
    return Example(TokenSequence(ids[:-1]), labels={"nll": labels}, weights={"nll": np.ones(len(labels), np.float32)})

  # Device.

  def weights(self, batch: Batch) -> Sums:
    weights = self.token_loss.weights(batch)
    return weights | ({"balance": _count_tokens(batch)} if self.balance else {})

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    out = forward(batch, rngs=rngs)
    sums, metrics = self.token_loss(forward, out, batch)
    if self.balance:
      count = _count_tokens(batch)
      sums["balance"] = count * sum(map(balance_loss, out.routing))
      metrics["balance"] = (sums["balance"], count)
    return sums, metrics


def _count_tokens(batch: Batch) -> Array:
  """Return the number of tokens without padding, Float[]."""
  return jnp.sum(batch.inputs.segments > 0).astype(jnp.float32)

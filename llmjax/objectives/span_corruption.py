"""Span corruption: an encoder reads text with spans replaced by sentinels, a decoder writes the spans (Raffel et al.
2020, T5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llmjax.config import ConfigError
from llmjax.objectives.losses import TokenLoss
from llmjax.types import Batch, Features, Forward, Metrics, Objective, Sums


@dataclasses.dataclass(frozen=True, eq=False)
class SpanCorruption(Objective):
  """Negative log-likelihood of the spans that were cut out: sentinel, its span, the next sentinel, ..., eos.

  A piece of text is as long as it can be for the corrupted input and its eos to fit into a row, and the rows of targets
  are as long as its spans then are: 512 input tokens are 568 of text and 114 of targets, as in T5.

  Attributes:
    noise_density: the share of tokens that are cut out.
    mean_span: tokens of a span, on average.
    label_smoothing, z_loss: see `losses.TokenLoss`.
  """

  tokenizer: Any
  noise_density: float = 0.15
  mean_span: float = 3.0
  label_smoothing: float = 0.0
  z_loss: float = 0.0

  stacks = ("both",)

  def __post_init__(self) -> None:
    if not 0 < self.noise_density < 1:
      raise ConfigError(f"objective.noise_density={self.noise_density} must be between 0 and 1")
    if not self.mean_span >= 1:
      raise ConfigError(f"objective.mean_span={self.mean_span} must be at least 1")
    if not self.tokenizer.sentinels or self.tokenizer.eos_id is None:
      raise ConfigError(
        "objective.name='span_corruption' needs sentinel tokens and one that ends a text (eos), which the tokenizer "
        "lacks; set data.tokenizer.sentinels=100, and a tokenizer with eos"
      )
    _ = self.token_loss  # checks

  @property
  def token_loss(self) -> TokenLoss:
    return TokenLoss("nll", self.label_smoothing, self.z_loss)

  @property
  def coefficients(self) -> dict[str, float]:
    return self.token_loss.coefficients

  # host

  def spans(self, tokens: int) -> tuple[int, int]:
    """(tokens that are cut out, spans) of a text; at least one is, and one is left before every span."""
    noise = min(max(round(tokens * self.noise_density), 1), tokens - 1)
    return noise, min(max(round(noise / self.mean_span), 1), noise, tokens - noise)

  def lengths(self, tokens: int) -> tuple[int, int]:
    """(inputs, targets) that a text of `tokens` gives: what is left or cut out, a sentinel a span, and eos."""
    noise, spans = self.spans(tokens)
    return tokens - noise + spans + 1, noise + spans + 1

  def text_length(self, seq_len: int) -> int:
    """The longest text whose corrupted input is not longer than a row."""
    if seq_len < self.lengths(2)[0]:
      raise ConfigError(f"seq_len={seq_len} is too short for span corruption; raise it")
    tokens = 2
    while self.lengths(tokens + 1)[0] <= seq_len:
      tokens += 1
    if self.spans(tokens)[1] > len(self.tokenizer.sentinels):
      raise ConfigError(
        f"seq_len={seq_len} has {self.spans(tokens)[1]} spans a row, and the tokenizer {len(self.tokenizer.sentinels)} "
        "sentinels; raise data.tokenizer.sentinels or objective.mean_span, or lower seq_len"
      )
    return tokens

  def row_lengths(self, seq_len: int) -> dict[str, int]:
    return {"inputs": seq_len, "targets": self.lengths(self.text_length(seq_len))[1]}

  def window(self, ids: np.ndarray, length: int) -> list[np.ndarray]:
    """Pieces of the document without its bos and eos."""
    text = self.tokenizer.unframe(ids)
    size = self.text_length(length)
    return [text[i : i + size] for i in range(0, len(text), size)]

  def features(self, example: Mapping[str, Any], rng: np.random.Generator, corpus: Any) -> Features | None:
    text = example["ids"]
    if len(text) < 2:
      return None
    noise, spans = self.spans(len(text))
    kept = np.split(text, self.cuts(len(text) - noise, noise, spans, rng))  # kept, cut out, kept, cut out, ...
    sentinels = self.tokenizer.sentinels
    eos = [self.tokenizer.eos_id]
    inputs = [part for i in range(spans) for part in (kept[2 * i], [sentinels[i]])]
    outputs = [part for i in range(spans) for part in ([sentinels[i]], kept[2 * i + 1])]
    labels = np.concatenate([*outputs, eos]).astype(np.int32)
    return {
      "inputs": np.concatenate([*inputs, eos]).astype(np.int32),
      "targets": np.concatenate([[self.tokenizer.pad_id], labels[:-1]]).astype(np.int32),
      "labels": {"nll": labels},
      "weights": {"nll": np.ones(len(labels), np.float32)},
    }

  def cuts(self, rest: int, noise: int, spans: int, rng: np.random.Generator) -> np.ndarray:
    """Where kept and cut-out spans of random lengths take turns; the text begins with a kept one and ends cut out."""
    lengths = np.stack([random_lengths(rest, spans, rng), random_lengths(noise, spans, rng)], axis=1)
    return np.cumsum(lengths.reshape(-1))[:-1]

  # device

  def weights(self, batch: Batch) -> Sums:
    return self.token_loss.weights(batch)

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    # Where spans begin and end is easier than what is in them, and not what one wants to know.
    ordinary = jnp.take(jnp.asarray(~self.tokenizer.special, jnp.float32), batch.labels["nll"], axis=0)
    spans = {"span_accuracy": batch.weights["nll"] * ordinary}
    return self.token_loss(forward, forward(batch, rngs=rngs), batch, spans)


def random_lengths(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
  """Int[parts], each at least 1, that sum to `total`; every such split is equally likely."""
  ends = np.sort(rng.permutation(total - 1)[: parts - 1] + 1)
  return np.diff(ends, prepend=0, append=total)

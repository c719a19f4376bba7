"""Span corruption of T5 (Raffel et al. 2020).

An encoder reads a text in which spans are replaced by sentinels, and a decoder writes the spans.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llmjax.config import ConfigError
from llmjax.examples import Example, RecordSource, RowLengths, TextTokenizer, TokenSequence, Window
from llmjax.objectives.losses import TokenLoss
from llmjax.types import Batch, Forward, Metrics, Objective, Sums


@dataclasses.dataclass(frozen=True, eq=False)
class SpanCorruption(Objective):
  """Negative log-likelihood of the removed spans: sentinel, its span, the next sentinel, ..., eos.

  A window of text is as long as possible for the corrupted input and its eos to fit into a row. Rows of targets have
  the length of such a window's targets. As in T5, 512 input tokens come from 568 of text, with 114 of targets.

  Attributes:
    tokenizer: tokenizer of the run, with sentinels and eos.
    noise_density: share of tokens that are removed.
    mean_span: mean number of tokens of a span.
    label_smoothing: see `losses.cross_entropy`.
    z_loss: see `losses.TokenLoss`.
  """

  tokenizer: TextTokenizer
  noise_density: float = 0.15
  mean_span: float = 3.0
  label_smoothing: float = 0.0
  z_loss: float = 0.0

  stacks = ("both",)

  def __post_init__(self) -> None:
    if not 0 < self.noise_density < 1:
      raise ConfigError(f"objective.noise_density: must be between 0 and 1, got {self.noise_density}")
    if not self.mean_span >= 1:
      raise ConfigError(f"objective.mean_span: must be at least 1, got {self.mean_span}")
    if not self.tokenizer.sentinels or self.tokenizer.eos_id is None:
      raise ConfigError(
        "data.tokenizer: objective.name='span_corruption' needs sentinels and a token that ends a text (eos), which "
        "the tokenizer lacks. Set data.tokenizer.sentinels=100, and choose a tokenizer with eos"
      )
    _ = self.token_loss  # checks its settings

  @property
  def token_loss(self) -> TokenLoss:
    """The loss of the target tokens."""
    return TokenLoss("nll", self.label_smoothing, self.z_loss)

  @property
  def coefficients(self) -> dict[str, float]:
    return self.token_loss.coefficients

  # Host.

  def text_length(self, seq_len: int) -> int:
    """Return the length of the longest text whose corrupted input fits into a row.

    Raises:
      ConfigError: a row is too short, or has more spans than the tokenizer has sentinels.
    """
    if seq_len < corrupted_lengths(2, self.noise_density, self.mean_span)[0]:
      raise ConfigError(f"seq_len: is too short for span corruption, got {seq_len}. Increase it")
    num_tokens = longest_text(seq_len, self.noise_density, self.mean_span)
    _, num_spans = count_spans(num_tokens, self.noise_density, self.mean_span)
    num_sentinels = len(self.tokenizer.sentinels)
    if num_spans > num_sentinels:
      raise ConfigError(
        f"data.tokenizer.sentinels: seq_len={seq_len} has {num_spans} spans per row, got {num_sentinels} sentinels. "
        "Increase data.tokenizer.sentinels or objective.mean_span, or decrease seq_len"
      )
    return num_tokens

  def row_lengths(self, seq_len: int) -> RowLengths:
    _, target_length = corrupted_lengths(self.text_length(seq_len), self.noise_density, self.mean_span)
    return RowLengths(seq_len, target_length)

  def split_ids(self, ids: np.ndarray, seq_len: int) -> list[np.ndarray]:
    """Return consecutive parts of the document, without its bos and eos."""
    text = self.tokenizer.unframe(ids)
    size = self.text_length(seq_len)
    return [text[i : i + size] for i in range(0, len(text), size)]

  def make_example(self, window: Window, rng: np.random.Generator, corpus: RecordSource) -> Example | None:
    text = window.ids
    if len(text) < 2:
      return None
    noise, num_spans = count_spans(len(text), self.noise_density, self.mean_span)
    cuts = self.draw_cuts(len(text) - noise, noise, num_spans, rng)
    parts = np.split(text, cuts)  # kept, removed, kept, removed, ...
    sentinels = self.tokenizer.sentinels
    eos = [self.tokenizer.eos_id]
    inputs = [part for i in range(num_spans) for part in (parts[2 * i], [sentinels[i]])]
    outputs = [part for i in range(num_spans) for part in ([sentinels[i]], parts[2 * i + 1])]
    labels = np.concatenate([*outputs, eos]).astype(np.int32)
    return Example(
      TokenSequence(np.concatenate([*inputs, eos])),
      TokenSequence(np.concatenate([[self.tokenizer.pad_id], labels[:-1]])),
      labels={"nll": labels},
      weights={"nll": np.ones(len(labels), np.float32)},
    )

  def draw_cuts(self, num_kept: int, num_removed: int, num_spans: int, rng: np.random.Generator) -> np.ndarray:
    """Return the positions Int[2 spans - 1] between kept and removed spans of random length.

    The text begins with a kept span and ends with a removed one.
    """
    lengths = [random_span_lengths(num_kept, num_spans, rng), random_span_lengths(num_removed, num_spans, rng)]
    return np.cumsum(np.stack(lengths, axis=1).reshape(-1))[:-1]

  # Device.

  def weights(self, batch: Batch) -> Sums:
    return self.token_loss.weights(batch)

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    # An accuracy without sentinels and eos: positions of spans are easier to predict than their text.
    is_text = jnp.take(jnp.asarray(~self.tokenizer.special, jnp.float32), batch.labels["nll"], axis=0)
    accuracies = {"span_accuracy": batch.weights["nll"] * is_text}
    return self.token_loss(forward, forward(batch, rngs=rngs), batch, accuracies)


def count_spans(num_tokens: int, noise_density: float, mean_span: float) -> tuple[int, int]:
  """Return (removed tokens, spans) for a text. At least one token is removed, and one is kept before each span."""
  noise = min(max(round(num_tokens * noise_density), 1), num_tokens - 1)
  return noise, min(max(round(noise / mean_span), 1), noise, num_tokens - noise)


def corrupted_lengths(num_tokens: int, noise_density: float, mean_span: float) -> tuple[int, int]:
  """Return the tokens of (inputs, targets) for a text, each with a sentinel per span and eos."""
  noise, num_spans = count_spans(num_tokens, noise_density, mean_span)
  return num_tokens - noise + num_spans + 1, noise + num_spans + 1


@functools.lru_cache(64)  # asked for every document
def longest_text(seq_len: int, noise_density: float, mean_span: float) -> int:
  """Return the maximum number of tokens, at least 2, of a text whose corrupted input has at most `seq_len` tokens."""
  num_tokens = 2
  while corrupted_lengths(num_tokens + 1, noise_density, mean_span)[0] <= seq_len:
    num_tokens += 1
  return num_tokens


def random_span_lengths(total: int, num_spans: int, rng: np.random.Generator) -> np.ndarray:
  """Return lengths Int[num_spans], each at least 1, that sum to `total`; all such divisions are equally likely."""
  ends = np.sort(rng.permutation(total - 1)[: num_spans - 1] + 1)
  return np.diff(ends, prepend=0, append=total)

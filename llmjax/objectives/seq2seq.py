"""A text from a text, such as a summary or a translation: by an encoder–decoder that reads one and writes the other
(Sutskever et al. 2014; Raffel et al. 2020), or by a decoder that goes on from one to the other (Radford et al. 2019).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array

from llmjax.config import ConfigError, suggest_name
from llmjax.metrics.texts import summary_metrics, translation_metrics
from llmjax.objectives.losses import TokenLoss
from llmjax.objectives.task import Record, Result, Task, text_field
from llmjax.types import Batch, Features, Forward, Metrics, Sums

METRICS = ("rouge", "bleu", "none")
STACKS = ("both", "decoder")  # of models that write


@dataclasses.dataclass(frozen=True, eq=False)
class Seq2Seq(Task):
  """Negative log-likelihood of the target's tokens and of eos behind them.

  An encoder reads the source and eos, as T5's does; the decoder begins with `pad_id`, as in `SpanCorruption`. A decoder
  alone reads what stands before any text, the source, the separator and the target. A source that is too long loses its
  end; of a decoder's row `target_len` tokens are kept for the target, however short it is, so that the prompt is the
  same with labels and without. A target that is too long loses its end, and then has no eos.

  Attributes:
    stacks: the model's, "both" or "decoder": which of the two is made.
    source, target: the field that is read, and the one that is learned; a target of None is left out.
    prefix: stands before every source, such as T5's "summarize: ".
    separator: of a decoder alone, stands between source and target.
    target_len: tokens of a target at most, eos included; None is a quarter of `seq_len`.
    metric: "rouge", for summaries; "bleu", for translations, and chrF besides; "none".
    bidirectional: of a decoder alone, the prompt is seen both ways, as in `PrefixLM`.
    label_smoothing, z_loss: see `losses.TokenLoss`.
  """

  tokenizer: Any
  seq_len: int
  stacks: Any = "both"
  source: str = "source"
  target: str = "target"
  prefix: str = ""
  separator: str = "\n"
  target_len: int | None = None
  metric: str = "rouge"
  bidirectional: bool = False
  label_smoothing: float = 0.0
  z_loss: float = 0.0

  packing = "whole"
  generates = True

  def __post_init__(self) -> None:
    if isinstance(self.stacks, str):  # one that cannot write is refused with the model, which says what would fit
      object.__setattr__(self, "stacks", (self.stacks,) if self.stacks in STACKS else STACKS)
    if self.metric not in METRICS:
      raise ConfigError(f"objective.metric={self.metric!r}; {suggest_name(self.metric, METRICS)}")
    if self.tokenizer.eos_id is None:
      raise ConfigError(
        "objective.name='seq2seq' needs a token that ends a text (eos), which the tokenizer lacks: nothing else says "
        "that a target is complete; set another data.tokenizer"
      )
    if self.bidirectional and self.encodes:
      raise ConfigError("objective.bidirectional=True is for a decoder alone: an encoder sees both ways; leave it out")
    if self.max_new_tokens < 1:
      raise ConfigError(f"objective.target_len={self.max_new_tokens} must be at least 1; set it, or raise seq_len")
    if self.room < 1:
      kept = "" if self.encodes else f" and objective.target_len={self.max_new_tokens}"
      raise ConfigError(f"seq_len={self.seq_len}{kept} leave no room for a source; raise seq_len")
    _ = self.token_loss  # checks

  @property
  def encodes(self) -> bool:
    """Whether the model reads the source with an encoder."""
    return "both" in self.stacks

  @property
  def max_new_tokens(self) -> int:
    """Tokens of an answer at most."""
    return self.seq_len // 4 if self.target_len is None else self.target_len

  @property
  def ends(self) -> tuple[int, ...]:
    """The tokens behind which an answer is complete."""
    return (self.tokenizer.eos_id,)

  @property
  def around(self) -> tuple[np.ndarray, np.ndarray]:
    """What stands before and behind the source that the model reads."""
    if self.encodes:
      return np.zeros(0, np.int32), np.array([self.tokenizer.eos_id], np.int32)
    return self.tokenizer.single[0], self.tokenizer.encode(self.separator)

  @property
  def room(self) -> int:
    """Tokens of a source at most, its prefix included."""
    kept = 0 if self.encodes else self.max_new_tokens
    return self.seq_len - kept - sum(map(len, self.around))

  @property
  def required_model_config(self) -> dict[str, Any]:
    return {} if self.encodes else {"bidirectional_prompt": self.bidirectional}

  @property
  def token_loss(self) -> TokenLoss:
    return TokenLoss("nll", self.label_smoothing, self.z_loss)

  @property
  def coefficients(self) -> dict[str, float]:
    return self.token_loss.coefficients

  @property
  def inputs(self) -> tuple[str, ...]:
    return (self.source,)

  @property
  def answers(self) -> tuple[str, ...]:
    return (self.target,)

  @property
  def libraries(self) -> tuple[str, ...]:
    return {"rouge": ("rouge_score", "regex"), "bleu": ("sacrebleu",), "none": ()}[self.metric]

  # host

  def row_lengths(self, seq_len: int) -> dict[str, int]:
    return {"inputs": seq_len, "targets": self.max_new_tokens} if self.encodes else {"inputs": seq_len}

  def check(self, record: Record, *, labelled: bool) -> None:
    super().check(record, labelled=labelled)
    text_field(record, self.source)
    if labelled and record[self.target] is not None:
      text_field(record, self.target)

  def prompt(self, record: Record) -> np.ndarray:
    """Int32[n]: what the encoder reads, or what the decoder goes on from; none where the source has no tokens."""
    text = self.tokenizer.encode(self.prefix + record[self.source])[: self.room]
    before, behind = self.around
    return np.concatenate([before, text, behind]).astype(np.int32) if len(text) else text

  def encode(self, record: Record, *, labelled: bool) -> list[Features]:
    if labelled and record[self.target] is None:  # as in test splits without answers
      return []
    prompt = self.prompt(record)
    if not len(prompt):
      return []
    if not labelled:
      prefix = {"prefix": np.ones(len(prompt), np.int32)} if self.bidirectional else {}
      return [{"inputs": {"ids": prompt, **prefix}}]
    target = np.append(self.tokenizer.encode(record[self.target]), self.ends)[: self.max_new_tokens]
    if self.encodes:
      return [
        {
          "inputs": {"ids": prompt},
          "targets": np.append(self.tokenizer.pad_id, target[:-1]),
          "labels": {"nll": target},
          "weights": {"nll": np.ones(len(target), np.float32)},
        }
      ]
    ids = np.concatenate([prompt, target])
    of_prompt = np.arange(len(ids)) < len(prompt)
    features = next_tokens(ids, ~of_prompt)
    if self.bidirectional:
      features["inputs"]["prefix"] = of_prompt[:-1]
    return [features]

  # device

  def weights(self, batch: Batch) -> Sums:
    return self.token_loss.weights(batch)

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    return self.token_loss(forward, forward(batch, rngs=rngs), batch)

  # host

  def result(self, record: Record, features: Sequence[Features], decoded: Sequence[Mapping[str, np.ndarray]]) -> Result:
    return {self.target: written(self.tokenizer, decoded[0]["tokens"], self.ends)}

  def measure(self, records: Sequence[Record], results: Sequence[Result]) -> dict[str, float]:
    if self.metric == "none":
      return {}
    truths, texts = [record[self.target] for record in records], [result[self.target] for result in results]
    return summary_metrics(truths, texts) if self.metric == "rouge" else translation_metrics(truths, texts)


def next_tokens(ids: np.ndarray, learned: np.ndarray) -> dict[str, Any]:
  """Features of a decoder's text: each token is predicted from those before it, and those of `learned` bear loss.

  Args:
    ids: Int[n].
    learned: Bool[n]; the first token cannot be.
  """
  return {
    "inputs": {"ids": ids[:-1].astype(np.int32)},
    "labels": {"nll": ids[1:].astype(np.int32)},
    "weights": {"nll": learned[1:].astype(np.float32)},
  }


def written(tokenizer: Any, tokens: np.ndarray, ends: Sequence[int]) -> str:
  """The text of generated tokens Int[n], up to the first of `ends`: what fills a row behind it may be text."""
  tokens = np.asarray(tokens)
  stop = np.flatnonzero(np.isin(tokens, ends))
  return tokenizer.decode(tokens[: stop[0]] if len(stop) else tokens)

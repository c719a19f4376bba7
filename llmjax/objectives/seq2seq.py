"""Text to text, for example summarisation or translation.

Either an encoder-decoder reads the source and writes the target (Sutskever et al. 2014; Raffel et al. 2020), or a
decoder continues the source with the target (Radford et al. 2019).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Array

from llmjax.config import ConfigError, Json, suggest_name
from llmjax.examples import Example, Record, RowLengths, TextTokenizer, TokenSequence
from llmjax.metrics.texts import summary_metrics, translation_metrics
from llmjax.objectives.losses import TokenLoss
from llmjax.objectives.task import Result, Task, require_text
from llmjax.types import Batch, Forward, Metrics, Sums

# Packages that each metric imports.
METRIC_PACKAGES: Mapping[str, tuple[str, ...]] = {"rouge": ("rouge_score", "regex"), "bleu": ("sacrebleu",), "none": ()}
GENERATING_STACKS = ("both", "decoder")


@dataclasses.dataclass(frozen=True, eq=False)
class Seq2Seq(Task):
  """Negative log-likelihood of the target's tokens and the eos after them.

  An encoder reads the source and eos, as T5's does; its decoder begins with `pad_id`, as in `SpanCorruption`. A decoder
  alone reads the beginning of a text (such as bos), the source, the separator and the target. Sources that are too long
  are truncated at the end. A decoder reserves `target_len` tokens of a row for the target, even if it is shorter, so
  that the prompt is the same with labels and without. Targets that are too long are truncated at the end, and then have
  no eos.

  Attributes:
    tokenizer: tokenizer of the run, with eos.
    seq_len: input tokens of a row.
    stacks: the model's stacks, "both" or "decoder", which select one of the two forms.
    source: field of the text that is read.
    target: field of the text that is predicted; records whose target is None are skipped.
    prefix: text before every source, for example T5's "summarize: ".
    separator: text between source and target, for a decoder alone.
    target_len: maximum number of tokens of a target, with eos; None: a quarter of `seq_len`.
    metric: "rouge" for summaries, "bleu" for translations (with chrF), or "none".
    bidirectional: attention in the prompt has both directions, as in `PrefixLM`; for a decoder alone.
    label_smoothing: see `losses.cross_entropy`.
    z_loss: see `losses.TokenLoss`.
  """

  tokenizer: TextTokenizer
  seq_len: int
  stacks: tuple[str, ...] | str = "both"  # type: ignore[assignment]  # a name becomes a tuple in __post_init__
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
    if isinstance(self.stacks, str):  # other stacks are rejected with the model, by a message that lists what fits
      stacks = (self.stacks,) if self.stacks in GENERATING_STACKS else GENERATING_STACKS
      object.__setattr__(self, "stacks", stacks)
    if self.metric not in METRIC_PACKAGES:
      raise ConfigError(
        f"objective.metric: is not a known value, got {self.metric!r}; {suggest_name(self.metric, METRIC_PACKAGES)}"
      )
    if self.tokenizer.eos_id is None:
      raise ConfigError(
        "data.tokenizer: objective.name='seq2seq' needs a token that ends a text (eos), which the tokenizer lacks. "
        "Choose another data.tokenizer"
      )
    if self.bidirectional and self.has_encoder:
      raise ConfigError(
        "objective.bidirectional: is for a decoder alone, because an encoder is always bidirectional, got True. Set it "
        "to False"
      )
    if self.max_new_tokens < 1:
      raise ConfigError(
        f"objective.target_len: must be at least 1, got {self.max_new_tokens}. Set it, or increase seq_len"
      )
    if self.source_room < 1:
      reserved = "" if self.has_encoder else f" with objective.target_len={self.max_new_tokens}"
      raise ConfigError(f"seq_len: leaves no room for a source, got {self.seq_len}{reserved}. Increase seq_len")
    _ = self.token_loss  # checks its settings

  @property
  def has_encoder(self) -> bool:
    """Whether an encoder reads the source."""
    return "both" in self.stacks

  @property
  def max_new_tokens(self) -> int:
    return self.seq_len // 4 if self.target_len is None else self.target_len

  @property
  def end_ids(self) -> tuple[int, ...]:
    return () if self.tokenizer.eos_id is None else (self.tokenizer.eos_id,)

  @property
  def source_frame(self) -> tuple[np.ndarray, np.ndarray]:
    """Tokens before and after the source, Int32[n] each."""
    if self.has_encoder:
      return np.zeros(0, np.int32), np.array(self.end_ids, np.int32)
    return self.tokenizer.single[0], self.tokenizer.encode(self.separator)

  @property
  def source_room(self) -> int:
    """Maximum number of tokens of a source, with its prefix."""
    reserved = 0 if self.has_encoder else self.max_new_tokens
    return self.seq_len - reserved - sum(map(len, self.source_frame))

  @property
  def required_model_config(self) -> dict[str, Json]:
    return {} if self.has_encoder else {"bidirectional_prompt": self.bidirectional}

  @property
  def token_loss(self) -> TokenLoss:
    """The loss of the target's tokens."""
    return TokenLoss("nll", self.label_smoothing, self.z_loss)

  @property
  def coefficients(self) -> dict[str, float]:
    return self.token_loss.coefficients

  @property
  def input_fields(self) -> tuple[str, ...]:
    return (self.source,)

  @property
  def label_fields(self) -> tuple[str, ...]:
    return (self.target,)

  @property
  def metric_packages(self) -> tuple[str, ...]:
    return METRIC_PACKAGES[self.metric]

  # Host.

  def row_lengths(self, seq_len: int) -> RowLengths:
    return RowLengths(seq_len, self.max_new_tokens if self.has_encoder else None)

  def check_record(self, record: Record, *, labelled: bool) -> None:
    super().check_record(record, labelled=labelled)
    require_text(record, self.source)
    if labelled and record[self.target] is not None:
      require_text(record, self.target)

  def encode_prompt(self, record: Record) -> np.ndarray:
    """Return the tokens Int32[n] that the encoder reads or the decoder continues; none if the source has no tokens."""
    text = self.tokenizer.encode(self.prefix + record[self.source])[: self.source_room]
    before, after = self.source_frame
    return np.concatenate([before, text, after]).astype(np.int32) if len(text) else text

  def encode_record(self, record: Record, *, labelled: bool) -> list[Example]:
    if labelled and record[self.target] is None:  # as in test splits without answers
      return []
    prompt = self.encode_prompt(record)
    if not len(prompt):
      return []
    if not labelled:
      return [Example(TokenSequence(prompt, prefix=np.ones(len(prompt)) if self.bidirectional else None))]
    target = np.append(self.tokenizer.encode(record[self.target]), self.end_ids)[: self.max_new_tokens]
    if self.has_encoder:
      shifted = TokenSequence(np.append(self.tokenizer.pad_id, target[:-1]))
      return [Example(TokenSequence(prompt), shifted, labels={"nll": target}, weights={"nll": np.ones(len(target))})]
    ids = np.concatenate([prompt, target])
    in_prompt = np.arange(len(ids)) < len(prompt)
    return [next_token_example(ids, ~in_prompt, prefix=in_prompt if self.bidirectional else None)]

  # Device.

  def weights(self, batch: Batch) -> Sums:
    return self.token_loss.weights(batch)

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    return self.token_loss(forward, forward(batch, rngs=rngs), batch)

  # Host.

  def make_result(
    self, record: Record, examples: Sequence[Example], decoded: Sequence[Mapping[str, np.ndarray]]
  ) -> Result:
    return {self.target: decode_until_end(self.tokenizer, decoded[0]["tokens"], self.end_ids)}

  def compute_metrics(self, records: Sequence[Record], results: Sequence[Result]) -> dict[str, float]:
    if self.metric == "none":
      return {}
    truths, predictions = [record[self.target] for record in records], [result[self.target] for result in results]
    if self.metric == "rouge":
      return summary_metrics(truths, predictions)
    return translation_metrics(truths, predictions)


def next_token_example(ids: np.ndarray, has_loss: np.ndarray, prefix: np.ndarray | None = None) -> Example:
  """Return an example for a decoder, in which each token is predicted from the tokens before it.

  Args:
    ids: Int[n], a text.
    has_loss: Bool[n], tokens that have loss; that of the first token is ignored.
    prefix: Bool[n], tokens with attention in both directions, see `Tokens.prefix`; None: none.
  """
  return Example(
    TokenSequence(ids[:-1], prefix=None if prefix is None else prefix[:-1]),
    labels={"nll": ids[1:]},
    weights={"nll": has_loss[1:].astype(np.float32)},
  )


def decode_until_end(tokenizer: TextTokenizer, tokens: np.ndarray, end_ids: Sequence[int]) -> str:
  """Return the text of generated tokens Int[n] up to the first of `end_ids`; what follows it may be filler."""
  tokens = np.asarray(tokens)
  ends = np.flatnonzero(np.isin(tokens, end_ids))
  return tokenizer.decode(tokens[: ends[0]] if len(ends) else tokens)

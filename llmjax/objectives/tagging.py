"""Tagging of words by a head on the first token of each, optionally with a linear-chain CRF (Lafferty et al. 2001)."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llmjax.config import ConfigError, Json, suggest_name
from llmjax.examples import Example, Record, TextTokenizer, TokenSequence
from llmjax.metrics.labels import classification_metrics
from llmjax.metrics.spans import span_metrics
from llmjax.objectives import crf, tag_scheme
from llmjax.objectives.losses import cross_entropy, is_correct
from llmjax.objectives.task import (
  NO_HEAD,
  OpenRecords,
  PretrainedHead,
  Result,
  Task,
  infer_field_labels,
  require_text,
  reuse_labels,
)
from llmjax.types import Batch, Forward, Metrics, Outputs, Sums

SEQEVAL_SCHEMES = {"bioes": "iobes"}  # names of schemes in `metrics.spans` that differ from ours


class Sentence(NamedTuple):
  """The words of a record."""

  words: list[str]
  starts: np.ndarray  # Int[words], first character of each word in `text`
  text: str


class TagWindow(NamedTuple):
  """A part of a sentence that fits into a row."""

  ids: np.ndarray  # Int32[n]
  word_of: np.ndarray  # Int32[n], the word that a token begins, -1: none


@dataclasses.dataclass(frozen=True, eq=False)
class Tagging(Task):
  """A tag for each word of a sentence. Sentences that are longer than a row are split into several.

  Attributes:
    tokenizer: tokenizer of the run.
    seq_len: maximum number of tokens of a row.
    labels: tags in the order of the logits.
    scheme: which tags may follow each other, see `tag_scheme`. Predictions never violate it, with and without a CRF.
    use_crf: also train scores of neighbouring tags, with the likelihood of whole sentences.
    tokens: field of the list of words. For records without it, the words of "text" are tagged: runs of letters and
      digits, and each other character alone.
    tags: field of the list of tags.
  """

  tokenizer: TextTokenizer
  seq_len: int
  labels: tuple[str, ...]
  scheme: str = "iob2"
  use_crf: bool = False
  tokens: str = "tokens"
  tags: str = "tags"

  packing = "whole"
  stacks = ("encoder", "decoder")

  def __post_init__(self) -> None:
    tag_scheme.check_tag_scheme(self.scheme)
    tag_scheme.check_tag_labels(self.labels, self.scheme)
    if len(self.labels) < 2:
      raise ConfigError(f"objective.labels: must be at least two tags, got {self.labels!r}")

  @property
  def head(self) -> dict[str, Json]:
    return {"head": "token", "num_classes": len(self.labels), "crf": self.use_crf}

  @property
  def resolved_config(self) -> dict[str, Json]:
    return {"labels": self.labels, "scheme": self.scheme}

  @property
  def coefficients(self) -> dict[str, float]:
    return {"tag": 1.0}

  @property
  def input_fields(self) -> tuple[str, ...]:
    return (self.tokens,)

  @property
  def label_fields(self) -> tuple[str, ...]:
    return (self.tags,)

  @property
  def metric_packages(self) -> tuple[str, ...]:
    return ("sklearn",) if self.scheme == "none" else ("seqeval",)

  # Host.

  @property
  def skip_reason(self) -> str:
    return f"their words have no tokens, or a span is longer than the seq_len={self.seq_len} tokens of a row"

  def check_record(self, record: Record, *, labelled: bool) -> None:
    if not labelled and self.tokens not in record and "text" in record:
      require_text(record, "text")
    else:
      super().check_record(record, labelled=labelled)
    words = self.read_sentence(record).words
    if not words:
      raise ConfigError(f"{self.tokens!r}: must not be empty. Remove the record")
    if not labelled:
      return
    tags = require_text_list(record, self.tags)
    if len(tags) != len(words):
      raise ConfigError(
        f"{self.tags!r}: must have a tag for each word of {self.tokens!r}, got {len(tags)} tags for {len(words)} words"
      )
    for tag in tags:
      if tag not in self.labels:
        raise ConfigError(
          f"{self.tags!r}: must be among the {len(self.labels)} labels, got {tag!r}; {suggest_name(tag, self.labels)}"
        )
    violation = tag_scheme.first_violation(tags, self.scheme)
    if violation is not None:
      raise ConfigError(f"{self.tags!r}: {describe_violation(violation, words, self.scheme)}")

  def read_sentence(self, record: Record) -> Sentence:
    """Return the words of a record: its list of words, joined by spaces, or the words of its text."""
    if self.tokens in record:
      words = require_text_list(record, self.tokens)
      return Sentence(words, np.cumsum([0, *(len(word) + 1 for word in words)])[:-1], " ".join(words))
    matches = list(re.finditer(r"\w+|[^\w\s]", record["text"]))
    starts = np.array([match.start() for match in matches], int)
    return Sentence([match[0] for match in matches], starts, record["text"])

  def split_sentence(self, record: Record, tags: Sequence[str] | None = None) -> list[TagWindow]:
    """Split a sentence into as few rows as possible.

    Rows end at words. Words without tokens of their own begin nowhere.

    Args:
      record: a record with words, or a text.
      tags: tags of the words; rows then end only where a sentence may end by the scheme.
    """
    flat, begins = self._tokenize_words(self.read_sentence(record))
    room = self.seq_len - len(self.tokenizer.assemble(flat[:0], None, self.seq_len)[0])
    positions = np.flatnonzero(begins > 0)
    cuts = [int(position) for position in positions if tags is None or self.may_cut(tags, int(begins[position]))]
    windows, start = [], 0
    while start < len(flat):
      stop: int = max((c for c in (*cuts, len(flat)) if start < c <= start + room), default=start + room)
      ids, _, (offset, _) = self.tokenizer.assemble(flat[start:stop], None, self.seq_len)
      word_of = np.full(len(ids), -1, np.int32)
      word_of[offset : offset + len(flat[start:stop])] = begins[start:stop]
      windows.append(TagWindow(ids, word_of))
      start = stop
    return windows

  def _tokenize_words(self, sentence: Sentence) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens Int[n] of a sentence, and the word that each begins, Int[n], -1: none."""
    words, starts, text = sentence
    ids, offsets = self.tokenizer.encode_with_offsets(text)
    is_space = np.array([c.isspace() for c in text] + [False])
    # The first character of each token after spaces, which some tokenizers count to the token.
    first = np.array([start + np.argmin(is_space[start : stop + 1]) for start, stop in offsets], int)
    word = np.searchsorted(starts, first, side="right") - 1
    ends = starts + np.array([len(each) for each in words])
    in_word = (word >= 0) & (first < ends[word]) & (first < offsets[:, 1])  # False for tokens of spaces only
    begins = np.full(len(ids), -1)
    begun_words, positions = np.unique(np.where(in_word, word, -1), return_index=True)
    begins[positions] = begun_words
    return ids, begins

  def may_cut(self, tags: Sequence[str], word: int) -> bool:
    """Whether a sentence might end before a word, and another begin there."""
    allowed = self.allowed
    before, after = self.labels.index(tags[word - 1]), self.labels.index(tags[word])
    return bool(allowed.end[before] and allowed.start[after])

  @functools.cached_property
  def allowed(self) -> tag_scheme.AllowedTransitions:
    """The transitions that the scheme allows."""
    return tag_scheme.allowed_transitions(self.labels, self.scheme)

  def encode_record(self, record: Record, *, labelled: bool) -> list[Example]:
    tags = record[self.tags] if labelled else None
    examples: list[Example] = []
    for ids, word_of in self.split_sentence(record, tags):
      has_tag = word_of >= 0
      own_tags = [tags[word] for word in word_of[has_tag]] if tags is not None else []
      # A span that is longer than a row, or has words without tokens, may violate the scheme in what remains of it.
      if not has_tag.any() or tag_scheme.first_violation(own_tags, self.scheme) is not None:
        continue
      labels = np.zeros(len(ids), np.int32)
      labels[has_tag] = [self.labels.index(tag) for tag in own_tags] if labelled else 0
      examples.append(Example(TokenSequence(ids), labels={"tag": labels}, weights={"tag": has_tag}))
    return examples

  # Device.

  @functools.cached_property
  def constraints(self) -> crf.Transitions:
    """Scores that forbid what the scheme does not allow."""
    return tag_scheme.transition_constraints(self.labels, self.scheme)

  def transitions(self, out: Outputs) -> crf.Transitions:
    """Return the trained scores of transitions, if any, plus the constraints."""
    if not self.use_crf:
      fixed = self.constraints
      return crf.Transitions(jnp.asarray(fixed.start), jnp.asarray(fixed.matrix), jnp.asarray(fixed.end))
    return crf.add_transitions(crf.Transitions(**out.transitions), self.constraints)

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    out = forward(batch, rngs=rngs)
    tags, weight = batch.labels["tag"], batch.weights["tag"]
    count = jnp.sum(weight)
    if self.use_crf:
      # A sentence has one likelihood, so weights other than 0 and 1 apply to whole rows.
      row_weight = jnp.max(weight, axis=1)
      nll = crf.negative_log_likelihood(out.logits, tags, self.transitions(out), weight > 0, batch.inputs.segments)
      total = jnp.sum(nll * row_weight)
    else:
      nll, _, _ = cross_entropy(out.logits, tags)
      total = jnp.sum(nll * weight)
    accuracy = jnp.sum(is_correct(out.logits, tags) * weight)
    return {"tag": total}, {"loss": (total, count), "accuracy": (accuracy, count)}

  def decode_outputs(self, out: Outputs, batch: Batch) -> dict[str, Array]:
    """Return the best allowed tags Int[B L], and their probabilities Float[B L].

    Probabilities are marginals of a CRF; without one they are those of each word alone.
    """
    mask = batch.weights["tag"] > 0
    transitions = self.transitions(out)
    scores = out.logits if self.use_crf else jax.nn.log_softmax(out.logits)
    tags, _ = crf.viterbi(scores, transitions, mask, batch.inputs.segments)
    if self.use_crf:
      probabilities = crf.marginals(scores, transitions, mask, batch.inputs.segments)
    else:
      probabilities = jnp.exp(scores)
    chosen = jnp.arange(len(self.labels))[None, None] == tags[..., None]
    return {"tags": tags, "probabilities": jnp.sum(jnp.where(chosen, probabilities, 0.0), axis=-1)}

  # Host.

  def make_result(
    self, record: Record, examples: Sequence[Example], decoded: Sequence[Mapping[str, np.ndarray]]
  ) -> Result:
    """Return {tags, "spans": [{"start", "end", "label", "text"}], "confidence"}.

    The confidence is the smallest probability of a word's tag. Records without a list of words also get their words.
    Spans count characters of the record's text, or of its words with a space between them. Words without tokens are
    tagged "O", or with the first label if "O" is not a label.
    """
    words, starts, text = self.read_sentence(record)
    tags = ["O" if "O" in self.labels else self.labels[0]] * len(words)
    confidence = 1.0
    windows = [window.word_of for window in self.split_sentence(record) if (window.word_of >= 0).any()]
    for word_of, outputs in zip(windows, decoded, strict=True):
      for position in np.flatnonzero(word_of >= 0):
        tags[word_of[position]] = self.labels[int(outputs["tags"][position])]
        confidence = min(confidence, float(outputs["probabilities"][position]))
    spans = []
    for start, stop, kind in tag_scheme.extract_spans(tags, self.scheme):
      first, last = int(starts[start]), int(starts[stop - 1]) + len(words[stop - 1])
      spans.append({"start": first, "end": last, "label": kind, "text": text[first:last]})
    answer = {self.tags: tags, "spans": spans, "confidence": round(confidence, 6)}
    return answer if self.tokens in record else {self.tokens: words, **answer}

  def compute_metrics(self, records: Sequence[Record], results: Sequence[Result]) -> dict[str, float]:
    """Return metrics of spans; with the scheme "none", of the tags of words."""
    truths, predictions = ([list(each[self.tags]) for each in rows] for rows in (records, results))
    if self.scheme != "none":
      return span_metrics(truths, predictions, SEQEVAL_SCHEMES.get(self.scheme, self.scheme))
    true_tags, predicted_tags = ([tag for tags in rows for tag in tags] for rows in (truths, predictions))
    metrics = classification_metrics(true_tags, predicted_tags, self.labels)
    return {"f1": metrics["f1_macro"], **metrics} if len(self.labels) > 2 else metrics


def require_text_list(record: Record, field: str) -> list[str]:
  """Return a field that is a list of texts.

  Raises:
    ConfigError: it is something else.
  """
  value = record[field]
  if not isinstance(value, (list, tuple)) or not all(isinstance(word, str) for word in value):
    raise ConfigError(f"{field!r}: must be a list of texts, got {value!r}")
  return list(value)


def describe_violation(violation: tag_scheme.Violation, words: Sequence[str], scheme: str) -> str:
  """Return a violation of a tag scheme as a message."""
  position, previous, tag = violation
  after = "at the beginning of the sentence" if previous is None else f"after {previous!r}"
  problem = f"ends in {previous!r}" if tag is None else f"has {tag!r} {after}"
  return (
    f"the sentence {problem}, at word {position} (from 0), {words[position]!r}, which violates "
    f"objective.scheme={scheme!r}. Fix the tags, or set objective.scheme='none'"
  )


def tagging(
  *,
  tokenizer: TextTokenizer,
  seq_len: int,
  labels: Sequence[str] | None = None,
  scheme: str | None = None,
  use_crf: bool = False,
  tokens: str = "tokens",
  tags: str = "tags",
  records: OpenRecords | None = None,
  pretrained_head: PretrainedHead = NO_HEAD,
) -> Tagging:
  """Build a tagging task from a config.

  Args:
    tokenizer: tokenizer of the run.
    seq_len: maximum number of tokens of a row.
    labels: tags; None: infer them from the training split, which is read completely, see `task.reuse_labels`.
    scheme: the tag scheme; None: that of `pretrained_head` if its labels are reused, else inferred from the labels.
    use_crf: see `Tagging`, as all other keys of the config.
    tokens: see `Tagging`.
    tags: see `Tagging`.
    records: opens the training split.
    pretrained_head: see `task.reuse_labels`.
  """
  if labels is None:
    source = None if records is None else records()
    inferred = infer_field_labels(source, tags, lambda record: require_text_list(record, tags))
    labels = reuse_labels(inferred, pretrained_head)
    scheme = pretrained_head.get("scheme") if scheme is None else scheme
  scheme = tag_scheme.infer_tag_scheme(labels) if scheme is None else scheme
  return Tagging(tokenizer, seq_len, tuple(labels), scheme, use_crf, tokens, tags)

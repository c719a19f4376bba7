"""Extractive question answering: locate the answer to a question in a context (Rajpurkar et al. 2016, SQuAD).

As in BERT (Devlin et al. 2019) and in Hugging Face's run_qa.py, long contexts are read in overlapping windows. An
answer is a label in each window that contains it completely. In all other windows, and if there is no answer, the label
is the first token.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llmjax.config import ConfigError, Json
from llmjax.examples import Example, Record, TextTokenizer, TokenSequence
from llmjax.metrics.texts import answer_metrics
from llmjax.objectives.losses import cross_entropy, is_correct
from llmjax.objectives.task import Result, Task, require_text
from llmjax.types import Batch, Forward, Metrics, Outputs, Sums

NUM_BEST_SPANS = 20  # spans that confidences compare, as in Hugging Face's run_qa.py
MIN_SCORE = float(np.finfo(np.float32).min)

CharacterSpan: TypeAlias = tuple[int, int]  # [start, stop) in a context


class ContextWindow(NamedTuple):
  """A question with a part of its context."""

  ids: np.ndarray  # Int32[n]
  token_types: np.ndarray  # Int32[n]
  offset: int  # position in `ids` of the part's first token
  part: slice  # tokens of the context that are in the window


@dataclasses.dataclass(frozen=True, eq=False)
class SpanQA(Task):
  """The first and the last token of the answer, each by a softmax over the tokens of a window.

  The answers of a record are [{"text", "start"}], with `start` in characters of the context; see `accepted_answers` for
  other forms. The first is the label, and metrics accept all. An empty list means that the context has no answer, None
  that the answer is unknown.

  Attributes:
    tokenizer: tokenizer of the run; it must have offsets, see `Tokenizer.encode_with_offsets`.
    seq_len: maximum number of tokens of a window.
    question: field of the question.
    context: field of the context.
    answer: field of the answers.
    stride: tokens of the context that neighbouring windows share.
    max_question: maximum number of tokens of a question; longer ones are truncated at the end.
    max_answer: maximum number of tokens of a predicted answer.
    no_answer: whether a question may have no answer (Rajpurkar et al. 2018, SQuAD 2.0).
    no_answer_threshold: predict no answer if the first token's score, the smallest of all windows, exceeds the score
      of the best span by more than this.
  """

  tokenizer: TextTokenizer
  seq_len: int
  question: str = "question"
  context: str = "context"
  answer: str = "answers"
  stride: int = 128
  max_question: int = 64
  max_answer: int = 30
  no_answer: bool = False
  no_answer_threshold: float = 0.0

  packing = "never"
  stacks = ("encoder", "decoder")

  def __post_init__(self) -> None:
    for name, minimum in (("stride", 0), ("max_question", 1), ("max_answer", 1)):
      if getattr(self, name) < minimum:
        raise ConfigError(f"objective.{name}: must be at least {minimum}, got {getattr(self, name)}")
    max_stride = self.text_room - self.max_question - 1
    if self.stride > max_stride:
      fix = f"Set objective.stride to at most {max_stride}" if max_stride >= 0 else "Decrease objective.max_question"
      raise ConfigError(
        f"seq_len: leaves {self.text_room} tokens for a question and its context, too few for objective.max_question="
        f"{self.max_question}, objective.stride={self.stride} and a new token in each window, got {self.seq_len}. {fix}"
        ", or increase seq_len"
      )
    if not math.isfinite(self.no_answer_threshold) or (self.no_answer_threshold and not self.no_answer):
      raise ConfigError(
        "objective.no_answer_threshold: must be a finite number, and 0 unless objective.no_answer=True, got "
        f"{self.no_answer_threshold}"
      )
    self.tokenizer.encode_with_offsets("")  # raises if the tokenizer has no offsets

  @functools.cached_property
  def text_room(self) -> int:
    """Tokens of question and context between special tokens."""
    empty = np.zeros(0, np.int32)
    return self.seq_len - len(self.tokenizer.assemble(empty, empty, self.seq_len)[0])

  @property
  def head(self) -> dict[str, Json]:
    return {"head": "span", "num_classes": 2, "crf": False}

  @property
  def coefficients(self) -> dict[str, float]:
    return {"begin": 0.5, "end": 0.5}

  @property
  def input_fields(self) -> tuple[str, ...]:
    return (self.question, self.context)

  @property
  def label_fields(self) -> tuple[str, ...]:
    return (self.answer,)

  # Host.

  def check_record(self, record: Record, *, labelled: bool) -> None:
    super().check_record(record, labelled=labelled)
    for field in self.input_fields:
      require_text(record, field)
    if not labelled or record[self.answer] is None:
      return
    answers = accepted_answers(record[self.answer], self.answer)
    if not answers and not self.no_answer:
      raise ConfigError(
        f"{self.answer!r}: must not be empty with objective.no_answer=False. Set objective.no_answer=True, or remove "
        "the record"
      )
    for text, start in answers:
      check_answer_start(record[self.context], self.context, text, start, self.answer)

  def split_context(self, record: Record) -> tuple[list[ContextWindow], np.ndarray]:
    """Return the windows of a record, at least one, and the characters Int32[n 2] of each token of its context."""
    question = self.tokenizer.encode(record[self.question].strip())[: self.max_question]
    ids, offsets = self.tokenizer.encode_with_offsets(record[self.context])
    room = self.text_room - len(question)
    windows = []
    for start in range(0, max(len(ids) - self.stride, 1), room - self.stride):
      part = slice(start, min(start + room, len(ids)))
      joined, token_types, (_, offset) = self.tokenizer.assemble(question, ids[part], self.seq_len)
      assert offset is not None
      windows.append(ContextWindow(joined, token_types, offset, part))
    return windows, offsets

  def encode_record(self, record: Record, *, labelled: bool) -> list[Example]:
    windows, offsets = self.split_context(record)
    inputs = [TokenSequence(window.ids, window.token_types) for window in windows]
    if not labelled:
      return [Example(sequence) for sequence in inputs]
    if record[self.answer] is None:
      return []
    answers = accepted_answers(record[self.answer], self.answer)
    tokens = _tokens_in_answer(record[self.context], offsets, *answers[0]) if answers else None
    if tokens is not None and not len(tokens):  # the tokenizer drops all characters of the answer
      return []
    weights = {"begin": np.ones((), np.float32), "end": np.ones((), np.float32)}
    return [
      Example(sequence, row_labels=_window_labels(window, tokens), row_weights=weights)
      for sequence, window in zip(inputs, windows, strict=True)
    ]

  # Device.

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    scores = token_scores(forward(batch, rngs=rngs), batch)
    labels, weights = (jnp.stack([x["begin"], x["end"]], axis=1) for x in (batch.labels, batch.weights))
    nll, _, _ = cross_entropy(scores, labels)
    correct = is_correct(scores, labels)
    begin, end = jnp.sum(nll * weights, axis=0)
    rows = jnp.sum(weights, axis=0)
    metrics = {
      "loss": (begin + end, jnp.sum(rows)),
      "begin_accuracy": (jnp.sum(correct[:, 0] * weights[:, 0]), rows[0]),
      "end_accuracy": (jnp.sum(correct[:, 1] * weights[:, 1]), rows[1]),
      "exact": (jnp.sum(jnp.all(correct, axis=1) * weights[:, 0]), rows[0]),
    }
    return {"begin": begin, "end": end}, metrics

  def decode_outputs(self, out: Outputs, batch: Batch) -> dict[str, Array]:
    """Return the logits Float[B L] of each token to be the first ("begin") and the last ("end") of the answer."""
    scores = token_scores(out, batch)
    return {"begin": scores[:, 0], "end": scores[:, 1]}

  # Host.

  def make_result(
    self, record: Record, examples: Sequence[Example], decoded: Sequence[Mapping[str, np.ndarray]]
  ) -> Result:
    """Return {"answer": context[start:end], "start", "end", "score", "confidence"}, and the answer as records have it.

    The score is the sum of the two logits. The confidence is the probability by a softmax over the best spans of all
    windows, in which a span of several windows counts once. With `no_answer`, the empty answer is one of the spans:
    "" from 0 to 0, with the probability "no_answer_probability".
    """
    context = record[self.context]
    span_scores, empty_score = self._score_spans(record, decoded)
    best = sorted(span_scores.items(), key=lambda item: -item[1])[:NUM_BEST_SPANS]
    if self.no_answer or not best:
      best.append(((0, 0), empty_score))
    logits = np.array([score for _, score in best])
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    choice = -1 if self.no_answer and empty_score - best[0][1] > self.no_answer_threshold else 0
    (start, stop), score = best[choice]
    result: Result = {
      self.answer: [{"text": context[start:stop], "start": start}] if stop else [],
      "answer": context[start:stop],
      "start": start,
      "end": stop,
      "score": round(score, 6),
      "confidence": round(float(probabilities[choice]), 6),
    }
    return result | ({"no_answer_probability": round(float(probabilities[-1]), 6)} if self.no_answer else {})

  def _score_spans(
    self, record: Record, decoded: Sequence[Mapping[str, np.ndarray]]
  ) -> tuple[dict[CharacterSpan, float], float]:
    """Return the best score of each candidate span over all windows, and the smallest score of the empty answer."""
    context = record[self.context]
    windows, offsets = self.split_context(record)
    has_text = np.array([bool(context[start:stop].strip()) for start, stop in offsets], bool)
    span_scores: dict[CharacterSpan, float] = {}
    empty_score = math.inf
    for window, scores in zip(windows, decoded, strict=True):
      begin, end = (scores[name].astype(float) for name in ("begin", "end"))
      empty_score = min(empty_score, float(begin[0] + end[0]))
      in_ids = slice(window.offset, window.offset + window.part.stop - window.part.start)
      begin, end = (np.where(has_text[window.part], x[in_ids], -np.inf) for x in (begin, end))
      characters = offsets[window.part]
      for score, first, last in best_spans(begin, end, self.max_answer, NUM_BEST_SPANS):
        span = strip_span(context, int(characters[first, 0]), int(characters[last, 1]))
        span_scores[span] = max(score, span_scores.get(span, -math.inf))
    return span_scores, empty_score

  def compute_metrics(self, records: Sequence[Record], results: Sequence[Result]) -> dict[str, float]:
    truths = [[text for text, _ in accepted_answers(record[self.answer], self.answer)] for record in records]
    return answer_metrics(truths, [result["answer"] for result in results])


def token_scores(out: Outputs, batch: Batch) -> Float[Array, "B 2 L"]:
  """Return the float32 logits of the first and the last token; padding has the smallest float32 number."""
  logits = jnp.swapaxes(out.logits.astype(jnp.float32), 1, 2)
  return jnp.where(batch.inputs.segments[:, None] > 0, logits, MIN_SCORE)


def best_spans(begin: np.ndarray, end: np.ndarray, max_length: int, count: int) -> list[tuple[float, int, int]]:
  """Return the best spans as (begin[i] + end[j], i, j) in descending order, with i <= j < i + `max_length`.

  All spans are compared. Hugging Face's run_qa.py compares those between the `count` best begins and ends.

  Args:
    begin: Float[n], -inf where no span may begin.
    end: Float[n], -inf where no span may end.
    max_length: maximum number of tokens of a span.
    count: maximum number of spans.
  """
  max_length = min(max_length, len(begin))
  scores = np.full((len(begin), max_length), -np.inf)
  for extra in range(max_length):
    scores[: len(begin) - extra, extra] = begin[: len(begin) - extra] + end[extra:]
  order = np.argsort(-scores, axis=None, kind="stable")[:count].tolist()
  spans = ((float(scores.flat[i]), i // max_length, i // max_length + i % max_length) for i in order)
  return [span for span in spans if span[0] > -math.inf]


def strip_span(text: str, start: int, stop: int) -> CharacterSpan:
  """Return the span of text[start:stop] without surrounding spaces."""
  part = text[start:stop]
  return start + len(part) - len(part.lstrip()), start + len(part.rstrip())


def _tokens_in_answer(context: str, offsets: np.ndarray, text: str, start: int) -> np.ndarray:
  """Return the tokens Int[m] of the context that overlap an answer without its surrounding spaces."""
  begin, end = strip_span(context, start, start + len(text))
  return np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > begin))


def _window_labels(window: ContextWindow, tokens: np.ndarray | None) -> dict[str, np.ndarray]:
  """Return the labels of a window: the answer's first and last token, or 0 if the window lacks a part of it."""
  begin = end = 0
  if tokens is not None and window.part.start <= tokens[0] and tokens[-1] < window.part.stop:
    begin, end = (window.offset + int(token) - window.part.start for token in (tokens[0], tokens[-1]))
  return {"begin": np.array(begin, np.int32), "end": np.array(end, np.int32)}


def accepted_answers(value: Json, field: str) -> list[tuple[str, int]]:
  """Return the answers of a record as (text, start).

  Args:
    value: [{"text", "start"}], or one such dict, whose text and start may be lists; "answer_start" is read as "start".
    field: its field, for messages.

  Raises:
    ConfigError: the value has another form, or a text is empty.
  """
  form = f'{field!r}: must be a list of answers such as {{"text": "Paris", "start": 17}}'
  answers: list[tuple[Json, Json]] = []
  for answer in _as_list(value):
    if not isinstance(answer, Mapping) or "text" not in answer or not {"start", "answer_start"} & set(answer):
      raise ConfigError(f"{form}, got {str(answer)[:60]!r}")
    texts, starts = _as_list(answer["text"]), _as_list(answer.get("start", answer.get("answer_start")))
    if len(texts) != len(starts):
      raise ConfigError(f"{form}, with a start for each text, got {len(texts)} texts and {len(starts)} starts")
    answers += zip(texts, starts, strict=True)
  for text, start in answers:
    if not isinstance(text, str) or not text.strip():
      raise ConfigError(f"{form}, with a text that is not empty, got {text!r}. If there is no answer, write []")
    if not isinstance(start, numbers.Integral) or isinstance(start, bool):
      raise ConfigError(f"{form}, with a whole number of characters as start, got {start!r}")
  return [(text, int(start)) for text, start in answers]


def _as_list(value: Json) -> list[Json]:
  return list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value]


def check_answer_start(context: str, field: str, text: str, start: int, answer_field: str) -> None:
  """Raise ConfigError if an answer is not in the context at its start; the message tells where it is.

  Args:
    context: the context.
    field: the context's field, for messages.
    text: the answer.
    start: its first character in the context.
    answer_field: the answer's field, for messages.
  """
  actual = context[start : start + len(text)] if start >= 0 else ""
  if actual == text:
    return
  nearest = sorted((abs(m.start() - start), m.start()) for m in re.finditer(re.escape(text), context))
  more = f" and {len(nearest) - 1} more places" * (len(nearest) > 1)
  hint = f"The answer is at {nearest[0][1]}{more}" if nearest else "The context does not contain the answer"
  raise ConfigError(
    f"{answer_field!r}: {text[:60]!r} must be at its start {start} in {field!r}, got {actual[:60]!r}. Starts count "
    f"characters, from 0. {hint}: fix the start, or remove the answer"
  )

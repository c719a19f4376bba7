"""Extractive question answering: where in a context the answer to a question stands (Rajpurkar et al. 2016).

As in BERT (Devlin et al. 2019) and in Hugging Face's run_qa.py, long contexts are read in windows that overlap. An
answer is learned in every window that holds all of it; any other window points at its first token, as all windows do
where there is no answer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llmjax.config import ConfigError
from llmjax.metrics.texts import answer_metrics
from llmjax.objectives.losses import correct, cross_entropy
from llmjax.objectives.task import Record, Result, Task, text_field
from llmjax.types import Batch, Features, Forward, Metrics, Outputs, Sums

BEST = 20  # spans that are compared with each other, as in Hugging Face's run_qa.py


class Window(NamedTuple):
  """A question with a part of its context."""

  ids: np.ndarray  # Int32[n]
  token_types: np.ndarray  # Int32[n]
  place: int  # where in `ids` the part begins
  part: slice  # which tokens of the context it is


@dataclasses.dataclass(frozen=True, eq=False)
class SpanQA(Task):
  """The first and the last token of the answer, each by a softmax over the tokens of a window.

  A record's answers are [{"text", "start"}], `start` in characters of the context; see `accepted_answers` for other
  forms. The first is learned, all are accepted in measuring; [] is that the context has none, None that it is unknown.

  Attributes:
    question, context, answer: the fields that are read, and the one that is learned.
    stride: the tokens of the context that neighbouring windows share.
    max_question: tokens of a question; a longer one loses its end.
    max_answer: tokens of an answer that is given, at most.
    no_answer: whether a question may have no answer (Rajpurkar et al. 2018, SQuAD 2.0).
    no_answer_threshold: no answer is given where the first token's score, the least of all windows, exceeds that of the
      best span by more than this.
  """

  tokenizer: Any
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
    for name, least in (("stride", 0), ("max_question", 1), ("max_answer", 1)):
      if getattr(self, name) < least:
        raise ConfigError(f"objective.{name}={getattr(self, name)} must be at least {least}")
    most = self.room - self.max_question - 1
    if self.stride > most:
      raise ConfigError(
        f"seq_len={self.seq_len} leaves {self.room} tokens for a question and its context, which are too few for "
        f"objective.max_question={self.max_question}, objective.stride={self.stride} and a new token in each window; "
        + (f"set objective.stride to at most {most}" if most >= 0 else "lower objective.max_question")
        + ", or raise seq_len"
      )
    if not math.isfinite(self.no_answer_threshold) or (self.no_answer_threshold and not self.no_answer):
      raise ConfigError(
        f"objective.no_answer_threshold={self.no_answer_threshold} must be a finite number, and 0 unless "
        "objective.no_answer=True"
      )
    self.tokenizer.encode_with_offsets("")  # says when it cannot tell

  @functools.cached_property
  def room(self) -> int:
    """Tokens of question and context between special tokens."""
    nothing = np.zeros(0, np.int32)
    return self.seq_len - len(self.tokenizer.assemble(nothing, nothing, self.seq_len)[0])

  @property
  def head(self) -> dict[str, Any]:
    return {"head": "span", "num_classes": 2, "crf": False}

  @property
  def coefficients(self) -> dict[str, float]:
    return {"begin": 0.5, "end": 0.5}

  @property
  def inputs(self) -> tuple[str, ...]:
    return (self.question, self.context)

  @property
  def answers(self) -> tuple[str, ...]:
    return (self.answer,)

  # host

  def check(self, record: Record, *, labelled: bool) -> None:
    super().check(record, labelled=labelled)
    for field in self.inputs:
      text_field(record, field)
    if not labelled or record[self.answer] is None:
      return
    answers = accepted_answers(record[self.answer], self.answer)
    if not answers and not self.no_answer:
      raise ConfigError(
        f"{self.answer!r} is empty, and objective.no_answer=False; set objective.no_answer=True, or take the record out"
      )
    for text, start in answers:
      check_place(record[self.context], self.context, text, start, self.answer)

  def windows(self, record: Record) -> tuple[list[Window], np.ndarray]:
    """The windows of a record, at least one, and the characters of each token of its context, Int32[n, 2]."""
    question = self.tokenizer.encode(record[self.question].strip())[: self.max_question]
    ids, offsets = self.tokenizer.encode_with_offsets(record[self.context])
    room = self.room - len(question)
    windows = []
    for start in range(0, max(len(ids) - self.stride, 1), room - self.stride):
      part = slice(start, min(start + room, len(ids)))
      joined, token_types, (_, place) = self.tokenizer.assemble(question, ids[part], self.seq_len)
      windows.append(Window(joined, token_types, place, part))
    return windows, offsets

  def encode(self, record: Record, *, labelled: bool) -> list[Features]:
    windows, offsets = self.windows(record)
    features: list[Features] = [{"inputs": {"ids": w.ids, "token_types": w.token_types}} for w in windows]
    if not labelled:
      return features
    if record[self.answer] is None:
      return []
    answers = accepted_answers(record[self.answer], self.answer)
    tokens = _tokens_of(record[self.context], offsets, *answers[0]) if answers else None
    if tokens is not None and not len(tokens):  # the tokenizer drops all of its characters
      return []
    return [{**f, "row": _labels(window, tokens)} for f, window in zip(features, windows, strict=True)]

  # device

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    scores = token_scores(forward(batch, rngs=rngs), batch)
    labels, weights = (jnp.stack([x["begin"], x["end"]], axis=1) for x in (batch.labels, batch.weights))
    nll, _, _ = cross_entropy(scores, labels)
    right = correct(scores, labels)
    begin, end = jnp.sum(nll * weights, axis=0)
    rows = jnp.sum(weights, axis=0)
    metrics = {
      "loss": (begin + end, jnp.sum(rows)),
      "begin_accuracy": (jnp.sum(right[:, 0] * weights[:, 0]), rows[0]),
      "end_accuracy": (jnp.sum(right[:, 1] * weights[:, 1]), rows[1]),
      "exact": (jnp.sum(jnp.all(right, axis=1) * weights[:, 0]), rows[0]),
    }
    return {"begin": begin, "end": end}, metrics

  def decode(self, out: Outputs, batch: Batch) -> dict[str, Array]:
    """Logits of each token to be the first and the last of the answer, [B L] each."""
    scores = token_scores(out, batch)
    return {"begin": scores[:, 0], "end": scores[:, 1]}

  # host

  def result(self, record: Record, features: Sequence[Features], decoded: Sequence[Mapping[str, np.ndarray]]) -> Result:
    """{"answer": context[start:end], "start", "end", "score": the sum of its two logits, "confidence"}, and the answer
    as records have it.

    The confidence is its share in a softmax over the best spans of all windows; a span that several have counts once.
    With `no_answer`, that there is none is one of them, and its share is "no_answer_probability": "" from 0 to 0.
    """
    context = record[self.context]
    windows, offsets = self.windows(record)
    text = np.array([bool(context[start:stop].strip()) for start, stop in offsets], bool)
    found: dict[tuple[int, int], float] = {}
    none = math.inf
    for window, scores in zip(windows, decoded, strict=True):
      begin, end = (scores[name].astype(float) for name in ("begin", "end"))
      none = min(none, float(begin[0] + end[0]))
      where = slice(window.place, window.place + window.part.stop - window.part.start)
      begin, end = (np.where(text[window.part], x[where], -np.inf) for x in (begin, end))
      places = offsets[window.part]
      for score, first, last in best_spans(begin, end, self.max_answer, BEST):
        span = trim(context, int(places[first, 0]), int(places[last, 1]))
        found[span] = max(score, found.get(span, -math.inf))
    best = sorted(found.items(), key=lambda item: -item[1])[:BEST]
    if self.no_answer or not best:
      best.append(((0, 0), none))
    logits = np.array([score for _, score in best])
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    choice = -1 if self.no_answer and none - best[0][1] > self.no_answer_threshold else 0
    (start, stop), score = best[choice]
    result = {
      self.answer: [{"text": context[start:stop], "start": start}] if stop else [],
      "answer": context[start:stop],
      "start": start,
      "end": stop,
      "score": round(score, 6),
      "confidence": round(float(shares[choice]), 6),
    }
    return result | ({"no_answer_probability": round(float(shares[-1]), 6)} if self.no_answer else {})

  def measure(self, records: Sequence[Record], results: Sequence[Result]) -> dict[str, float]:
    truths = [[text for text, _ in accepted_answers(record[self.answer], self.answer)] for record in records]
    return answer_metrics(truths, [result["answer"] for result in results])


def token_scores(out: Outputs, batch: Batch) -> Float[Array, "B 2 L"]:
  """Logits of the first and the last token in float32; padding has the least there is."""
  logits = jnp.swapaxes(out.logits.astype(jnp.float32), 1, 2)
  return jnp.where(batch.inputs.segments[:, None] > 0, logits, jnp.finfo(jnp.float32).min)


def best_spans(begin: np.ndarray, end: np.ndarray, longest: int, count: int) -> list[tuple[float, int, int]]:
  """(begin[i] + end[j], i, j) of the best spans with i <= j < i + `longest`, at most `count`, the best first.

  All spans are looked at; Hugging Face's run_qa.py looks at those between the `count` best begins and ends.

  Args:
    begin, end: Float[n], -inf where no span may begin or end.
  """
  longest = min(longest, len(begin))
  scores = np.full((len(begin), longest), -np.inf)
  for more in range(longest):
    scores[: len(begin) - more, more] = begin[: len(begin) - more] + end[more:]
  order = np.argsort(-scores, axis=None, kind="stable")[:count].tolist()
  spans = ((float(scores.flat[i]), i // longest, i // longest + i % longest) for i in order)
  return [span for span in spans if span[0] > -math.inf]


def trim(text: str, start: int, stop: int) -> tuple[int, int]:
  """The part of text[start:stop] without spaces around it."""
  part = text[start:stop]
  return start + len(part) - len(part.lstrip()), start + len(part.rstrip())


def _tokens_of(context: str, offsets: np.ndarray, text: str, start: int) -> np.ndarray:
  """Int[m]: the tokens of the context that have a part of an answer, without the spaces around it."""
  begin, end = trim(context, start, start + len(text))
  return np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > begin))


def _labels(window: Window, tokens: np.ndarray | None) -> dict[str, dict[str, Any]]:
  """The row's labels: the answer's first and last token, or twice the window's first where it is not all in there."""
  begin = end = 0
  if tokens is not None and window.part.start <= tokens[0] and tokens[-1] < window.part.stop:
    begin, end = (window.place + int(token) - window.part.start for token in (tokens[0], tokens[-1]))
  labels = {"begin": np.array(begin, np.int32), "end": np.array(end, np.int32)}
  return {"labels": labels, "weights": dict.fromkeys(labels, np.array(1, np.float32))}


def accepted_answers(value: Any, field: str) -> list[tuple[str, int]]:
  """The answers of a record as (text, start).

  Args:
    value: [{"text", "start"}], or one such dict, whose text and start may be lists; "answer_start" is a start too.
    field: what the record calls them, for messages.
  Raises:
    ConfigError: another form; an empty text.
  """
  form = f'{field!r} must be a list of answers such as {{"text": "Paris", "start": 17}}'
  found: list[tuple[Any, Any]] = []
  for answer in _list(value):
    if not isinstance(answer, Mapping) or "text" not in answer or not {"start", "answer_start"} & set(answer):
      raise ConfigError(f"{form}; it has {str(answer)[:60]!r}")
    texts, starts = _list(answer["text"]), _list(answer.get("start", answer.get("answer_start")))
    if len(texts) != len(starts):
      raise ConfigError(f"{form}; it has {len(texts)} texts and {len(starts)} starts; give each text its own")
    found += zip(texts, starts)
  for text, start in found:
    if not isinstance(text, str) or not text.strip():
      raise ConfigError(f"{form}, with a text that is not empty, not {text!r}; [] is that there is no answer")
    if not isinstance(start, numbers.Integral) or isinstance(start, bool):
      raise ConfigError(f"{form}, with a start in whole characters, not {start!r}")
  return [(text, int(start)) for text, start in found]


def _list(value: Any) -> list[Any]:
  return list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value]


def check_place(context: str, field: str, text: str, start: int, answer: str) -> None:
  """Raises ConfigError where an answer does not stand at its start, with what stands there and where it does stand."""
  there = context[start : start + len(text)] if start >= 0 else ""
  if there == text:
    return
  places = sorted((abs(m.start() - start), m.start()) for m in re.finditer(re.escape(text), context))
  more = f" and {len(places) - 1} more places" * (len(places) > 1)
  elsewhere = f"it stands at {places[0][1]}{more}" if places else "it stands nowhere in it"
  raise ConfigError(
    f"{answer!r} has {text[:60]!r} at start {start}, where {field!r} has {there[:60]!r}; starts count characters, "
    f"from 0, and {elsewhere}: mend the start, or take the answer out"
  )

"""Tagging of words: a head on the first token of each, or a linear-chain CRF over them (Lafferty et al. 2001)."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llmjax.config import ConfigError, suggest_name
from llmjax.metrics.labels import classification_metrics
from llmjax.metrics.spans import span_metrics
from llmjax.objectives import crf, tag_scheme
from llmjax.objectives.losses import correct, cross_entropy
from llmjax.objectives.task import NOTHING, Record, Records, Result, Task, keep_labels, sort_labels, text_field
from llmjax.types import Batch, Features, Forward, Metrics, Outputs, Sums


@dataclasses.dataclass(frozen=True, eq=False)
class Tagging(Task):
  """A tag for each word of a sentence, which is read in several rows where it is longer than one.

  Attributes:
    labels: the tags, in the order of the logits.
    scheme: what tags may follow each other, see `tag_scheme`; answers never break it, with a CRF or without.
    use_crf: learn scores of one tag after another besides, and the likelihood of whole sentences.
    tokens, tags: the fields of a record: a list of words, and of their tags. Where there is no such list, answers are
      given to the words of its "text": runs of letters and digits, and all other characters alone.
  """

  tokenizer: Any
  seq_len: int
  labels: tuple[str, ...]
  scheme: str = "iob2"
  use_crf: bool = False
  tokens: str = "tokens"
  tags: str = "tags"

  packing = "whole"
  stacks = ("encoder", "decoder")

  def __post_init__(self) -> None:
    tag_scheme.check_scheme(self.scheme)
    tag_scheme.check_labels(self.labels, self.scheme)
    if len(self.labels) < 2:
      raise ConfigError(f"objective.labels={self.labels!r} must be at least two tags")

  @property
  def head(self) -> dict[str, Any]:
    return {"head": "token", "num_classes": len(self.labels), "crf": self.use_crf}

  @property
  def resolved_config(self) -> dict[str, Any]:
    return {"labels": self.labels, "scheme": self.scheme}

  @property
  def coefficients(self) -> dict[str, float]:
    return {"tag": 1.0}

  @property
  def inputs(self) -> tuple[str, ...]:
    return (self.tokens,)

  @property
  def answers(self) -> tuple[str, ...]:
    return (self.tags,)

  @property
  def libraries(self) -> tuple[str, ...]:
    return ("sklearn",) if self.scheme == "none" else ("seqeval",)

  # host

  @property
  def skip_reason(self) -> str:
    return f"their words have no tokens, or a span is longer than the seq_len={self.seq_len} tokens of a row"

  def check(self, record: Record, *, labelled: bool) -> None:
    if not labelled and self.tokens not in record and "text" in record:
      text_field(record, "text")
    else:
      super().check(record, labelled=labelled)
    words, _, _ = self.words_of(record)
    if not words:
      raise ConfigError(f"{self.tokens!r} is empty; take the record out")
    if not labelled:
      return
    tags = text_list(record, self.tags)
    if len(tags) != len(words):
      raise ConfigError(f"{self.tokens!r} has {len(words)} words and {self.tags!r} {len(tags)} tags; each word has one")
    for tag in tags:
      if tag not in self.labels:
        raise ConfigError(
          f"{self.tags!r}: {tag!r} is none of the {len(self.labels)} labels; {suggest_name(tag, self.labels)}"
        )
    broken = tag_scheme.violation(tags, self.scheme)
    if broken is not None:
      raise ConfigError(f"{self.tags!r}: {broken_scheme(broken, words, self.scheme)}")

  def words_of(self, record: Record) -> tuple[list[str], np.ndarray, str]:
    """(words, where each begins, Int[n], in their text): of a list with a space between them, or of plain text."""
    if self.tokens in record:
      words = text_list(record, self.tokens)
      return words, np.cumsum([0, *(len(word) + 1 for word in words)])[:-1], " ".join(words)
    found = list(re.finditer(r"\w+|[^\w\s]", record["text"]))
    return [match[0] for match in found], np.array([match.start() for match in found], int), record["text"]

  def windows(self, record: Record, tags: Sequence[str] | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """The sentence in as few rows as hold it: ids Int32[n], and of each token which word it begins, -1 for none.

    A row ends at a word; with `tags`, where a sentence might end by the scheme. Words that have no token of their own
    begin nowhere.
    """
    words, starts, text = self.words_of(record)
    flat, offsets = self.tokenizer.encode_with_offsets(text)
    blank = np.array([c.isspace() for c in text] + [False])
    first = np.array([start + np.argmin(blank[start : stop + 1]) for start, stop in offsets], int)  # behind its space
    which = np.searchsorted(starts, first, side="right") - 1
    ends = starts + np.array([len(word) for word in words])
    inside = (which >= 0) & (first < ends[which]) & (first < offsets[:, 1])  # and no lone space
    begins = np.full(len(flat), -1)
    seen, places = np.unique(np.where(inside, which, -1), return_index=True)
    begins[places] = seen
    room = self.seq_len - len(self.tokenizer.assemble(flat[:0], None, self.seq_len)[0])
    places = np.flatnonzero(begins > 0)
    cuts = [int(place) for place in places if tags is None or self.may_cut(tags, int(begins[place]))]
    found, start = [], 0
    while start < len(flat):
      stop: int = max((c for c in (*cuts, len(flat)) if start < c <= start + room), default=start + room)
      ids, _, (offset, _) = self.tokenizer.assemble(flat[start:stop], None, self.seq_len)
      word_of = np.full(len(ids), -1, np.int32)
      word_of[offset : offset + len(flat[start:stop])] = begins[start:stop]
      found.append((ids, word_of))
      start = stop
    return found

  def may_cut(self, tags: Sequence[str], word: int) -> bool:
    """Whether a sentence might end before a word, and another begin there."""
    start, _, end = self.allowed
    return bool(end[self.labels.index(tags[word - 1])] and start[self.labels.index(tags[word])])

  @functools.cached_property
  def allowed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tag_scheme.allowed(self.labels, self.scheme)

  def encode(self, record: Record, *, labelled: bool) -> list[Features]:
    tags = record[self.tags] if labelled else None
    found: list[Features] = []
    for ids, word_of in self.windows(record, tags):
      real = word_of >= 0
      here = [tags[word] for word in word_of[real]] if tags is not None else []
      # A span longer than a row, or with words without tokens, may break the scheme in what is left of it.
      if not real.any() or tag_scheme.violation(here, self.scheme) is not None:
        continue
      labels = np.zeros(len(ids), np.int32)
      labels[real] = [self.labels.index(tag) for tag in here] if labelled else 0
      found.append({"inputs": ids, "labels": {"tag": labels}, "weights": {"tag": real}})
    return found

  # device

  @functools.cached_property
  def constraints(self) -> crf.Transitions:
    return tag_scheme.constraints(self.labels, self.scheme)

  def transitions(self, out: Outputs) -> crf.Transitions:
    """What was learned, and what is not allowed."""
    if not self.use_crf:
      return jax.tree.map(jnp.asarray, self.constraints)
    return crf.add_transition(crf.Transitions(**out.transitions), self.constraints)

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    out = forward(batch, rngs=rngs)
    tags, weight = batch.labels["tag"], batch.weights["tag"]
    count = jnp.sum(weight)
    if self.use_crf:
      # Weights beyond 0 and 1 are of whole rows: a sentence has one likelihood.
      scale = jnp.max(weight, axis=1)
      each = crf.negative_log_likelihood(out.logits, tags, self.transitions(out), weight > 0, batch.inputs.segments)
      total = jnp.sum(each * scale)
    else:
      nll, _, _ = cross_entropy(out.logits, tags)
      total = jnp.sum(nll * weight)
    accuracy = jnp.sum(correct(out.logits, tags) * weight)
    return {"tag": total}, {"loss": (total, count), "accuracy": (accuracy, count)}

  def decode(self, out: Outputs, batch: Batch) -> dict[str, Array]:
    """The best allowed tags [B L], and their probabilities [B L]: marginal ones of a CRF, else of each word alone."""
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

  # host

  def result(self, record: Record, features: Sequence[Features], decoded: Sequence[Mapping[str, np.ndarray]]) -> Result:
    """{tags, "spans": [{"start", "end", "label", "text"}], "confidence": the least of any word}, and the words that
    these are of where the record has no list of them.

    Places count characters of the record's text, or of its words with a space between them. A word without tokens is
    tagged "O" (or the first of the labels).
    """
    words, starts, text = self.words_of(record)
    tags = ["O" if "O" in self.labels else self.labels[0]] * len(words)
    confidence = 1.0
    windows = [word_of for _, word_of in self.windows(record) if (word_of >= 0).any()]
    for word_of, found in zip(windows, decoded, strict=True):
      for place in np.flatnonzero(word_of >= 0):
        tags[word_of[place]] = self.labels[int(found["tags"][place])]
        confidence = min(confidence, float(found["probabilities"][place]))
    spans = []
    for start, stop, kind in tag_scheme.spans(tags, self.scheme):
      first, last = int(starts[start]), int(starts[stop - 1]) + len(words[stop - 1])
      spans.append({"start": first, "end": last, "label": kind, "text": text[first:last]})
    answer = {self.tags: tags, "spans": spans, "confidence": round(confidence, 6)}
    return answer if self.tokens in record else {self.tokens: words, **answer}

  def measure(self, records: Sequence[Record], results: Sequence[Result]) -> dict[str, float]:
    """Of spans; of other tags, by words."""
    truths, guesses = ([list(each[self.tags]) for each in rows] for rows in (records, results))
    if self.scheme != "none":
      return span_metrics(truths, guesses, {"bioes": "iobes"}.get(self.scheme, self.scheme))
    words, guessed = ([tag for tags in rows for tag in tags] for rows in (truths, guesses))
    found = classification_metrics(words, guessed, self.labels)
    return {"f1": found["f1_macro"], **found} if len(self.labels) > 2 else found


def text_list(record: Record, field: str) -> list[str]:
  """A field that must be a list of texts."""
  value = record[field]
  if not isinstance(value, (list, tuple)) or not all(isinstance(word, str) for word in value):
    raise ConfigError(f"{field!r} is {value!r}, which is no list of texts")
  return list(value)


def broken_scheme(broken: tuple[int, str | None, str | None], words: Sequence[str], scheme: str) -> str:
  """What `tag_scheme.violation` found, in words."""
  position, previous, tag = broken
  after = "at the beginning of the sentence" if previous is None else f"after {previous!r}"
  found = f"ends in {previous!r}" if tag is None else f"has {tag!r} {after}"
  return (
    f"the sentence {found}, at word {position} (from 0), {words[position]!r}, which breaks "
    f"objective.scheme={scheme!r}; mend the tags, or set it to 'none'"
  )


def tagging(
  *,
  tokenizer: Any,
  seq_len: int,
  labels: Sequence[str] | None = None,
  scheme: str | None = None,
  use_crf: bool = False,
  tokens: str = "tokens",
  tags: str = "tags",
  records: Records | None = None,
  learned: Mapping[str, Any] = NOTHING,
) -> Tagging:
  """From config: `labels` None are those of the training split, all of which is read for that, and `scheme` None is
  that of `learned`, see `keep_labels`, or the one that they could be of, see `tag_scheme.guess`."""
  if labels is None:
    labels = keep_labels(find_tags(records, tags), learned)
    scheme = learned.get("scheme") if scheme is None else scheme
  scheme = tag_scheme.guess(labels) if scheme is None else scheme
  return Tagging(tokenizer, seq_len, tuple(labels), scheme, use_crf, tokens, tags)


def find_tags(records: Records | None, field: str) -> tuple[str, ...]:
  """The tags of the training split."""
  if records is None:
    raise ConfigError("objective.labels=None takes the tags of a training split, and there is none; name them")
  found: set[str] = set()
  source = records()
  for number, record in enumerate(source):
    if field not in record:
      raise ConfigError(f"{source.location(number)}: there is no field {field!r}; {suggest_name(field, record)}")
    try:
      found.update(text_list(record, field))
    except ConfigError as error:
      raise ConfigError(f"{source.location(number)}: {error}") from error
  return sort_labels(found)

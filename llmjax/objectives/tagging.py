"""Tagging of words: a head on the first token of each, or a linear-chain CRF over them (Lafferty et al. 2001)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llmjax import task_metrics
from llmjax.config import ConfigError, nearest
from llmjax.objectives import crf, tag_scheme
from llmjax.objectives.losses import correct, cross_entropy
from llmjax.objectives.task import Record, Records, Result, Task, sort_labels
from llmjax.types import Batch, Features, Forward, Metrics, Outputs, Sums


@dataclasses.dataclass(frozen=True, eq=False)
class Tagging(Task):
  """A tag for each word of a sentence; words beyond the end of a row are not learned, and tagged "O" (or the first).

  Attributes:
    labels: the tags, in the order of the logits.
    scheme: what tags may follow each other, see `tag_scheme`; answers never break it, with a CRF or without.
    use_crf: learn scores of one tag after another besides, and the likelihood of whole sentences.
    tokens, tags: the fields of a record: a list of words, and of their tags.
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
  def decided(self) -> dict[str, Any]:
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

  # host

  def check(self, record: Record, *, labelled: bool) -> None:
    super().check(record, labelled=labelled)
    words = text_list(record, self.tokens)
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
          f"{self.tags!r}: {tag!r} is none of the {len(self.labels)} labels; {nearest(tag, self.labels)}"
        )
    broken = tag_scheme.violation(tags, self.scheme)
    if broken is not None:
      raise ConfigError(f"{self.tags!r}: {broken_scheme(broken, words, self.scheme)}")

  def read(self, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(ids Int32[n], of each token which word it begins, Int32[n], -1 for none), as far as a row holds them.

    The words are read as running text, with a space between them. One that has no token of its own begins nowhere.
    """
    flat, offsets = self.tokenizer.encode_with_offsets(" ".join(words))
    lengths = np.array([len(word) for word in words])
    starts = np.cumsum([0, *(lengths[:-1] + 1)])
    text = np.array([c.isspace() for c in " ".join(words)] + [False])
    first = np.array([start + np.argmin(text[start : stop + 1]) for start, stop in offsets], int)  # behind its space
    which = np.searchsorted(starts, first, side="right") - 1
    inside = (first < (starts + lengths)[which]) & (first < offsets[:, 1])  # and no lone space
    begins = np.full(len(flat), -1)
    words_seen, places = np.unique(np.where(inside, which, -1), return_index=True)
    begins[places] = words_seen
    ids, _, (offset, _) = self.tokenizer.assemble(flat, None, self.seq_len)
    word_of = np.full(len(ids), -1, np.int32)
    kept = min(len(flat), len(ids) - offset)
    word_of[offset : offset + kept] = begins[:kept]
    return ids, word_of

  def encode(self, record: Record, *, labelled: bool) -> list[Features]:
    ids, word_of = self.read(record[self.tokens])
    real = word_of >= 0
    if not real.any():
      return []
    tags = [self.labels.index(tag) for tag in record[self.tags]] if labelled else [0] * len(record[self.tokens])
    return [
      {
        "inputs": ids,
        "labels": {"tag": np.where(real, np.array(tags, np.int32)[word_of], 0)},
        "weights": {"tag": real},
      }
    ]

  # device

  @functools.cached_property
  def constraints(self) -> crf.Transitions:
    return tag_scheme.constraints(self.labels, self.scheme)

  def transitions(self, out: Outputs) -> crf.Transitions:
    """What was learned, and what is not allowed."""
    if not self.use_crf:
      return jax.tree.map(jnp.asarray, self.constraints)
    return crf.add(crf.Transitions(**out.transitions), self.constraints)

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
    words = record[self.tokens]
    _, word_of = self.read(words)
    places = np.flatnonzero(word_of >= 0)
    other = "O" if "O" in self.labels else self.labels[0]
    tags = [other] * len(words)
    for place in places:
      tags[word_of[place]] = self.labels[int(decoded[0]["tags"][place])]
    confidence = float(np.min(decoded[0]["probabilities"][places]))
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])
    spans = [
      {
        "start": int(starts[start]),
        "end": int(starts[stop - 1]) + len(words[stop - 1]),
        "label": kind,
        "text": " ".join(words[start:stop]),
      }
      for start, stop, kind in tag_scheme.spans(tags, self.scheme)
    ]
    return {self.tags: tags, "spans": spans, "confidence": round(confidence, 6)}

  def measure(self, records: Sequence[Record], results: Sequence[Result]) -> dict[str, float]:
    scheme = {"bioes": "iobes"}.get(self.scheme, "iob2")
    truths, guesses = ([list(each[self.tags]) for each in rows] for rows in (records, results))
    return task_metrics.spans(truths, guesses, scheme)


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
) -> Tagging:
  """From config: `labels` None are those of the training split, all of which is read for that, and `scheme` None is
  the one that they could be of, see `tag_scheme.guess`."""
  if labels is None or scheme is None:
    labels = find_tags(records, tags) if labels is None else labels
    scheme = tag_scheme.guess(labels) if scheme is None else scheme
  return Tagging(tokenizer, seq_len, tuple(labels), scheme, use_crf, tokens, tags)


def find_tags(records: Records | None, field: str) -> tuple[str, ...]:
  """The tags of the training split."""
  if records is None:
    raise ConfigError("objective.labels=None takes the tags of a training split, and there is none; name them")
  found: set[str] = set()
  for number, record in enumerate(records()):
    if field not in record:
      raise ConfigError(f"record {number} (from 0): there is no field {field!r}; {nearest(field, record)}")
    try:
      found.update(text_list(record, field))
    except ConfigError as error:
      raise ConfigError(f"record {number} (from 0): {error}") from error
  return sort_labels(found)

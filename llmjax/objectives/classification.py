"""Classification and regression of a text, or of two that belong together (Devlin et al. 2019)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llmjax.config import ConfigError, suggest_name
from llmjax.metrics.labels import classification_metrics, multi_label_metrics, regression_metrics
from llmjax.objectives.losses import correct, cross_entropy
from llmjax.objectives.task import (
  NOTHING,
  Record,
  Records,
  Result,
  Task,
  class_of,
  keep_labels,
  label_text,
  sort_labels,
  text_field,
)
from llmjax.types import Batch, Features, Forward, Metrics, Outputs, Sums

KINDS = ("single", "multi", "regression")


@dataclasses.dataclass(frozen=True, eq=False)
class Classification(Task):
  """One of C classes, any number of them, or a number.

  Attributes:
    labels: the names of the classes, in the order of the logits; empty for regression.
    kind: "single", softmax cross-entropy; "multi", a sigmoid cross-entropy for each class; "regression", squared error.
    text, pair: the fields that are read; None is no second text.
    label: the field that is learned: a label; for "multi" a list of them, or one text with commas; else a number.
    label_smoothing: see `losses.cross_entropy`; of "single" alone.
  """

  tokenizer: Any
  seq_len: int
  labels: tuple[str, ...]
  kind: str = "single"
  text: str = "text"
  pair: str | None = None
  label: str = "label"
  label_smoothing: float = 0.0

  packing = "never"
  stacks = ("encoder", "decoder")

  def __post_init__(self) -> None:
    if self.kind not in KINDS:
      raise ConfigError(f"objective.kind={self.kind!r}; {suggest_name(self.kind, KINDS)}")
    if not 0 <= self.label_smoothing < 1 or (self.label_smoothing and self.kind != "single"):
      raise ConfigError(f"objective.label_smoothing={self.label_smoothing} must be in [0, 1), and 0 but for 'single'")
    least = {"single": 2, "multi": 1, "regression": 0}[self.kind]
    if len(self.labels) < least or (self.kind == "regression" and self.labels):
      raise ConfigError(
        f"objective.labels={self.labels!r}: objective.kind={self.kind!r} has {least or 'no'} labels"
        f"{' or more' if least else ''}"
      )
    self.tokenizer.assemble(*self._empty, self.seq_len)  # says when there is no room

  @property
  def _empty(self) -> tuple[np.ndarray, np.ndarray | None]:
    nothing = np.zeros(0, np.int32)
    return nothing, None if self.pair is None else nothing

  @property
  def head(self) -> dict[str, Any]:
    return {"head": "sequence", "num_classes": max(len(self.labels), 1), "crf": False}

  @property
  def resolved_config(self) -> dict[str, Any]:
    return {"labels": self.labels}

  @property
  def coefficients(self) -> dict[str, float]:
    return {"class": 1.0}

  @property
  def inputs(self) -> tuple[str, ...]:
    return (self.text,) if self.pair is None else (self.text, self.pair)

  @property
  def answers(self) -> tuple[str, ...]:
    return (self.label,)

  @property
  def confident(self) -> bool:
    return self.kind != "regression"

  @property
  def libraries(self) -> tuple[str, ...]:
    return ("sklearn", "scipy")

  # host

  def check(self, record: Record, *, labelled: bool) -> None:
    super().check(record, labelled=labelled)
    for field in self.inputs:
      text_field(record, field)
    if labelled and record[self.label] is not None:
      self.target(record)

  def target(self, record: Record) -> np.ndarray:
    """Int[] of a class, Float[C] of any number of them, Float[1] of a number."""
    value = record[self.label]
    if self.kind == "single":
      return np.array(class_of(record, self.label, self.labels), np.int32)
    if self.kind == "multi":
      which = [class_of({self.label: name}, self.label, self.labels) for name in label_list(value, self.label)]
      return np.isin(np.arange(len(self.labels)), which).astype(np.float32)
    try:
      number = float(value)
    except (TypeError, ValueError):
      number = math.nan
    if not math.isfinite(number):
      raise ConfigError(f"{self.label!r} is {value!r}, which is no number; objective.kind='single' takes names")
    return np.array([number], np.float32)

  def encode(self, record: Record, *, labelled: bool) -> list[Features]:
    if labelled and record[self.label] is None:  # as in the test splits of GLUE
      return []
    texts = [self.tokenizer.encode(record[field]) for field in self.inputs]
    if not all(map(len, texts)):
      return []
    ids, token_types, _ = self.tokenizer.assemble(texts[0], texts[1] if self.pair else None, self.seq_len)
    features: Features = {"inputs": {"ids": ids, "token_types": token_types}}
    if not labelled:
      return [features]
    target = self.target(record)
    row = {"labels": {"class": target}, "weights": {"class": np.ones(target.shape, np.float32)}}
    return [{**features, "row": row}]

  # device

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    logits = forward(batch, rngs=rngs).logits
    target, weight = batch.labels["class"], batch.weights["class"]
    count = jnp.sum(weight)
    if self.kind == "single":
      smoothed, nll, _ = cross_entropy(logits[:, None], target[:, None], self.label_smoothing)
      right = correct(logits[:, None], target[:, None])[:, 0]
      each, plain = smoothed[:, 0], nll[:, 0]
    elif self.kind == "multi":
      each = plain = -target * jax.nn.log_sigmoid(logits) - (1 - target) * jax.nn.log_sigmoid(-logits)
      right = (logits > 0) == (target > 0.5)
    else:
      each = plain = jnp.square(logits - target)
      right = None
    metrics = {"loss": (jnp.sum(plain * weight), count)}
    if right is not None:
      metrics["accuracy"] = (jnp.sum(right * weight), count)
    return {"class": jnp.sum(each * weight)}, metrics

  def decode(self, out: Outputs, batch: Batch) -> dict[str, Array]:
    """Probabilities [B C]; of regression the number [B 1]."""
    activation = {"single": jax.nn.softmax, "multi": jax.nn.sigmoid, "regression": lambda x: x}[self.kind]
    return {"scores": activation(out.logits)}

  # host

  def result(self, record: Record, features: Sequence[Features], decoded: Sequence[Mapping[str, np.ndarray]]) -> Result:
    scores = decoded[0]["scores"].astype(float)
    if self.kind == "regression":
      return {self.label: round(float(scores[0]), 6)}
    named = {name: round(float(score), 6) for name, score in zip(self.labels, scores, strict=True)}
    if self.kind == "single":
      best = int(np.argmax(scores))
      return {self.label: self.labels[best], "confidence": round(float(scores[best]), 6), "scores": named}
    found = [name for name, score in zip(self.labels, scores, strict=True) if score > 0.5]
    return {self.label: found, "confidence": round(float(np.min(np.maximum(scores, 1 - scores))), 6), "scores": named}

  def measure(self, records: Sequence[Record], results: Sequence[Result]) -> dict[str, float]:
    truths = [record[self.label] for record in records]
    guesses = [result[self.label] for result in results]
    if self.kind == "single":
      return classification_metrics(list(map(label_text, truths)), guesses, self.labels)
    if self.kind == "multi":
      return multi_label_metrics([label_list(t, self.label) for t in truths], guesses, self.labels)
    return regression_metrics(list(map(float, truths)), guesses)


def label_list(value: Any, field: str) -> list[str]:
  """The labels of a record that may have several: a list, or a text with commas."""
  if isinstance(value, str):
    value = [part for part in value.split(",") if part.strip()]
  if not isinstance(value, (list, tuple)):
    raise ConfigError(f"{field!r} is {value!r}; it must be a list of labels, or a text with commas")
  return list(map(label_text, value))


def classification(
  *,
  tokenizer: Any,
  seq_len: int,
  labels: Sequence[str] | None = None,
  kind: str = "single",
  text: str = "text",
  pair: str | None = None,
  label: str = "label",
  label_smoothing: float = 0.0,
  records: Records | None = None,
  learned: Mapping[str, Any] = NOTHING,
) -> Classification:
  """From config: `labels` None are those of the training split, all of which is read for that; see `keep_labels`."""
  if labels is None:
    many = kind == "multi"
    labels = () if kind == "regression" else keep_labels(find_labels(records, label, many=many), learned)
  names = tuple(map(label_text, labels))
  return Classification(tokenizer, seq_len, names, kind, text, pair, label, label_smoothing)


def find_labels(records: Records | None, field: str, *, many: bool = False) -> tuple[str, ...]:
  """The labels in a field of the training split: those that it declares, else all that occur.

  Raises:
    ConfigError: no such field, or a value that is no label, with its record.
  """
  if records is None:
    raise ConfigError("objective.labels=None takes the labels of a training split, and there is none; name them")
  source = records()
  declared = getattr(source, "labels", {}).get(field)
  if declared:
    return tuple(declared)
  found: set[str] = set()
  for number, record in enumerate(source):
    if field not in record:
      raise ConfigError(f"{source.location(number)}: there is no field {field!r}; {suggest_name(field, record)}")
    try:
      if record[field] is not None:
        found.update(label_list(record[field], field) if many else [label_text(record[field])])
    except ConfigError as error:
      raise ConfigError(f"{source.location(number)}: {field!r}: {error}") from error
  if len(found) > MOST:
    raise ConfigError(
      f"{field!r} has {len(found)} different values, which can hardly be labels; for numbers set "
      "objective.kind='regression', or name the labels: objective.labels=('a', 'b')"
    )
  return sort_labels(found)


MOST = 10_000  # labels that are found, not named

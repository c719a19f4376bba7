"""Classification and regression of a text or a pair of texts (Devlin et al. 2019)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llmjax.config import ConfigError, Json, suggest_name
from llmjax.examples import Example, Record, TextTokenizer, TokenSequence
from llmjax.metrics.labels import classification_metrics, multi_label_metrics, regression_metrics
from llmjax.objectives.losses import cross_entropy, is_correct
from llmjax.objectives.task import (
  NO_HEAD,
  OpenRecords,
  PretrainedHead,
  Result,
  Task,
  class_index,
  infer_field_labels,
  label_name,
  require_text,
  reuse_labels,
)
from llmjax.types import Batch, Forward, Metrics, Outputs, Sums

MIN_LABELS = {"single": 2, "multi": 1, "regression": 0}  # by kind of task
MAX_INFERRED_LABELS = 10_000  # more values of a field are hardly labels


@dataclasses.dataclass(frozen=True, eq=False)
class Classification(Task):
  """Classification into one or several of C classes, or regression.

  Attributes:
    tokenizer: tokenizer of the run.
    seq_len: maximum number of tokens of an example.
    labels: class names in the order of the logits; empty for regression.
    kind: "single": one class, softmax cross-entropy; "multi": any number of classes, a sigmoid cross-entropy for each;
      "regression": a number, squared error.
    text: field of the text.
    pair: field of a second text; None: there is none.
    label: field of the answer: a label; for "multi" a list of labels or one text with commas; for "regression" a
      number.
    label_smoothing: see `losses.cross_entropy`; for "single" only.
  """

  tokenizer: TextTokenizer
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
    if self.kind not in MIN_LABELS:
      raise ConfigError(
        f"objective.kind: is not a known value, got {self.kind!r}; {suggest_name(self.kind, MIN_LABELS)}"
      )
    if not 0 <= self.label_smoothing < 1 or (self.label_smoothing and self.kind != "single"):
      raise ConfigError(
        "objective.label_smoothing: must be in [0, 1), and 0 unless objective.kind='single', got "
        f"{self.label_smoothing}"
      )
    minimum = MIN_LABELS[self.kind]
    if len(self.labels) < minimum or (self.kind == "regression" and self.labels):
      expected = f"at least {minimum} labels" if minimum else "no labels"
      raise ConfigError(f"objective.labels: must have {expected} for objective.kind={self.kind!r}, got {self.labels!r}")
    empty = np.zeros(0, np.int32)
    self.tokenizer.assemble(empty, None if self.pair is None else empty, self.seq_len)  # raises if there is no room

  @property
  def head(self) -> dict[str, Json]:
    return {"head": "sequence", "num_classes": max(len(self.labels), 1), "crf": False}

  @property
  def resolved_config(self) -> dict[str, Json]:
    return {"labels": self.labels}

  @property
  def coefficients(self) -> dict[str, float]:
    return {"class": 1.0}

  @property
  def input_fields(self) -> tuple[str, ...]:
    return (self.text,) if self.pair is None else (self.text, self.pair)

  @property
  def label_fields(self) -> tuple[str, ...]:
    return (self.label,)

  @property
  def has_confidence(self) -> bool:
    return self.kind != "regression"

  @property
  def metric_packages(self) -> tuple[str, ...]:
    return ("sklearn", "scipy")

  # Host.

  def check_record(self, record: Record, *, labelled: bool) -> None:
    super().check_record(record, labelled=labelled)
    for field in self.input_fields:
      require_text(record, field)
    if labelled and record[self.label] is not None:
      self.encode_label(record)

  def encode_label(self, record: Record) -> np.ndarray:
    """Return the target: Int[] for "single", Float[C] with 0 and 1 for "multi", Float[1] for "regression".

    Raises:
      ConfigError: the value is not a label, or not a number.
    """
    value = record[self.label]
    if self.kind == "single":
      return np.array(class_index(record, self.label, self.labels), np.int32)
    if self.kind == "multi":
      names = label_names(value, self.label)
      indices = [class_index({self.label: name}, self.label, self.labels) for name in names]
      return np.isin(np.arange(len(self.labels)), indices).astype(np.float32)
    try:
      number = float(value)
    except (TypeError, ValueError):
      number = math.nan
    if not math.isfinite(number):
      raise ConfigError(f"{self.label!r}: must be a number, got {value!r}. For class names set objective.kind='single'")
    return np.array([number], np.float32)

  def encode_record(self, record: Record, *, labelled: bool) -> list[Example]:
    if labelled and record[self.label] is None:  # as in GLUE's test splits
      return []
    texts = [self.tokenizer.encode(record[field]) for field in self.input_fields]
    if not all(map(len, texts)):
      return []
    ids, token_types, _ = self.tokenizer.assemble(texts[0], texts[1] if self.pair else None, self.seq_len)
    inputs = TokenSequence(ids, token_types)
    if not labelled:
      return [Example(inputs)]
    target = self.encode_label(record)
    weight = np.ones(target.shape, np.float32)
    return [Example(inputs, row_labels={"class": target}, row_weights={"class": weight})]

  # Device.

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    logits = forward(batch, rngs=rngs).logits
    target, weight = batch.labels["class"], batch.weights["class"]
    count = jnp.sum(weight)
    correct = None
    if self.kind == "single":
      smoothed, nll, _ = cross_entropy(logits[:, None], target[:, None], self.label_smoothing)
      correct = is_correct(logits[:, None], target[:, None])[:, 0]
      trained, reported = smoothed[:, 0], nll[:, 0]
    elif self.kind == "multi":
      trained = reported = -target * jax.nn.log_sigmoid(logits) - (1 - target) * jax.nn.log_sigmoid(-logits)
      correct = (logits > 0) == (target > 0.5)
    else:
      trained = reported = jnp.square(logits - target)
    metrics = {"loss": (jnp.sum(reported * weight), count)}
    if correct is not None:
      metrics["accuracy"] = (jnp.sum(correct * weight), count)
    return {"class": jnp.sum(trained * weight)}, metrics

  def decode_outputs(self, out: Outputs, batch: Batch) -> dict[str, Array]:
    """Return {"scores": probabilities Float[B C]}; for regression the number Float[B 1]."""
    activations: dict[str, Callable[[Array], Array]] = {"single": jax.nn.softmax, "multi": jax.nn.sigmoid}
    activation = activations.get(self.kind)
    return {"scores": out.logits if activation is None else activation(out.logits)}

  # Host.

  def make_result(
    self, record: Record, examples: Sequence[Example], decoded: Sequence[Mapping[str, np.ndarray]]
  ) -> Result:
    """Return the answer in the field `label`; for classes with "confidence" and {"scores": {label: probability}}."""
    scores = decoded[0]["scores"].astype(float)
    if self.kind == "regression":
      return {self.label: round(float(scores[0]), 6)}
    by_label = {name: round(float(score), 6) for name, score in zip(self.labels, scores, strict=True)}
    answer: str | list[str]
    if self.kind == "single":
      best = int(np.argmax(scores))
      answer, confidence = self.labels[best], scores[best]
    else:
      answer = [name for name, score in zip(self.labels, scores, strict=True) if score > 0.5]
      confidence = np.min(np.maximum(scores, 1 - scores))
    return {self.label: answer, "confidence": round(float(confidence), 6), "scores": by_label}

  def compute_metrics(self, records: Sequence[Record], results: Sequence[Result]) -> dict[str, float]:
    truths = [record[self.label] for record in records]
    predictions = [result[self.label] for result in results]
    if self.kind == "single":
      return classification_metrics([label_name(truth, self.label) for truth in truths], predictions, self.labels)
    if self.kind == "multi":
      return multi_label_metrics([label_names(truth, self.label) for truth in truths], predictions, self.labels)
    return regression_metrics(list(map(float, truths)), predictions)


def label_names(value: Json, field: str) -> list[str]:
  """Return the labels of a record that may have several.

  Args:
    value: a list of labels, or a text with commas between them.
    field: its field, for messages.

  Raises:
    ConfigError: the value has another form.
  """
  if isinstance(value, str):
    value = [part for part in value.split(",") if part.strip()]
  if not isinstance(value, (list, tuple)):
    raise ConfigError(f"{field!r}: must be a list of labels, or a text with commas, got {value!r}")
  return [label_name(each, field) for each in value]


def classification(
  *,
  tokenizer: TextTokenizer,
  seq_len: int,
  labels: Sequence[Json] | None = None,
  kind: str = "single",
  text: str = "text",
  pair: str | None = None,
  label: str = "label",
  label_smoothing: float = 0.0,
  records: OpenRecords | None = None,
  pretrained_head: PretrainedHead = NO_HEAD,
) -> Classification:
  """Build a classification task from a config.

  Args:
    tokenizer: tokenizer of the run.
    seq_len: maximum number of tokens of an example.
    labels: class names; None: infer them from the training split, see `infer_labels` and `task.reuse_labels`.
    kind: see `Classification`, as all other keys of the config.
    text: see `Classification`.
    pair: see `Classification`.
    label: see `Classification`.
    label_smoothing: see `Classification`.
    records: opens the training split.
    pretrained_head: see `task.reuse_labels`.
  """
  if labels is None:
    labels = ()
    if kind != "regression":
      labels = reuse_labels(infer_labels(records, label, is_multi=kind == "multi"), pretrained_head)
  names = tuple(label_name(name, "objective.labels") for name in labels)
  return Classification(tokenizer, seq_len, names, kind, text, pair, label, label_smoothing)


def infer_labels(records: OpenRecords | None, field: str, *, is_multi: bool = False) -> tuple[str, ...]:
  """Return the labels of a field of the training split: those that the data declare, else all that occur.

  Args:
    records: opens the training split.
    field: field of the label.
    is_multi: whether a record may have several labels.

  Raises:
    ConfigError: a record lacks the field or has no valid label there; there are too many different values.
  """
  source = None if records is None else records()
  if source is not None and source.labels.get(field):
    return tuple(source.labels[field])

  def read_labels(record: Record) -> list[str]:
    value = record[field]
    if value is None:
      return []
    return label_names(value, field) if is_multi else [label_name(value, field)]

  labels = infer_field_labels(source, field, read_labels)
  if len(labels) > MAX_INFERRED_LABELS:
    raise ConfigError(
      f"{field!r}: must have at most {MAX_INFERRED_LABELS} labels, got {len(labels)} different values. For numbers set "
      "objective.kind='regression'; otherwise set objective.labels=('a', 'b')"
    )
  return labels

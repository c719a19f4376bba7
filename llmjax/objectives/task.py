"""Tasks: objectives whose records carry the answer in fields of their own, and helpers to read those fields.

All parts of a task stand in one file. `encode_record` makes examples of a record, with or without its labels (host).
`loss` and `decode_outputs` process batches of them (device). `make_result` turns decoded outputs into an answer, and
`compute_metrics` compares answers with the records' own (host). `llmjax predict` and the evaluator of tasks use these.
"""

from __future__ import annotations

import abc
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from llmjax.config import ConfigError, Json, suggest_name
from llmjax.data.sources.base import Source
from llmjax.examples import Example, Record, RecordSource, TextTokenizer, Window
from llmjax.types import Array, Batch, Objective, Outputs

Result: TypeAlias = dict[str, Json]  # an answer as JSON
OpenRecords: TypeAlias = Callable[[], Source]  # opens the training split
PretrainedHead: TypeAlias = Mapping[str, Json]  # config of the objective that a head was trained on, and its "path"

NO_HEAD: PretrainedHead = types.MappingProxyType({})
FRESH_HEAD_HINT = """to initialise a new head, set --config.init_map='((".*head.*|crf/.*", None),)'"""
MAX_SHOWN_LABELS = 6  # in messages


class Task(Objective):
  """An objective whose records carry the answer.

  Attributes:
    tokenizer: tokenizer of the run.
    seq_len: most input tokens of an example.
    generates: whether answers are texts, generated from the prompt that `encode_record` makes without labels.
    max_new_tokens: default for the length of a generated text, in tokens; used if `generates`.
    end_ids: tokens that end a generated text; used if `generates`.
  """

  tokenizer: TextTokenizer
  seq_len: int
  generates: bool = False

  @property
  def max_new_tokens(self) -> int:
    raise NotImplementedError(f"{type(self).__name__} does not generate")

  @property
  def end_ids(self) -> tuple[int, ...]:
    return ()

  @property
  def has_confidence(self) -> bool:
    """Whether results have the key "confidence"."""
    return not self.generates

  @property
  def metric_packages(self) -> tuple[str, ...]:
    """Optional packages that `compute_metrics` imports."""
    return ()

  # Host.

  @property
  @abc.abstractmethod
  def input_fields(self) -> tuple[str, ...]:
    """Fields of a record that the model reads."""

  @property
  @abc.abstractmethod
  def label_fields(self) -> tuple[str, ...]:
    """Fields of a record that the model is trained to predict."""

  @property
  def fields(self) -> tuple[str, ...]:
    return (*self.input_fields, *self.label_fields)

  @property
  def skip_reason(self) -> str:
    return (
      f"they have no tokens in {_join_fields(self.input_fields)}, or no answer in {_join_fields(self.label_fields)}"
    )

  def check_record(self, record: Record, *, labelled: bool) -> None:
    """Check a record without tokenizing it, so that whole splits can be checked before anything compiles.

    Args:
      record: fields by name.
      labelled: whether the answer must be there and valid.

    Raises:
      ConfigError: the record cannot be read.
    """
    for field in (*self.input_fields, *(self.label_fields if labelled else ())):
      if field not in record:
        raise ConfigError(f"there is no field {field!r}, which the objective reads; {suggest_name(field, record)}")

  @abc.abstractmethod
  def encode_record(self, record: Record, *, labelled: bool) -> list[Example]:
    """Return the examples of a record: none if it is skipped, several if it is read in windows.

    Args:
      record: a record that passed `check_record`.
      labelled: whether examples have labels and weights. Without, the answer may be missing.
    """

  def split_record(self, record: Record, tokenizer: TextTokenizer, seq_len: int, whole: bool) -> Iterator[Window]:
    self.check_record(record, labelled=True)
    for example in self.encode_record(record, labelled=True):
      yield Window(record, np.zeros(0, np.int32), example)

  def make_example(self, window: Window, rng: np.random.Generator, corpus: RecordSource) -> Example | None:
    return window.example

  # Device.

  def decode_outputs(self, out: Outputs, batch: Batch) -> dict[str, Array]:
    """Return what `make_result` needs, as arrays [B ...]. Not used by tasks that generate.

    Args:
      out: outputs of the model.
      batch: examples without labels.
    """
    raise TypeError(f"{type(self).__name__} must define `decode_outputs`, or set `generates`, to give answers")

  # Host.

  @abc.abstractmethod
  def make_result(
    self, record: Record, examples: Sequence[Example], decoded: Sequence[Mapping[str, np.ndarray]]
  ) -> Result:
    """Return the answer: the record's label fields, and further keys; with "confidence" in [0, 1] if there is one.

    Args:
      record: the record to answer.
      examples: its examples, of `encode_record` without labels.
      decoded: for each example the arrays of `decode_outputs` without the batch axis. For tasks that generate,
        {"tokens": Int[n]}, the generated tokens without the one that ends the text.
    """

  @abc.abstractmethod
  def compute_metrics(self, records: Sequence[Record], results: Sequence[Result]) -> dict[str, float]:
    """Return {metric: value} of results, compared with the answers of their records."""


def _join_fields(fields: Iterable[str]) -> str:
  return " and ".join(map(repr, fields))


def reuse_labels(labels: Sequence[str], pretrained_head: PretrainedHead) -> tuple[str, ...]:
  """Return the labels to train with: those of a pretrained head, in its order, else those of the training split.

  Args:
    labels: labels of the training split.
    pretrained_head: the "labels" of the head in the checkpoint of init_from, and the "path" of the checkpoint.

  Raises:
    ConfigError: the training split has labels that the head lacks.
  """
  head_labels = tuple(pretrained_head.get("labels", ()))
  if not head_labels:
    return tuple(labels)
  if set(labels) <= set(head_labels):
    return head_labels
  raise ConfigError(
    f"init_from={pretrained_head['path']} has a head for the labels {_show_labels(head_labels)}, and the training "
    f"split has {_show_labels(labels)}; {FRESH_HEAD_HINT}"
  )


def _show_labels(labels: Sequence[str]) -> str:
  more = f", ... ({len(labels)} in all)" if len(labels) > MAX_SHOWN_LABELS else ""
  return ", ".join(map(repr, labels[:MAX_SHOWN_LABELS])) + more


def require_text(record: Record, field: str) -> str:
  """Return a field of text.

  Raises:
    ConfigError: the field is not text, or is blank.
  """
  value = record[field]
  if not isinstance(value, str):
    raise ConfigError(f"{field!r}: must be text, got {value!r}")
  if not value.strip():
    raise ConfigError(f"{field!r}: must not be empty. Fill it, or remove the record")
  return value


def class_index(record: Record, field: str, labels: Sequence[str]) -> int:
  """Return the index of a record's label.

  Raises:
    ConfigError: the value is not one of the labels.
  """
  name = label_name(record[field], field)
  if name not in labels:
    raise ConfigError(f"{field!r}: must be one of the {len(labels)} labels, got {name!r}; {suggest_name(name, labels)}")
  return labels.index(name)


def label_name(value: Json, field: str) -> str:
  """Return the name of a label; 1, 1.0 and "1" have the same.

  Args:
    value: the label in a record.
    field: its field, for messages.

  Raises:
    ConfigError: the value is neither text nor a whole number.
  """
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, (float, np.floating)) and float(value).is_integer():
    value = int(value)
  if isinstance(value, (str, int, np.integer)) and str(value).strip():
    return str(value).strip()
  raise ConfigError(f"{field!r}: a label must be text or a whole number, got {value!r}")


def sort_labels(labels: Iterable[str]) -> tuple[str, ...]:
  """Return distinct labels in order: by value if all are numbers, else alphabetically."""
  names = set(labels)
  return tuple(sorted(names, key=float if all(map(_is_number, names)) else str))


def _is_number(text: str) -> bool:
  try:
    return math.isfinite(float(text))
  except ValueError:
    return False


def infer_field_labels(
  source: Source | None, field: str, read_labels: Callable[[Record], Iterable[str]]
) -> tuple[str, ...]:
  """Return the labels that occur in a field of the training split, which is read completely.

  Args:
    source: the training split, None if there is none.
    field: field of a record.
    read_labels: returns the labels of a record that has the field.

  Raises:
    ConfigError: there is no training split, or a record lacks the field or has no valid label there.
  """
  if source is None:
    raise ConfigError("objective.labels: None infers labels from a training split, and there is none. Set the labels")
  labels: set[str] = set()
  for index, record in enumerate(source):
    if field not in record:
      raise ConfigError(f"{source.location(index)}: there is no field {field!r}; {suggest_name(field, record)}")
    try:
      labels.update(read_labels(record))
    except ConfigError as error:
      raise ConfigError(f"{source.location(index)}: {error}") from error
  return sort_labels(labels)

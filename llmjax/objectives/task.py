"""What objectives of labelled data share: they read a record's fields, and give back an answer in fields of their own.

A task has its parts side by side in its file: `encode` makes features of a record, with its labels or without
(host); `loss` and `decode` work on batches of them (device); `result` makes an answer of what `decode` gave, and
`measure` compares answers with the records' own (host). `llmjax predict` and the evaluator of tasks use these.
"""

from __future__ import annotations

import abc
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llmjax.config import ConfigError, suggest_name
from llmjax.types import Array, Batch, Features, Objective, Outputs

Record = Mapping[str, Any]
Result = dict[str, Any]  # of JSON


class Task(Objective):
  """An objective whose records carry the answer.

  Attributes:
    tokenizer, seq_len: what a record is read with, and how much of it; every task has these.
    generates: its answers are texts, written after what `encode` gives without labels. Such tasks also have
      `max_new_tokens`, how long a text may be where nothing else is said, and `ends`, the tokens that end one.
    confident: its answers have a "confidence".
    libraries: that `measure` imports.
  """

  tokenizer: Any
  seq_len: int
  generates: bool = False
  max_new_tokens: Any = None
  ends: Any = ()

  @property
  def confident(self) -> bool:
    return not self.generates

  @property
  def libraries(self) -> tuple[str, ...]:
    return ()

  # host

  @property
  @abc.abstractmethod
  def inputs(self) -> tuple[str, ...]:
    """The fields of a record that are read."""

  @property
  @abc.abstractmethod
  def answers(self) -> tuple[str, ...]:
    """The fields of a record that are learned."""

  @property
  def fields(self) -> tuple[str, ...]:
    return (*self.inputs, *self.answers)

  @property
  def skip_reason(self) -> str:
    return f"they have no tokens in {_named(self.inputs)}, or no answer in {_named(self.answers)}"

  def check(self, record: Record, *, labelled: bool) -> None:
    """Raises ConfigError where a record cannot be read, or, with `labelled`, not be learned from. It tokenises nothing,
    so that whole splits can be looked at before anything compiles."""
    for field in (*self.inputs, *(self.answers if labelled else ())):
      if field not in record:
        raise ConfigError(f"there is no field {field!r}, which the objective reads; {suggest_name(field, record)}")

  @abc.abstractmethod
  def encode(self, record: Record, *, labelled: bool) -> list[Features]:
    """Features of a record: none where it is left out, several where it is read in windows.

    Args:
      record: one that passed `check`.
      labelled: whether labels and weights are wanted; without, the answers may be missing.
    """

  def examples(self, record: Record, tokenizer: Any, length: int, whole: bool) -> Iterator[dict[str, Any]]:
    self.check(record, labelled=True)
    for features in self.encode(record, labelled=True):
      yield {"features": features}

  def features(self, example: Record, rng: np.random.Generator, corpus: Any) -> Features | None:
    return example["features"]

  # device

  def decode(self, out: Outputs, batch: Batch) -> dict[str, Array]:
    """What `result` needs of a batch of features without labels; leaves [B ...]. Tasks that generate need none."""
    raise TypeError(
      f"{type(self).__name__} gives no answers from a model's outputs: it must have `decode`, or generate"
    )

  # host

  @abc.abstractmethod
  def result(self, record: Record, features: Sequence[Features], decoded: Sequence[Mapping[str, np.ndarray]]) -> Result:
    """The answer, in the fields of the records and more, with "confidence" in [0, 1] where there is one.

    Args:
      features: what `encode` gave for the record.
      decoded: what `decode` gave for each of them, without the batch dimension; where the task generates, {"tokens":
        Int[n]}, what it wrote without what ends it.
    """

  @abc.abstractmethod
  def measure(self, records: Sequence[Record], results: Sequence[Result]) -> dict[str, float]:
    """{metric: number} of results against the records' own answers."""


Records = Callable[[], Any]  # opens the training split, a `llmjax.data.sources.base.Source`


def _named(fields: Iterable[str]) -> str:
  return " and ".join(map(repr, fields))


NOTHING: Mapping[str, Any] = types.MappingProxyType({})
FRESH_HEAD = """to start it afresh, --config.init_map='((".*head.*|crf/.*", None),)'"""


def keep_labels(found: Sequence[str], learned: Mapping[str, Any]) -> tuple[str, ...]:
  """The labels of a training split; all of the head that is gone on with, in its order, where it knows these.

  Args:
    learned: the "labels" of that head, and the "path" that it is from; empty where there is none.
  Raises:
    ConfigError: it knows others.
  """
  known = tuple(learned.get("labels", ()))
  if not known or set(found) <= set(known):
    return known or tuple(found)
  raise ConfigError(
    f"init_from={learned['path']} has a head for the labels {_shown(known)}, and the training split has "
    f"{_shown(found)}; {FRESH_HEAD}"
  )


def _shown(labels: Sequence[str]) -> str:
  more = f", ... ({len(labels)} in all)" if len(labels) > 6 else ""
  return ", ".join(map(repr, labels[:6])) + more


def text_field(record: Record, field: str, *, empty: bool = False) -> str:
  """A field that must be text; not blank unless `empty`.

  Raises ConfigError with what is there instead.
  """
  value = record[field]
  if not isinstance(value, str):
    raise ConfigError(f"{field!r} is {value!r}, which is no text")
  if not empty and not value.strip():
    raise ConfigError(f"{field!r} is empty; fill it, or take the record out")
  return value


def class_of(record: Record, field: str, labels: Sequence[str]) -> int:
  """The number of a record's class."""
  label = label_text(record[field])
  if label not in labels:
    raise ConfigError(
      f"{field!r} is {label!r}, which is none of the {len(labels)} labels; {suggest_name(label, labels)}"
    )
  return labels.index(label)


def label_text(value: Any) -> str:
  """A label as its name: 1, 1.0 and "1" are the same; None has none.

  Raises ConfigError for what names nothing.
  """
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, (float, np.floating)) and float(value).is_integer():
    value = int(value)
  if isinstance(value, (str, int, np.integer)) and str(value).strip():
    return str(value).strip()
  raise ConfigError(f"a label is {value!r}; it must be a text or a whole number")


def sort_labels(found: Iterable[str]) -> tuple[str, ...]:
  """Numbers by their size, else by the alphabet."""
  names = set(found)
  return tuple(sorted(names, key=float if all(map(_is_number, names)) else str))


def _is_number(text: str) -> bool:
  try:
    return math.isfinite(float(text))
  except ValueError:
    return False

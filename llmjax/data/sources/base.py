"""`Source`: records with random access, selected by a split.

`registry` lists the kinds of sources. A record has the key "text", unless the objective reads other fields. Sources
may be read by several threads.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from llmjax.config import ConfigError
from llmjax.storage.cache import content_digest

Record: TypeAlias = dict[str, Any]  # {field: value of JSON's types}


@dataclasses.dataclass(frozen=True)
class Source:
  """Records with random access.

  Attributes:
    size: number of records.
    read: returns the record of an index, without checking the index.
    fingerprint: hex digits that depend on content and selection; equal on all hosts with the same data.
    parts: components of a mixture; empty for other sources.
    weights: the relative frequency of each component.
    whole: the source without slicing, for a source that is a slice of a text.
    labels: {field: class names in order}, if the data declares them.
    locate: returns the file and line of an index for error messages; None: unknown. See `location`.
  """

  size: int
  read: Callable[[int], Record]
  fingerprint: str
  parts: tuple[Source, ...] = ()
  weights: tuple[float, ...] = ()
  whole: Source | None = None
  labels: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  locate: Callable[[int], str] | None = None

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < self.size:
      raise IndexError(f"record {index} of {self.size}")
    return self.read(int(index))

  def __iter__(self) -> Iterator[Record]:
    return map(self.read, range(self.size))

  def location(self, index: int) -> str:
    """Return where a record is stored, for error messages."""
    return f"record {index} (from 0)" if self.locate is None else self.locate(int(index))


def text_of(record: Mapping[str, Any]) -> str:
  """Return the text of any record: its "text" if that is a string, else all strings in it.

  Items of a list of strings, for example words, are joined by spaces. Other strings, for example the messages of a
  chat, are joined by line ends.
  """
  text = record.get("text")
  return text if isinstance(text, str) else "\n".join(_strings_in(record.values()))


def _strings_in(values: Iterable[Any]) -> Iterator[str]:
  for value in values:
    if isinstance(value, str):
      yield value
    elif isinstance(value, Mapping):
      yield from _strings_in(value.values())
    elif isinstance(value, (list, tuple)):
      are_words = bool(value) and all(isinstance(v, str) for v in value)
      yield from [" ".join(value)] if are_words else _strings_in(value)


class Split(NamedTuple):
  """A parsed split, such as "train[10%:200]" -> ("train", "10%", "200"); empty strings for omitted parts."""

  name: str
  start: str
  stop: str


def parse_split(split: str) -> Split:
  """Parse a split in the syntax of TFDS: "train", "train[:90%]", "[90%:]", "train[100:200]"."""
  bound = r"(-?\d+(?:\.\d+)?%|-?\d+|)"
  match = re.fullmatch(rf"([\w-]*)(?:\[{bound}:{bound}\])?", split.strip())
  if match is None:
    raise ConfigError(f"split: not a split, got {split!r}. Write 'train', 'train[:90%]', '[90%:]' or 'train[100:200]'")
  return Split(match[1], match[2] or "", match[3] or "")


def split_bounds(split: str, size: int, unit: str = "records") -> tuple[int, int]:
  """Return [start, stop) of a split of `size` units.

  Percentages are rounded down, so that adjacent slices partition the data.

  Raises:
    ConfigError: the slice is empty.
  """

  def position(bound: str, default: int) -> int:
    if not bound:
      return default
    offset = Fraction(bound[:-1]) / 100 * size if bound.endswith("%") else Fraction(bound)
    return min(max(math.floor(offset) if offset >= 0 else size + math.floor(offset), 0), size)

  _, low, high = parse_split(split)
  start, stop = position(low, 0), position(high, size)
  if start >= stop:
    raise ConfigError(f"split: {split!r} selects none of {size} {unit}. Choose a wider slice or add data")
  return start, stop


def shuffle_source(source: Source, split: str) -> Source:
  """Return a slice of the records in a fixed pseudo-random order."""
  start, stop = split_bounds(split, len(source))
  # NumPy promises to keep a generator's raw bits, but not what other methods make of them.
  order = np.argsort(np.random.Philox(key=0).random_raw(len(source)), kind="stable")[start:stop]
  fingerprint = content_digest("shuffled", source.fingerprint, start, stop)
  return dataclasses.replace(_select_records(source, order, fingerprint), whole=source.whole)


def subsample_bytes(source: Source, max_bytes: int) -> Source:
  """Return evenly spaced records with about `max_bytes` of text in total; all records of a smaller source."""
  sample = np.linspace(0, len(source) - 1, min(len(source), 64)).astype(np.int64)
  mean = sum(len(text_of(source[int(i)]).encode()) for i in sample) / len(sample)
  count = len(source) if mean * len(source) <= max_bytes else max(int(max_bytes / mean), 1)
  indices = np.linspace(0, len(source) - 1, count).astype(np.int64)
  return _select_records(source, indices, content_digest(source.fingerprint, count))


def _select_records(source: Source, indices: np.ndarray, fingerprint: str) -> Source:
  """Return the records of `indices` Int64[n], in that order."""
  return Source(
    len(indices),
    lambda index: source[int(indices[index])],
    fingerprint,
    labels=source.labels,
    locate=lambda index: source.location(int(indices[index])),
  )


def join_sources(parts: Iterable[Source], weights: Iterable[float]) -> Source:
  """Return a mixture of sources. It has the labels that are the same in all of them."""
  parts, weights = tuple(parts), tuple(float(w) for w in weights)
  ends = np.cumsum([len(part) for part in parts])

  def component(index: int) -> tuple[Source, int]:
    """Return the component of a record and the record's index in it."""
    part = int(np.searchsorted(ends, index, side="right"))
    return parts[part], index - int(ends[part]) + len(parts[part])

  def read(index: int) -> Record:
    part, own_index = component(index)
    return part[own_index]

  def locate(index: int) -> str:
    part, own_index = component(index)
    return part.location(own_index)

  labels = {
    field: names for field, names in parts[0].labels.items() if all(p.labels.get(field) == names for p in parts)
  }
  fingerprint = content_digest([p.fingerprint for p in parts], weights)
  return Source(int(ends[-1]), read, fingerprint, parts, weights, labels=labels, locate=locate)

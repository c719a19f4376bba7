"""Where text comes from: sources of records with random access, chosen by `data.corpus.name` and a split.

A source is a `Source`: `len(source)`, `source[i] -> {"text": str, ...}` and a fingerprint of content and selection.
Reading is safe from several threads. Local files are read by `files.py`, `records.py` and, where they hold texts with
answers to learn, `labelled.py`; TFDS by `tfds_source.py`. A record needs no "text" where the objective names fields.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from llmjax.config import ConfigError, build
from llmjax.storage.cache import content_digest

# Each takes `split` in the syntax of TFDS: "train", "validation", "train[:90%]", "[90%:]", "train[100:200]".
SOURCES = {
  "python_stdlib": "llmjax.data.sources.tfds:python_stdlib",
  "tfds": "llmjax.data.sources.tfds:tfds",
  "mixture": "llmjax.data.sources.base:mixture",
  "files": "llmjax.data.sources.base:files",
  "text": "llmjax.data.sources.files:text",
  "jsonl": "llmjax.data.sources.files:jsonl",
  "parquet": "llmjax.data.sources.tables:parquet",
  "csv": "llmjax.data.sources.tables:csv",
  "array_record": "llmjax.data.sources.tables:array_record",
  "conll": "llmjax.data.sources.labelled:conll",
  "squad": "llmjax.data.sources.labelled:squad",
  "parallel": "llmjax.data.sources.labelled:parallel",
}


@dataclasses.dataclass(frozen=True)
class Source:
  """Records with random access.

  Attributes:
    size: how many.
    read: index -> record, a dict: with "text", unless the source was told that no field is called so.
    fingerprint: short hex that names content and selection; the same on every host that holds the same data.
    parts, weights: the sources of a mixture and how often each is drawn; empty for any other source.
    whole: the source that this one is a slice of, where there is one.
    labels: {field: the names of its classes, in their order}, where the data itself declares them.
    where: index -> the file and line of a record, where they are known; see `place`.
  """

  size: int
  read: Callable[[int], dict[str, Any]]
  fingerprint: str
  parts: tuple[Source, ...] = ()
  weights: tuple[float, ...] = ()
  whole: Source | None = None
  labels: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  where: Callable[[int], str] | None = None

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not 0 <= index < self.size:
      raise IndexError(f"record {index} of {self.size}")
    return self.read(int(index))

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return map(self.read, range(self.size))

  def location(self, index: int) -> str:
    """Where a record is to be found, for messages."""
    return f"record {index} (from 0)" if self.where is None else self.where(int(index))


def text_of(record: Mapping[str, Any]) -> str:
  """The text of any record: its "text" where that is a string, else all strings in it, whatever the field.

  Strings of a list of strings, such as words, are joined by spaces; everything else, such as the messages of a chat, by
  line ends.
  """
  text = record.get("text")
  return text if isinstance(text, str) else "\n".join(_texts(record.values()))


def _texts(values: Iterable[Any]) -> Iterator[str]:
  for value in values:
    if isinstance(value, str):
      yield value
    elif isinstance(value, Mapping):
      yield from _texts(value.values())
    elif isinstance(value, (list, tuple)):
      words = bool(value) and all(isinstance(v, str) for v in value)
      yield from [" ".join(value)] if words else _texts(value)


def parse_split(split: str) -> tuple[str, str, str]:
  """ "train[10%:200]" -> ("train", "10%", "200"); empty strings where nothing is said."""
  bound = r"(-?\d+(?:\.\d+)?%|-?\d+|)"
  match = re.fullmatch(rf"([\w-]*)(?:\[{bound}:{bound}\])?", split.strip())
  if match is None:
    raise ConfigError(f"split {split!r} is not understood; say 'train', 'train[:90%]', '[90%:]' or 'train[100:200]'")
  return match[1], match[2] or "", match[3] or ""


def split_bounds(split: str, size: int, unit: str = "records") -> tuple[int, int]:
  """The slice of `split` over `size` units as [start, stop); percents round down, so that slices partition."""

  def position(bound: str, default: int) -> int:
    if not bound:
      return default
    share = Fraction(bound[:-1]) / 100 * size if bound.endswith("%") else Fraction(bound)
    return min(max(math.floor(share) if share >= 0 else size + math.floor(share), 0), size)

  _, low, high = parse_split(split)
  start, stop = position(low, 0), position(high, size)
  if start >= stop:
    raise ConfigError(f"split {split!r} selects none of {size} {unit}; choose a wider slice or give more data")
  return start, stop


# Which source reads a file, by the ending of its name; any other is text.
ENDINGS = {
  ".jsonl": "jsonl",
  ".parquet": "parquet",
  ".csv": "csv",
  ".tsv": "csv",
  ".array_record": "array_record",
  ".conll": "conll",
  ".json": "squad",
}


def source_kind(file: str | Path) -> str:
  """Which source reads a file or glob."""
  return ENDINGS.get(Path(file).suffix, "text")


def files(
  split: str,
  files: str | Sequence[str] | Mapping[str, Any],
  column: str | None = "text",
  columns: Sequence[str] = (),
  max_bytes: int = 65536,
  shuffle: bool = False,
) -> Source:
  """One's own files, of whatever kind the name of the split's first says.

  Args:
    files: a path or glob, a tuple of those, or {split: those}.
    column: the field of a record that is the text, None where no one field is; plain text, CoNLL and SQuAD have theirs.
    columns: further ones to read from Parquet and CSV; records of other kinds hold all their fields, and where `column`
      is None, those of JSONL must have these.
    max_bytes: pieces of plain text.
    shuffle: slices such as "[:90%]" are of the records in an order of chance, the same every time: files may be sorted.
  """
  name, _, _ = parse_split(split)
  chosen = files.get(name, "") if isinstance(files, Mapping) else files
  chosen = chosen if isinstance(chosen, (str, Path)) else next(iter(chosen), "")
  kind = source_kind(chosen)
  if kind == "text" and (column is None or columns):
    wanted = ", ".join(map(repr, columns)) or "fields"
    raise ConfigError(
      f"data.corpus.files={str(chosen)!r} is plain text by its ending, and the objective reads {wanted}; known are "
      f"{', '.join(ENDINGS)}: rename it"
    )
  settings: dict[str, Any] = {"text": column}
  if kind in ("text", "conll", "squad"):
    settings = {"max_bytes": max_bytes} if kind == "text" else {}
  if kind in ("parquet", "csv") or (kind == "jsonl" and column is None):
    settings["columns"] = tuple(columns)
  spec = {"name": kind, "files": files, **settings}
  if not shuffle:
    return build(spec, SOURCES, "data.corpus", split=split)
  return shuffled(build(spec, SOURCES, "data.corpus", split=name), split)


def shuffled(whole: Source, split: str) -> Source:
  """A slice of the records in an order of chance."""
  start, stop = split_bounds(split, len(whole))
  # Only raw bits of a generator: NumPy promises that those never change.
  order = np.argsort(np.random.Philox(key=0).random_raw(len(whole)), kind="stable")[start:stop]
  fingerprint = content_digest("shuffled", whole.fingerprint, start, stop)
  return Source(
    stop - start,
    lambda i: whole[int(order[i])],
    fingerprint,
    whole=whole.whole,
    labels=whole.labels,
    where=lambda i: whole.location(int(order[i])),
  )


def subsample_bytes(source: Source, max_bytes: int) -> Source:
  """Evenly spaced records with about `max_bytes` of text together; all of them where there is no more."""
  probe = np.linspace(0, len(source) - 1, min(len(source), 64)).astype(np.int64)
  mean = sum(len(text_of(source[int(i)]).encode()) for i in probe) / len(probe)
  count = len(source) if mean * len(source) <= max_bytes else max(int(max_bytes / mean), 1)
  which = np.linspace(0, len(source) - 1, count).astype(np.int64)
  fingerprint = content_digest(source.fingerprint, count)
  return Source(
    count,
    lambda index: source[int(which[index])],
    fingerprint,
    labels=source.labels,
    where=lambda index: source.location(int(which[index])),
  )


def mixture(split: str, sources: Mapping[str, Mapping[str, Any]]) -> Source:
  """Several sources, drawn from in proportion to their weights: {NAME: {"weight": w, "name": ..., ...}}.

  A part may have a `split` of its own. Read by index, the parts follow each other.
  """
  if not sources:
    raise ConfigError("data.corpus.sources is empty; give {NAME: {'weight': 1.0, 'name': 'text', ...}}")
  parts: list[Source] = []
  weights: list[float] = []
  for name, spec in sources.items():
    what = f"data.corpus.sources.{name}"
    spec = dict(spec)
    weight = spec.pop("weight", None)
    if not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
      raise ConfigError(f"{what}.weight={weight!r} must be a positive number")
    runtime: dict[str, Any] = {} if "split" in spec else {"split": split}
    part = build(spec, SOURCES, what, **runtime)
    total = sum(part.weights) or 1.0
    parts.extend(part.parts or [part])  # a mixture of mixtures is one mixture
    weights.extend(weight * w / total for w in part.weights or [1.0])
  return join_sources(parts, weights)


def join_sources(parts: Iterable[Source], weights: Iterable[float]) -> Source:
  """A mixture of opened sources; it has the labels in which all of them agree."""
  parts, weights = tuple(parts), tuple(float(w) for w in weights)
  starts = [sum(len(p) for p in parts[:i]) for i in range(len(parts) + 1)]

  def find(index: int) -> tuple[Source, int]:
    which = next(i for i in range(len(parts)) if index < starts[i + 1])
    return parts[which], index - starts[which]

  def read(index: int) -> dict[str, Any]:
    part, own = find(index)
    return part[own]

  def where(index: int) -> str:
    part, own = find(index)
    return part.location(own)

  labels = {
    field: names for field, names in parts[0].labels.items() if all(p.labels.get(field) == names for p in parts)
  }
  fingerprint = content_digest([p.fingerprint for p in parts], weights)
  return Source(starts[-1], read, fingerprint, parts, weights, labels=labels, where=where)

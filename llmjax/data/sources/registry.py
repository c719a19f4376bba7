"""The sources by their names in configs (`data.corpus.name`), and the two that are built from others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from llmjax.config import ConfigError, build
from llmjax.data.sources.base import Source, join_sources, parse_split, shuffle_source

# Each function takes `split`, see `base.parse_split`.
SOURCES = {
  "python_stdlib": "llmjax.data.sources.tfds:python_stdlib_source",
  "tfds": "llmjax.data.sources.tfds:tfds_source",
  "mixture": "llmjax.data.sources.registry:mixture_source",
  "files": "llmjax.data.sources.registry:files_source",
  "text": "llmjax.data.sources.text:text_source",
  "jsonl": "llmjax.data.sources.text:jsonl_source",
  "parquet": "llmjax.data.sources.tables:parquet_source",
  "csv": "llmjax.data.sources.tables:csv_source",
  "array_record": "llmjax.data.sources.tables:array_record_source",
  "conll": "llmjax.data.sources.labelled:conll_source",
  "squad": "llmjax.data.sources.labelled:squad_source",
  "parallel": "llmjax.data.sources.labelled:parallel_source",
}

# {suffix of a file: key of SOURCES}; all other files are "text".
SUFFIXES = {
  ".jsonl": "jsonl",
  ".parquet": "parquet",
  ".csv": "csv",
  ".tsv": "csv",
  ".array_record": "array_record",
  ".conll": "conll",
  ".json": "squad",
}


def source_kind(file: str | Path) -> str:
  """Return the key of SOURCES for a file or glob, by its suffix."""
  return SUFFIXES.get(Path(file).suffix, "text")


def files_source(
  split: str,
  files: str | Sequence[str] | Mapping[str, Any],
  column: str | None = "text",
  columns: Sequence[str] = (),
  max_bytes: int = 65536,
  shuffle: bool = False,
) -> Source:
  """Return the records of files in any of the formats of SUFFIXES, chosen by the suffix of the split's first file.

  Args:
    split: see `base.parse_split`.
    files: a path or glob, several of them, or {split name: one or several}.
    column: field to use as "text"; None: the records need no text. Ignored for plain text, CoNLL and SQuAD.
    columns: further columns to read from Parquet and CSV. Other formats have all their fields; with `column` None,
      JSONL records must have these.
    max_bytes: largest record of plain text.
    shuffle: slice the records in a fixed pseudo-random order, because files may be sorted.
  """
  name = parse_split(split).name
  of_split = files.get(name, "") if isinstance(files, Mapping) else files
  first = of_split if isinstance(of_split, (str, Path)) else next(iter(of_split), "")
  kind = source_kind(first)
  if kind == "text" and (column is None or columns):
    wanted = ", ".join(map(repr, columns)) or "fields"
    raise ConfigError(
      f"data.corpus.files: the objective reads {wanted}, but the suffix stands for plain text, got {str(first)!r}. "
      f"Rename the file; suffixes of records are {', '.join(SUFFIXES)}"
    )
  spec: dict[str, object] = {"name": kind, "files": files}
  if kind == "text":
    spec["max_bytes"] = max_bytes
  elif kind not in ("conll", "squad"):
    spec["text"] = column
  if kind in ("parquet", "csv") or (kind == "jsonl" and column is None):
    spec["columns"] = tuple(columns)
  if not shuffle:
    return cast(Source, build(spec, SOURCES, "data.corpus", split=split))
  return shuffle_source(build(spec, SOURCES, "data.corpus", split=name), split)


def mixture_source(split: str, sources: Mapping[str, Mapping[str, Any]]) -> Source:
  """Return several sources, sampled in proportion to their weights. Indexing reads them one after the other.

  Args:
    split: the split of each component without a key "split" of its own.
    sources: {name: {"weight": w, "name": key of SOURCES, ...}}.
  """
  if not sources:
    raise ConfigError("data.corpus.sources: empty. Set it to {NAME: {'weight': 1.0, 'name': 'text', ...}}")
  parts: list[Source] = []
  weights: list[float] = []
  for name, component in sources.items():
    key, spec = f"data.corpus.sources.{name}", dict(component)
    weight = spec.pop("weight", None)
    if not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
      raise ConfigError(f"{key}.weight: must be a positive number, got {weight!r}")
    runtime: dict[str, Any] = {} if "split" in spec else {"split": split}
    part = build(spec, SOURCES, key, **runtime)
    total = sum(part.weights) or 1.0
    parts.extend(part.parts or [part])  # a mixture of mixtures is flattened
    weights.extend(weight * w / total for w in part.weights or [1.0])
  return join_sources(parts, weights)

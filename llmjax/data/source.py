"""Where text comes from: sources of records with random access, chosen by `data.corpus.name` and a split.

A source is a `Source`: `len(source)`, `source[i] -> {"text": str, ...}` and a fingerprint of content and selection.
Reading is safe from several threads. Sources over local files are in `files.py` and `records.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from llmjax.config import ConfigError, build, nearest

# Each takes `split` in the syntax of TFDS: "train", "validation", "train[:90%]", "[90%:]", "train[100:200]".
SOURCES = {
  "python_stdlib": "llmjax.data.source:python_stdlib",
  "tfds": "llmjax.data.source:tfds",
  "mixture": "llmjax.data.source:mixture",
  "text": "llmjax.data.files:text",
  "jsonl": "llmjax.data.files:jsonl",
  "parquet": "llmjax.data.records:parquet",
  "array_record": "llmjax.data.records:array_record",
}


@dataclasses.dataclass(frozen=True)
class Source:
  """Records with random access.

  Attributes:
    size: how many.
    read: index -> record, a dict with at least "text".
    fingerprint: short hex that names content and selection; the same on every host that holds the same data.
    parts, weights: the sources of a mixture and how often each is drawn; empty for any other source.
    whole: the source that this one is a slice of, where there is one.
  """

  size: int
  read: Callable[[int], dict[str, Any]]
  fingerprint: str
  parts: tuple[Source, ...] = ()
  weights: tuple[float, ...] = ()
  whole: Source | None = None

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not 0 <= index < self.size:
      raise IndexError(f"record {index} of {self.size}")
    return self.read(int(index))

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return map(self.read, range(self.size))


def digest(*content: Any) -> str:
  """A short hex name for JSON-like content."""
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def cache_dir() -> Path:
  """Where prepared data and trained tokenizers are kept: $LLMJAX_CACHE, else ~/.cache/llmjax."""
  return Path(os.environ.get("LLMJAX_CACHE") or "~/.cache/llmjax").expanduser()


def cached(path: Path, fill: Callable[[Path], None]) -> Path:
  """`path`, made by `fill(other path)` and renamed if absent: never half there, and processes may race."""
  if path.exists():
    return path
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
      made = Path(folder) / path.name
      fill(made)
      try:
        made.rename(path)
      except OSError:
        if not path.exists():  # else another process was faster, with the same content
          raise
  except PermissionError as error:
    raise ConfigError(f"the cache {path.parent} cannot be written ({error}); set LLMJAX_CACHE to a folder") from error
  return path


def parse_split(split: str) -> tuple[str, str, str]:
  """ "train[10%:200]" -> ("train", "10%", "200"); empty strings where nothing is said."""
  bound = r"(-?\d+(?:\.\d+)?%|-?\d+|)"
  match = re.fullmatch(rf"([\w-]*)(?:\[{bound}:{bound}\])?", split.strip())
  if match is None:
    raise ConfigError(f"split {split!r} is not understood; say 'train', 'train[:90%]', '[90%:]' or 'train[100:200]'")
  return match[1], match[2] or "", match[3] or ""


def select(split: str, size: int, unit: str = "records") -> tuple[int, int]:
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


def python_stdlib(split: str, config: str = "text") -> Source:
  """The running interpreter's standard library; real text without a download. See `python_stdlib.py`."""
  from llmjax.data.python_stdlib import fingerprint, prepare

  with _quiet():
    return _from_tfds(prepare(config), split, "text", fingerprint())


def tfds(
  split: str,
  dataset: str | None = None,
  folder: str | None = None,
  data_dir: str | None = None,
  text: str = "text",
) -> Source:
  """A TensorFlow Dataset, read without TensorFlow; so it must be prepared as ArrayRecord.

  Args:
    dataset: "lm1b", "wiki40b/en", ...; downloaded and prepared if it is not in `data_dir` yet.
    folder: a prepared dataset's own folder (holding dataset_info.json) instead.
    data_dir: None is TFDS's default (~/tensorflow_datasets, or $TFDS_DATA_DIR).
    text: the field of a record to be called "text".
  """
  import tensorflow_datasets

  if (dataset is None) == (folder is None):
    raise ConfigError("data.corpus: 'tfds' needs either `dataset` (such as 'lm1b') or `folder`")
  if folder is None:
    return _from_tfds(_named(str(dataset), data_dir), split, text, None)
  try:
    builder = tensorflow_datasets.builder_from_directory(str(Path(folder).expanduser()))
  except (OSError, ValueError) as error:
    raise ConfigError(f"data.corpus.folder={folder!r} holds no prepared TFDS dataset: {_line(error)}") from error
  return _from_tfds(builder, split, text, None)


def _named(dataset: str, data_dir: str | None) -> Any:
  """A builder by name, prepared."""
  import tensorflow_datasets

  # TFDS registers these only up to the first of all its collections that misses a package.
  for collection in ("text", "translate", "summarization", "question_answering"):
    with contextlib.suppress(ImportError):
      importlib.import_module(f"tensorflow_datasets.{collection}")
  try:
    with _quiet():  # it warns of every folder that is not prepared yet
      builder = tensorflow_datasets.builder(dataset, data_dir=data_dir, file_format="array_record")
  except tensorflow_datasets.core.registered.DatasetNotFoundError as error:
    known = re.findall(r"^\s*- (\w+)", str(error), re.MULTILINE)
    raise ConfigError(f"data.corpus.dataset={dataset!r} is no TFDS dataset; {nearest(dataset, known)}") from error
  except ValueError as error:
    hint = _needs_array_record(f"{dataset} in {data_dir or 'the TFDS folder'}") if "TFRECORD" in str(error) else ""
    raise ConfigError(hint or f"data.corpus.dataset={dataset!r}: {_line(error)}") from error
  if not builder.is_prepared():
    logging.getLogger("llmjax").warning("preparing %s in %s; this downloads it", dataset, builder.data_dir)
    failures = (OSError, ImportError, AssertionError, ValueError, RuntimeError)
    try:
      builder.download_and_prepare()
    except (*failures, tensorflow_datasets.download.DownloadError) as error:
      raise ConfigError(
        f"data.corpus.dataset={dataset!r} is not prepared in {builder.data_dir}, and preparing it failed "
        f"({type(error).__name__}: {_line(error)}); prepare it elsewhere with file_format='array_record' and copy it"
      ) from error
  return builder


def _from_tfds(builder: Any, split: str, text: str, fingerprint: str | None) -> Source:
  """A split of a prepared builder; the fingerprint is of the metadata and shards unless the content's is known."""
  info = builder.info
  if info.file_format is None or info.file_format.value != "array_record":
    raise ConfigError(_needs_array_record(builder.data_dir))
  if not info.splits:
    raise ConfigError(f"{builder.data_dir} has no splits; prepare the dataset again")
  if text not in info.features:
    raise ConfigError(f"data.corpus.text={text!r} is no field of {info.full_name}; {nearest(text, info.features)}")
  name, low, high = parse_split(split)
  if name not in info.splits and name != "all":
    raise ConfigError(f"split {split!r}: {info.full_name} has {', '.join(info.splits)}")
  chosen = [info.splits[n] for n in ([name] if name != "all" else info.splits)]
  try:
    records = builder.as_data_source(split) if info.splits[split].num_examples else ()
  except (ValueError, AssertionError) as error:
    raise ConfigError(f"split {split!r} of {info.full_name}: {_line(error)}") from error
  if not records:
    raise ConfigError(f"split {split!r} of {info.full_name} has no records; choose another")
  if fingerprint is None:
    from llmjax.data.files import file_digest

    paths = [Path(p) for s in chosen for p in (s.filepaths[0], s.filepaths[-1])]
    fingerprint = digest([[s.num_bytes, s.shard_lengths] for s in chosen], [file_digest(p, whole=0) for p in paths])

  def read(index: int) -> dict[str, Any]:
    record = {k: v.decode("utf-8") if isinstance(v, bytes) else v for k, v in records[index].items()}
    return record if text == "text" else {**record, "text": record[text]}

  return Source(len(records), read, digest(info.full_name, fingerprint, name, low, high, text))


def _needs_array_record(where: Any) -> str:
  return (
    f"{where} is not stored as ArrayRecord, the one TFDS format with random access and without TensorFlow; prepare it "
    "with file_format='array_record' in another data_dir"
  )


def _line(error: BaseException) -> str:
  return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without the progress bars, prints and warnings of TFDS."""
  import tensorflow_datasets

  logger, level = logging.getLogger("absl"), logging.getLogger("absl").level
  logger.setLevel(logging.ERROR)
  tensorflow_datasets.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logger.setLevel(level)
    tensorflow_datasets.enable_progress_bar()


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
  return join(parts, weights)


def join(parts: Iterable[Source], weights: Iterable[float]) -> Source:
  """A mixture of opened sources."""
  parts, weights = tuple(parts), tuple(float(w) for w in weights)
  starts = [sum(len(p) for p in parts[:i]) for i in range(len(parts) + 1)]

  def read(index: int) -> dict[str, Any]:
    which = next(i for i in range(len(parts)) if index < starts[i + 1])
    return parts[which][index - starts[which]]

  return Source(starts[-1], read, digest([p.fingerprint for p in parts], weights), parts, weights)

"""Sources from TensorFlow Datasets, read without TensorFlow, and the embedded corpus, which is one of them."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from llmjax.config import ConfigError, suggest_name
from llmjax.data.sources.base import Source, parse_split
from llmjax.data.sources.files import NO_TEXT
from llmjax.data.sources.tfrecord import Slice, TFRecords
from llmjax.storage.buckets import fetch_folder, in_bucket
from llmjax.storage.cache import content_digest
from llmjax.storage.digests import file_digest


def python_stdlib(split: str, config: str = "text") -> Source:
  """The running interpreter's standard library; real text without a download.

  Args:
    config: "text" (files and help texts), "docstring_pairs" (functions and what they do), and tasks with answers made
      from the code: "package", "tokens", "params", "preferences"; see `python_stdlib.py`.
  """
  from llmjax.datasets.python_stdlib import fingerprint, prepare

  with _quiet():
    return _from_tfds(prepare(config), split, "text", fingerprint())


def tfds(
  split: str,
  dataset: str | None = None,
  folder: str | None = None,
  data_dir: str | None = None,
  text: str | None = "text",
) -> Source:
  """A TensorFlow Dataset, stored as ArrayRecord or as TFRecord (TFDS's default); read without TensorFlow.

  Values come as Python's own: strings, numbers, lists, dicts. Classes come by name, None where they are hidden (-1),
  and the names are the source's `labels`. Answers as SQuAD has them, {"text": [...], "answer_start": [...]}, come as
  [{"text", "start"}].

  Args:
    dataset: "lm1b", "wiki40b/en", ...; downloaded and prepared as ArrayRecord if it is not in `data_dir` yet.
    folder: a prepared dataset's own folder (holding dataset_info.json) instead.
    data_dir: None is TFDS's default (~/tensorflow_datasets, or $TFDS_DATA_DIR).
    text: the field of a record to be called "text"; None where no one field is the text.
  """
  import tensorflow_datasets

  if (dataset is None) == (folder is None):
    raise ConfigError("data.corpus: 'tfds' needs either `dataset` (such as 'lm1b') or `folder`")
  if folder is None:
    return _from_tfds(_named(str(dataset), data_dir), split, text, None)
  local = fetch_folder(folder) if in_bucket(folder) else Path(folder).expanduser()
  try:
    builder = tensorflow_datasets.builder_from_directory(str(local))
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
      builder = tensorflow_datasets.builder(dataset, data_dir=data_dir)
      prepared = builder.is_prepared()
  except tensorflow_datasets.core.registered.DatasetNotFoundError as error:
    known = re.findall(r"^\s*- (\w+)", str(error), re.MULTILINE)
    raise ConfigError(f"data.corpus.dataset={dataset!r} is no TFDS dataset; {suggest_name(dataset, known)}") from error
  except ValueError as error:
    raise ConfigError(f"data.corpus.dataset={dataset!r}: {_line(error)}") from error
  if not prepared:
    logging.getLogger("llmjax").warning("preparing %s in %s; this downloads it", dataset, builder.data_dir)
    failures = (OSError, ImportError, AssertionError, ValueError, RuntimeError)
    try:
      builder.download_and_prepare(file_format="array_record")
    except (*failures, tensorflow_datasets.download.DownloadError) as error:
      raise ConfigError(
        f"data.corpus.dataset={dataset!r} is not prepared in {builder.data_dir}, and preparing it failed "
        f"({type(error).__name__}: {_line(error)}); prepare it elsewhere and copy it"
      ) from error
  return builder


def _from_tfds(builder: Any, split: str, text: str | None, fingerprint: str | None) -> Source:
  """A split of a prepared builder; the fingerprint is of the metadata and shards unless the content's is known."""
  info = builder.info
  if not info.splits:
    raise ConfigError(f"{builder.data_dir} has no splits; prepare the dataset again")
  if text is not None and text not in info.features:
    known = suggest_name(text, info.features)
    raise ConfigError(f"data.corpus.text={text!r} is no field of {info.full_name}; {known} {NO_TEXT}")
  name, low, high = parse_split(split)
  if name not in info.splits and name != "all":
    raise ConfigError(f"split {split!r}: {info.full_name} has {', '.join(info.splits)}")
  chosen = [info.splits[n] for n in ([name] if name != "all" else info.splits)]
  try:
    size = info.splits[split].num_examples
    record = _records(builder, split) if size else None
  except (ValueError, AssertionError) as error:
    if isinstance(error, ConfigError):
      raise
    raise ConfigError(f"split {split!r} of {info.full_name}: {_line(error)}") from error
  if record is None:
    raise ConfigError(f"split {split!r} of {info.full_name} has no records; choose another")
  if fingerprint is None:
    paths = [Path(p) for s in chosen for p in (s.filepaths[0], s.filepaths[-1])]
    fingerprint = content_digest(
      [[s.num_bytes, s.shard_lengths] for s in chosen], [file_digest(p, whole=0) for p in paths]
    )

  def read(index: int) -> dict[str, Any]:
    fields = {field: _plain(value, info.features[field]) for field, value in record(index).items()}
    return fields if text in ("text", None) else {**fields, "text": fields[text]}

  labels = {field: names for field in info.features if (names := _class_names(info.features[field])) is not None}
  return Source(size, read, content_digest(info.full_name, fingerprint, name, low, high, text), labels=labels)


def _class_names(feature: Any) -> tuple[str, ...] | None:
  """What the classes of a feature, or of the members of a sequence, are called; None where it has no named classes."""
  import tensorflow_datasets

  while isinstance(feature, tensorflow_datasets.features.Sequence):
    feature = feature.feature
  is_class = isinstance(feature, tensorflow_datasets.features.ClassLabel)
  return tuple(feature.names) if is_class and feature.names else None


def _plain(value: Any, feature: Any) -> Any:
  """A value of a TFDS feature as Python's own types."""
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if isinstance(value, Mapping):
    fields = {field: _plain(part, feature[field]) for field, part in value.items()}
    if fields.keys() == {"text", "answer_start"} and isinstance(fields["text"], list):
      return [{"text": text, "start": start} for text, start in zip(fields["text"], fields["answer_start"])]
    return fields
  if isinstance(value, (np.ndarray, np.generic)):
    value = value.tolist()
    return _plain(value, feature) if isinstance(value, (bytes, list)) else _named_class(value, feature)
  if isinstance(value, (list, tuple)):
    return [_plain(part, feature) for part in value]
  return _named_class(value, feature)


def _named_class(value: Any, feature: Any) -> Any:
  names = _class_names(feature)
  return value if names is None else names[value] if value >= 0 else None


def _records(builder: Any, split: str) -> Callable[[int], dict[str, Any]]:
  """index -> record of a split or slice, which TFDS cuts, so that it is the same whatever the format."""
  info = builder.info
  stored = info.file_format.value if info.file_format else "an unknown format"
  if stored == "array_record":
    return builder.as_data_source(split).__getitem__
  if stored != "tfrecord":
    raise ConfigError(
      f"{builder.data_dir} is stored as {stored}; of TFDS's formats, array_record and tfrecord are read: prepare it as "
      "one of those in another data_dir"
    )
  parts = info.splits[split].file_instructions
  contents = TFRecords(Slice(Path(p.filename), p.examples_in_shard, p.skip, p.skip + p.take) for p in parts)

  def record(index: int) -> dict[str, Any]:
    try:
      return info.features.deserialize_example_np(contents[index])
    except DecodeError as error:
      raise ConfigError(f"{builder.data_dir}: record {index} of split {split!r} is damaged; copy it again") from error

  return record


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

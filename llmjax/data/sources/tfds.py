"""TensorFlow Datasets as sources, read without TensorFlow; the embedded corpus `python_stdlib` is one of them."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from google.protobuf.message import DecodeError

from llmjax.config import ConfigError, suggest_name
from llmjax.data.sources.base import Record, Source, parse_split
from llmjax.data.sources.paths import OR_NONE, first_line
from llmjax.data.sources.tfrecord import RecordRange, TFRecords
from llmjax.storage.buckets import fetch_folder, in_bucket
from llmjax.storage.cache import content_digest, file_digest

if TYPE_CHECKING:
  from tensorflow_datasets.core import DatasetBuilder
  from tensorflow_datasets.core.features import FeatureConnector

# TFDS registers the datasets of these only up to the first collection that misses a package.
COLLECTIONS = ("text", "translate", "summarization", "question_answering")
PREPARE_ERRORS = (OSError, ImportError, AssertionError, ValueError, RuntimeError)


def python_stdlib_source(split: str, config: str = "text") -> Source:
  """Return the standard library of the running interpreter: real text without a download.

  Args:
    split: see `base.parse_split`.
    config: "text" (files and help texts), "docstring_pairs" (functions and their docstrings), or a labelled task made
      from the code: "package", "tokens", "params", "preferences"; see `llmjax.datasets.python_stdlib.builder`.
  """
  from llmjax.datasets.python_stdlib import library
  from llmjax.datasets.python_stdlib.builder import prepare_python_stdlib

  with _quiet_tfds():
    return _builder_source(prepare_python_stdlib(config), split, "text", library.library_fingerprint())


def tfds_source(
  split: str,
  dataset: str | None = None,
  folder: str | None = None,
  data_dir: str | None = None,
  text: str | None = "text",
) -> Source:
  """Return a TensorFlow Dataset that is stored as ArrayRecord or as TFRecord, the default of TFDS.

  Values have Python's own types. Classes are given by name, or None if they are hidden (-1); the names are the source's
  `labels`. SQuAD's answers {"text": [...], "answer_start": [...]} are given as [{"text", "start"}].

  Args:
    split: see `base.parse_split`.
    dataset: "lm1b", "wiki40b/en", ...; downloaded and prepared as ArrayRecord if it is not in `data_dir` yet.
    folder: alternatively, the folder of a prepared dataset, which holds dataset_info.json.
    data_dir: None: the default of TFDS (~/tensorflow_datasets, or $TFDS_DATA_DIR).
    text: field to use as "text"; None: the records need no text.
  """
  import tensorflow_datasets

  if dataset is not None and folder is None:
    return _builder_source(_prepared_builder(dataset, data_dir), split, text, None)
  if folder is None or dataset is not None:
    raise ConfigError("data.corpus: 'tfds' needs either `dataset` (such as 'lm1b') or `folder`")
  local = fetch_folder(folder) if in_bucket(folder) else Path(folder).expanduser()
  try:
    builder = tensorflow_datasets.builder_from_directory(str(local))
  except (OSError, ValueError) as error:
    raise ConfigError(
      f"data.corpus.folder: must be a prepared TFDS dataset, got {folder!r}: {first_line(error)}"
    ) from error
  return _builder_source(builder, split, text, None)


def _prepared_builder(dataset: str, data_dir: str | None) -> DatasetBuilder:
  import tensorflow_datasets

  for collection in COLLECTIONS:
    with contextlib.suppress(ImportError):
      importlib.import_module(f"tensorflow_datasets.{collection}")
  try:
    with _quiet_tfds():  # TFDS warns of every folder that is not prepared yet
      builder = tensorflow_datasets.builder(dataset, data_dir=data_dir)
      is_prepared = builder.is_prepared()
  except tensorflow_datasets.core.registered.DatasetNotFoundError as error:
    known = re.findall(r"^\s*- (\w+)", str(error), re.MULTILINE)
    raise ConfigError(
      f"data.corpus.dataset: not a TFDS dataset, got {dataset!r}; {suggest_name(dataset, known)}"
    ) from error
  except ValueError as error:
    raise ConfigError(f"data.corpus.dataset: TFDS refuses it: {first_line(error)}, got {dataset!r}") from error
  if not is_prepared:
    logging.getLogger("llmjax").warning("preparing %s in %s; this downloads it", dataset, builder.data_dir)
    try:
      builder.download_and_prepare(file_format="array_record")
    except (*PREPARE_ERRORS, tensorflow_datasets.download.DownloadError) as error:
      raise ConfigError(
        f"data.corpus.dataset: {dataset!r} is not prepared in {builder.data_dir}, and preparing it failed: "
        f"{type(error).__name__}: {first_line(error)}. Prepare it elsewhere and copy it"
      ) from error
  return builder


def _builder_source(builder: DatasetBuilder, split: str, text: str | None, fingerprint: str | None) -> Source:
  """Return a split of a prepared builder.

  Args:
    builder: the dataset.
    split: see `base.parse_split`.
    text: field to use as "text"; None: the records need no text.
    fingerprint: digest of the content; None: taken from the metadata and shards.
  """
  info = builder.info
  if not info.splits:
    raise ConfigError(f"{builder.data_dir}: has no splits. Prepare the dataset again")
  if text is not None and text not in info.features:
    hint = suggest_name(text, info.features)
    raise ConfigError(f"data.corpus.text: not a field of {info.full_name}, got {text!r}; {hint} {OR_NONE}")
  name, low, high = parse_split(split)
  if name not in info.splits and name != "all":
    raise ConfigError(
      f"split: {info.full_name} has no split {name!r}, got {split!r}. Choose one of: {', '.join(info.splits)}"
    )
  try:
    size = info.splits[split].num_examples
    read_example = _example_reader(builder, split) if size else None
  except (ValueError, AssertionError) as error:
    if isinstance(error, ConfigError):
      raise
    raise ConfigError(f"split: TFDS refuses it for {info.full_name}: {first_line(error)}, got {split!r}") from error
  if read_example is None:
    raise ConfigError(f"split: selects no records of {info.full_name}, got {split!r}. Choose a wider split")
  if fingerprint is None:
    splits = [info.splits[n] for n in ([name] if name != "all" else info.splits)]
    paths = [Path(p) for s in splits for p in (s.filepaths[0], s.filepaths[-1])]
    metadata = [[s.num_bytes, s.shard_lengths] for s in splits]
    fingerprint = content_digest(metadata, [file_digest(p, max_hashed_bytes=0) for p in paths])

  def read(index: int) -> Record:
    record = {field: _python_value(value, info.features[field]) for field, value in read_example(index).items()}
    return record if text in ("text", None) else {**record, "text": record[text]}

  labels = {field: names for field in info.features if (names := _class_names(info.features[field])) is not None}
  return Source(size, read, content_digest(info.full_name, fingerprint, name, low, high, text), labels=labels)


def _class_names(feature: FeatureConnector) -> tuple[str, ...] | None:
  """Return the class names of a feature or of a sequence's items; None without named classes."""
  import tensorflow_datasets

  while isinstance(feature, tensorflow_datasets.features.Sequence):
    feature = feature.feature
  is_class = isinstance(feature, tensorflow_datasets.features.ClassLabel)
  return tuple(feature.names) if is_class and feature.names else None


def _python_value(value: Any, feature: FeatureConnector) -> Any:
  """Convert the value of a feature to Python's own types."""
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if isinstance(value, Mapping):
    fields = {field: _python_value(part, feature[field]) for field, part in value.items()}
    if fields.keys() == {"text", "answer_start"} and isinstance(fields["text"], list):
      return [{"text": text, "start": start} for text, start in zip(fields["text"], fields["answer_start"])]
    return fields
  if isinstance(value, (np.ndarray, np.generic)):
    return _python_value(value.tolist(), feature)
  if isinstance(value, (list, tuple)):
    return [_python_value(item, feature) for item in value]
  names = _class_names(feature)
  return value if names is None else names[value] if value >= 0 else None


def _example_reader(builder: DatasetBuilder, split: str) -> Callable[[int], Mapping[str, Any]]:
  """Return a function from index to example. TFDS resolves the slice, so all formats give the same examples."""
  info = builder.info
  stored = info.file_format.value if info.file_format else "an unknown format"
  if stored == "array_record":
    return cast(Callable[[int], Mapping[str, Any]], builder.as_data_source(split).__getitem__)
  if stored != "tfrecord":
    raise ConfigError(
      f"{builder.data_dir}: must be stored as array_record or tfrecord, got {stored}. Prepare it as one of those in "
      "another data_dir"
    )
  instructions = info.splits[split].file_instructions
  contents = TFRecords(
    RecordRange(Path(i.filename), i.examples_in_shard, i.skip, i.skip + i.take) for i in instructions
  )

  def read_example(index: int) -> Mapping[str, Any]:
    try:
      return cast(Mapping[str, Any], info.features.deserialize_example_np(contents[index]))
    except DecodeError as error:
      raise ConfigError(f"{builder.data_dir}: record {index} of split {split!r} is damaged. Copy it again") from error

  return read_example


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
  """Suppress the progress bars, prints and warnings of TFDS."""
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

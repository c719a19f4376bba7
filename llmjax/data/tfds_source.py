"""Sources from TensorFlow Datasets, read without TensorFlow, and the embedded corpus, which is one of them."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmjax.config import ConfigError, nearest
from llmjax.data.files import file_digest
from llmjax.data.source import Source, digest, parse_split


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

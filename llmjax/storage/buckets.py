"""Paths on Google Cloud Storage, gs://BUCKET/..., beside local ones, over etils.epath and fsspec (gcsfs).

A run's folder is used where it is, but for what is written line by line: objects cannot be appended to, so a `Mirror`
stands for it. Data and Hugging Face folders are fetched into the cache, once as long as they do not change.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmjax.config import ConfigError
from llmjax.storage.cache import cache_dir, content_digest, fill_cache

SCHEME = "gs://"
PERIOD = 30.0  # seconds between two uploads of what a run writes


def in_bucket(path: str | Path) -> bool:
  return str(path).startswith(SCHEME)


def as_path(path: str | Path) -> Path:
  """A path: pathlib's where it is local; in a bucket epath's, which stands in for it.

  Raises:
    ConfigError: the bucket is missing or may not be read, or gcsfs is not installed.
    ConnectionError: it cannot be reached now.
  """
  if not in_bucket(path):
    return Path(path)
  from etils import epath

  _look(str(path))
  found: Any = epath.Path(path)
  return found


@functools.cache
def _look(path: str) -> None:
  """Says what is wrong with a bucket, which epath and fsspec take for a path that does not exist."""
  files = _files(path)
  with translate_storage_errors(path):
    try:
      files.info(path)
    except FileNotFoundError:
      files.find(path)  # nothing, or FileNotFoundError where there is no bucket


def _files(path: str) -> Any:
  if importlib.util.find_spec("gcsfs") is None:
    raise ConfigError(f'{path} is in a bucket, which needs gcsfs: pip install "llmjax[gcs]"')
  import fsspec

  os.environ.setdefault("EPATH_USE_TF", "false")  # one way to a bucket, whether TensorFlow is installed or not
  # Checkpoints are written past gcsfs, and by other hosts: a listing from before would hide them.
  fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints the traceback of every failure besides
  return fsspec.filesystem("gcs")


@contextlib.contextmanager
def translate_storage_errors(path: str | Path) -> Iterator[None]:
  """Around requests about `path`: what goes wrong with one in a bucket is one line, of a ConnectionError where trying
  again may help, else of a ConfigError."""
  try:
    yield
  except Exception as error:  # gcsfs, aiohttp and google.auth have no class in common
    if isinstance(error, ConfigError) or not in_bucket(path):
      raise
    from gcsfs.retry import is_retriable

    missing = isinstance(error, FileNotFoundError)
    reason = "there is no such bucket" if missing else f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise (ConnectionError if is_retriable(error) else ConfigError)(
      f"{path}: {reason}; check the name, the credentials (gcloud auth application-default login, or the machine's "
      "service account) and their role in the bucket (Storage Object User)"
    ) from error


def fetch_file(pattern: str) -> list[Path]:
  """Copies in the cache of the objects that a path or glob names, sorted by name; none where there are none.

  A copy is of one generation of an object, so a changed object is fetched anew.

  Raises:
    ConfigError, ConnectionError: see `place`.
  """
  files = _files(pattern)
  with translate_storage_errors(pattern):
    found = files.glob(pattern, detail=True)

  def copy(name: str) -> Path:
    facts = found[name]
    version = content_digest(facts["size"], facts["generation"])
    return fill_cache(cache_dir() / "buckets" / name / version / Path(name).name, lambda made: _download(facts, made))

  with ThreadPoolExecutor(8) as pool:
    return list(pool.map(copy, sorted(name for name in found if not (_is_folder(found[name]) or _hidden(name)))))


def fetch_folder(path: str) -> Path:
  """A copy in the cache of a folder in a bucket; another one where an object in it has changed."""
  files = _files(path)
  with translate_storage_errors(path):
    found = files.find(path, detail=True)
  root = path.removeprefix(SCHEME).rstrip("/")
  version = content_digest(sorted((name, facts["generation"]) for name, facts in found.items()))

  def fill(made: Path) -> None:
    for name, facts in found.items():
      _download(facts, made / name.removeprefix(root + "/"))

  return fill_cache(cache_dir() / "buckets" / root / version, fill)


def _download(facts: Mapping[str, Any], target: Path) -> None:
  path = SCHEME + facts["name"]
  logging.getLogger("llmjax").warning("fetching %s (%.1f MB)", path, facts["size"] / 1e6)
  target.parent.mkdir(parents=True, exist_ok=True)
  with translate_storage_errors(path):
    _files(path).get_file(path, str(target))
    if target.stat().st_size != facts["size"]:
      raise EOFError("another size arrived than it has; it is being written, or the connection broke")


def _is_folder(facts: Mapping[str, Any]) -> bool:
  return facts["type"] == "directory"


def _hidden(name: str) -> bool:
  """As a local glob sees it."""
  return any(part.startswith(".") for part in name.split("/"))


def move_folder(source: Path, target: Path) -> None:
  """Renames a folder. In a bucket it is copied before it is deleted, so that nothing is lost by a cut in between."""
  if in_bucket(source):
    files = _files(str(source))
    files.copy(str(source), str(target), recursive=True)
    files.rm(str(source), recursive=True)
  else:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def staging_dir(path: Path) -> Path:
  """A local folder to write what shall be at `path`: that itself, or an empty one in the cache; see `upload`."""
  if not in_bucket(path):
    return path
  folder = cache_dir() / "scratch" / content_digest(str(path))
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  return folder


def upload_folder(folder: Path, path: Path) -> None:
  """Brings what is in the scratch folder of `path` there, and removes it; nothing where it is local."""
  if in_bucket(path):
    _files(str(path)).put(f"{folder}/", f"{path}/", recursive=True)
    shutil.rmtree(folder)


class BucketMirror:
  """A local folder that stands for one in a bucket. Every object is written anew, for none can be appended to.

  Args:
    path: in a bucket.
    names: what the folder begins with of the objects that are there.
  """

  def __init__(self, path: Path, names: Iterable[str]):
    self.path, self.folder = path, staging_dir(path)
    for name in names:
      if (path / name).exists():
        (self.folder / name).write_bytes((path / name).read_bytes())
    self._uploaded: dict[Path, tuple[int, int]] = {}
    self._thread = ThreadPoolExecutor(1)
    self._last = time.monotonic()

  def refresh(self) -> None:
    """Starts to upload what has changed, where that is due; a failure waits for `upload`, which tries again."""
    if time.monotonic() - self._last > PERIOD:
      self._last = time.monotonic()
      self._thread.submit(self._upload)

  def upload(self) -> None:
    """Everything is in the bucket when this returns."""
    self._thread.submit(self._upload).result()

  def close(self) -> None:
    self.upload()
    self._thread.shutdown()
    shutil.rmtree(self.folder)

  def _upload(self) -> None:
    for file in (file for file in self.folder.rglob("*") if file.is_file()):
      state = file.stat()
      version = state.st_size, state.st_mtime_ns
      if self._uploaded.get(file) != version:
        _files(str(self.path)).put_file(str(file), f"{self.path}/{file.relative_to(self.folder).as_posix()}")
        self._uploaded[file] = version

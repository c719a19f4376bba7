"""Paths on Google Cloud Storage, gs://BUCKET/..., and on local disks, through etils.epath and fsspec (gcsfs).

Checkpoints are written to a bucket directly. Objects cannot be appended to, so log files are written to a local folder
that a `BucketMirror` uploads. Data files and Hugging Face folders are downloaded to the cache once per generation.
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
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from llmjax.config import ConfigError
from llmjax.storage.cache import cache_dir, content_digest, fill_cache

if TYPE_CHECKING:
  from fsspec import AbstractFileSystem

SCHEME = "gs://"
UPLOAD_INTERVAL_SECONDS = 30.0
DOWNLOAD_THREADS = 8

ObjectInfo: TypeAlias = Mapping[str, Any]  # a resource of the JSON API: name, type, size, generation, ...


def in_bucket(path: str | Path) -> bool:
  return str(path).startswith(SCHEME)


def as_path(path: str | Path) -> Path:
  """Return a pathlib.Path; for a bucket an epath.Path, which has the same methods.

  Raises:
    ConfigError: the bucket does not exist or access is denied, or gcsfs is not installed.
    ConnectionError: the bucket cannot be reached at present.
  """
  if not in_bucket(path):
    return Path(path)
  from etils import epath

  _check_bucket(str(path))
  return cast(Path, epath.Path(path))


@functools.cache
def _check_bucket(path: str) -> None:
  """Raise the error of a bucket that cannot be read, which epath and fsspec report as a path that does not exist."""
  files = _gcs_filesystem(path)
  with translate_storage_errors(path):
    try:
      files.info(path)
    except FileNotFoundError:
      files.find(path)  # raises FileNotFoundError if the bucket does not exist, otherwise returns no objects


def _gcs_filesystem(path: str | Path) -> AbstractFileSystem:
  if importlib.util.find_spec("gcsfs") is None:
    raise ConfigError(f'{path}: a path in a bucket needs gcsfs. Run pip install "llmjax[gcs]"')
  import fsspec

  os.environ.setdefault("EPATH_USE_TF", "false")  # epath uses gcsfs also if TensorFlow is installed
  # Orbax and other hosts write objects without gcsfs, so a cached listing would hide them.
  fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # gcsfs logs the traceback of every error that it raises
  return fsspec.filesystem("gcs")


@contextlib.contextmanager
def translate_storage_errors(path: str | Path) -> Iterator[None]:
  """Translate storage errors about a path in a bucket to errors of one line.

  Raises:
    ConnectionError: for errors that may go away on a retry.
    ConfigError: for all others.
  """
  try:
    yield
  except Exception as error:  # gcsfs, aiohttp and google.auth have no base class in common
    if isinstance(error, ConfigError) or not in_bucket(path):
      raise
    from gcsfs.retry import is_retriable

    is_missing = isinstance(error, FileNotFoundError)
    reason = "there is no such bucket" if is_missing else f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise (ConnectionError if is_retriable(error) else ConfigError)(
      f"{path}: {reason}. Check the name, the credentials (gcloud auth application-default login, or the machine's "
      "service account) and their role in the bucket (Storage Object User)"
    ) from error


def fetch_files(pattern: str) -> list[Path]:
  """Download the objects that a path or glob in a bucket matches to the cache.

  A cache entry belongs to one generation of an object, so a changed object is downloaded again.

  Returns:
    The local files, sorted by name; empty if nothing matches.

  Raises:
    ConfigError, ConnectionError: see `as_path`.
  """
  files = _gcs_filesystem(pattern)
  with translate_storage_errors(pattern):
    objects: dict[str, ObjectInfo] = files.glob(pattern, detail=True)

  def fetch_object(name: str) -> Path:
    info = objects[name]
    version = content_digest(info["size"], info["generation"])
    path = cache_dir() / "buckets" / name / version / Path(name).name
    return fill_cache(path, lambda target: _download_object(info, target))

  def is_visible_file(name: str) -> bool:  # a local glob skips hidden files and folders
    is_hidden = any(part.startswith(".") for part in name.split("/"))
    return objects[name]["type"] != "directory" and not is_hidden

  with ThreadPoolExecutor(DOWNLOAD_THREADS) as pool:
    return list(pool.map(fetch_object, sorted(filter(is_visible_file, objects))))


def fetch_folder(path: str) -> Path:
  """Download a folder in a bucket to the cache and return it; a change of any object gives a new cache entry."""
  files = _gcs_filesystem(path)
  with translate_storage_errors(path):
    objects: dict[str, ObjectInfo] = files.find(path, detail=True)
  root = path.removeprefix(SCHEME).rstrip("/")
  version = content_digest(sorted((name, info["generation"]) for name, info in objects.items()))

  def download_all(target: Path) -> None:
    for name, info in objects.items():
      _download_object(info, target / name.removeprefix(root + "/"))

  return fill_cache(cache_dir() / "buckets" / root / version, download_all)


def _download_object(info: ObjectInfo, target: Path) -> None:
  path = SCHEME + info["name"]
  logging.getLogger("llmjax").warning("downloading %s (%.1f MB)", path, info["size"] / 1e6)
  target.parent.mkdir(parents=True, exist_ok=True)
  with translate_storage_errors(path):
    _gcs_filesystem(path).get_file(path, str(target))
    size = target.stat().st_size
    if size != info["size"]:
      raise EOFError(f"expected {info['size']} bytes, got {size}; it is being written, or the connection broke")


def move_folder(source: Path, target: Path) -> None:
  """Move a folder. In a bucket it is copied before it is deleted, so an interruption loses nothing."""
  if in_bucket(source):
    files = _gcs_filesystem(source)
    files.copy(str(source), str(target), recursive=True)
    files.rm(str(source), recursive=True)
  else:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def staging_dir(path: Path) -> Path:
  """Return a local folder for files that belong at `path`.

  For a local path this is `path` itself. For a path in a bucket it is an empty folder in the cache, which
  `upload_folder` uploads.
  """
  if not in_bucket(path):
    return path
  folder = cache_dir() / "scratch" / content_digest(str(path))
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  return folder


def upload_folder(folder: Path, path: Path) -> None:
  """Upload the staging folder of `path` and delete it; no-op for a local path."""
  if in_bucket(path):
    _gcs_filesystem(path).put(f"{folder}/", f"{path}/", recursive=True)
    shutil.rmtree(folder)


class BucketMirror:
  """A local folder whose changed files are uploaded to a folder in a bucket, each as a whole.

  Args:
    path: the folder in the bucket.
    names: objects to download at the start, if they exist.

  Attributes:
    folder: the local folder.
  """

  def __init__(self, path: Path, names: Iterable[str]):
    self.path, self.folder = path, staging_dir(path)
    for name in names:
      if (path / name).exists():
        (self.folder / name).write_bytes((path / name).read_bytes())
    self._uploaded_versions: dict[Path, tuple[int, int]] = {}  # {file: (size, modification time)}
    self._thread = ThreadPoolExecutor(1)
    self._last_upload = time.monotonic()

  def refresh(self) -> None:
    """Upload in a thread if the interval has passed. A failed upload is repeated, and reported, by `upload`."""
    if time.monotonic() - self._last_upload > UPLOAD_INTERVAL_SECONDS:
      self._last_upload = time.monotonic()
      self._thread.submit(self._upload_changed_files)

  def upload(self) -> None:
    """Upload all changed files before returning."""
    self._thread.submit(self._upload_changed_files).result()

  def close(self) -> None:
    """Upload all changed files and delete the local folder."""
    self.upload()
    self._thread.shutdown()
    shutil.rmtree(self.folder)

  def _upload_changed_files(self) -> None:
    for file in (file for file in self.folder.rglob("*") if file.is_file()):
      stat = file.stat()
      version = stat.st_size, stat.st_mtime_ns
      if self._uploaded_versions.get(file) != version:
        relative = file.relative_to(self.folder).as_posix()
        _gcs_filesystem(self.path).put_file(str(file), f"{self.path}/{relative}")
        self._uploaded_versions[file] = version

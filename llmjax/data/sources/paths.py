"""Data files: expansion of globs, reading as UTF-8, and wording that error messages of several sources share."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from llmjax.config import ConfigError
from llmjax.data.sources.base import parse_split
from llmjax.storage.buckets import as_path, fetch_files, in_bucket

# A path or glob, local or gs://; several of them; or {split name: one or several}.
Files: TypeAlias = str | Sequence[str] | Mapping[str, Any]

OR_NONE = "(or to None, if the objective reads other fields)"  # ends messages about data.corpus.text


def expand_files(files: Files, split: str, key: str = "files") -> list[Path]:
  """Return the files of a split, with globs expanded and sorted. Files in a bucket are downloaded to the cache.

  Args:
    files: value of the config key.
    split: its name selects an entry of `files`; without entries it must be "train", "all" or empty.
    key: the config key below data.corpus, for error messages.

  Raises:
    ConfigError: no file matches, or `files` has no such split.
  """
  key = f"data.corpus.{key}"
  name = parse_split(split).name
  if isinstance(files, Mapping):
    if name not in files:
      raise ConfigError(f"{key}: has no split {name!r}, got {split!r}. Choose one of: {', '.join(files) or 'none'}")
    files = files[name]
  elif name not in ("", "all", "train"):
    raise ConfigError(
      f"{key}: has no named splits, got {split!r}. Slice it as '[:90%]' and '[90%:]', or set it to "
      "{'train': ..., 'validation': ...}"
    )
  expanded: dict[Path, None] = {}
  for pattern in [files] if isinstance(files, (str, Path)) else list(files or ()):
    expanded.update(dict.fromkeys(_expand_pattern(pattern, key)))
  if not expanded:
    raise ConfigError(f"{key}: empty. Set it to a path, a glob or a tuple of those")
  return list(expanded)


def _expand_pattern(pattern: str | Path, key: str) -> list[Path]:
  path = as_path(pattern).expanduser()
  if path.is_dir():
    raise ConfigError(f"{key}: is a folder, got {str(pattern)!r}. Write {str(pattern).rstrip('/') + '/**/*'!r}")
  if in_bucket(path):
    matches = fetch_files(str(path))
  else:
    matches = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
  matches = [p for p in matches if p.is_file()]
  if not matches:
    relative_to = "" if in_bucket(path) else f" (relative to {Path.cwd()})"
    raise ConfigError(f"{key}: there is no such file, got {str(pattern)!r}{relative_to}")
  return matches


def read_utf8_file(path: Path) -> str:
  r"""Return the content of a file without a byte order mark, with "\n" as line ends."""
  try:
    return path.read_bytes().decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
  except UnicodeDecodeError as error:
    raise utf8_error(path, error.start) from error


def utf8_error(path: Path, offset: int) -> ConfigError:
  return ConfigError(
    f"{path}: byte {offset} is not UTF-8. Convert the file (iconv -f ENCODING -t UTF-8) or remove it from the files"
  )


def json_error(error: json.JSONDecodeError) -> str:
  """Return what is wrong with a line of JSON, and in which column."""
  return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def first_line(error: BaseException) -> str:
  """Return the first line of an error that is not blank, for messages."""
  return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def file_names(paths: Sequence[Path]) -> str:
  """Return the first file, and whether there are more, for error messages."""
  return f"{paths[0]}{', ...' if len(paths) > 1 else ''}"


def record_locator(paths: Sequence[Path], first: int) -> Callable[[int], str]:
  """Return `Source.locate` for records that are counted over all files, starting at `first`."""
  return lambda index: f"record {first + index} (from 0) of {file_names(paths)}"

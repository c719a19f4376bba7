"""The cache directory for prepared data and trained tokenizers, and digests of content."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llmjax.config import ConfigError

MAX_HASHED_BYTES = 1 << 26
SAMPLE_BYTES, SAMPLES = 1 << 16, 64


def content_digest(*content: object) -> str:
  """Return 16 hex digits that depend on JSON-like content."""
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path: Path, max_hashed_bytes: int = MAX_HASHED_BYTES) -> str:
  """Return the SHA-256 of a file's size and content; of a larger file, of its size and evenly spaced samples.

  Modification times do not count, because hosts with copies of the same file must agree.
  """
  size = path.stat().st_size
  digest = hashlib.sha256(str(size).encode())
  with path.open("rb") as file:
    if size <= max_hashed_bytes:
      digest.update(file.read())
    else:
      for position in np.linspace(0, size - min(size, SAMPLE_BYTES), SAMPLES, dtype=np.int64):
        file.seek(int(position))
        digest.update(file.read(SAMPLE_BYTES))
  return digest.hexdigest()


def cache_dir() -> Path:
  """Return the directory of prepared data and trained tokenizers: $LLMJAX_CACHE, else ~/.cache/llmjax."""
  return Path(os.environ.get("LLMJAX_CACHE") or "~/.cache/llmjax").expanduser()


def fill_cache(path: Path, fill: Callable[[Path], None]) -> Path:
  """Create a cache entry if it is absent. Several processes may do so at once.

  Args:
    path: the entry, a file or a directory.
    fill: writes the entry to the path that it is given. The result is renamed to `path`, so no entry is incomplete.

  Returns:
    `path`.

  Raises:
    ConfigError: the cache is not writable.
  """
  if path.exists():
    return path
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
      filled = Path(folder) / path.name
      fill(filled)
      try:
        filled.rename(path)
      except OSError:
        if not path.exists():  # otherwise another process was faster, with the same content
          raise
  except PermissionError as error:
    raise ConfigError(f"{path.parent}: the cache is not writable: {error}. Set LLMJAX_CACHE to a folder") from error
  return path

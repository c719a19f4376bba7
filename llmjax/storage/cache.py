"""The cache folder for prepared data and trained tokenizers, and digests that name content."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmjax.config import ConfigError


def content_digest(*content: Any) -> str:
  """A short hex name for JSON-like content."""
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def cache_dir() -> Path:
  """Where prepared data and trained tokenizers are kept: $LLMJAX_CACHE, else ~/.cache/llmjax."""
  return Path(os.environ.get("LLMJAX_CACHE") or "~/.cache/llmjax").expanduser()


def fill_cache(path: Path, fill: Callable[[Path], None]) -> Path:
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

"""Files of the running interpreter's standard library: their texts, their digest, and the split of each file."""

from __future__ import annotations

import functools
import hashlib
import importlib
import sysconfig
import tokenize
from pathlib import Path
from typing import TypeAlias

from llmjax.config import ConfigError

VERSION = "1.0.0"

# Tests are mostly data. `encodings` and `lib2to3` are tables that repeat in several files, which would leak between
# splits. Generated build settings differ between machines with the same Python.
EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages", "__pycache__"}
GENERATED = ("_sysconfigdata", "config-")
TOPICS = "pydoc_data/topics.py"

Documents: TypeAlias = list[tuple[str, str]]  # (path relative to the library, text)


def library_documents() -> Documents:
  """Return all files of the library, and all help topics as `pydoc_data/topics.py#TOPIC`, sorted by path."""
  root = Path(sysconfig.get_paths()["stdlib"])
  documents = []
  for path in root.rglob("*.py"):
    parts = path.relative_to(root).parts
    name = "/".join(parts)
    if EXCLUDED & set(parts) or any(part.startswith(GENERATED) for part in parts) or name == TOPICS:
      continue
    try:
      with tokenize.open(path) as file:  # uses the declared encoding, and makes all line ends "\n"
        documents.append((name, file.read()))
    except (SyntaxError, UnicodeDecodeError):
      continue
  try:
    topics = importlib.import_module("pydoc_data.topics").topics
  except ModuleNotFoundError:  # some distributions package it separately
    topics = {}
  documents += [(f"{TOPICS}#{topic}", text) for topic, text in topics.items()]
  documents = sorted((name, text) for name, text in documents if text.strip())
  if not documents:
    raise ConfigError(f"data.corpus.name: 'python_stdlib' has no Python files, got {root}. Use another corpus")
  return documents


@functools.cache
def library_fingerprint() -> str:
  """Return 16 hex digits of the SHA-256 of paths and texts."""
  digest = hashlib.sha256(VERSION.encode())
  for document in library_documents():
    for part in document:
      digest.update(hashlib.sha256(part.encode()).digest())
  return digest.hexdigest()[:16]


def split_of_path(path: str) -> str:
  """Return "train" (about 90 %), "validation" (5 %) or "test" (5 %), from a hash of the path."""
  bucket = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % 20
  return {0: "test", 1: "validation"}.get(bucket, "train")

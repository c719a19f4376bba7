"""Real text without a download: the running interpreter's standard library as a TFDS dataset.

About 10 MB of Python source and the prose of `pydoc_data.topics`. Splits are by file (the topics by topic), through a
hash of the path, so that a file stays in its split when others come or go. The content differs between Python
versions, and the fingerprint says so.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from llmjax.config import ConfigError, nearest
from llmjax.data.source import cache_dir, cached

VERSION = "1.0.0"

# Tests are mostly data. `encodings` and `lib2to3` are tables that repeat across files, so they would leak between
# splits. Generated build settings differ between machines with the same Python.
EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages", "__pycache__"}
GENERATED = ("_sysconfigdata", "config-")
TOPICS = "pydoc_data/topics.py"

Documents = list[tuple[str, str]]  # (path relative to the library, text)


def documents() -> Documents:
  """Every file of the library and every help topic, sorted by path."""
  root = Path(sysconfig.get_paths()["stdlib"])
  found = []
  for path in root.rglob("*.py"):
    parts = path.relative_to(root).parts
    name = "/".join(parts)
    if EXCLUDED & set(parts) or any(part.startswith(GENERATED) for part in parts) or name == TOPICS:
      continue
    try:
      with tokenize.open(path) as file:  # heeds the declared encoding, and makes all line ends "\n"
        found.append((name, file.read()))
    except (SyntaxError, UnicodeDecodeError):
      continue
  try:
    topics = importlib.import_module("pydoc_data.topics").topics
  except ModuleNotFoundError:  # some distributions package it apart
    topics = {}
  found += [(f"{TOPICS}#{topic}", text) for topic, text in topics.items()]
  found = sorted((name, text) for name, text in found if text.strip())
  if not found:
    raise ConfigError(f"data.corpus.name='python_stdlib': no Python files in {root}; use another corpus")
  return found


@functools.cache
def fingerprint() -> str:
  """Names the content: hex of SHA-256 over paths and texts."""
  content = hashlib.sha256(VERSION.encode())
  for path, text in documents():
    for part in (path, text):
      content.update(hashlib.sha256(part.encode()).digest())
  return content.hexdigest()[:16]


def split_of(path: str) -> str:
  """About 90 % train, 5 % validation, 5 % test, by the path alone."""
  bucket = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % 20
  return {0: "test", 1: "validation"}.get(bucket, "train")


def text_records(found: Documents) -> Iterator[dict[str, Any]]:
  """Language modelling: a file or a topic each."""
  for path, text in found:
    yield {"text": text, "path": path}


# {config: (features, records of some documents)}: another kind of task is one function and one entry.
CONFIGS: dict[str, tuple[dict[str, Any], Callable[[Documents], Iterator[dict[str, Any]]]]] = {
  "text": ({"text": tfds.features.Text(), "path": tfds.features.Text()}, text_records),
}

_registered = "python_stdlib" in tfds.core.registered.list_imported_builders()  # so when this module is reloaded
with tfds.core.registered.skip_registration() if _registered else contextlib.nullcontext():

  class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """The builder. Prepare it with `file_format="array_record"`: TFDS's default format needs TensorFlow."""

    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = tuple(tfds.core.BuilderConfig(name=n, description=f.__doc__) for n, (_, f) in CONFIGS.items())

    url_infos = None  # nothing is downloaded, and TFDS's own search for checksums needs a package it does not require

    def _info(self):
      features, _ = CONFIGS[self.builder_config.name]
      return tfds.core.DatasetInfo(
        builder=self,
        description=__doc__,
        features=tfds.features.FeaturesDict(features),
        homepage="https://docs.python.org/3/library/",
      )

    def _split_generators(self, dl_manager):
      found = documents()
      splits = ("train", "validation", "test")
      return {name: self._generate_examples([d for d in found if split_of(d[0]) == name]) for name in splits}

    def _generate_examples(self, found):
      _, records = CONFIGS[self.builder_config.name]
      for i, record in enumerate(records(found)):
        yield f"{i:08d}", record


def prepare(config: str = "text") -> PythonStdlib:
  """The prepared builder, from the user's cache."""
  if config not in CONFIGS:
    raise ConfigError(f"data.corpus.config={config!r} is no config of python_stdlib; {nearest(config, CONFIGS)}")

  def builder(folder: Path) -> PythonStdlib:
    return PythonStdlib(config=config, data_dir=str(folder), file_format="array_record")

  folder = cache_dir() / "python_stdlib" / fingerprint() / config
  return builder(cached(folder, lambda made: builder(made).download_and_prepare()))

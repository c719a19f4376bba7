"""Real text without a download: the running interpreter's standard library as a TFDS dataset.

About 10 MB of Python source and the prose of `pydoc_data.topics`. Splits are by file (the topics by topic), through a
hash of the path, so that a file stays in its split when others come or go. The content differs between Python
versions, and the fingerprint says so.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib
import re
import sysconfig
import tokenize
import warnings
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


def docstring_pairs(found: Documents) -> Iterator[dict[str, Any]]:
  """Code search: a function or method each, its source without the docstring beside the docstring.

  Left out: summaries of fewer than three words, bodies that do nothing, functions inside functions (they are a part of
  the outer one's source). The library repeats itself, so of functions with the same summary or the same source only the
  first in the whole library counts: neither occurs twice, in one split or in two.
  """
  seen: set[str] = set()
  for path, source in found:
    for name, function in _functions(source):
      docstring = (ast.get_docstring(function) or "").rstrip()
      summary = " ".join(re.split(r"\n\s*\n", docstring)[0].split())
      if len(summary.split()) < 3 or _does_nothing(function):
        continue
      text = _without_docstring(source, function)
      if text and not {summary, text} & seen:
        seen |= {summary, text}
        yield {"text": text, "docstring": docstring, "summary": summary, "name": name, "path": path}


Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(source: str) -> Iterator[tuple[str, Function]]:
  """(qualified name, function) of the functions and methods of a file, in order; none where it is not Python."""

  def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
      if isinstance(child, Function):
        yield prefix + child.name, child
      elif isinstance(child, ast.ClassDef):
        yield from visit(child, f"{prefix}{child.name}.")
      elif isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):  # such as "if" and "try"
        yield from visit(child, prefix)

  try:
    with warnings.catch_warnings(action="ignore"):  # of odd escapes in strings
      tree = ast.parse(source)
  except (SyntaxError, ValueError):
    return
  yield from visit(tree, "")


def _does_nothing(function: Function) -> bool:
  """Whether the body is nothing but a docstring, `pass`, `...` and `raise NotImplementedError`."""

  def idle(node: ast.stmt) -> bool:
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return constant or isinstance(node, ast.Pass) or ast.unparse(node).startswith("raise NotImplementedError")

  return all(map(idle, function.body))


def _without_docstring(source: str, function: Function) -> str:
  """The lines of a function from its decorators on, moved to the left margin; "" where its docstring shares a line."""
  lines = source.split("\n")
  docstring, following = function.body[:2]
  assert docstring.end_lineno is not None and function.end_lineno is not None  # a parsed file has them
  if lines[docstring.lineno - 1][: docstring.col_offset].strip() or following.lineno == docstring.end_lineno:
    return ""
  start = min(node.lineno for node in (function, *function.decorator_list)) - 1
  after = docstring.end_lineno
  while not lines[after].strip():
    after += 1
  kept = lines[start : docstring.lineno - 1] + lines[after : function.end_lineno]
  margin = lines[start][: len(lines[start]) - len(lines[start].lstrip())]
  return "\n".join(line.removeprefix(margin) for line in kept)


# {config: (fields, all of them text, and records of documents)}: another kind of task is one function and one entry.
# Records come from the whole library, and each is in the split of its "path".
CONFIGS: dict[str, tuple[tuple[str, ...], Callable[[Documents], Iterator[dict[str, Any]]]]] = {
  "text": (("text", "path"), text_records),
  "docstring_pairs": (("text", "docstring", "summary", "name", "path"), docstring_pairs),
}

_registered = "python_stdlib" in tfds.core.registered.list_imported_builders()  # so when this module is reloaded
with tfds.core.registered.skip_registration() if _registered else contextlib.nullcontext():

  class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """The builder. Prepare it with `file_format="array_record"`: TFDS needs TensorFlow to write its default format."""

    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = tuple(tfds.core.BuilderConfig(name=n, description=f.__doc__) for n, (_, f) in CONFIGS.items())

    url_infos = None  # nothing is downloaded, and TFDS's own search for checksums needs a package it does not require

    def _info(self):
      fields, _ = CONFIGS[self.builder_config.name]
      return tfds.core.DatasetInfo(
        builder=self,
        description=__doc__,
        features=tfds.features.FeaturesDict({field: tfds.features.Text() for field in fields}),
        homepage="https://docs.python.org/3/library/",
      )

    def _split_generators(self, dl_manager):
      _, make = CONFIGS[self.builder_config.name]
      records = list(make(documents()))
      splits = ("train", "validation", "test")
      return {name: self._generate_examples([r for r in records if split_of(r["path"]) == name]) for name in splits}

    def _generate_examples(self, records):
      for i, record in enumerate(records):
        yield f"{i:08d}", record


def prepare(config: str = "text") -> PythonStdlib:
  """The prepared builder, from the user's cache."""
  if config not in CONFIGS:
    raise ConfigError(f"data.corpus.config={config!r} is no config of python_stdlib; {nearest(config, CONFIGS)}")

  def builder(folder: Path) -> PythonStdlib:
    return PythonStdlib(config=config, data_dir=str(folder), file_format="array_record")

  folder = cache_dir() / "python_stdlib" / fingerprint() / config
  return builder(cached(folder, lambda made: builder(made).download_and_prepare()))

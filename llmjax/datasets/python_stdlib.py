"""Real text without a download: the running interpreter's standard library as a TFDS dataset.

About 10 MB of Python source and the prose of `pydoc_data.topics`. Splits are by file (the topics by topic), through a
hash of the path, so that a file stays in its split when others come or go. The content differs between Python
versions, and the fingerprint says so.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import functools
import hashlib
import importlib
import itertools
import keyword
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from llmjax.config import ConfigError, suggest_name
from llmjax.storage.cache import cache_dir, fill_cache

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
  start = _first_line(function)
  after = docstring.end_lineno
  while not lines[after].strip():
    after += 1
  return _at_the_margin(lines[start : docstring.lineno - 1] + lines[after : function.end_lineno])


def _first_line(function: Function) -> int:
  """The line of the first decorator, else of the function, from 0."""
  return min(node.lineno for node in (function, *function.decorator_list)) - 1


def _at_the_margin(lines: list[str]) -> str:
  margin = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
  return "\n".join(line.removeprefix(margin) for line in lines)


SNIPPET_LINES = range(5, 61)
SNIPPETS = 50  # in train, that a package needs to be a class; twelve to sixteen of the library's have them


def package(found: Documents) -> Iterator[dict[str, Any]]:
  """Classification: a function or method of 5 to 60 lines each, and the top-level package that it comes from.

  Classes are the packages with at least 50 such functions. Functions are held out, not files, of which many packages
  have too few: so a file's manner helps to tell where a function is from. Left out are functions that import anything,
  which would tell the package, and all but the first of those with the same source.
  """
  seen: set[str] = set()
  snippets: list[dict[str, Any]] = []
  for path, source in found:
    name, inside, _ = path.partition("/")
    if not inside or "#" in path:  # a module by itself, or a help topic
      continue
    lines = source.split("\n")
    for title, function in _functions(source):
      kept = lines[_first_line(function) : function.end_lineno]
      if len(kept) not in SNIPPET_LINES or any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(function)):
        continue
      text = _at_the_margin(kept)
      if text not in seen:
        seen.add(text)
        snippets.append({"text": text, "package": name, "path": f"{path}#{title}"})
  counts = collections.Counter(r["package"] for r in snippets)
  yield from (r for r in snippets if counts[r["package"]] >= SNIPPETS)


TOKENS = 60  # of a record at most
EXCERPTS = 12  # of a file at most


def tokens(found: Documents) -> Iterator[dict[str, Any]]:
  """Labelling of spans: excerpts of files as tokens, and what they are, as tags in the scheme IOB2.

  An excerpt is whole logical lines (statements that are not compound, or heads of those that are), with at most 60
  tokens together; of a file there are at most 12, evenly spread. Tokens are Python's, but strings and comments are cut
  at white space, so that no token holds any. What is tagged, everything else being "O":

    IMPORT     the dotted name of a module in an import: "os . path", ". util"
    CALL       the dotted name that is called: "self . assertEqual"
    FUNCTION, CLASS, PARAMETER   a name where it is defined
    STRING, NUMBER, COMMENT
  """
  for path, source in found:
    if "#" in path:
      continue
    excerpts = list(_excerpts(source))
    for i in sorted({i * len(excerpts) // EXCERPTS for i in range(EXCERPTS)} if excerpts else ()):
      words, tags = zip(*excerpts[i])
      yield {"tokens": list(words), "tags": list(tags), "text": " ".join(words), "path": path}


Tagged = list[tuple[str, str]]  # (token, tag)


def _excerpts(source: str) -> Iterator[Tagged]:
  excerpt: Tagged = []
  for line in _logical_lines(source):
    tagged = _tagged(line)
    if excerpt and len(excerpt) + len(tagged) > TOKENS:  # also before a line that is left out: an excerpt has no gaps
      yield excerpt
      excerpt = []
    if len(tagged) <= TOKENS:
      excerpt += tagged
  if excerpt:
    yield excerpt


Token = tuple[str, str]  # (kind: NAME, NUMBER, STRING, COMMENT or OP, text)


def _logical_lines(source: str) -> Iterator[list[Token]]:
  """The tokens of each, comments beside and before it among them, up to where it is not Python.

  Newer Pythons cut an f-string into tokens, older ones do not; here it is one.
  """
  lines = [line + "\n" for line in source.split("\n")]
  line: list[Token] = []
  opened: list[tuple[int, int]] = []  # where the f-strings begin that we are in
  try:
    for token in tokenize.generate_tokens(iter(lines).__next__):
      kind = tokenize.tok_name[token.type]
      if kind.endswith("STRING_START"):
        opened.append(token.start)
      elif kind.endswith("STRING_END"):
        start = opened.pop()
        if not opened:
          line.append(("STRING", _between(lines, start, token.end)))
      elif opened:
        continue
      elif kind == "NEWLINE":
        yield line
        line = []
      elif kind in ("NAME", "NUMBER", "STRING", "COMMENT", "OP"):
        line.append((kind, token.string))
  except (SyntaxError, tokenize.TokenError):
    return
  if line:
    yield line


def _between(lines: list[str], start: tuple[int, int], stop: tuple[int, int]) -> str:
  """The text between two places (line from 1, column)."""
  (first, begin), (last, end) = start, stop
  if first == last:
    return lines[first - 1][begin:end]
  return "".join([lines[first - 1][begin:], *lines[first : last - 1], lines[last - 1][:end]])


def _tagged(line: list[Token]) -> Tagged:
  """A logical line's tokens with their tags."""
  kinds = _kinds([token for token in line if token[0] != "COMMENT"])
  found: Tagged = []
  for kind, text in line:
    label, begins = ("COMMENT", True) if kind == "COMMENT" else next(kinds)
    begins = begins or not found or found[-1][1][2:] != label  # a comment may stand inside a dotted name
    for word in text.split():
      found.append((word, "O" if label is None else f"{'B' if begins else 'I'}-{label}"))
      begins = False
  return found


def _kinds(code: list[Token]) -> Iterator[tuple[str | None, bool]]:
  """(what each token is part of, whether it begins that) of a logical line without comments."""
  names = [kind == "NAME" and not keyword.iskeyword(text) for kind, text in code]
  texts = [text for _, text in code]
  parameters = _parameters(texts, names)
  importing = texts[:1] in (["import"], ["from"])
  i = 0
  while i < len(code):
    before = texts[i - 1] if i else ""
    stop = i  # behind the dotted name that begins here
    while importing and before == "from" and stop < len(code) and texts[stop] in (".", "..."):
      stop += 1
    while stop < len(code) and names[stop]:
      stop += 1
      if texts[stop : stop + 1] != ["."] or not any(names[stop + 1 : stop + 2]):
        break
      stop += 1
    label = None
    if importing and stop > i and (before == "from" or (texts[0] == "import" and before in ("import", ","))):
      label = "IMPORT"
    elif code[i][0] in ("STRING", "NUMBER"):
      label, stop = code[i][0], i + 1
    elif names[i] and before in ("def", "class"):
      label, stop = "FUNCTION" if before == "def" else "CLASS", i + 1
    elif i in parameters:
      label, stop = "PARAMETER", i + 1
    elif names[i] and texts[stop : stop + 1] == ["("]:
      label = "CALL"
    stop = max(stop, i + 1)
    yield from ((label, place == i) for place in range(i, stop))
    i = stop


def _parameters(texts: list[str], names: list[bool]) -> set[int]:
  """Which tokens are the names of parameters, where the line defines a function."""
  if "def" not in texts[:2] or "(" not in texts:
    return set()
  found, depth, expected = set(), 0, False
  for i in range(texts.index("("), len(texts)):
    depth += (texts[i] in ("(", "[", "{")) - (texts[i] in (")", "]", "}"))
    if depth == 0:
      break
    if expected and names[i]:
      found.add(i)
    expected = depth == 1 and (texts[i] in ("(", ",") or (expected and texts[i] in ("*", "**")))
  return found


def params(found: Documents) -> Iterator[dict[str, Any]]:
  """Answers in a context: a parameter of a function each, and where its docstring says what it is.

  The context is the head of the function and its docstring. The answer is the description of the parameter in a list
  ("name -- description", "name: description", with the more indented lines below it), else the one sentence in which
  its name stands. Left out are parameters of one letter, those with several such places or none, docstrings of one
  sentence, and all but the first of the functions with the same context, or in a file with the same name.
  """
  seen: set[str] = set()
  for path, source in found:
    for name, function in _functions(source):
      docstring = (ast.get_docstring(function) or "").rstrip()
      sentences = _sentences(docstring)
      context, place = f"def {function.name}({ast.unparse(function.args)}):\n{docstring}", f"{path}#{name}"
      if len(sentences) < 2 or {context, place} & seen:
        continue
      seen |= {context, place}
      for parameter in _names(function.args):
        spans = _descriptions(parameter, docstring, sentences)
        if len(parameter) > 1 and len(spans) == 1:
          [(start, stop)] = spans
          answer = {"text": docstring[start:stop], "answer_start": len(context) - len(docstring) + start}
          record = {"id": f"{place}#{parameter}", "question": f"What is {parameter}?", "context": context}
          yield {**record, "answers": [answer], "text": context, "path": path}


Spans = list[tuple[int, int]]


def _names(arguments: ast.arguments) -> list[str]:
  """Of the parameters, but for the object or class of a method."""
  every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
  return [a.arg for a in every if a is not None and a.arg not in ("self", "cls")]


def _descriptions(parameter: str, docstring: str, sentences: Spans) -> Spans:
  """Where a list describes the parameter, else the sentences that mention it; a call, `parameter=...`, does neither."""
  word = rf"(?<![\w.]){parameter}(?![\w(=]|\.\w)"
  listed = rf"^( *)\*{{0,2}}{word} *(?:--?|:) +(\S.*(?:\n\1 +\S.*)*)"
  found = [match.span(2) for match in re.finditer(listed, docstring, re.MULTILINE)]
  return found or [(start, stop) for start, stop in sentences if re.search(word, docstring[start:stop])]


def _sentences(text: str) -> Spans:
  """Where sentences start and end; paragraphs end them too, and examples (">>>") are none."""
  found = []
  for match in re.finditer(r"\S(?:.|\n(?!\s*\n))*?(?:[.!?](?=\s)|(?=\s*\n\s*\n)|(?=\s*\Z))", text):
    if ">>>" not in match[0]:
      found.append(match.span())
  return found


def preferences(found: Documents) -> Iterator[dict[str, Any]]:
  """Preferences: a function each, its own summary, and as the worse answer that of the next function of the same file.

  Functions and summaries are those of `docstring_pairs`; the next of a file's last is its first, and a file with one
  alone is left out.
  """
  for path, group in itertools.groupby(docstring_pairs(found), key=lambda r: r["path"]):
    records = list(group)
    for record, other in zip(records, records[1:] + records[:1]):
      if other is not record:
        yield {"text": record["text"], "chosen": record["summary"], "rejected": other["summary"], "path": path}


TEXT = tfds.features.Text()
TEXTS = tfds.features.Sequence(TEXT)
ANSWERS = tfds.features.Sequence({"text": TEXT, "answer_start": np.int32})  # as in TFDS's SQuAD


def _texts(*fields: str) -> dict[str, Any]:
  return dict.fromkeys(fields, TEXT)


# {config: (features, records of documents)}: another kind of task is one function and one entry.
# Records come from the whole library, and each is in the split of its "path".
CONFIGS: dict[str, tuple[dict[str, Any], Callable[[Documents], Iterator[dict[str, Any]]]]] = {
  "text": (_texts("text", "path"), text_records),
  "docstring_pairs": (_texts("text", "docstring", "summary", "name", "path"), docstring_pairs),
  "package": (_texts("text", "package", "path"), package),
  "tokens": ({"tokens": TEXTS, "tags": TEXTS, **_texts("text", "path")}, tokens),
  "params": ({**_texts("id", "question", "context", "text", "path"), "answers": ANSWERS}, params),
  "preferences": (_texts("text", "chosen", "rejected", "path"), preferences),
}

_registered = "python_stdlib" in tfds.core.registered.list_imported_builders()  # so when this module is reloaded
with tfds.core.registered.skip_registration() if _registered else contextlib.nullcontext():

  class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """The builder. Prepare it with `file_format="array_record"`: TFDS needs TensorFlow to write its default format."""

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
      _, make = CONFIGS[self.builder_config.name]
      records = list(make(documents()))
      splits = {name: [r for r in records if split_of(r["path"]) == name] for name in ("train", "validation", "test")}
      return {name: self._generate_examples(some) for name, some in splits.items() if some}  # TFDS has no empty ones

    def _generate_examples(self, records):
      for i, record in enumerate(records):
        yield f"{i:08d}", record


def prepare(config: str = "text") -> PythonStdlib:
  """The prepared builder, from the user's cache."""
  if config not in CONFIGS:
    raise ConfigError(f"data.corpus.config={config!r} is no config of python_stdlib; {suggest_name(config, CONFIGS)}")

  def builder(folder: Path) -> PythonStdlib:
    return PythonStdlib(config=config, data_dir=str(folder), file_format="array_record")

  folder = cache_dir() / "python_stdlib" / fingerprint() / config
  return builder(fill_cache(folder, lambda made: builder(made).download_and_prepare()))

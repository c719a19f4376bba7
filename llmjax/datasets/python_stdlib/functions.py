"""Records made from the functions of the library: docstrings, packages, preferences."""

from __future__ import annotations

import ast
import collections
import itertools
import re
import warnings
from collections.abc import Iterator
from typing import TypeAlias

from llmjax.datasets.python_stdlib.library import Documents

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
TextRecord: TypeAlias = dict[str, str]

SNIPPET_LINES = range(5, 61)
MIN_SNIPPETS = 50  # functions of a package that is a class; 12 to 16 packages of the library have as many


def functions_of(source: str) -> Iterator[tuple[str, Function]]:
  """Yield (qualified name, function) for the functions and methods of a file; nothing if it is not Python.

  Functions inside functions are not yielded, because they are part of the outer one's source.
  """

  def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
      if isinstance(child, Function):
        yield prefix + child.name, child
      elif isinstance(child, ast.ClassDef):
        yield from visit(child, f"{prefix}{child.name}.")
      elif isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):  # such as "if" and "try"
        yield from visit(child, prefix)

  try:
    with warnings.catch_warnings(action="ignore"):  # of invalid escapes in strings
      tree = ast.parse(source)
  except (SyntaxError, ValueError):
    return
  yield from visit(tree, "")


def docstring_of(function: Function) -> str:
  return (ast.get_docstring(function) or "").rstrip()


def docstring_pairs(documents: Documents) -> Iterator[TextRecord]:
  """Code search: the source of a function or method without its docstring, and the docstring.

  Functions without a body are skipped, and so are summaries of fewer than three words. The library repeats itself, so
  of several functions with the same summary or the same source only the first one is used. Therefore neither occurs in
  two splits.
  """
  seen: set[str] = set()
  for path, source in documents:
    for name, function in functions_of(source):
      docstring = docstring_of(function)
      summary = " ".join(re.split(r"\n\s*\n", docstring)[0].split())
      if len(summary.split()) < 3 or _is_stub(function):
        continue
      text = _source_without_docstring(source, function)
      if text and not {summary, text} & seen:
        seen |= {summary, text}
        yield {"text": text, "docstring": docstring, "summary": summary, "name": name, "path": path}


def package_snippets(documents: Documents) -> Iterator[TextRecord]:
  """Classification: a function or method of 5 to 60 lines, and the top-level package that it comes from.

  Classes are the packages with at least 50 such functions. Functions are held out, not files, because many packages
  have too few files; the style of a file therefore helps to classify its functions. Functions with imports, which
  would give the package away, and duplicates are skipped.
  """
  seen: set[str] = set()
  snippets: list[TextRecord] = []
  for path, source in documents:
    package, has_package, _ = path.partition("/")
    if not has_package or "#" in path:  # a module outside any package, or a help topic
      continue
    lines = source.split("\n")
    for name, function in functions_of(source):
      own_lines = lines[_first_line(function) : function.end_lineno]
      has_import = any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(function))
      if len(own_lines) not in SNIPPET_LINES or has_import:
        continue
      text = _dedent(own_lines)
      if text not in seen:
        seen.add(text)
        snippets.append({"text": text, "package": package, "path": f"{path}#{name}"})
  counts = collections.Counter(snippet["package"] for snippet in snippets)
  yield from (snippet for snippet in snippets if counts[snippet["package"]] >= MIN_SNIPPETS)


def summary_preferences(documents: Documents) -> Iterator[TextRecord]:
  """Preferences: a function, its own summary as chosen answer, and that of the file's next function as rejected one.

  Functions and summaries are those of `docstring_pairs`. The first function follows the last one of a file; files with
  a single function are skipped.
  """
  for path, group in itertools.groupby(docstring_pairs(documents), key=lambda record: record["path"]):
    records = list(group)
    for record, other in zip(records, records[1:] + records[:1]):
      if other is not record:
        yield {"text": record["text"], "chosen": record["summary"], "rejected": other["summary"], "path": path}


def _is_stub(function: Function) -> bool:
  """Whether the body is nothing but a docstring, `pass`, `...` and `raise NotImplementedError`."""

  def does_nothing(node: ast.stmt) -> bool:
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_constant or isinstance(node, ast.Pass) or ast.unparse(node).startswith("raise NotImplementedError")

  return all(map(does_nothing, function.body))


def _source_without_docstring(source: str, function: Function) -> str:
  """Return the dedented lines of a function from its decorators on; "" if its docstring shares a line with code."""
  lines = source.split("\n")
  docstring, following = function.body[:2]
  assert docstring.end_lineno is not None and function.end_lineno is not None  # `ast.parse` sets them
  if lines[docstring.lineno - 1][: docstring.col_offset].strip() or following.lineno == docstring.end_lineno:
    return ""
  body_start = docstring.end_lineno
  while not lines[body_start].strip():
    body_start += 1
  return _dedent(lines[_first_line(function) : docstring.lineno - 1] + lines[body_start : function.end_lineno])


def _first_line(function: Function) -> int:
  """Return the line, from 0, of the first decorator, else of the function."""
  return min(node.lineno for node in (function, *function.decorator_list)) - 1


def _dedent(lines: list[str]) -> str:
  """Remove the first line's indentation from all lines; keep less indented lines as they are."""
  margin = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
  return "\n".join(line.removeprefix(margin) for line in lines)

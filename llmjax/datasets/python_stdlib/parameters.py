"""Extractive questions about the parameters of the library's functions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import TypeAlias

from llmjax.datasets.python_stdlib.functions import docstring_of, functions_of
from llmjax.datasets.python_stdlib.library import Documents

Spans: TypeAlias = list[tuple[int, int]]  # [start, stop) in characters


def parameter_questions(documents: Documents) -> Iterator[dict[str, object]]:
  """Answers in a context: a parameter of a function, and the part of its docstring that describes the parameter.

  The context is the head of the function and its docstring. The answer is the parameter's description in a list
  ("name -- description" or "name: description", with more indented lines below it), else the only sentence that
  mentions the parameter. Skipped are parameters of one letter, parameters with no or several such spans, docstrings of
  one sentence, and functions whose context, or whose name in the same file, occurred before.
  """
  seen: set[str] = set()
  for path, source in documents:
    for name, function in functions_of(source):
      docstring = docstring_of(function)
      sentences = _sentence_spans(docstring)
      context, place = f"def {function.name}({ast.unparse(function.args)}):\n{docstring}", f"{path}#{name}"
      if len(sentences) < 2 or {context, place} & seen:
        continue
      seen |= {context, place}
      for parameter in _parameter_names(function.args):
        spans = _description_spans(parameter, docstring, sentences)
        if len(parameter) > 1 and len(spans) == 1:
          [(start, stop)] = spans
          yield {
            "id": f"{place}#{parameter}",
            "question": f"What is {parameter}?",
            "context": context,
            "answers": [{"text": docstring[start:stop], "answer_start": len(context) - len(docstring) + start}],
            "text": context,
            "path": path,
          }


def _parameter_names(arguments: ast.arguments) -> list[str]:
  """Return all parameters except the object or class of a method."""
  every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
  return [a.arg for a in every if a is not None and a.arg not in ("self", "cls")]


def _description_spans(parameter: str, docstring: str, sentences: Spans) -> Spans:
  """Return the descriptions of a parameter in lists, else the sentences that mention it; not those that call it."""
  word = rf"(?<![\w.]){parameter}(?![\w(=]|\.\w)"
  in_list = rf"^( *)\*{{0,2}}{word} *(?:--?|:) +(\S.*(?:\n\1 +\S.*)*)"
  spans = [match.span(2) for match in re.finditer(in_list, docstring, re.MULTILINE)]
  return spans or [(start, stop) for start, stop in sentences if re.search(word, docstring[start:stop])]


def _sentence_spans(text: str) -> Spans:
  """Return the sentences of a text. A paragraph ends a sentence; doctest examples (">>>") are not sentences."""
  sentences = re.finditer(r"\S(?:.|\n(?!\s*\n))*?(?:[.!?](?=\s)|(?=\s*\n\s*\n)|(?=\s*\Z))", text)
  return [match.span() for match in sentences if ">>>" not in match[0]]

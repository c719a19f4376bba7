"""Sources over the usual files of texts with answers to learn: CoNLL columns, SQuAD's JSON, line-aligned translations.

Files of this kind are small, so they are read into memory once, and every mistake in them shows when they are opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmjax.config import ConfigError
from llmjax.data.sources.base import Source, parse_split, shuffled, split_bounds
from llmjax.data.sources.files import Files, expand, in_files, json_error, read_text
from llmjax.storage.cache import content_digest
from llmjax.storage.digests import file_digest

# What records hold, by the source; of `parallel` it is what its arguments say.
FIELDS = {"conll": ("tokens", "tags", "text"), "squad": ("id", "question", "context", "answers", "text")}

Records = list[dict[str, Any]]


def conll(
  split: str, files: Files, token_column: int = 0, tag_column: int = -1, separator: str | None = None
) -> Source:
  """Sentences in columns, a token a line and a blank line behind each (Tjong Kim Sang and De Meulder 2003).

  Records are {"tokens": [...], "tags": [...], "text": the tokens with spaces between them}. Left out are lines that
  begin with "-DOCSTART-", and comments: lines before a sentence's first token that begin with "# ", and others that
  begin with "#" and have not enough columns.

  Args:
    token_column, tag_column: which columns, from 0; negative ones count from the last.
    separator: what stands between columns; None is any run of spaces and tabs.
  Raises:
    ConfigError: a line with too few columns.
  """
  if token_column == tag_column:
    raise ConfigError(f"data.corpus.token_column and tag_column are both {tag_column}; tags need a column of their own")
  if separator == "":
    raise ConfigError("data.corpus.separator is empty; give what stands between columns, or None for spaces and tabs")
  paths = expand(files, split)
  records = [r for path in paths for r in _sentences(path, token_column, tag_column, separator)]
  return _source(split, paths, records, ("conll", token_column, tag_column, separator))


def _sentences(path: Path, token_column: int, tag_column: int, separator: str | None) -> Iterator[dict[str, Any]]:
  tokens: list[str] = []
  tags: list[str] = []
  for number, line in enumerate([*read_text(path).split("\n"), ""], 1):
    line = line.strip(" \t") if separator is None else line
    if not line.strip() or line.startswith("-DOCSTART-"):
      if tokens:
        yield {"tokens": tokens, "tags": tags, "text": " ".join(tokens)}
      tokens, tags = [], []
      continue
    if line.startswith("# ") and not tokens:
      continue
    cells = re.split("[ \t]+", line) if separator is None else line.split(separator)
    places = [column + len(cells) * (column < 0) for column in (token_column, tag_column)]
    if not all(0 <= place < len(cells) for place in places) or places[0] == places[1]:
      if line.startswith("#"):
        continue
      columns = f"{len(cells)} column{'s' * (len(cells) != 1)}"
      raise ConfigError(
        f"{path}:{number}: {columns} in {line[:60]!r}, where data.corpus.token_column={token_column} and "
        f"tag_column={tag_column} need more; set those and data.corpus.separator as the file is, or mend the line"
      )
    tokens.append(cells[places[0]])
    tags.append(cells[places[1]])


def squad(split: str, files: Files) -> Source:
  """Questions and the places of their answers in a context: SQuAD's JSON (Rajpurkar et al. 2016; v2: 2018).

  Records are {"id", "question", "context", "answers": [{"text", "start"}], "text": the context}, with starts in
  characters. A question without an answer, or marked as impossible, has no answers.

  Raises:
    ConfigError: a file of another form; an answer that does not stand at its place.
  """
  paths = expand(files, split)
  records = [record for path in paths for record in _questions(path)]
  return _source(split, paths, records, ("squad",))


def _questions(path: Path) -> Iterator[dict[str, Any]]:
  try:
    content = json.loads(read_text(path))
  except json.JSONDecodeError as error:
    raise ConfigError(f"{path}:{error.lineno}: not JSON: {json_error(error)}") from error
  form = 'is not SQuAD\'s {"data": [{"paragraphs": [{"context": ..., "qas": [{"id", "question", "answers"}]}]}]}'
  try:
    for article in content["data"]:
      for paragraph in article["paragraphs"]:
        context = paragraph["context"]
        for question in paragraph["qas"]:
          found = [] if question.get("is_impossible") else question.get("answers", [])
          answers = [{"text": answer["text"], "start": answer["answer_start"]} for answer in found]
          _check(path, question["id"], context, answers)
          yield {
            "id": question["id"],
            "question": question["question"],
            "context": context,
            "answers": answers,
            "text": context,
          }
  except KeyError as error:
    raise ConfigError(f"{path} {form}: {error} is missing; other JSON is read as JSONL, an object a line") from error
  except (TypeError, AttributeError) as error:
    raise ConfigError(f"{path} {form}; other JSON is read as JSONL, an object a line") from error


def _check(path: Path, name: str, context: str, answers: list[dict[str, Any]]) -> None:
  for answer in answers:
    text, start = answer["text"], answer["start"]
    there = context[start : start + len(text)] if start >= 0 else ""
    if there != text:
      raise ConfigError(
        f"{path}: question {name!r}: the answer {text[:60]!r} does not stand at answer_start {start}, where the "
        f"context has {there[:60]!r}; starts count characters, from 0: mend the file, or leave the answer out"
      )


def parallel(
  split: str,
  files: Files,
  targets: Files,
  source: str = "source",
  target: str = "target",
  shuffle: bool = False,
) -> Source:
  """Two texts whose lines belong together, such as translations.

  Records are {source: line, target: line, "text": the source}. Where a line of either side is blank there is none.

  Args:
    files, targets: the one side and the other; of several files, those at the same place of both lists are a pair.
    source, target: what the fields are called.
    shuffle: see `source.files`.
  Raises:
    ConfigError: different numbers of files, or of lines in a pair of them.
  """
  if target in (source, "text"):
    raise ConfigError(f"data.corpus.target={target!r} is what another field is called; choose another name")
  paths, others = expand(files, split), expand(targets, split, "targets")
  if len(paths) != len(others):
    raise ConfigError(
      f"data.corpus.files are {len(paths)} and data.corpus.targets {len(others)}; each file needs its own on the other "
      f"side (the first are {paths[0]} and {others[0]})"
    )
  records: Records = []
  for path, other in zip(paths, others):
    left, right = _lines(path), _lines(other)
    if len(left) != len(right):
      raise ConfigError(
        f"{path} has {len(left)} lines and {other} {len(right)}; lines belong together by their number, so give files "
        "that are aligned"
      )
    records += [{"text": a, source: a, target: b} for a, b in zip(left, right) if a and b]
  name, _, _ = parse_split(split)
  settings = ("parallel", source, target)
  found = _source(name if shuffle else split, [*paths, *others], records, settings)
  return shuffled(found, split) if shuffle else found


def _lines(path: Path) -> list[str]:
  """All lines, blank ones as ""; a line end behind the last begins no other."""
  lines = read_text(path).removesuffix("\n").split("\n")
  return [line if line.strip() else "" for line in lines]


def _source(split: str, paths: list[Path], records: Records, settings: Any) -> Source:
  if not records:
    raise ConfigError(f"{paths[0]}{' and the others' if len(paths) > 1 else ''}: no records (data.corpus.files)")
  start, stop = split_bounds(split, len(records))
  chosen = records[start:stop]
  fingerprint = content_digest(settings, [file_digest(p) for p in paths], start, stop)
  return Source(stop - start, lambda index: dict(chosen[index]), fingerprint, where=in_files(paths, start))

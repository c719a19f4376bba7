"""Common formats of labelled text as sources: CoNLL columns, SQuAD's JSON, line-aligned translations.

These files are small, so they are read into memory. All errors in them are reported when the source is opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from llmjax.config import ConfigError
from llmjax.data.sources.base import Record, Source, parse_split, shuffle_source, split_bounds
from llmjax.data.sources.paths import Files, expand_files, file_names, json_error, read_utf8_file, record_locator
from llmjax.storage.cache import content_digest, file_digest

# {source: fields of its records}; fields of `parallel` are named by its arguments.
FIELDS = {"conll": ("tokens", "tags", "text"), "squad": ("id", "question", "context", "answers", "text")}

SQUAD_FORMAT = '{"data": [{"paragraphs": [{"context": ..., "qas": [{"id", "question", "answers"}]}]}]}'


def conll_source(
  split: str, files: Files, token_column: int = 0, tag_column: int = -1, separator: str | None = None
) -> Source:
  """Return tagged sentences of CoNLL files: a token per line in columns, a blank line after each sentence.

  Lines that begin with "-DOCSTART-" are skipped, and so are comments: lines before a sentence's first token that begin
  with "# ", and lines that begin with "#" and have too few columns.

  Args:
    split: see `base.parse_split`.
    files: as of `text.text_source`.
    token_column, tag_column: columns, counted from 0; negative numbers count from the last column.
    separator: string between columns; None: spaces and tabs.

  Returns:
    Records {"tokens": [...], "tags": [...], "text": the tokens joined by spaces}.

  Raises:
    ConfigError: a line has too few columns.

  Reference: Tjong Kim Sang and De Meulder 2003.
  """
  if token_column == tag_column:
    raise ConfigError(f"data.corpus.tag_column: must differ from data.corpus.token_column, got {tag_column} for both")
  if separator == "":
    raise ConfigError("data.corpus.separator: empty. Set it to the string between columns, or None for spaces and tabs")
  paths = expand_files(files, split)
  records = [r for path in paths for r in _read_sentences(path, token_column, tag_column, separator)]
  return _records_source(split, paths, records, ("conll", token_column, tag_column, separator))


def _read_sentences(path: Path, token_column: int, tag_column: int, separator: str | None) -> Iterator[Record]:
  tokens: list[str] = []
  tags: list[str] = []
  for number, line in enumerate([*read_utf8_file(path).split("\n"), ""], 1):
    line = line.strip(" \t") if separator is None else line
    if not line.strip() or line.startswith("-DOCSTART-"):
      if tokens:
        yield {"tokens": tokens, "tags": tags, "text": " ".join(tokens)}
      tokens, tags = [], []
      continue
    if line.startswith("# ") and not tokens:
      continue
    cells = re.split("[ \t]+", line) if separator is None else line.split(separator)
    columns = [column + len(cells) * (column < 0) for column in (token_column, tag_column)]
    if not all(0 <= column < len(cells) for column in columns) or columns[0] == columns[1]:
      if line.startswith("#"):
        continue
      raise ConfigError(
        f"{path}:{number}: data.corpus.token_column={token_column} and tag_column={tag_column} need more columns, got "
        f"{len(cells)} column{'s' * (len(cells) != 1)} in {line[:60]!r}. Fix the line, the columns or "
        "data.corpus.separator"
      )
    tokens.append(cells[columns[0]])
    tags.append(cells[columns[1]])


def squad_source(split: str, files: Files) -> Source:
  """Return questions with answers that are spans of a context, from files in SQuAD's JSON format.

  Args:
    split: see `base.parse_split`.
    files: as of `text.text_source`.

  Returns:
    Records {"id", "question", "context", "answers": [{"text", "start"}], "text": the context}, with starts in
    characters. Questions that have no answer or are marked as impossible have no answers.

  Raises:
    ConfigError: a file has another format, or an answer is not at its offset.

  Reference: Rajpurkar et al. 2016; version 2: Rajpurkar et al. 2018.
  """
  paths = expand_files(files, split)
  return _records_source(split, paths, [record for path in paths for record in _read_questions(path)], ("squad",))


def _read_questions(path: Path) -> Iterator[Record]:
  try:
    content = json.loads(read_utf8_file(path))
  except json.JSONDecodeError as error:
    raise ConfigError(f"{path}:{error.lineno}: not JSON: {json_error(error)}. Fix the file") from error
  try:
    for article in content["data"]:
      for paragraph in article["paragraphs"]:
        context = paragraph["context"]
        for question in paragraph["qas"]:
          given = [] if question.get("is_impossible") else question.get("answers", [])
          answers = [{"text": answer["text"], "start": answer["answer_start"]} for answer in given]
          for answer in answers:
            _check_answer(path, question["id"], context, answer["text"], answer["start"])
          yield {
            "id": question["id"],
            "question": question["question"],
            "context": context,
            "answers": answers,
            "text": context,
          }
  except (KeyError, TypeError, AttributeError) as error:
    missing = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    raise ConfigError(
      f"{path}: is not in SQuAD's format {SQUAD_FORMAT}: {missing}. Write other JSON as JSONL, one object per line"
    ) from error


def _check_answer(path: Path, question: str, context: str, text: str, start: int) -> None:
  actual = context[start : start + len(text)] if start >= 0 else ""
  if actual != text:
    raise ConfigError(
      f"{path}: question {question!r}: the answer {text[:60]!r} is not at answer_start {start}, got {actual[:60]!r}. "
      "Starts count characters, from 0: fix the file or remove the answer"
    )


def parallel_source(
  split: str,
  files: Files,
  targets: Files,
  source: str = "source",
  target: str = "target",
  shuffle: bool = False,
) -> Source:
  """Return pairs of lines of two aligned texts, such as translations. Pairs with a blank line are skipped.

  Args:
    split: see `base.parse_split`.
    files: files of source lines, as of `text.text_source`.
    targets: files of target lines; the i-th belongs to the i-th of `files`.
    source, target: names of the two fields.
    shuffle: as of `registry.files_source`.

  Returns:
    Records {source: line, target: line, "text": source line}.

  Raises:
    ConfigError: the numbers of files, or of lines in a pair of files, differ.
  """
  if target in (source, "text"):
    raise ConfigError(f"data.corpus.target: another field has this name, got {target!r}. Choose another name")
  sources, others = expand_files(files, split), expand_files(targets, split, "targets")
  if len(sources) != len(others):
    raise ConfigError(
      f"data.corpus.targets: must be as many files as data.corpus.files, got {len(others)} and {len(sources)} (the "
      f"first are {others[0]} and {sources[0]})"
    )
  records: list[Record] = []
  for path, other in zip(sources, others):
    left, right = _read_lines(path), _read_lines(other)
    if len(left) != len(right):
      raise ConfigError(
        f"{other}: must have as many lines as {path}, got {len(right)} and {len(left)}. Give files with aligned lines"
      )
    records += [{"text": a, source: a, target: b} for a, b in zip(left, right) if a and b]
  settings, name = ("parallel", source, target), parse_split(split).name
  pairs = _records_source(name if shuffle else split, [*sources, *others], records, settings)
  return shuffle_source(pairs, split) if shuffle else pairs


def _read_lines(path: Path) -> list[str]:
  """Return all lines, blank ones as ""."""
  lines = read_utf8_file(path).removesuffix("\n").split("\n")
  return [line if line.strip() else "" for line in lines]


def _records_source(split: str, paths: list[Path], records: list[Record], settings: object) -> Source:
  if not records:
    raise ConfigError(f"{file_names(paths)}: no records. Set data.corpus.files to files with records")
  start, stop = split_bounds(split, len(records))
  selected = records[start:stop]
  fingerprint = content_digest(settings, [file_digest(p) for p in paths], start, stop)
  return Source(stop - start, lambda index: dict(selected[index]), fingerprint, locate=record_locator(paths, start))

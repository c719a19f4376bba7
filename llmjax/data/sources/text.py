"""Text and JSONL files as sources. Files may be larger than memory: only the offsets of records are in memory."""

from __future__ import annotations

import functools
import json
import mmap
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from llmjax.config import ConfigError, suggest_name
from llmjax.data.sources.base import Record, Source, split_bounds
from llmjax.data.sources.byte_spans import JoinedFiles, Spans, find_documents, find_lines, find_paragraphs
from llmjax.data.sources.paths import OR_NONE, Files, expand_files, json_error
from llmjax.storage.cache import content_digest


def text_source(
  split: str,
  files: Files,
  records: str = "document",
  max_bytes: int = 65536,
  chunk: int = 4096,
  overlap: int = 0,
) -> Source:
  """Return records of UTF-8 text files.

  Args:
    split: a slice such as "[:90%]" counts records, with records="chunk" bytes of the concatenated files. Its name is a
      key of `files` if that is a dict, else "train", "all" or empty.
    files: a path or glob (`**` for subfolders), several of them, or {split name: one or several}.
    records: "document": one per file, cut at line ends into pieces of at most `max_bytes`; "paragraph": runs of lines
      between blank lines; "line"; "chunk": `chunk` bytes of the concatenated files, of which the next one repeats
      `overlap`, both extended to whole characters. Over single-byte tokens or ASCII characters, a chunk of seq_len + 1
      with overlap 1 is exactly one window, and each character but the first is a label once.
    max_bytes: largest document.
    chunk, overlap: in bytes, see `records`.
  """
  find_spans: dict[str, Callable[[mmap.mmap], Spans]] = {
    "document": functools.partial(find_documents, max_bytes=max_bytes),
    "paragraph": find_paragraphs,
    "line": find_lines,
    "chunk": lambda data: (np.zeros(0, np.int64), np.zeros(0, np.int64)),  # computed from the index
  }
  if records not in find_spans:
    raise ConfigError(f"data.corpus.records: unknown, got {records!r}; {suggest_name(records, find_spans)}")
  if max_bytes < 4:
    raise ConfigError(f"data.corpus.max_bytes: must be at least 4, the longest character, got {max_bytes}")
  if not 0 <= overlap < chunk or chunk < 4:
    raise ConfigError(
      f"data.corpus.chunk: must be at least 4 and larger than data.corpus.overlap={overlap}, got {chunk}"
    )
  joined = JoinedFiles(expand_files(files, split), find_spans[records])
  settings = ("text", records, max_bytes, chunk, overlap)

  def open_split(split: str, whole: Source | None) -> Source:
    if records == "chunk":
      return _chunk_source(joined, chunk, overlap, settings, split, whole)
    return _span_source(joined, lambda start, stop: {"text": joined.read_text(start, stop)}, settings, split, whole)

  return open_split(split, None if isinstance(files, Mapping) else open_split("", None))


def jsonl_source(split: str, files: Files, text: str | None = "text", columns: Sequence[str] = ()) -> Source:
  """Return the objects of JSONL files, one per line; blank lines are skipped.

  Args:
    split: see `base.parse_split`.
    files: as of `text_source`.
    text: field to use as "text"; None: the records need no text.
    columns: fields that every record must have. Records have all their other fields too.
  """
  columns = tuple(columns)
  joined = JoinedFiles(expand_files(files, split), find_lines)

  def parse_line(start: int, stop: int) -> Record:
    line = joined.read_text(start, stop)
    try:
      return _parse_record(line, text, columns)
    except ConfigError as error:
      raise ConfigError(f"{joined.file_and_line(start)}: {error}") from error

  settings = ("jsonl", text, *[columns] * bool(columns))
  source = _span_source(joined, parse_line, settings, split, whole=None)
  for index in sorted({0, len(source) - 1}):  # most errors in the fields are reported here, before training starts
    source[index]
  return source


def _parse_record(line: str, text: str | None, columns: tuple[str, ...]) -> Record:
  """Parse a line, check its fields, and set "text" from the field `text`."""
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    raise ConfigError(f"not a JSON object: {json_error(error)}") from error
  if not isinstance(record, dict):
    raise ConfigError(f"not a JSON object, got a {type(record).__name__}")
  for key, fields in (("columns", columns), ("text", () if text is None else (text,))):
    for field in fields:
      if field not in record:
        way_out = f" {OR_NONE}" if key == "text" else ""
        raise ConfigError(f"no field {field!r} (data.corpus.{key}); {suggest_name(field, record)}{way_out}")
  for field in record.keys() if text is None else (text, *columns):
    if not _has_utf8_bytes(record[field]):
      raise ConfigError(f"{field!r} holds half a surrogate pair, which is not text")
  if text is None:
    return record
  if not isinstance(record[text], str):
    kind = type(record[text]).__name__
    raise ConfigError(f"{text!r} must be a string, got a {kind}. Set data.corpus.text to a field of text {OR_NONE}")
  return {**record, "text": record[text]}


def _has_utf8_bytes(value: object) -> bool:
  """Whether all strings of a JSON value can be encoded: JSON can name halves of surrogate pairs, which cannot."""
  try:
    json.dumps(value, ensure_ascii=False).encode()
  except UnicodeEncodeError:
    return False
  return True


def _span_source(
  joined: JoinedFiles, parse: Callable[[int, int], Record], settings: object, split: str, whole: Source | None
) -> Source:
  """Return the spans of files as records; `parse` makes a record of (start, stop)."""
  if not len(joined.starts):
    raise ConfigError(f"{joined.paths[0]}: no records, only blank lines. Set data.corpus.files to files with text")
  first, last = split_bounds(split, len(joined.starts))
  starts, stops = joined.starts[first:last], joined.stops[first:last]
  return Source(
    last - first,
    lambda index: parse(int(starts[index]), int(stops[index])),
    content_digest(settings, joined.digest, first, last),
    whole=whole,
    locate=lambda index: joined.file_and_line(int(starts[index])),
  )


def _chunk_source(
  joined: JoinedFiles, chunk: int, overlap: int, settings: object, split: str, whole: Source | None
) -> Source:
  """Return records of a fixed number of bytes."""
  low, high = (joined.character_start(position, -1) for position in split_bounds(split, joined.size, "bytes"))
  if low >= high:
    raise ConfigError(f"split: selects less than a character of {joined.paths[0]}, got {split!r}. Choose a wider slice")
  stride = chunk - overlap

  def read(index: int) -> Record:
    start, next_start = low + index * stride, low + (index + 1) * stride
    if next_start + overlap >= high:
      stop = high
    elif overlap:
      stop = min(joined.character_start(next_start + overlap, 1), high)
    else:
      stop = joined.character_start(next_start, -1)
    return {"text": joined.read_text(joined.character_start(start, -1), stop)}

  count = max(1, -(-(high - low - overlap) // stride))
  return Source(count, read, content_digest(settings, joined.digest, low, high), whole=whole)

"""Sources over text and JSONL files, which may be larger than memory: only offsets are kept."""

from __future__ import annotations

import codecs
import functools
import glob
import json
import mmap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmjax.config import ConfigError, suggest_name
from llmjax.data.sources.base import Source, parse_split, split_bounds
from llmjax.storage.buckets import as_path, fetch_file, in_bucket
from llmjax.storage.cache import content_digest
from llmjax.storage.digests import file_digest

Files = str | Sequence[str] | Mapping[str, Any]  # a path or glob, local or gs://, several, or {split: those}
Spans = tuple[np.ndarray, np.ndarray]  # where records start and end, Int[n] each, in bytes

BLOCK = 1 << 24
CHECKED = 1 << 30  # a file is checked to be UTF-8 up to here when it is opened, and beyond as it is read
NO_TEXT = "(or to None, where the objective names the fields it reads)"  # the way out for records without one text


def text(
  split: str,
  files: Files,
  records: str = "document",
  max_bytes: int = 65536,
  chunk: int = 4096,
  overlap: int = 0,
) -> Source:
  """UTF-8 text files.

  Args:
    split: a slice such as "[:90%]" counts records, with records="chunk" bytes of the concatenated files. The name
      before it is a key of `files` where that is a dict, else "train", "all" or nothing.
    files: a path or glob (`**` for subfolders), a tuple of those, or {split: those}.
    records: "document" is a file each, cut at line ends where it is longer than `max_bytes`; "paragraph" ends at blank
      lines; "line"; "chunk" is `chunk` bytes of the concatenated files, neighbours sharing `overlap`, both widened to
      whole characters. With chunk = seq_len + 1 and overlap = 1 over single bytes or ASCII characters a record is
      exactly one window, and everything but the first character is a label once.
  """
  cutters: dict[str, Callable[[mmap.mmap], Spans]] = {
    "document": functools.partial(_documents, max_bytes=max_bytes),
    "paragraph": _paragraphs,
    "line": _lines,
    "chunk": lambda data: (np.zeros(0, np.int64), np.zeros(0, np.int64)),
  }
  if records not in cutters:
    raise ConfigError(f"data.corpus.records={records!r} is unknown; {suggest_name(records, cutters)}")
  if max_bytes < 4:
    raise ConfigError(f"data.corpus.max_bytes={max_bytes} must be at least 4, a character's longest")
  if not 0 <= overlap < chunk or chunk < 4:
    raise ConfigError(f"data.corpus.chunk={chunk} must be at least 4 and larger than data.corpus.overlap={overlap}")
  joined = Joined(expand(files, split), cutters[records])
  settings = ("text", records, max_bytes, chunk, overlap)
  chunks = functools.partial(_chunk_source, joined, chunk, overlap, settings)
  build = chunks if records == "chunk" else functools.partial(_span_source, joined, _as_text, settings)
  return build(split, whole=None if isinstance(files, Mapping) else build("", whole=None))


def jsonl(split: str, files: Files, text: str | None = "text", columns: Sequence[str] = ()) -> Source:
  """One JSON object a line, blank lines aside.

  Args:
    text: the field to be called "text"; None where no one field is the text.
    columns: fields that every record must have; the others come with them.
  """
  columns = tuple(columns)

  def parse(joined: Joined, start: int, stop: int) -> dict[str, Any]:
    try:
      record = json.loads(joined.text(start, stop))
    except json.JSONDecodeError as error:
      raise ConfigError(f"{joined.where(start)}: not a JSON object: {json_error(error)}") from error
    if not isinstance(record, dict):
      raise ConfigError(f"{joined.where(start)}: not a JSON object but a {type(record).__name__}")
    for field in columns:
      if field not in record:
        raise ConfigError(f"{joined.where(start)}: {_no_field(field, 'columns', record)}")
    checked = record.keys() if text is None else (text, *columns)
    for field in checked:
      if field in record and not _encodable(record[field]):
        raise ConfigError(f"{joined.where(start)}: {field!r} holds half a surrogate pair, which is no text")
    if text is None:
      return record
    if text not in record:
      raise ConfigError(f"{joined.where(start)}: {_no_field(text, 'text', record)} {NO_TEXT}")
    if not isinstance(record[text], str):
      kind = type(record[text]).__name__
      raise ConfigError(
        f"{joined.where(start)}: {text!r} is no string but a {kind}; set data.corpus.text to a field of text {NO_TEXT}"
      )
    return {**record, "text": record[text]}

  settings = ("jsonl", text, *[columns] * bool(columns))
  source = _span_source(Joined(expand(files, split), _lines), parse, settings, split, whole=None)
  for index in sorted({0, len(source) - 1}):  # a wrong field shows before training, not in it
    source[index]
  return source


def in_files(paths: Sequence[Path], first: int) -> Callable[[int], str]:
  """`Source.where` of records that are numbered through, from `first`, whatever files they are from."""
  return lambda index: f"record {first + index} (from 0) of {paths[0]}{', ...' if len(paths) > 1 else ''}"


def json_error(error: json.JSONDecodeError) -> str:
  """What is wrong with a line, and where in it."""
  return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def _no_field(field: str, key: str, record: Mapping[str, Any]) -> str:
  return f"no field {field!r} (data.corpus.{key}); {suggest_name(field, record)}"


def _encodable(value: Any) -> bool:
  """Whether all strings of a value have UTF-8 bytes: JSON can name halves of surrogate pairs, which have none."""
  try:
    json.dumps(value, ensure_ascii=False).encode()
  except UnicodeEncodeError:
    return False
  return True


def expand(files: Files, split: str, key: str = "files") -> list[Path]:
  """The files that `files`, which is data.corpus's `key`, names for the split, globs expanded and sorted; copies in the
  cache of those in a bucket."""
  name, _, _ = parse_split(split)
  if isinstance(files, Mapping):
    if name not in files:
      raise ConfigError(f"split {split!r}: data.corpus.{key} has {', '.join(files) or 'no splits'}")
    files = files[name]
  elif name not in ("", "all", "train"):
    raise ConfigError(
      f"split {split!r}: data.corpus.{key} has no named splits; slice it as '[:90%]' and '[90%:]', or give files as "
      "{'train': ..., 'validation': ...}"
    )
  patterns = [files] if isinstance(files, (str, Path)) else list(files or ())
  found: dict[Path, None] = {}
  for pattern in patterns:
    path = as_path(pattern).expanduser()
    if path.is_dir():
      raise ConfigError(f"data.corpus.{key}={str(pattern)!r} is a folder; say {str(pattern).rstrip('/') + '/**/*'!r}")
    if in_bucket(path):
      matches = fetch_file(str(path))
    else:
      matches = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
    matches = [p for p in matches if p.is_file()]
    if not matches:
      where = "" if in_bucket(path) else f" (from {Path.cwd()})"
      raise ConfigError(f"data.corpus.{key}={str(pattern)!r}: there is no such file{where}")
    found.update(dict.fromkeys(matches))
  if not found:
    raise ConfigError(f"data.corpus.{key} is empty; give a path, a glob or a tuple of those")
  return list(found)


def read_text(path: Path) -> str:
  """A whole file, without a byte order mark, and with "\\n" for line ends."""
  try:
    return path.read_bytes().decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
  except UnicodeDecodeError as error:
    raise _not_utf8(path, error.start) from error


class Joined:
  """Files as one sequence of bytes, read piece by piece, with the spans that `cut` finds in each."""

  def __init__(self, paths: list[Path], cut: Callable[[mmap.mmap], Spans]):
    self.paths = paths
    sizes: list[int] = []
    starts, stops = [], []
    for path in paths:
      size = path.stat().st_size
      if size:  # an empty file cannot be mapped
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
          _check_utf8(path, data)
          first, last = cut(data)
        starts.append(first + sum(sizes))
        stops.append(last + sum(sizes))
      sizes.append(size)
    self.offsets = np.cumsum([0, *sizes])
    self.size = int(self.offsets[-1])
    if not self.size:
      raise ConfigError(
        f"{paths[0]}{' and the others' if len(paths) > 1 else ''}: the file is empty (data.corpus.files)"
      )
    self.starts, self.stops = np.concatenate(starts), np.concatenate(stops)
    self.digest = content_digest([file_digest(p) for p in paths])

  def bytes(self, start: int, stop: int) -> bytes:
    """Files are opened at every read: many files must not exhaust the process's descriptors."""
    pieces = []
    while start < stop:
      which = int(np.searchsorted(self.offsets, start, side="right")) - 1
      with self.paths[which].open("rb") as file:
        file.seek(start - int(self.offsets[which]))
        piece = file.read(min(stop, int(self.offsets[which + 1])) - start)
      if not piece:
        raise ConfigError(f"{self.paths[which]} has become shorter since it was opened; restore it, or start again")
      pieces.append(piece)
      start += len(piece)
    return b"".join(pieces)

  def text(self, start: int, stop: int) -> str:
    try:
      return self.bytes(start, stop).decode("utf-8")
    except UnicodeDecodeError as error:
      which = int(np.searchsorted(self.offsets, start + error.start, side="right")) - 1
      raise _not_utf8(self.paths[which], start + error.start - int(self.offsets[which])) from error

  def where(self, offset: int) -> str:
    """file:line, for messages."""
    which = int(np.searchsorted(self.offsets, offset, side="right")) - 1
    return f"{self.paths[which]}:{self.bytes(int(self.offsets[which]), offset).count(10) + 1}"

  def boundary(self, offset: int, step: int) -> int:
    """The nearest start of a character at or before (step -1) or at or after (step 1) `offset`."""
    low = max(offset - 3, 0)
    near = self.bytes(low, min(offset + 4, self.size))
    while 0 <= offset - low < len(near) and near[offset - low] & 0xC0 == 0x80:
      offset += step
    return offset


def _span_source(joined: Joined, parse: Any, settings: Any, split: str, *, whole: Source | None) -> Source:
  """Records that are spans of the files."""
  if not len(joined.starts):
    raise ConfigError(f"{joined.paths[0]}: no records, only blank lines (data.corpus.files)")
  start, stop = split_bounds(split, len(joined.starts))

  def read(index: int) -> dict[str, Any]:
    return parse(joined, int(joined.starts[start + index]), int(joined.stops[start + index]))

  return Source(
    stop - start,
    read,
    content_digest(settings, joined.digest, start, stop),
    whole=whole,
    where=lambda index: joined.where(int(joined.starts[start + index])),
  )


def _as_text(joined: Joined, start: int, stop: int) -> dict[str, Any]:
  return {"text": joined.text(start, stop)}


def _chunk_source(
  joined: Joined, chunk: int, overlap: int, settings: Any, split: str, *, whole: Source | None
) -> Source:
  """Records of a fixed number of bytes, found by arithmetic."""
  low, high = (joined.boundary(position, -1) for position in split_bounds(split, joined.size, "bytes"))
  if low >= high:
    raise ConfigError(f"split {split!r} selects less than a character of {joined.paths[0]}; choose a wider slice")
  stride = chunk - overlap

  def read(index: int) -> dict[str, Any]:
    start, following = low + index * stride, low + (index + 1) * stride
    if following + overlap >= high:
      stop = high
    elif overlap:
      stop = min(joined.boundary(following + overlap, 1), high)
    else:
      stop = joined.boundary(following, -1)
    return {"text": joined.text(joined.boundary(start, -1), stop)}

  count = max(1, -(-(high - low - overlap) // stride))
  return Source(count, read, content_digest(settings, joined.digest, low, high), whole=whole)


def _documents(data: mmap.mmap, max_bytes: int) -> Spans:
  edges = [0]
  while len(data) - edges[-1] > max_bytes:
    start, stop = edges[-1], edges[-1] + max_bytes
    cut = data.rfind(b"\n", start, stop) + 1
    while cut == 0 and data[stop] & 0xC0 == 0x80:  # no line end: at least never inside a character
      stop -= 1
    edges.append(cut or stop)
  edges.append(len(data))
  return np.array(edges[:-1], np.int64), np.array(edges[1:], np.int64)


def _all_lines(data: mmap.mmap) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Starts and ends (without line ends) of all lines, and which of them are blank."""
  array = np.frombuffer(data, np.uint8)
  breaks = [np.flatnonzero(array[i : i + BLOCK] == ord("\n")) + i for i in range(0, len(array), BLOCK)]
  ends = np.concatenate([*breaks, [len(array)]])
  starts = np.concatenate([[0], ends[:-1] + 1])
  blank = ends == starts
  full = np.flatnonzero(~blank)
  for i in full[np.isin(array[starts[full]], list(b" \t\r\v\f"))].tolist():  # blank, or merely indented
    blank[i] = data[starts[i] : ends[i]].isspace()
  full = np.flatnonzero(~blank)
  ends[full] -= array[ends[full] - 1] == ord("\r")
  return starts, ends, blank


def _lines(data: mmap.mmap) -> Spans:
  starts, ends, blank = _all_lines(data)
  return starts[~blank], ends[~blank]


def _paragraphs(data: mmap.mmap) -> Spans:
  starts, ends, blank = _all_lines(data)
  change = np.diff(np.concatenate([[True], blank, [True]]).astype(np.int8))
  return starts[change[:-1] == -1], ends[change[1:] == 1]


def _check_utf8(path: Path, data: mmap.mmap) -> None:
  decoder = codecs.getincrementaldecoder("utf-8")()
  for start in range(0, min(len(data), CHECKED), BLOCK):
    block, pending = data[start : start + BLOCK], len(decoder.getstate()[0])
    if block.isascii() and not pending:
      continue
    try:
      decoder.decode(block, final=start + len(block) == len(data))
    except UnicodeDecodeError as error:
      raise _not_utf8(path, start - pending + error.start) from error


def _not_utf8(path: Path, offset: int) -> ConfigError:
  return ConfigError(
    f"{path}: byte {offset} is not UTF-8; convert the file (iconv -f ENCODING -t UTF-8) or leave it out"
  )

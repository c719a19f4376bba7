"""Spans of text files, such as lines and paragraphs, found without loading a file into memory."""

from __future__ import annotations

import codecs
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np

from llmjax.config import ConfigError
from llmjax.data.sources.paths import file_names, utf8_error
from llmjax.storage.cache import content_digest, file_digest

Spans: TypeAlias = tuple[np.ndarray, np.ndarray]  # (starts Int64[n], stops Int64[n]) of records, in bytes

BLOCK = 1 << 24  # bytes scanned at a time
MAX_CHECKED_BYTES = 1 << 30  # opening a file checks that this much of it is UTF-8; the rest is checked when it is read


class JoinedFiles:
  """Files as one sequence of bytes.

  Args:
    paths: the files.
    find_spans: returns the records of one file, which is memory-mapped.

  Attributes:
    size: bytes of all files.
    starts, stops: Int64[n], records of all files.
    digest: depends on the content of all files.

  Raises:
    ConfigError: a file is not UTF-8, or all are empty.
  """

  def __init__(self, paths: list[Path], find_spans: Callable[[mmap.mmap], Spans]):
    self.paths = paths
    sizes = [path.stat().st_size for path in paths]
    self._offsets = np.cumsum([0, *sizes])  # of each file in the sequence
    self.size = int(self._offsets[-1])
    if not self.size:
      raise ConfigError(f"{file_names(paths)}: the file is empty. Set data.corpus.files to files with text")
    starts, stops = [], []
    for path, size, offset in zip(paths, sizes, self._offsets):
      if size:  # an empty file cannot be mapped
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
          _check_utf8(path, data)
          first, last = find_spans(data)
        starts.append(first + offset)
        stops.append(last + offset)
    self.starts, self.stops = np.concatenate(starts), np.concatenate(stops)
    self.digest = content_digest([file_digest(p) for p in paths])

  def _file_at(self, offset: int) -> tuple[int, int]:
    """Return the number of the file that holds an offset, and where that file starts."""
    number = int(np.searchsorted(self._offsets, offset, side="right")) - 1
    return number, int(self._offsets[number])

  def read_bytes(self, start: int, stop: int) -> bytes:
    """Return bytes, which may be of several files."""
    pieces = []
    while start < stop:
      number, first = self._file_at(start)
      # Files are opened for each read: there may be more of them than file descriptors.
      with self.paths[number].open("rb") as file:
        file.seek(start - first)
        piece = file.read(min(stop, int(self._offsets[number + 1])) - start)
      if not piece:
        raise ConfigError(f"{self.paths[number]}: the file was shortened while in use. Restore it, or start again")
      pieces.append(piece)
      start += len(piece)
    return b"".join(pieces)

  def read_text(self, start: int, stop: int) -> str:
    try:
      return self.read_bytes(start, stop).decode("utf-8")
    except UnicodeDecodeError as error:
      number, first = self._file_at(start + error.start)
      raise utf8_error(self.paths[number], start + error.start - first) from error

  def file_and_line(self, offset: int) -> str:
    """Return "FILE:LINE" of an offset, for error messages."""
    number, first = self._file_at(offset)
    return f"{self.paths[number]}:{self.read_bytes(first, offset).count(10) + 1}"

  def character_start(self, offset: int, step: int) -> int:
    """Return the nearest start of a character at or before (step -1), or at or after (step 1), an offset."""
    low = max(offset - 3, 0)  # a character has at most four bytes
    window = self.read_bytes(low, min(offset + 4, self.size))
    while 0 <= offset - low < len(window) and window[offset - low] & 0xC0 == 0x80:
      offset += step
    return offset


def find_documents(data: mmap.mmap, max_bytes: int) -> Spans:
  """Return the whole file as one record; if it is longer than `max_bytes`, pieces that end at line ends."""
  edges = [0]
  while len(data) - edges[-1] > max_bytes:
    start, stop = edges[-1], edges[-1] + max_bytes
    line_end = data.rfind(b"\n", start, stop) + 1
    while line_end == 0 and data[stop] & 0xC0 == 0x80:  # without a line end, cut between characters
      stop -= 1
    edges.append(line_end or stop)
  edges.append(len(data))
  return np.array(edges[:-1], np.int64), np.array(edges[1:], np.int64)


def find_lines(data: mmap.mmap) -> Spans:
  """Return the lines that are not blank, without line ends."""
  starts, stops, is_blank = _all_lines(data)
  return starts[~is_blank], stops[~is_blank]


def find_paragraphs(data: mmap.mmap) -> Spans:
  """Return runs of lines that are not blank."""
  starts, stops, is_blank = _all_lines(data)
  change = np.diff(np.concatenate([[True], is_blank, [True]]).astype(np.int8))
  return starts[change[:-1] == -1], stops[change[1:] == 1]


def _all_lines(data: mmap.mmap) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Return (starts, stops without line ends, whether blank) of all lines."""
  array = np.frombuffer(data, np.uint8)
  line_feeds = [np.flatnonzero(array[i : i + BLOCK] == ord("\n")) + i for i in range(0, len(array), BLOCK)]
  stops = np.concatenate([*line_feeds, [len(array)]])
  starts = np.concatenate([[0], stops[:-1] + 1])
  is_blank = stops == starts
  # Only lines that begin with white space are read here: a loop over all lines would take minutes.
  nonempty = np.flatnonzero(~is_blank)
  for i in nonempty[np.isin(array[starts[nonempty]], list(b" \t\r\v\f"))].tolist():
    is_blank[i] = data[starts[i] : stops[i]].isspace()
  nonblank = np.flatnonzero(~is_blank)
  stops[nonblank] -= array[stops[nonblank] - 1] == ord("\r")
  return starts, stops, is_blank


def _check_utf8(path: Path, data: mmap.mmap) -> None:
  decoder = codecs.getincrementaldecoder("utf-8")()
  for start in range(0, min(len(data), MAX_CHECKED_BYTES), BLOCK):
    block, pending = data[start : start + BLOCK], len(decoder.getstate()[0])
    if block.isascii() and not pending:
      continue
    try:
      decoder.decode(block, final=start + len(block) == len(data))
    except UnicodeDecodeError as error:
      raise utf8_error(path, start - pending + error.start) from error

"""TFRecord files, the default format of TFDS, with random access and without TensorFlow.

A file is its records one after the other, each as length (uint64), masked CRC-32C of these eight bytes (uint32),
content and masked CRC-32C of it, little-endian (tensorflow/core/lib/io/record_writer.h). Nothing in it says where the
i-th one begins. So the lengths are walked once, when a record of the file is first read, and what was found is kept in
the cache.
"""

from __future__ import annotations

import array
import functools
import logging
import mmap
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmjax.config import ConfigError
from llmjax.storage.cache import cache_dir, content_digest, fill_cache

LENGTH = struct.Struct("<Q")
HEADER = 12  # bytes of a length and its checksum
OVERHEAD = HEADER + 4  # bytes of a record beside its content
COMPRESSED = (b"\x1f\x8b", b"\x78\x01", b"\x78\x9c", b"\x78\xda")  # how gzip and zlib files begin
OPEN_FILES = 64  # at a time; each takes two of the process's descriptors, of which there may be as few as 256


class Slice(NamedTuple):
  """Records `start` to `stop` of a file that holds `total`."""

  path: Path
  total: int
  start: int
  stop: int


class TFRecords:
  """The records of slices, one slice after the other, as bytes; may be read from several threads.

  Checksums of contents are not looked at: in Python that would take longer than all the rest.

  Raises ConfigError: a file that cannot be read, is compressed or damaged, or holds another number of records; for all
  but the first, not before one of its records is asked for.
  """

  def __init__(self, slices: Iterable[Slice]):
    self.slices = tuple(slices)
    self.ends = np.cumsum([s.stop - s.start for s in self.slices])
    self.open = functools.lru_cache(OPEN_FILES)(open_file)
    for path in {s.path for s in self.slices}:
      if not path.is_file():
        raise ConfigError(f"{path}: there is no such file, but dataset_info.json counts its records; copy it there")

  def __len__(self) -> int:
    return int(self.ends[-1]) if self.slices else 0

  def __getitem__(self, index: int) -> bytes:
    which = int(np.searchsorted(self.ends, index, side="right"))
    path, total, _, stop = self.slices[which]
    data, positions = self.open(path, total)
    number = stop - int(self.ends[which]) + index
    start, following = int(positions[number]), int(positions[number + 1])
    content = data[start + HEADER : following - 4]
    if LENGTH.unpack_from(data, start)[0] != len(content):
      raise ConfigError(f"{path} is not what it was when it was indexed; delete {cache_dir() / 'tfrecord'}")
    return content


def open_file(path: Path, count: int) -> tuple[mmap.mmap, np.ndarray]:
  """A file that must hold `count` records: its bytes, and where they stand as `walk` gives it, from the cache."""
  try:
    with path.open("rb") as file:
      stat = os.fstat(file.fileno())
      data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except (OSError, ValueError) as error:  # an empty file cannot be mapped
    raise ConfigError(f"{path} cannot be read: {error}") from error

  def make(made: Path) -> None:
    logging.getLogger("llmjax").info("indexing %s, once", path)
    np.save(made, walk(path, data, count))

  name = content_digest(str(path.resolve()), stat.st_size, stat.st_mtime_ns, count)
  return data, np.load(fill_cache(cache_dir() / "tfrecord" / f"{name}.npy", make), mmap_mode="r")


def walk(path: Path, data: mmap.mmap | bytes, count: int) -> np.ndarray:
  """Int64[count + 1]: where each record begins, and where the last one ends; `path` is for messages."""
  found, end = array.array("q"), 0
  while len(found) < count and end + HEADER <= len(data):
    found.append(end)
    end += LENGTH.unpack_from(data, end)[0] + OVERHEAD
  starts = np.array(found, np.int64)
  columns = [np.frombuffer(data, np.uint8)[starts + i] for i in range(HEADER)]
  said = np.stack(columns[8:], axis=1).view("<u4")[:, 0]
  wrong = np.flatnonzero(masked_crc32c(columns[:8]) != said)
  if len(wrong) and data[:2] in COMPRESSED:
    raise ConfigError(f"{path} is compressed; decompress it (gunzip), or prepare the dataset again without compression")
  if len(wrong):
    where = f"the length of record {wrong[0]}, at byte {starts[wrong[0]]}, does not fit its checksum"
    raise ConfigError(f"{path} is damaged: {where}; copy or prepare it again")
  if len(starts) < count or end > len(data):
    whole = len(starts) - (end > len(data))
    raise ConfigError(f"{path} ends after {whole} of the {count} records that it should hold; copy or prepare it again")
  if end < len(data):
    raise ConfigError(f"{path} goes on after the {count} records that it should hold; copy or prepare it again")
  return np.append(starts, end)


def _table() -> np.ndarray:
  """UInt32[256]: CRC-32C of every byte, bit by bit (polynomial 0x1EDC6F41, reflected)."""
  crc: np.ndarray = np.arange(256, dtype=np.uint32)
  for _ in range(8):
    crc = (crc >> 1) ^ np.where(crc & 1, np.uint32(0x82F63B78), np.uint32(0))
  return crc


_TABLE = _table()


def masked_crc32c(columns: Sequence[np.ndarray]) -> np.ndarray:
  """UInt32[n] of UInt8[n] columns: CRC-32C of each row, rotated and shifted as TFRecord files have it.

  Castagnoli et al. 1993; the mask is that of tensorflow/core/lib/hash/crc32c.h.
  """
  crc = np.full(len(columns[0]), 0xFFFFFFFF, np.uint32)
  for column in columns:
    crc = _TABLE[(crc ^ column) & 0xFF] ^ (crc >> 8)
  crc = ~crc
  return ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)

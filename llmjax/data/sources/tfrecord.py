"""TFRecord files, the default format of TFDS, with random access and without TensorFlow.

A file is a sequence of records. A record is its length (uint64), the masked CRC-32C of these eight bytes (uint32), the
content, and the masked CRC-32C of the content, all little-endian (tensorflow/core/lib/io/record_writer.h). A file has
no index. The first read of a file therefore scans the lengths and saves the offsets of all records in the cache.
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
OVERHEAD = HEADER + 4  # bytes of a record besides its content
COMPRESSED_PREFIXES = (b"\x1f\x8b", b"\x78\x01", b"\x78\x9c", b"\x78\xda")  # of gzip and zlib files
MAX_OPEN_FILES = 64  # each takes two file descriptors, and a process may have as few as 256


class RecordRange(NamedTuple):
  """Records [start, stop) of a file that holds `total` records."""

  path: Path
  total: int
  start: int
  stop: int


class TFRecords:
  """Random access to the records of several ranges, as bytes. May be read by several threads.

  Checksums of contents are not verified: in Python that would take longer than everything else.

  Raises:
    ConfigError: a file does not exist. Later, when the first record of a file is read: the file cannot be read, is
      compressed or damaged, or holds another number of records.
  """

  def __init__(self, ranges: Iterable[RecordRange]):
    self.ranges = tuple(ranges)
    self.ends = np.cumsum([r.stop - r.start for r in self.ranges])
    self.open_file = functools.lru_cache(MAX_OPEN_FILES)(open_indexed)
    for path in {r.path for r in self.ranges}:
      if not path.is_file():
        raise ConfigError(f"{path}: there is no such file, but dataset_info.json lists it. Copy the file there")

  def __len__(self) -> int:
    return int(self.ends[-1]) if self.ranges else 0

  def __getitem__(self, index: int) -> bytes:
    number = int(np.searchsorted(self.ends, index, side="right"))
    path, total, _, stop = self.ranges[number]
    data, offsets = self.open_file(path, total)
    record = stop - int(self.ends[number]) + index
    start, next_start = int(offsets[record]), int(offsets[record + 1])
    content = data[start + HEADER : next_start - 4]
    if LENGTH.unpack_from(data, start)[0] != len(content):
      raise ConfigError(f"{path}: the file has changed since it was indexed. Delete {cache_dir() / 'tfrecord'}")
    return content


def open_indexed(path: Path, count: int) -> tuple[mmap.mmap, np.ndarray]:
  """Return the bytes of a file of `count` records, and the result of `record_offsets`, which is cached."""
  try:
    with path.open("rb") as file:
      stat = os.fstat(file.fileno())
      data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
    raise ConfigError(f"{path}: cannot be read: {error}. Copy the file again") from error

  def save_offsets(target: Path) -> None:
    logging.getLogger("llmjax").info("indexing %s, once", path)
    np.save(target, record_offsets(path, data, count))

  name = content_digest(str(path.resolve()), stat.st_size, stat.st_mtime_ns, count)
  return data, np.load(fill_cache(cache_dir() / "tfrecord" / f"{name}.npy", save_offsets), mmap_mode="r")


def record_offsets(path: Path, data: mmap.mmap | bytes, count: int) -> np.ndarray:
  """Return Int64[count + 1]: the start of each record and the end of the last one.

  Raises:
    ConfigError: the file is damaged or compressed, or holds another number of records.
  """
  offsets, end = array.array("q"), 0
  while len(offsets) < count and end + HEADER <= len(data):
    offsets.append(end)
    end += LENGTH.unpack_from(data, end)[0] + OVERHEAD
  starts = np.array(offsets, np.int64)
  header = [np.frombuffer(data, np.uint8)[starts + i] for i in range(HEADER)]
  stored = np.stack(header[8:], axis=1).view("<u4")[:, 0]
  wrong = np.flatnonzero(masked_crc32c(header[:8]) != stored)
  if len(wrong) and data[:2] in COMPRESSED_PREFIXES:
    raise ConfigError(f"{path}: is compressed. Decompress it (gunzip), or prepare the dataset without compression")
  if len(wrong):
    where = f"the length of record {wrong[0]}, at byte {starts[wrong[0]]}, does not match its checksum"
    raise ConfigError(f"{path}: is damaged: {where}. Copy or prepare the file again")
  if len(starts) < count or end > len(data):
    complete = len(starts) - (end > len(data))
    raise ConfigError(f"{path}: must hold {count} records, got {complete}. Copy or prepare the file again")
  if end < len(data):
    raise ConfigError(f"{path}: must hold {count} records, got more. Copy or prepare the file again")
  return np.append(starts, end)


def _crc32c_table() -> np.ndarray:
  """Return UInt32[256], CRC-32C of every byte (polynomial 0x1EDC6F41, reflected)."""
  crc: np.ndarray = np.arange(256, dtype=np.uint32)
  for _ in range(8):
    crc = (crc >> 1) ^ np.where(crc & 1, np.uint32(0x82F63B78), np.uint32(0))
  return crc


CRC32C_TABLE = _crc32c_table()


def masked_crc32c(columns: Sequence[np.ndarray]) -> np.ndarray:
  """Return the masked CRC-32C of each row, as TFRecord files store it.

  Args:
    columns: the bytes of all rows, UInt8[n] per position.

  Returns:
    UInt32[n].

  Reference: Castagnoli et al. 1993; mask: tensorflow/core/lib/hash/crc32c.h.
  """
  crc = np.full(len(columns[0]), 0xFFFFFFFF, np.uint32)
  for column in columns:
    crc = CRC32C_TABLE[(crc ^ column) & 0xFF] ^ (crc >> 8)
  crc = ~crc
  return ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)

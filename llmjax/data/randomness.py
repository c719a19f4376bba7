"""Random numbers as pure functions of integer counters, equal on every machine and for any number of hosts."""

from __future__ import annotations

import functools
import hashlib
import struct

import numpy as np

# First counter after the seed: hashes for different purposes are independent.
SHUFFLE, DRAW, TRAIN, EVAL = range(4)

# Largest number of records whose permutation is stored. Grain's index_shuffle walks a cycle of about this length, so it
# is slow for fewer records.
MAX_TABLE_SIZE = 1 << 16


def counter_hash(*counters: int) -> bytes:
  """Return 16 bytes that depend on the counters only (BLAKE2b)."""
  return hashlib.blake2b(struct.pack(f"<{len(counters)}Q", *(c % 2**64 for c in counters)), digest_size=16).digest()


def counter_rng(*counters: int) -> np.random.Generator:
  """Return a NumPy generator that is seeded by the counters."""
  return np.random.Generator(np.random.Philox(key=np.frombuffer(counter_hash(*counters), "<u8")))


def counter_uniform(*counters: int) -> float:
  """Return a number in [0, 1) that depends on the counters only."""
  (bits,) = struct.unpack("<Q", counter_hash(*counters)[:8])
  return float(bits / 2**64)


def permute_index(position: int, size: int, *counters: int) -> int:
  """Return the entry at `position` of a pseudo-random permutation of range(size), one for each value of `counters`."""
  if size <= MAX_TABLE_SIZE:
    return int(_permutation(size, *counters)[position])
  from grain.experimental import index_shuffle

  (key,) = struct.unpack("<I", counter_hash(*counters)[:4])
  return int(index_shuffle(position, max_index=size - 1, seed=key, rounds=4))


@functools.lru_cache(64)
def _permutation(size: int, *counters: int) -> np.ndarray:
  """Return a whole permutation Int[size]."""
  # NumPy promises to keep a generator's raw bits, but not what other methods make of them.
  bits = np.random.Philox(key=np.frombuffer(counter_hash(*counters), "<u8")).random_raw(size)
  return np.argsort(bits, kind="stable")

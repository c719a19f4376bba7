"""What a text costs without a model: compressors' bits per byte, to hold a language model's against. No JAX."""

from __future__ import annotations

import gzip
import lzma
import math
from collections import Counter
from collections.abc import Iterable

from llmjax.config import ConfigError

MAX_TRAIN_BYTES = 64 * 2**20


def compressor_baselines(
  train_texts: Iterable[str], heldout_texts: Iterable[str], *, max_train_bytes: int = MAX_TRAIN_BYTES
) -> dict[str, float]:
  """Bits per byte of the held-out texts, which are measured as one: joined by newlines, in UTF-8.

  - "unigram": the entropy of the held-out bytes' own frequencies, a bound for any model that ignores context.
  - "gzip": level 9, with its header of 18 bytes.
  - "lzma": LZMA2 at preset 9 extreme, without a container, so that nothing is added to short texts.
  - "lzma_primed": how much longer that makes the training text, joined likewise, when the held-out text follows a
    newline behind it; the dictionary reaches over all of both. The baseline for a trained model, which has seen the
    training text as well.

  About 14 seconds for 12 MB on one core, with the interpreter lock released, and 14 times the text's size in memory.

  Args:
    train_texts: read to the end; the last `max_train_bytes` of it count.
    heldout_texts: must hold at least one character.
    max_train_bytes: what does not fit in front of the held-out text is left out, the earliest first.
  Raises:
    ConfigError: there is no held-out text.
  """
  heldout = "\n".join(heldout_texts).encode()
  if not heldout:
    raise ConfigError("data.eval: there is no held-out text to measure; choose a split that has some")
  train = _tail(train_texts, max_train_bytes)
  both = train + heldout
  sizes = {
    "gzip": len(gzip.compress(heldout, compresslevel=9)),
    "lzma": _lzma_size(heldout, len(both)),
    "lzma_primed": _lzma_size(both, len(both)) - _lzma_size(train, len(both)),
  }
  frequencies = [count / len(heldout) for count in Counter(heldout).values()]
  unigram = -math.fsum(p * math.log2(p) for p in frequencies)
  return {"unigram": unigram, **{name: 8 * size / len(heldout) for name, size in sizes.items()}}


def _tail(texts: Iterable[str], size: int) -> bytes:
  """The last `size` bytes of all texts, a newline behind each; never holds much more than twice that."""
  kept = bytearray()
  for text in texts:
    kept += text.encode() + b"\n"
    if len(kept) > 2 * size:
      del kept[: len(kept) - size]
  return bytes(kept[max(len(kept) - size, 0) :])


def _lzma_size(data: bytes, reach: int) -> int:
  """Compressed bytes with a dictionary of at least `reach` bytes (4 KiB is the format's least)."""
  lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(reach, 4096)}
  return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=[lzma2]))

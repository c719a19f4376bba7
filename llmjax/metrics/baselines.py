"""Baselines without a model: bits per byte of general compressors, to compare a language model with."""

from __future__ import annotations

import gzip
import lzma
import math
from collections import Counter
from collections.abc import Iterable

from llmjax.config import ConfigError

MAX_TRAIN_BYTES = 64 * 2**20
MIN_DICTIONARY_BYTES = 4096  # lower limit of LZMA2


def compressor_baselines(
  train_texts: Iterable[str], heldout_texts: Iterable[str], *, max_train_bytes: int = MAX_TRAIN_BYTES
) -> dict[str, float]:
  """Return the bits per byte of the held-out texts, which are joined by newlines and encoded as UTF-8.

  - "unigram": entropy of the frequencies of the held-out bytes, a lower bound for any model that ignores context.
  - "gzip": level 9, with its header of 18 bytes.
  - "lzma": LZMA2 at preset 9 extreme, without a container, whose size would count in short texts.
  - "lzma_primed": bytes that LZMA2 needs for the held-out text after the training text and a newline. The dictionary
    covers both texts. This is the baseline for a trained model, which has seen the training text too.

  Takes about 14 seconds for 12 MB on one core, with the interpreter lock released, and 14 times the text's size in
  memory.

  Args:
    train_texts: read to the end, of which the last `max_train_bytes` count.
    heldout_texts: at least one character.
    max_train_bytes: maximum size of the training text. The beginning is dropped.

  Returns:
    {name: bits per byte}.

  Raises:
    ConfigError: the held-out text is empty.
  """
  heldout = "\n".join(heldout_texts).encode()
  if not heldout:
    raise ConfigError("data.eval: there is no held-out text to measure. Choose a split that has text.")
  train = _last_bytes(train_texts, max_train_bytes)
  both = train + heldout
  sizes = {
    "gzip": len(gzip.compress(heldout, compresslevel=9)),
    "lzma": _lzma_size(heldout, len(both)),
    "lzma_primed": _lzma_size(both, len(both)) - _lzma_size(train, len(both)),
  }
  frequencies = [count / len(heldout) for count in Counter(heldout).values()]
  unigram = -math.fsum(p * math.log2(p) for p in frequencies)
  return {"unigram": unigram, **{name: 8 * size / len(heldout) for name, size in sizes.items()}}


def _last_bytes(texts: Iterable[str], size: int) -> bytes:
  """Return the last `size` bytes of all texts, each followed by a newline. Holds about twice that at most."""
  tail = bytearray()
  for text in texts:
    tail += text.encode() + b"\n"
    if len(tail) > 2 * size:
      del tail[: len(tail) - size]
  return bytes(tail[max(len(tail) - size, 0) :])


def _lzma_size(data: bytes, dictionary_bytes: int) -> int:
  """Return the compressed size in bytes, with a dictionary of at least `dictionary_bytes`."""
  lzma2 = {
    "id": lzma.FILTER_LZMA2,
    "preset": 9 | lzma.PRESET_EXTREME,
    "dict_size": max(dictionary_bytes, MIN_DICTIONARY_BYTES),
  }
  return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=[lzma2]))

"""Tokenizers without merges: UTF-8 bytes, and characters of the training text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llmjax.config import ConfigError
from llmjax.data.sources.base import Source, text_of
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.data.tokenizers.training_text import require_training_text
from llmjax.storage.cache import content_digest, fill_cache

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"


def bytes_tokenizer(special: bool = True) -> Tokenizer:
  """Return a tokenizer whose ids 0 to 255 are UTF-8 bytes; with `special`, bos is 256 and eos 257."""
  return bytes_from_files({"bytes.json": json.dumps({"special": special}).encode()})


def bytes_from_files(files: Mapping[str, bytes]) -> Tokenizer:
  special = json.loads(files["bytes.json"])["special"]
  names = {256: BOS, 257: EOS} if special else {}

  def to_offsets(text: str) -> tuple[np.ndarray, np.ndarray]:
    return _utf8_bytes(text), np.repeat(_character_spans(text), [len(c.encode()) for c in text], axis=0)

  return Tokenizer(
    name="bytes",
    pieces=tuple(bytes([i]) for i in range(256)) + (b"",) * len(names),
    to_ids=_utf8_bytes,
    files=dict(files),
    bos_id=256 if special else None,
    eos_id=257 if special else None,
    names=names,
    to_offsets=to_offsets,
  )


def characters_tokenizer(source: Source | None, cache: Path, special: bool = False, unknown: bool = False) -> Tokenizer:
  """Return a tokenizer with one token per character of the training text, in the order of code points.

  If the training text is a slice of a text ("[:90%]"), the alphabet is that of the whole text, because a rare character
  may occur only in the held-out slice.

  Args:
    source: training text.
    cache: directory of trained vocabularies.
    special: whether to add bos and eos.
    unknown: whether to add a token for all other characters, which decodes to no text; otherwise they are errors.
  """
  source = require_training_text(source, "characters")
  source = source.whole or source

  def save_alphabet(target: Path) -> None:
    alphabet: set[str] = set()
    for record in source:
      alphabet.update(text_of(record))
    target.write_text(json.dumps("".join(sorted(alphabet))), encoding="utf-8")

  path = fill_cache(cache / f"characters-{content_digest(source.fingerprint)}.json", save_alphabet)
  settings = {"characters": json.loads(path.read_text(encoding="utf-8")), "special": special, "unknown": unknown}
  return characters_from_files({"characters.json": json.dumps(settings).encode()})


def characters_from_files(files: Mapping[str, bytes]) -> Tokenizer:
  settings = json.loads(files["characters.json"])
  alphabet, special, unknown = settings["characters"], settings["special"], settings["unknown"]
  code_points = _code_points(alphabet)

  def to_ids(text: str) -> np.ndarray:
    points = _code_points(text)
    ids = np.searchsorted(code_points, points).astype(np.int32)
    if len(code_points):
      is_missing = code_points[np.minimum(ids, len(code_points) - 1)] != points
    else:
      is_missing = np.ones(len(points), bool)
    if unknown:
      ids[is_missing] = len(code_points)
    elif is_missing.any():
      character = chr(int(points[is_missing][0]))
      raise ConfigError(
        f"data.tokenizer: the training text has no character {character!r} (U+{ord(character):04X}, "
        f"{text.count(character)} times in this record). Remove it from the text, or train with "
        "--config.data.tokenizer.unknown=True"
      )
    return ids

  size = len(alphabet)
  names = dict(enumerate([UNKNOWN] * unknown + [BOS, EOS] * special, start=size))
  return Tokenizer(
    name="characters",
    pieces=tuple(c.encode() for c in alphabet) + (b"",) * len(names),
    to_ids=to_ids,
    files=dict(files),
    bos_id=size + unknown if special else None,
    eos_id=size + unknown + 1 if special else None,
    unk_id=size if unknown else None,
    names=names,
    to_offsets=lambda text: (to_ids(text), _character_spans(text)),
  )


def _utf8_bytes(text: str) -> np.ndarray:
  """Return UInt8[n]."""
  return np.frombuffer(text.encode(), np.uint8)


def _code_points(text: str) -> np.ndarray:
  """Return UInt32[n]."""
  return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _character_spans(text: str) -> np.ndarray:
  """Return Int64[n, 2], [start, stop) of each character."""
  return np.arange(len(text))[:, None] + [0, 1]

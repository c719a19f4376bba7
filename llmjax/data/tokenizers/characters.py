"""Tokenizers without merges: UTF-8 bytes, and characters of the training text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llmjax.config import ConfigError
from llmjax.data.sources.base import Source, text_of
from llmjax.data.tokenizers.base import Tokenizer, training_text
from llmjax.storage.cache import content_digest, fill_cache

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"


def bytes_(special: bool = True) -> Tokenizer:
  """UTF-8 bytes are ids 0 to 255; with `special`, 256 begins and 257 ends a document."""
  return bytes_from_files({"bytes.json": json.dumps({"special": special}).encode()})


def bytes_from_files(files: Mapping[str, bytes]) -> Tokenizer:
  special = json.loads(files["bytes.json"])["special"]
  return Tokenizer(
    name="bytes",
    pieces=tuple(bytes([i]) for i in range(256)) + (b"",) * (2 if special else 0),
    to_ids=_bytes,
    files=dict(files),
    bos_id=256 if special else None,
    eos_id=257 if special else None,
    names={256: BOS, 257: EOS} if special else {},
    to_offsets=lambda text: (_bytes(text), np.repeat(_spans(text), [len(c.encode()) for c in text], axis=0)),
  )


def characters(source: Source | None, cache: Path, special: bool = False, unknown: bool = False) -> Tokenizer:
  """One token a character, in code point order.

  The alphabet is that of the training text; where that is a slice of a text ("[:90%]"), of the whole text, since a
  rare character may occur in the held-out slice alone.

  Args:
    special: adds bos and eos.
    unknown: adds a token for all other characters, which are else an error; they are lost in decoding.
  """
  source = training_text(source, "characters")
  source = source.whole or source

  def learn(made: Path) -> None:
    alphabet: set[str] = set()
    for record in source:
      alphabet.update(text_of(record))
    made.write_text(json.dumps("".join(sorted(alphabet))), encoding="utf-8")

  known = json.loads(
    fill_cache(cache / f"characters-{content_digest(source.fingerprint)}.json", learn).read_text(encoding="utf-8")
  )
  settings = {"characters": known, "special": special, "unknown": unknown}
  return characters_from_files({"characters.json": json.dumps(settings).encode()})


def characters_from_files(files: Mapping[str, bytes]) -> Tokenizer:
  settings = json.loads(files["characters.json"])
  alphabet, special, unknown = settings["characters"], settings["special"], settings["unknown"]
  points = _points(alphabet)

  def to_ids(text: str) -> np.ndarray:
    found = _points(text)
    ids = np.searchsorted(points, found).astype(np.int32)
    missing = points[np.minimum(ids, len(points) - 1)] != found if len(points) else np.ones(len(found), bool)
    if unknown:
      ids[missing] = len(points)
    elif missing.any():
      strange = chr(int(found[missing][0]))
      raise ConfigError(
        f"the character {strange!r} (U+{ord(strange):04X}, {text.count(strange)} times in this record) is not in the "
        "training text; give text of known characters only, or train with --config.data.tokenizer.unknown=True"
      )
    return ids

  first = len(alphabet)
  names = dict(enumerate([UNKNOWN] * unknown + [BOS, EOS] * special, start=first))
  return Tokenizer(
    name="characters",
    pieces=tuple(c.encode() for c in alphabet) + (b"",) * len(names),
    to_ids=to_ids,
    files=dict(files),
    bos_id=first + unknown if special else None,
    eos_id=first + unknown + 1 if special else None,
    unk_id=first if unknown else None,
    names=names,
    to_offsets=lambda text: (to_ids(text), _spans(text)),
  )


def _bytes(text: str) -> np.ndarray:
  """UInt8[n]."""
  return np.frombuffer(text.encode(), np.uint8)


def _spans(text: str) -> np.ndarray:
  """Where each character starts and stops, Int[n, 2]."""
  return np.arange(len(text))[:, None] + [0, 1]


def _points(text: str) -> np.ndarray:
  """Code points, UInt32[n]."""
  return np.frombuffer(text.encode("utf-32-le"), np.uint32)

"""Tokenizers of SentencePiece: models of files, and ones trained on the training text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmjax.config import ConfigError
from llmjax.data.sources.base import Source
from llmjax.data.tokenizers.base import TRAINING_BYTES, Tokenizer, sample_text_lines, training_text
from llmjax.storage.cache import content_digest, fill_cache

SPACE = "\u2581"  # SentencePiece's sign for a space

# Numbers in a model's protocol buffer: kinds of pieces, and a kind of model.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
UNIGRAM = 1

# The scores of a unigram vocabulary are multiples of 1 / ROUNDING, so that sums of them are exact in single precision.
# Else rounding noise decides between segmentations of equal score (two spaces and four, or four and two), and no other
# program, nor the same one behind another text, would decide alike.
ROUNDING = 64


def _read(path: str, key: str = "data.tokenizer.path") -> bytes:
  try:
    return Path(path).expanduser().read_bytes()
  except OSError as error:
    raise ConfigError(f"{key}={str(path)!r} cannot be read: {error.strerror}") from error


def sentencepiece(
  source: Source | None,
  cache: Path,
  extra: int = 0,
  path: str | None = None,
  vocab_size: int = 4096,
  model_type: str = "bpe",
  byte_fallback: bool = True,
  character_coverage: float = 0.9995,
) -> Tokenizer:
  """A SentencePiece model: of the file `path`, or trained on the training text (Kudo and Richardson 2018).

  A trained one keeps every character as it is; other settings than `path` concern only training. `vocab_size` counts
  all tokens, also the `extra` ones that will be added.
  """
  if path is not None:
    return sentencepiece_from_files({"tokenizer.model": _read(path)})
  source = training_text(source, "sentencepiece")
  settings = (model_type, byte_fallback, character_coverage)
  learned = (vocab_size - extra, *settings, *[ROUNDING] * (model_type == "unigram"))
  name = f"sentencepiece-{content_digest(source.fingerprint, learned, TRAINING_BYTES)}.model"

  def train(made: Path) -> None:
    made.write_bytes(train_sentencepiece(sample_text_lines(source), vocab_size, *settings, extra=extra))

  return sentencepiece_from_files({"tokenizer.model": fill_cache(cache / name, train).read_bytes()})


def train_sentencepiece(
  texts: Iterable[str],
  vocab_size: int,
  model_type: str = "bpe",
  byte_fallback: bool = True,
  character_coverage: float = 0.9995,
  extra: int = 0,
) -> bytes:
  """The bytes of a SentencePiece model.

  No normalisation and no added or removed spaces, so that decoding gives back the text; runs of spaces and line ends
  may become pieces. Ids: 0 unknown, 1 bos, 2 eos, then (with `byte_fallback`) 256 bytes, then pieces; `extra` fewer
  than `vocab_size`, which counts tokens that will be added. A short text gives fewer pieces than asked for. The same
  texts give the same bytes.
  """
  import sentencepiece as spm

  if model_type not in ("bpe", "unigram"):
    raise ConfigError(f"data.tokenizer.model_type={model_type!r} must be 'bpe' or 'unigram'")
  if vocab_size <= extra:
    raise ConfigError(f"data.tokenizer.vocab_size={vocab_size} leaves none for text beside {extra} added tokens")
  model = io.BytesIO()
  try:
    spm.SentencePieceTrainer.train(
      sentence_iterator=_sentences(texts),
      model_writer=model,
      vocab_size=vocab_size - extra,
      model_type=model_type,
      byte_fallback=byte_fallback,
      character_coverage=character_coverage,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      hard_vocab_limit=False,
      max_sentence_length=1 << 20,
      unk_id=0,
      bos_id=1,
      eos_id=2,
      pad_id=-1,
      num_threads=4,  # a part of the result for unigram models: sums are taken thread by thread
      minloglevel=3,
    )
  except (RuntimeError, OSError) as error:
    reason = re.sub(r"^.*?\] ?", "", str(error).strip().splitlines()[-1])
    beside = f" beside {extra} added tokens" if extra else ""
    raise ConfigError(
      f"data.tokenizer.vocab_size={vocab_size}: SentencePiece cannot train{beside}: {reason or 'the text is empty'}"
    ) from error
  return _rounded(model.getvalue()) if model_type == "unigram" else model.getvalue()


def _rounded(model: bytes) -> bytes:
  proto = model_proto(model)
  for piece in proto.pieces:
    piece.score = round(piece.score * ROUNDING) / ROUNDING
  return proto.SerializeToString(deterministic=True)


def model_proto(model: bytes, name: str = "file") -> Any:
  """The protocol buffer of a SentencePiece model.

  Raises ConfigError: `name` is none.
  """
  from google.protobuf.message import DecodeError
  from sentencepiece import sentencepiece_model_pb2

  try:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
  except DecodeError as error:
    raise ConfigError(f"the {name} is no SentencePiece model: {error}") from error
  if not proto.pieces:
    raise ConfigError(f"the {name} is no SentencePiece model: it has no pieces")
  return proto


def _sentences(texts: Iterable[str], length: int = 4000) -> Iterator[str]:
  """Pieces of at most `length` characters, cut at line ends where possible.

  Left out: NUL, and U+2581 and U+2585, which SentencePiece keeps for itself.
  """
  for text in texts:
    for part in re.split(f"[\0{SPACE}\u2585]", text):
      start = 0
      while start < len(part):
        stop = start + length
        stop = part.rfind("\n", start, stop) + 1 or stop if stop < len(part) else len(part)
        yield part[start:stop]
        start = stop


def sentencepiece_from_files(files: Mapping[str, bytes]) -> Tokenizer:
  """From {"tokenizer.model": the model's bytes}."""
  import sentencepiece as spm

  try:
    model = spm.SentencePieceProcessor(model_proto=files["tokenizer.model"])
  except RuntimeError as error:
    raise ConfigError("data.tokenizer.path: the file is no SentencePiece model") from error

  def piece(token: int) -> bytes:
    if model.is_control(token) or model.is_unknown(token):
      return b""
    if model.is_byte(token):
      return bytes([int(model.id_to_piece(token)[1:-1], 16)])  # "<0x0A>"
    return model.id_to_piece(token).replace(SPACE, " ").encode()

  # SentencePiece's sign for a space in a text would come back as a space.
  mark = [model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

  def to_ids(text: str) -> list[int]:
    first, *rest = text.split(SPACE)
    ids = model.encode(first)
    for part in rest:
      ids += mark + model.encode(part)
    return ids

  def to_offsets(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    first, *rest = [text] if prefixed else text.split(SPACE)
    ids, spans = _pieces(model, first)
    start = len(first)
    for part in rest:
      more, places = _pieces(model, part)
      ids += mark + more
      spans += [(start, start + 1)] * len(mark) + [(start + 1 + begin, start + 1 + end) for begin, end in places]
      start += 1 + len(part)
    return ids, spans

  prefixed = model.encode("a", out_type=str)[0].startswith(SPACE)  # models made for words, such as T5's and Llama's
  bos, eos, pad = model.bos_id(), model.eos_id(), model.pad_id()
  vocabulary = range(model.vocab_size())
  return Tokenizer(
    name="sentencepiece",
    pieces=tuple(map(piece, vocabulary)),
    to_ids=model.encode if prefixed else to_ids,
    files=dict(files),
    bos_id=bos if bos >= 0 else None,
    eos_id=eos if eos >= 0 else None,
    pad_id=max(pad, 0),
    unk_id=model.unk_id(),
    names={i: model.id_to_piece(i) for i in vocabulary if model.is_control(i) or model.is_unknown(i)},
    to_text=model.decode if prefixed else None,
    to_offsets=to_offsets,
  )


def _pieces(model: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
  """(ids, the characters [start, stop) that each stands for).

  The model tells places in bytes. Of several pieces of one character, such as bytes, it gives the last the character
  and the others nothing, at its start.
  """
  from sentencepiece import sentencepiece_pb2

  proto = sentencepiece_pb2.SentencePieceText.FromString(model.encode(text, out_type="serialized_proto"))  # type: ignore[attr-defined]
  starts = np.cumsum([0, *(len(character.encode()) for character in text)])
  spans: list[tuple[int, int]] = []
  following = (len(text), len(text))
  for begin, end in reversed(np.searchsorted(starts, [(p.begin, p.end) for p in proto.pieces]).tolist()):
    following = (begin, end) if begin < end else following
    spans.append(following)
  return [p.id for p in proto.pieces], spans[::-1]

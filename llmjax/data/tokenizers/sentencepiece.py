"""SentencePiece tokenizers, read from a model file or trained on the training text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from llmjax.config import ConfigError
from llmjax.data.sources.base import Source
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.data.tokenizers.training_text import MAX_TRAINING_BYTES, require_training_text, sample_training_texts
from llmjax.storage.cache import content_digest, fill_cache

if TYPE_CHECKING:
  from sentencepiece import SentencePieceProcessor

ModelProto: TypeAlias = Any  # sentencepiece_model_pb2.ModelProto, a class that is made at run time

SPACE = "\u2581"  # SentencePiece's symbol for a space
MODEL_FILE = "tokenizer.model"

# Enumerations of a model's protocol buffer: types of pieces, and a type of model.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
UNIGRAM = 1

# Scores of a unigram vocabulary are rounded to multiples of 1 / SCORE_STEPS, so that their sums are exact in single
# precision. Otherwise rounding errors would choose between segmentations of equal score (two spaces and four, or four
# and two), differently in other programs and after other texts.
SCORE_STEPS = 64

MAX_SENTENCE = 4000  # characters that the trainer gets at a time


def sentencepiece_tokenizer(
  source: Source | None,
  cache: Path,
  extra: int = 0,
  path: str | None = None,
  vocab_size: int = 4096,
  model_type: str = "bpe",
  byte_fallback: bool = True,
  character_coverage: float = 0.9995,
) -> Tokenizer:
  """Return a SentencePiece tokenizer (Kudo and Richardson 2018). A trained one encodes every character as it is.

  Args:
    source: training text.
    cache: directory of trained vocabularies.
    extra: number of tokens that will be added to the vocabulary; `vocab_size` includes them.
    path: model file; None: train a model with the other settings.
    vocab_size, model_type, byte_fallback, character_coverage: see `train_sentencepiece`.
  """
  if path is not None:
    try:
      return sentencepiece_from_files({MODEL_FILE: Path(path).expanduser().read_bytes()})
    except OSError as error:
      raise ConfigError(f"data.tokenizer.path: cannot be read: {error.strerror}, got {str(path)!r}") from error
  source = require_training_text(source, "sentencepiece")
  settings = (model_type, byte_fallback, character_coverage)
  version = (vocab_size - extra, *settings, *[SCORE_STEPS] * (model_type == "unigram"))
  name = f"sentencepiece-{content_digest(source.fingerprint, version, MAX_TRAINING_BYTES)}.model"

  def save_model(target: Path) -> None:
    target.write_bytes(train_sentencepiece(sample_training_texts(source), vocab_size, *settings, extra=extra))

  return sentencepiece_from_files({MODEL_FILE: fill_cache(cache / name, save_model).read_bytes()})


def train_sentencepiece(
  texts: Iterable[str],
  vocab_size: int,
  model_type: str = "bpe",
  byte_fallback: bool = True,
  character_coverage: float = 0.9995,
  extra: int = 0,
) -> bytes:
  """Train a SentencePiece model without normalisation and without added or removed spaces, so that decoding is exact.

  Runs of spaces and line ends may become pieces. Ids are 0 unknown, 1 bos, 2 eos, then (with `byte_fallback`) 256
  bytes, then pieces.

  Args:
    texts: training texts.
    vocab_size: number of tokens, including `extra` ones that will be added later. A short text gives fewer pieces.
    model_type: "bpe" or "unigram".
    byte_fallback: whether characters without a piece become bytes; otherwise they become the unknown token.
    character_coverage: share of the text's characters that get a piece.
    extra: see `vocab_size`.

  Returns:
    The bytes of the model, the same for the same texts.

  Raises:
    ConfigError: a setting is not valid, or SentencePiece cannot train with it.
  """
  import sentencepiece

  if model_type not in ("bpe", "unigram"):
    raise ConfigError(f"data.tokenizer.model_type: must be 'bpe' or 'unigram', got {model_type!r}")
  if vocab_size <= extra:
    raise ConfigError(
      f"data.tokenizer.vocab_size: leaves no tokens for text besides {extra} added ones, got {vocab_size}. Increase it"
    )
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_split_sentences(texts),
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
      num_threads=4,  # must not change: unigram training sums per thread, so the number affects the result
      minloglevel=3,
    )
  except (RuntimeError, OSError) as error:
    reason = re.sub(r"^.*?\] ?", "", str(error).strip().splitlines()[-1]) or "the text is empty"
    added = f" with {extra} added tokens" if extra else ""
    raise ConfigError(
      f"data.tokenizer.vocab_size: SentencePiece cannot train: {reason}, got {vocab_size}{added}. Change it or the text"
    ) from error
  return _round_scores(model.getvalue()) if model_type == "unigram" else model.getvalue()


def _round_scores(model: bytes) -> bytes:
  proto = parse_sentencepiece_model(model)
  for piece in proto.pieces:
    piece.score = round(piece.score * SCORE_STEPS) / SCORE_STEPS
  return cast(bytes, proto.SerializeToString(deterministic=True))


def parse_sentencepiece_model(model: bytes, name: str = MODEL_FILE) -> ModelProto:
  """Return the protocol buffer of a SentencePiece model.

  Raises:
    ConfigError: the file `name` is not a model.
  """
  from google.protobuf.message import DecodeError
  from sentencepiece import sentencepiece_model_pb2

  try:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
  except DecodeError as error:
    raise ConfigError(f"{name}: not a SentencePiece model: {error}. Copy the file again") from error
  if not proto.pieces:
    raise ConfigError(f"{name}: not a SentencePiece model: it has no pieces. Copy the file again")
  return proto


def _split_sentences(texts: Iterable[str]) -> Iterator[str]:
  """Yield parts of at most MAX_SENTENCE characters, split at line ends if possible.

  Skip NUL, and U+2581 and U+2585, which SentencePiece reserves.
  """
  for text in texts:
    for part in re.split(f"[\0{SPACE}\u2585]", text):
      start = 0
      while start < len(part):
        stop = start + MAX_SENTENCE
        stop = part.rfind("\n", start, stop) + 1 or stop if stop < len(part) else len(part)
        yield part[start:stop]
        start = stop


def sentencepiece_from_files(files: Mapping[str, bytes]) -> Tokenizer:
  """Return the tokenizer of {"tokenizer.model": bytes of a model}."""
  import sentencepiece

  try:
    model = sentencepiece.SentencePieceProcessor(model_proto=files[MODEL_FILE])
  except RuntimeError as error:
    raise ConfigError("data.tokenizer.path: the file is not a SentencePiece model. Choose another file") from error

  def piece_bytes(token: int) -> bytes:
    if model.is_control(token) or model.is_unknown(token):
      return b""
    if model.is_byte(token):
      return bytes([int(model.id_to_piece(token)[1:-1], 16)])  # "<0x0A>"
    return model.id_to_piece(token).replace(SPACE, " ").encode()

  # SentencePiece would encode its symbol in a text as a space, so the symbol is encoded as bytes. Models that insert a
  # space before the text, such as T5's and Llama's, are used as they are, because they change spaces anyway.
  inserts_space = model.encode("a", out_type=str)[0].startswith(SPACE)
  symbol_ids = [model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

  def to_offsets(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    start = 0
    for number, part in enumerate([text] if inserts_space else text.split(SPACE)):
      if number:
        ids += symbol_ids
        spans += [(start, start + 1)] * len(symbol_ids)
        start += 1
      part_ids, part_spans = _encode_with_spans(model, part)
      ids += part_ids
      spans += [(start + begin, start + end) for begin, end in part_spans]
      start += len(part)
    return ids, spans

  def to_ids(text: str) -> list[int]:
    first, *rest = [text] if inserts_space else text.split(SPACE)
    ids: list[int] = model.encode(first)
    for part in rest:
      ids += symbol_ids + model.encode(part)
    return ids

  bos, eos = model.bos_id(), model.eos_id()
  vocabulary = range(model.vocab_size())
  return Tokenizer(
    name="sentencepiece",
    pieces=tuple(map(piece_bytes, vocabulary)),
    to_ids=to_ids,
    files=dict(files),
    bos_id=bos if bos >= 0 else None,
    eos_id=eos if eos >= 0 else None,
    pad_id=max(model.pad_id(), 0),
    unk_id=model.unk_id(),
    names={i: model.id_to_piece(i) for i in vocabulary if model.is_control(i) or model.is_unknown(i)},
    to_text=model.decode if inserts_space else None,
    to_offsets=to_offsets,
  )


def _encode_with_spans(model: SentencePieceProcessor, text: str) -> tuple[list[int], list[tuple[int, int]]]:
  """Return ids, and the characters [start, stop) of each.

  The model gives spans in bytes. If a character has several pieces, such as bytes, the last one has the character and
  the others have empty spans at its start. These get the next span that is not empty.
  """
  from sentencepiece import sentencepiece_pb2

  serialized = model.encode(text, out_type="serialized_proto")
  proto = sentencepiece_pb2.SentencePieceText.FromString(serialized)  # type: ignore[attr-defined]
  byte_starts = np.cumsum([0, *(len(character.encode()) for character in text)])
  spans: list[tuple[int, int]] = []
  next_span = (len(text), len(text))
  for begin, end in reversed(np.searchsorted(byte_starts, [(p.begin, p.end) for p in proto.pieces]).tolist()):
    next_span = (begin, end) if begin < end else next_span
    spans.append(next_span)
  return [p.id for p in proto.pieces], spans[::-1]

"""Tokenizers of Hugging Face models, from their `tokenizer.json`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmjax.config import ConfigError
from llmjax.data.tokenizer import SENTINEL, Tokenizer

# Files beside tokenizer.json that say which tokens are special, and, where there are none, the usual names.
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json")
ROLES = {
  "bos": ("bos_token", "cls_token"),
  "eos": ("eos_token", "sep_token"),
  "pad": ("pad_token",),
  "unk": ("unk_token",),
  "mask": ("mask_token",),
}
USUAL = {
  "bos": ("<s>", "<bos>", "[CLS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
  "eos": ("</s>", "<eos>", "[SEP]", "<|end_of_text|>", "<|endoftext|>"),
  "pad": ("<pad>", "[PAD]"),
  "unk": ("<unk>", "[UNK]"),
  "mask": ("<mask>", "[MASK]"),
}


def hf(path: str) -> Tokenizer:
  """`path` is a tokenizer.json or the folder that holds it."""
  file = Path(path).expanduser()
  file = file / "tokenizer.json" if file.is_dir() else file
  if not file.is_file():
    raise ConfigError(f"data.tokenizer.path={path!r}: there is no {file}")
  beside = [file.parent / name for name in COMPANIONS]
  return hf_from_files({"tokenizer.json": file.read_bytes()} | {p.name: p.read_bytes() for p in beside if p.is_file()})


def hf_from_files(files: Mapping[str, bytes]) -> Tokenizer:
  """From {"tokenizer.json": ..., and those of COMPANIONS that exist}."""
  try:
    import tokenizers
  except ImportError as error:
    raise ConfigError("data.tokenizer.name='hf' needs the tokenizers package: pip install 'llmjax[hf]'") from error
  try:
    settings = json.loads(files["tokenizer.json"])
  except ValueError as error:
    raise ConfigError(f"data.tokenizer.path: the file is no tokenizer.json: {error}") from error
  if not isinstance(settings, dict) or not {"model", "decoder", "added_tokens"} <= set(settings):
    raise ConfigError("data.tokenizer.path: the JSON file is no tokenizer.json: it has no model, decoder, added_tokens")
  model = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
  model.no_truncation()
  model.no_padding()
  model.encode_special_tokens = True  # what looks like a special token in a text is text

  vocabulary = model.get_vocab(with_added_tokens=True)
  added = {t["content"]: t["special"] for t in settings["added_tokens"]}
  decoder = _types(settings["decoder"])
  to_bytes = _byte_level if "ByteLevel" in decoder else _word_level
  pieces = [b""] * (max(vocabulary.values()) + 1)
  for token, index in vocabulary.items():
    special = added.get(token)  # None: an ordinary token
    pieces[index] = to_bytes(token) if special is None else b"" if special else token.encode()

  special = _special_tokens(files, vocabulary)
  sentinels = itertools.takewhile(added.__contains__, map(SENTINEL.format, itertools.count()))
  names = {i: token for token, i in vocabulary.items() if added.get(token) or i in special.values()}
  framed = model.encode("a", add_special_tokens=True).ids
  return Tokenizer(
    name="hf",
    pieces=tuple(pieces),
    to_ids=lambda text: model.encode(text, add_special_tokens=False).ids,
    files=dict(files),
    bos_id=special["bos"],
    eos_id=special["eos"],
    pad_id=special["pad"] or 0,
    unk_id=special["unk"],
    mask_id=special["mask"],
    sentinels=tuple(vocabulary[token] for token in sentinels),
    names=names,
    continuing=frozenset(i for t, i in vocabulary.items() if "WordPiece" in decoder and t.startswith("##")),
    prompt_bos=bool(framed) and framed[0] == special["bos"],
    to_text=None if "ByteLevel" in decoder else lambda ids: model.decode(ids, skip_special_tokens=True),
  )


def _special_tokens(files: Mapping[str, bytes], vocabulary: Mapping[str, int]) -> dict[str, int | None]:
  named: dict[str, Any] = {}
  for name in reversed(COMPANIONS):
    if name in files:
      named |= {k: v for k, v in json.loads(files[name]).items() if k.endswith("_token") and v is not None}
  contents = {k: v["content"] if isinstance(v, dict) else v for k, v in named.items()}
  found: dict[str, int | None] = {}
  for role, keys in ROLES.items():
    candidates = [contents[k] for k in keys if k in contents] if contents else USUAL[role]
    found[role] = next((vocabulary[c] for c in candidates if c in vocabulary), None)
  return found


def _types(decoder: Mapping[str, Any] | None) -> set[str]:
  """The kinds of decoders in a possibly nested one."""
  if decoder is None:
    return set()
  return {decoder["type"]}.union(*(_types(part) for part in decoder.get("decoders", ())))


def _byte_alphabet() -> dict[str, int]:
  """Byte-level BPE writes a byte as a visible character: itself if it is one, else the next free one from U+0100 on."""
  visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  hidden = [byte for byte in range(256) if byte not in visible]
  return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_ALPHABET = _byte_alphabet()


def _byte_level(token: str) -> bytes:
  return b"".join(bytes([_ALPHABET[c]]) if c in _ALPHABET else c.encode() for c in token)


def _word_level(token: str) -> bytes:
  """Pieces with SentencePiece's space sign and byte tokens, or WordPiece's "##" for a word's continuation."""
  if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
    return bytes([int(token[1:-1], 16)])
  return token.removeprefix("##").replace("\u2581", " ").encode()

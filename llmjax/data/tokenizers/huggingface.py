"""Tokenizers of Hugging Face folders, from whichever files they have."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmjax.config import ConfigError
from llmjax.data.tokenizers import chat, hf_formats
from llmjax.data.tokenizers.base import SENTINEL, Tokenizer
from llmjax.data.tokenizers.hf_formats import BYTES_BACK, COMPANIONS, STRIP, VOCABULARIES, Json, replace
from llmjax.data.tokenizers.sentencepiece import SPACE

# Which of a folder's tokens has which role, and, where it names none, the usual names.
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
  """`path` is a Hugging Face folder or a tokenizer.json."""
  file = Path(path).expanduser()
  if not file.exists():
    raise ConfigError(f"data.tokenizer.path={path!r}: there is no {file}")
  if file.is_dir():
    return from_folder(file)
  return _built({"tokenizer.json": file.read_bytes()} | _read(file.parent, COMPANIONS), file)


def from_folder(folder: Path) -> Tokenizer:
  """The tokenizer of a Hugging Face folder, which gives the ids that Transformers' AutoTokenizer gives.

  The folder holds one of VOCABULARIES, and beside it any of COMPANIONS. `pad` puts around a text what the folder says.
  As for any tokenizer of ours, `encode` takes what looks like a special token for text, and `chat` for the token.

  Raises:
    ConfigError: there is no tokenizer; half of one; one of a kind that only a tokenizer.json can describe; a damaged
      file.
  """
  folder = Path(folder).expanduser()
  present = [[name for name in names if (folder / name).is_file()] for names in VOCABULARIES]
  found = next((names for names, there in zip(VOCABULARIES, present) if there == list(names)), None)
  if found is None:
    half = next(((names, there) for names, there in zip(VOCABULARIES, present) if there), None)
    if half is not None:
      missing = ", ".join(set(half[0]) - set(half[1]))
      raise ConfigError(f"{folder} holds {half[1][0]} but no {missing}, which belongs to it")
    looked_for = ", ".join(" + ".join(names) for names in VOCABULARIES)
    raise ConfigError(f"{folder} holds no tokenizer: none of {looked_for}")
  more = [str(p.relative_to(folder)) for p in sorted(folder.glob("additional_chat_templates/*.jinja"))]
  return _built(_read(folder, (*found, *COMPANIONS, *more)), folder)


def _read(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
  return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _built(files: Mapping[str, bytes], where: Path) -> Tokenizer:
  try:
    return hf_from_files(files)
  except ConfigError as error:
    raise ConfigError(f"{where}: {error}") from error
  except Exception as error:  # of whatever kind a damaged file gives, here or in the package tokenizers
    raise ConfigError(f"{where}: a file of the tokenizer is damaged ({type(error).__name__}: {error})") from error


def hf_from_files(files: Mapping[str, bytes]) -> Tokenizer:
  """From the files of a folder: those of VOCABULARIES that it has, and of COMPANIONS."""
  settings, named = hf_formats.read_tokenizer_folder(files)
  encoder, decoder = _load(_hiding_special_tokens(settings)), _load(settings)
  parser = functools.cache(lambda: _load(settings, parse_special_tokens=True))  # seldom wanted, and large

  config = hf_formats.parse(files, "chat_template.json") | hf_formats.parse(files, "tokenizer_config.json")
  vocabulary = decoder.get_vocab(with_added_tokens=True)
  added = {t["content"]: t["special"] for t in settings["added_tokens"]}
  kinds = _types(settings["decoder"])
  pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
  for token, index in vocabulary.items():
    pieces[index] = b"" if added.get(token) else _bytes(token, kinds)

  def to_offsets(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    made = encoder.encode(text, add_special_tokens=False)
    return made.ids, made.offsets

  roles = _roles(named, vocabulary)
  sentinels = itertools.takewhile(added.__contains__, map(SENTINEL.format, itertools.count()))
  return Tokenizer(
    name="hf",
    pieces=tuple(pieces),
    to_ids=lambda text: encoder.encode(text, add_special_tokens=False).ids,
    files=dict(files),
    bos_id=roles["bos"],
    eos_id=roles["eos"],
    pad_id=roles["pad"] or 0,
    unk_id=roles["unk"],
    mask_id=roles["mask"],
    sentinels=tuple(vocabulary[token] for token in sentinels),
    names={i: token for token, i in vocabulary.items() if added.get(token) or i in roles.values()},
    continuing=frozenset(i for t, i in vocabulary.items() if "WordPiece" in kinds and t.startswith("##")),
    around=_around(decoder),
    around_pair=_around_pair(decoder),
    to_text=_to_text(settings["decoder"], decoder, pieces),
    chat_templates=chat.read_templates(files, config.get("chat_template")),
    token_names={key: token for key, token in named.items() if token is not None},
    to_special_ids=lambda text: parser().encode(text, add_special_tokens=False).ids,
    to_offsets=to_offsets,
  )


def _load(settings: Json, parse_special_tokens: bool = False) -> Any:
  """The `tokenizers.Tokenizer` of a tokenizer.json's content."""
  import tokenizers

  try:
    model = tokenizers.Tokenizer.from_str(json.dumps(settings))
  except Exception as error:  # the package has no class of its own for them
    raise ConfigError(f"the file is no tokenizer.json: {' '.join(str(error).split())}") from error
  model.no_truncation()
  model.no_padding()
  model.encode_special_tokens = not parse_special_tokens
  return model


def _hiding_special_tokens(settings: Json) -> Json:
  """A unigram model finds its special tokens in a text as it finds any piece; under another name it does not."""
  vocabulary = settings["model"].get("vocab")
  settings = {**settings, "post_processor": None}  # without tokens to add, it would only take spaces out of offsets
  if not isinstance(vocabulary, list):
    return settings
  special = {token["content"] for token in settings["added_tokens"] if token["special"]}
  hidden = [["\0 " + piece if piece in special else piece, score] for piece, score in vocabulary]
  outside = [t for t in settings["added_tokens"] if t["id"] >= len(vocabulary) or not t["special"]]
  return {
    **settings,
    "added_tokens": outside,
    "model": {**settings["model"], "vocab": hidden},
  }


def _around(model: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """What stands before and behind a single text."""
  for text in ("a", "0", " "):  # at least one of them gives tokens
    made = model.encode(text, add_special_tokens=True)
    own = [i for i, added in enumerate(made.special_tokens_mask) if not added]
    if own:
      return tuple(made.ids[: own[0]]), tuple(made.ids[own[-1] + 1 :])
  return tuple(made.ids), ()


def _around_pair(model: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int] | None:
  """What stands before, between and behind two texts, and the token type of the second; None where nothing does."""
  for text in ("a", "0"):
    made = model.encode(text, text, add_special_tokens=True)
    own = [i for i, added in enumerate(made.special_tokens_mask) if not added]
    half = len(own) // 2
    if own and own[half] - own[half - 1] > 1:
      before, between = made.ids[: own[0]], made.ids[own[half - 1] + 1 : own[half]]
      return tuple(before), tuple(between), tuple(made.ids[own[-1] + 1 :]), made.type_ids[own[half]]
  return None


def _roles(named: Mapping[str, str | None], vocabulary: Mapping[str, int]) -> dict[str, int | None]:
  contents = {key: token for key, token in named.items() if token is not None}
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


def byte_alphabet() -> dict[str, int]:
  """Byte-level BPE writes a byte as a visible character: itself if it is one, else the next free one from U+0100 on."""
  visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  hidden = [byte for byte in range(256) if byte not in visible]
  return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_ALPHABET = byte_alphabet()


def _bytes(token: str, decoders: set[str]) -> bytes:
  """What a token stands for, as its kind of vocabulary writes it."""
  if "ByteLevel" in decoders:
    return bytes(_ALPHABET[c] for c in token) if _ALPHABET.keys() >= set(token) else token.encode()
  if "ByteFallback" in decoders and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
    return bytes([int(token[1:-1], 16)])
  if "WordPiece" in decoders:
    return token.removeprefix("##").encode()
  return token.replace(SPACE, " ").encode()


def _to_text(decoder: Json, model: Any, pieces: Sequence[bytes]) -> Callable[[list[int]], str] | None:
  """None where text is the concatenation of the pieces; else that without the space in front, or what the library says.

  The library would turn all bytes beside a broken character into U+FFFD, so that no stream could tell a byte in time.
  """
  parts = [part for part in (decoder or {}).get("decoders", [decoder]) if part != replace(SPACE, " ")]
  if parts == list(BYTES_BACK) or "ByteLevel" in _types(decoder):
    return None
  if parts == [*BYTES_BACK, STRIP]:
    return lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace").removeprefix(" ")
  return lambda ids: model.decode(ids, skip_special_tokens=True)

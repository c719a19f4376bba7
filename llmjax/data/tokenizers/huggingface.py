"""Tokenizers of Hugging Face folders."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmjax.config import ConfigError
from llmjax.data.tokenizers.base import Ids, Tokenizer
from llmjax.data.tokenizers.chat import read_chat_templates
from llmjax.data.tokenizers.extra_tokens import SENTINEL
from llmjax.data.tokenizers.hf_files import COMPANION_FILES, VOCABULARY_FILES, Files, JsonObject, parse_json_file
from llmjax.data.tokenizers.hf_folder import read_tokenizer_folder
from llmjax.data.tokenizers.sentencepiece import SPACE

if TYPE_CHECKING:
  import tokenizers

# {role: names that a folder gives the role's token, the preferred one first}
ROLES = {
  "bos": ("bos_token", "cls_token"),
  "eos": ("eos_token", "sep_token"),
  "pad": ("pad_token",),
  "unk": ("unk_token",),
  "mask": ("mask_token",),
}
# {role: tokens that have the role in folders that name no tokens}
USUAL_TOKENS = {
  "bos": ("<s>", "<bos>", "[CLS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
  "eos": ("</s>", "<eos>", "[SEP]", "<|end_of_text|>", "<|endoftext|>"),
  "pad": ("<pad>", "[PAD]"),
  "unk": ("<unk>", "[UNK]"),
  "mask": ("<mask>", "[MASK]"),
}

# Parts of decoders in a tokenizer.json
SPACES = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
BYTE_FALLBACK = [{"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP_SPACE = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def huggingface_tokenizer(path: str) -> Tokenizer:
  """Return the tokenizer of a Hugging Face folder or a tokenizer.json."""
  file = Path(path).expanduser()
  if not file.exists():
    raise ConfigError(f"data.tokenizer.path: there is no such file or folder, got {path!r}")
  if file.is_dir():
    return tokenizer_from_folder(file)
  return _named_errors({"tokenizer.json": file.read_bytes()} | _read_files(file.parent, COMPANION_FILES), file)


def tokenizer_from_folder(folder: Path) -> Tokenizer:
  """Return the tokenizer of a Hugging Face folder, with the ids of Transformers' AutoTokenizer.

  As with all tokenizers here, `encode` reads names of special tokens as text, and `chat` reads them as tokens.

  Args:
    folder: has one entry of VOCABULARY_FILES, and any COMPANION_FILES.

  Raises:
    ConfigError: vocabulary files are missing or damaged, or of a kind that only a tokenizer.json can describe.
  """
  folder = Path(folder).expanduser()
  incomplete = None
  for names in VOCABULARY_FILES:
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
      templates = [str(p.relative_to(folder)) for p in sorted(folder.glob("additional_chat_templates/*.jinja"))]
      return _named_errors(_read_files(folder, (*names, *COMPANION_FILES, *templates)), folder)
    if len(missing) < len(names) and incomplete is None:
      incomplete = f"{folder}: has {' and '.join(set(names) - set(missing))} but no {missing[0]}. Copy the folder again"
  alternatives = ", ".join(" + ".join(names) for names in VOCABULARY_FILES)
  raise ConfigError(incomplete or f"{folder}: has no tokenizer. A folder of a tokenizer has one of {alternatives}")


def _read_files(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
  return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _named_errors(files: Files, path: Path) -> Tokenizer:
  """Return the tokenizer of `files`; errors name `path`."""
  try:
    return huggingface_from_files(files)
  except ConfigError as error:
    raise ConfigError(f"{path}: {error}") from error
  except Exception as error:  # a damaged file may raise anything, here or in the package tokenizers
    raise ConfigError(f"{path}: a file of the tokenizer is damaged ({type(error).__name__}: {error})") from error


def huggingface_from_files(files: Files) -> Tokenizer:
  """Return the tokenizer of a folder's files: VOCABULARY_FILES, COMPANION_FILES and additional chat templates."""
  settings, token_names = read_tokenizer_folder(files)
  encoder, decoder = _load_library(_without_special_tokens(settings)), _load_library(settings)
  # Encodes names of special tokens as those tokens. It is used only for chats, and large.
  special_encoder = functools.cache(lambda: _load_library(settings, encode_special_tokens=False))

  vocabulary = decoder.get_vocab(with_added_tokens=True)
  is_special = {token["content"]: token["special"] for token in settings["added_tokens"]}
  decoder_types = _decoder_types(settings["decoder"])
  pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
  for token, index in vocabulary.items():
    pieces[index] = b"" if is_special.get(token) else _piece_bytes(token, decoder_types)

  def to_offsets(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoding = encoder.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets

  roles = _role_ids(token_names, vocabulary)
  sentinels = itertools.takewhile(is_special.__contains__, map(SENTINEL.format, itertools.count()))
  config = parse_json_file(files, "chat_template.json") | parse_json_file(files, "tokenizer_config.json")
  is_word_piece = "WordPiece" in decoder_types
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
    names={i: token for token, i in vocabulary.items() if is_special.get(token) or i in roles.values()},
    continuation_ids=frozenset(i for token, i in vocabulary.items() if is_word_piece and token.startswith("##")),
    single_template=_single_template(decoder),
    pair_template=_pair_template(decoder),
    to_text=_text_decoder(settings["decoder"], decoder, pieces),
    chat_templates=read_chat_templates(files, config.get("chat_template")),
    token_names={key: token for key, token in token_names.items() if token is not None},
    to_special_ids=lambda text: special_encoder().encode(text, add_special_tokens=False).ids,
    to_offsets=to_offsets,
  )


def _load_library(settings: JsonObject, encode_special_tokens: bool = True) -> tokenizers.Tokenizer:
  """Return the tokenizer of a tokenizer.json's content.

  Args:
    settings: the content.
    encode_special_tokens: whether names of special tokens are encoded as text.
  """
  import tokenizers

  try:
    library = tokenizers.Tokenizer.from_str(json.dumps(settings))
  except Exception as error:  # the package raises bare exceptions
    raise ConfigError(f"tokenizer.json: not valid: {' '.join(str(error).split())}. Copy the file again") from error
  library.no_truncation()
  library.no_padding()
  library.encode_special_tokens = encode_special_tokens
  return library


def _without_special_tokens(settings: JsonObject) -> JsonObject:
  """Return settings with which no text is encoded to a special token.

  A unigram model finds its special tokens in a text like any other piece, so they are renamed.
  """
  vocabulary = settings["model"].get("vocab")
  settings = {**settings, "post_processor": None}  # without special tokens, all it does is trim offsets
  if not isinstance(vocabulary, list):
    return settings
  special = {token["content"] for token in settings["added_tokens"] if token["special"]}
  renamed = [["\0 " + piece if piece in special else piece, score] for piece, score in vocabulary]
  added = [t for t in settings["added_tokens"] if t["id"] >= len(vocabulary) or not t["special"]]
  return {**settings, "added_tokens": added, "model": {**settings["model"], "vocab": renamed}}


def _single_template(library: tokenizers.Tokenizer) -> tuple[Ids, Ids]:
  """Return the tokens before and after a single text."""
  for text in ("a", "0", " "):  # a vocabulary has tokens for at least one of these
    encoding = library.encode(text, add_special_tokens=True)
    own = [i for i, is_added in enumerate(encoding.special_tokens_mask) if not is_added]
    if own:
      return tuple(encoding.ids[: own[0]]), tuple(encoding.ids[own[-1] + 1 :])
  return tuple(encoding.ids), ()


def _pair_template(library: tokenizers.Tokenizer) -> tuple[Ids, Ids, Ids, int] | None:
  """Return the tokens before, between and after two texts, and the second's type; None: there are none between."""
  for text in ("a", "0"):
    encoding = library.encode(text, text, add_special_tokens=True)
    own = [i for i, is_added in enumerate(encoding.special_tokens_mask) if not is_added]
    half = len(own) // 2
    if own and own[half] - own[half - 1] > 1:
      before, between = encoding.ids[: own[0]], encoding.ids[own[half - 1] + 1 : own[half]]
      return tuple(before), tuple(between), tuple(encoding.ids[own[-1] + 1 :]), encoding.type_ids[own[half]]
  return None


def _role_ids(token_names: Mapping[str, str | None], vocabulary: Mapping[str, int]) -> dict[str, int | None]:
  declared = {key: token for key, token in token_names.items() if token is not None}
  ids: dict[str, int | None] = {}
  for role, keys in ROLES.items():
    candidates = [declared[key] for key in keys if key in declared] if declared else USUAL_TOKENS[role]
    ids[role] = next((vocabulary[token] for token in candidates if token in vocabulary), None)
  return ids


def _decoder_types(decoder: JsonObject | None) -> set[str]:
  """Return the types of a decoder and of the decoders in it."""
  if decoder is None:
    return set()
  return {decoder["type"]}.union(*(_decoder_types(part) for part in decoder.get("decoders", ())))


def byte_alphabet() -> dict[str, int]:
  """Return {character: byte} of byte-level BPE: visible bytes as themselves, others as characters from U+0100 on."""
  visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in visible]
  return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = byte_alphabet()


def _piece_bytes(token: str, decoder_types: set[str]) -> bytes:
  """Return the text of a token, which vocabularies write in different ways."""
  if "ByteLevel" in decoder_types:
    is_written = BYTE_ALPHABET.keys() >= set(token)
    return bytes(BYTE_ALPHABET[c] for c in token) if is_written else token.encode()
  if "ByteFallback" in decoder_types and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
    return bytes([int(token[1:-1], 16)])
  if "WordPiece" in decoder_types:
    return token.removeprefix("##").encode()
  return token.replace(SPACE, " ").encode()


def _text_decoder(
  settings: JsonObject | None, library: tokenizers.Tokenizer, pieces: Sequence[bytes]
) -> Callable[[list[int]], str] | None:
  """Return `Tokenizer.to_text`: None, if the text is the concatenation of the pieces.

  Pieces are concatenated here if possible: next to a broken character, the library replaces all bytes by U+FFFD, so a
  stream could not return any text before the last byte.
  """
  parts = [part for part in (settings or {}).get("decoders", [settings]) if part != SPACES]
  if parts == BYTE_FALLBACK or "ByteLevel" in _decoder_types(settings):
    return None
  if parts == [*BYTE_FALLBACK, STRIP_SPACE]:
    return lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace").removeprefix(" ")
  return lambda ids: str(library.decode(ids, skip_special_tokens=True))

"""Families of tokenizers in Hugging Face folders, and conversion of their vocabularies to `tokenizers.Tokenizer`.

A conversion gives the tokenizer that Transformers makes of the same files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from llmjax.config import ConfigError
from llmjax.data.tokenizers.extra_tokens import SENTINEL
from llmjax.data.tokenizers.hf_files import Files, JsonObject, decode_text_file, parse_json_file
from llmjax.data.tokenizers.sentencepiece import (
  CONTROL,
  NORMAL,
  SPACE,
  UNIGRAM,
  USER_DEFINED,
  parse_sentencepiece_model,
)

TokenNames: TypeAlias = Mapping[str, str | None]  # {"bos_token": "<s>", ...}


class Family(NamedTuple):
  """A family of tokenizers.

  Attributes:
    tokens: special tokens, if the folder does not declare others.
    convert: makes the tokenizer from vocabulary files, configuration and special tokens.
    before, after, between: special tokens before and after a text, and before the second text of a pair.
    adds_bos, adds_eos: whether `before` and `after` are used, if the folder does not declare it; None: always.
  """

  tokens: TokenNames
  convert: Callable[[Files, JsonObject, TokenNames], Tokenizer]
  before: tuple[str, ...] = ()
  after: tuple[str, ...] = ()
  between: tuple[str, ...] = ()
  adds_bos: bool | None = None
  adds_eos: bool | None = None


# Conversions


def convert_byte_level_bpe(files: Files, config: JsonObject, tokens: TokenNames) -> Tokenizer:
  """Convert the vocabulary and merges of GPT-2 and RoBERTa."""
  vocabulary = parse_json_file(files, "vocab.json" if "vocab.json" in files else "encoder.json")
  merges_file = "merges.txt" if "merges.txt" in files else "vocab.bpe"
  merges = []
  for line in decode_text_file(files, merges_file).split("\n"):
    if line.strip() and not line.startswith("#version"):
      left, _, right = line.rstrip("\r").partition(" ")
      if not vocabulary.keys() >= {left, right, left + right}:
        raise ConfigError(
          f"{merges_file}: a merge must join two tokens of the vocabulary to a third one, got {line!r}. Copy the "
          "folder again"
        )
      merges.append((left, right))
  tokenizer = Tokenizer(models.BPE(vocabulary, merges))
  add_space = bool(config.get("add_prefix_space", False))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_space)
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer


def convert_word_piece(files: Files, config: JsonObject, tokens: TokenNames) -> Tokenizer:
  """Convert the word list of BERT."""
  lines = decode_text_file(files, "vocab.txt").removesuffix("\n").split("\n")
  vocabulary = {line.rstrip(): i for i, line in enumerate(lines)}
  tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=tokens["unk_token"]))
  tokenizer.normalizer = normalizers.BertNormalizer(
    handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    strip_accents=config.get("strip_accents"),
    lowercase=config.get("do_lower_case", True),
  )
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = decoders.WordPiece()
  return tokenizer


def convert_t5(files: Files, config: JsonObject, tokens: TokenNames) -> Tokenizer:
  """Convert the SentencePiece unigram model of T5. Sentinels follow its pieces, the last one first."""
  proto = parse_sentencepiece_model(*_sentencepiece_file(files))
  sentinels = [SENTINEL.format(k) for k in reversed(range(config.get("extra_ids", 100)))]
  pieces = [(piece.piece, piece.score) for piece in proto.pieces] + [(name, 0.0) for name in sentinels]
  tokenizer = Tokenizer(models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id, byte_fallback=False))
  rules = proto.normalizer_spec.precompiled_charsmap
  if rules:
    tokenizer.normalizer = normalizers.Precompiled(rules)
  metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
  tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
  tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in sentinels])
  return tokenizer


def convert_llama(files: Files, config: JsonObject, tokens: TokenNames) -> Tokenizer:
  """Convert the SentencePiece BPE model of Llama, which inserts a space before the text."""
  inserts_space = config.get("add_prefix_space") in (True, None)
  prepend_scheme = "never" if not inserts_space else "always" if config.get("legacy", False) else "first"
  tokenizer = _convert_sentencepiece_bpe(files, unk_token=None)
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
  strip = [decoders.Strip(" ", 1, 0)] if inserts_space else []
  tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), *byte_fallback_decoders(), *strip])
  return tokenizer


def convert_gemma(files: Files, config: JsonObject, tokens: TokenNames) -> Tokenizer:
  """Convert the SentencePiece BPE model of Gemma, which inserts no space."""
  tokenizer = _convert_sentencepiece_bpe(files, tokens["unk_token"])
  tokenizer.normalizer = normalizers.Replace(" ", SPACE)
  tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), *byte_fallback_decoders()])
  return tokenizer


def _convert_sentencepiece_bpe(files: Files, unk_token: str | None) -> Tokenizer:
  pieces = parse_sentencepiece_model(*_sentencepiece_file(files)).pieces
  vocabulary = {piece.piece: i for i, piece in enumerate(pieces)}
  merges = infer_merges({piece.piece: i for i, piece in enumerate(pieces) if piece.type in (NORMAL, USER_DEFINED)})
  tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
  found_whole = [piece for piece in pieces if piece.type in (CONTROL, USER_DEFINED)]
  tokenizer.add_tokens([AddedToken(p.piece, special=p.type == CONTROL, normalized=False) for p in found_whole])
  return tokenizer


def infer_merges(vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
  """Return all pairs of pieces that join to a third one, in the order of the vocabulary, in which BPE learned them."""
  merges = []
  for piece in sorted(vocabulary, key=vocabulary.__getitem__):
    pairs = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
    merges += [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]
  return merges


def byte_fallback_decoders() -> list[decoders.Decoder]:
  return [decoders.ByteFallback(), decoders.Fuse()]


def _sentencepiece_file(files: Files) -> tuple[bytes, str]:
  """Return the content and the name of a folder's SentencePiece model."""
  name = "spiece.model" if "spiece.model" in files else "tokenizer.model"
  return files[name], name


# Families

END = "<|endoftext|>"
GPT2 = {"bos_token": END, "eos_token": END, "unk_token": END}
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
ROBERTA = {**LLAMA, "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
BERT = {k: f"[{k[:-6].upper()}]" for k in ("unk_token", "cls_token", "sep_token", "pad_token", "mask_token")}
T5 = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
GEMMA = {**T5, "bos_token": "<bos>", "eos_token": "<eos>", "mask_token": "<mask>"}
CLS, SEP, BOS, EOS = ("cls_token",), ("sep_token",), ("bos_token",), ("eos_token",)

FAMILIES = {
  "gpt2": Family(GPT2, convert_byte_level_bpe, BOS, EOS, between=BOS, adds_bos=False, adds_eos=False),
  "roberta": Family(ROBERTA, convert_byte_level_bpe, CLS, SEP, between=SEP),
  "bert": Family(BERT, convert_word_piece, CLS, SEP),
  "t5": Family(T5, convert_t5, after=EOS),
  "llama": Family(LLAMA, convert_llama, BOS, EOS, between=BOS, adds_bos=True, adds_eos=False),
  "gemma": Family(GEMMA, convert_gemma, BOS, EOS, between=BOS, adds_bos=True, adds_eos=False),
}

# {class of tokenizer_config.json without "Tokenizer" and "Fast": key of FAMILIES}
CLASSES = {
  "GPT2": "gpt2",
  "Roberta": "roberta",
  "Bart": "roberta",
  "Longformer": "roberta",
  "Bert": "bert",
  "DistilBert": "bert",
  "Electra": "bert",
  "MobileBert": "bert",
  "T5": "t5",
  "MT5": "t5",
  "Llama": "llama",
  "Gemma": "gemma",
}


def find_family(files: Files, config: JsonObject) -> Family | None:
  """Return the family of the class that a folder names; without a class, the family of its vocabulary.

  Returns:
    The family, or None for a tokenizer.json of any other class.

  Raises:
    ConfigError: there is no tokenizer.json, and the family is unknown.
  """
  class_name = str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer")
  if class_name in CLASSES:
    return FAMILIES[CLASSES[class_name]]
  if "tokenizer.json" in files:
    return None
  key = None if class_name else _family_of_vocabulary(files)
  if key is None:
    subject = f"tokenizer_class={config['tokenizer_class']!r}" if class_name else "a vocabulary of unknown kind"
    raise ConfigError(
      f"{subject} needs a tokenizer.json (without one, classes are {', '.join(CLASSES)}). Write it with Transformers: "
      "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )
  return FAMILIES[key]


def _family_of_vocabulary(files: Files) -> str | None:
  if "vocab.txt" in files:
    return "bert" if BERT["cls_token"] in decode_text_file(files, "vocab.txt").split() else None
  if "spiece.model" in files or "tokenizer.model" in files:
    proto = parse_sentencepiece_model(*_sentencepiece_file(files))
    first_pieces = " ".join(piece.piece for piece in proto.pieces[:3])
    if proto.trainer_spec.model_type == UNIGRAM:
      return "t5" if first_pieces == "<pad> </s> <unk>" else None
    return {"<unk> <s> </s>": "llama", "<pad> <eos> <bos>": "gemma"}.get(first_pieces)
  vocabulary = parse_json_file(files, "vocab.json" if "vocab.json" in files else "encoder.json")
  if any(token.endswith("</w>") for token in vocabulary):  # CLIP and the first GPT mark the ends of words
    return None
  return "roberta" if {"<s>", "</s>", "<mask>"} <= set(vocabulary) else "gpt2"

"""Export of tokenizers as files that Transformers' AutoTokenizer opens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from llmjax.config import ConfigError
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.data.tokenizers.extra_tokens import EXTRA_FILE
from llmjax.data.tokenizers.hf_families import byte_fallback_decoders, infer_merges
from llmjax.data.tokenizers.hf_files import JsonObject, parse_json_file
from llmjax.data.tokenizers.hf_folder import added_token, read_tokenizer_folder, template_processor
from llmjax.data.tokenizers.huggingface import BYTE_ALPHABET, huggingface_from_files
from llmjax.data.tokenizers.sentencepiece import (
  BYTE,
  CONTROL,
  MODEL_FILE,
  NORMAL,
  SCORE_STEPS,
  SPACE,
  UNIGRAM,
  UNKNOWN,
  parse_sentencepiece_model,
)


def to_huggingface(tokenizer: Tokenizer) -> dict[str, bytes]:
  """Return {file name: content}, with which Transformers' AutoTokenizer gives the same ids and texts.

  A tokenizer of a Hugging Face folder gives the folder's files, with added mask and sentinels written into them. Others
  give a tokenizer.json, which puts bos before a single text, and a tokenizer_config.json. Names of special tokens in a
  text are text, as here; but if there are a mask or sentinels, names become tokens, because prompts need those. Two
  results differ: Transformers drops characters that a tokenizer of characters refuses, and it may decode broken UTF-8
  to another number of U+FFFD.

  Raises:
    ConfigError: the kind of tokenizer cannot be exported, or the ids would differ.
  """
  if tokenizer.name == "hf":
    return _export_folder(tokenizer)
  if tokenizer.name not in EXPORTERS:
    raise ConfigError(
      f"data.tokenizer.name: kind {tokenizer.name!r} cannot be written for Transformers. Kinds that can are hf, "
      f"{', '.join(EXPORTERS)}"
    )
  library = EXPORTERS[tokenizer.name](tokenizer)
  library.add_tokens([AddedToken(name, special=True, normalized=False) for _, name in sorted(tokenizer.names.items())])
  for index, name in tokenizer.names.items():
    assert library.token_to_id(name) == index, f"{name} has the id {library.token_to_id(name)}, not {index}"
  bos = {} if tokenizer.bos_id is None else {tokenizer.names[tokenizer.bos_id]: tokenizer.bos_id}
  settings = {**json.loads(library.to_str()), "post_processor": template_processor(bos, {}, bos)}
  token_names = tokenizer.special_token_names()
  padding = tokenizer.names.get(tokenizer.pad_id, token_names.get("eos_token"))
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    "split_special_tokens": tokenizer.mask_id is None and not tokenizer.sentinels,
    **token_names,
    **({} if padding is None else {"pad_token": padding}),
    "additional_special_tokens": [tokenizer.names[i] for i in tokenizer.sentinels],
  }
  return {"tokenizer.json": _to_json(settings), "tokenizer_config.json": _to_json(config)}


def _to_json(content: JsonObject) -> bytes:
  return json.dumps(content, ensure_ascii=False, indent=1).encode()


def _export_folder(tokenizer: Tokenizer) -> dict[str, bytes]:
  """Return a folder's files, with the tokens that were added to its vocabulary."""
  files = tokenizer.to_files()
  # Without added tokens the folder is exported as it is. Transformers does not know encoder.json, so that is converted.
  if files.pop(EXTRA_FILE, None) is None and "encoder.json" not in files:
    return files
  settings, token_names = read_tokenizer_folder(files)
  old_size = huggingface_from_files(files).vocab_size
  additions = [added_token(i, tokenizer.names[i]) for i in range(old_size, tokenizer.vocab_size)]
  settings["added_tokens"] += additions

  config = {**token_names, **parse_json_file(files, "tokenizer_config.json")}
  if tokenizer.mask_id is not None and tokenizer.mask_id >= old_size:
    config["mask_token"] = tokenizer.names[tokenizer.mask_id]
  if "added_tokens_decoder" in config:
    for token in additions:
      config["added_tokens_decoder"][str(token["id"])] = {k: v for k, v in token.items() if k != "id"}
  sentinels = [tokenizer.names[i] for i in tokenizer.sentinels if i >= old_size]
  key = "extra_special_tokens" if "extra_special_tokens" in config else "additional_special_tokens"
  if sentinels and isinstance(config.get(key, []), list):
    config[key] = [*config.get(key, []), *sentinels]

  exported = {**files, "tokenizer.json": _to_json(settings), "tokenizer_config.json": _to_json(config)}
  if huggingface_from_files(exported).names != tokenizer.names:
    raise ConfigError(
      "data.tokenizer.path: the vocabulary of this Hugging Face folder has holes in its ids, so the package tokenizers "
      "would give the added mask and sentinels other ids. Train without them to export it"
    )
  return exported


def _export_sentencepiece(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
  """Convert a SentencePiece model that keeps texts as they are.

  Pieces are written with plain spaces, so that U+2581 in a text is a character without a piece, as here.
  """
  proto = parse_sentencepiece_model(tokenizer.files[MODEL_FILE])
  normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
  if (
    not trainer.byte_fallback
    or not normalizer.escape_whitespaces
    or any((normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces, normalizer.precompiled_charsmap))
    or {piece.type for piece in proto.pieces} - {NORMAL, UNKNOWN, CONTROL, BYTE}
  ):
    raise ConfigError(
      "data.tokenizer.path: this SentencePiece model changes the text or has no bytes for unknown characters, so a "
      "tokenizer.json could not give the same ids. Train with byte_fallback=True, or use a Hugging Face folder "
      "(data.tokenizer.name='hf')"
    )
  text = {piece.piece.replace(SPACE, " "): i for i, piece in enumerate(proto.pieces) if piece.type == NORMAL}
  others = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type != NORMAL}
  if trainer.model_type != UNIGRAM:
    merges = infer_merges(text)
    bpe = models.BPE(text | others, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    library = tokenizers.Tokenizer(bpe)
  else:
    scores = [piece.score for piece in proto.pieces]
    library = _export_unigram(text, others, scores, tokenizer.unk_id)
  library.decoder = decoders.Sequence(byte_fallback_decoders())
  return library


def _export_unigram(
  text: dict[str, int], others: dict[str, int], scores: list[float], unk_id: int | None
) -> tokenizers.Tokenizer:
  """Convert a unigram model.

  Args:
    text: {piece: id} of pieces that a text may contain.
    others: {piece: id} of bytes and special tokens.
    scores: log-probabilities of all pieces.
    unk_id: id of the unknown token.
  """
  if any(score * SCORE_STEPS % 1 for score in scores):
    raise ConfigError(
      "data.tokenizer: this unigram vocabulary has scores whose sums depend on the order of addition, so a "
      "tokenizer.json could not give the same ids. Train it again: llmjax rounds the scores of new vocabularies"
    )
  # The library finds names of bytes in a text like any other piece. Therefore they score worse than any path through
  # known characters. Unknown characters score even worse, so the text is split at them first.
  too_low = min((scores[i] for i in text.values()), default=0.0) * 16 - 16
  pieces = sorted((text | others).items(), key=lambda item: item[1])
  vocabulary = [(piece, scores[i] if text.get(piece) == i else too_low) for piece, i in pieces]
  library = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=unk_id, byte_fallback=True))
  unknown = "".join(sorted({character for name in others for character in name} - set(text)))
  if unknown:
    library.pre_tokenizer = pre_tokenizers.Split(Regex(f"[{re.escape(unknown)}]"), "isolated")
  return library


def _export_bytes(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
  library = tokenizers.Tokenizer(models.BPE(BYTE_ALPHABET, []))
  library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  library.decoder = decoders.ByteLevel()
  return library


def _export_characters(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
  vocabulary = {piece.decode(): i for i, piece in enumerate(tokenizer.pieces) if piece}
  unknown = None if tokenizer.unk_id is None else tokenizer.names[tokenizer.unk_id]
  if tokenizer.unk_id is not None and unknown is not None:
    vocabulary[unknown] = tokenizer.unk_id
  library = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token=unknown))
  library.decoder = decoders.Fuse()
  return library


EXPORTERS: dict[str, Callable[[Tokenizer], tokenizers.Tokenizer]] = {
  "sentencepiece": _export_sentencepiece,
  "bytes": _export_bytes,
  "characters": _export_characters,
}

"""Our tokenizers as files that Transformers' AutoTokenizer opens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llmjax.config import ConfigError
from llmjax.data.tokenizers import hf_formats
from llmjax.data.tokenizers.base import EXTRA_FILE, Tokenizer
from llmjax.data.tokenizers.hf_formats import BYTES_BACK, Json, added_token, bpe, sequence, template, tokenizer_json
from llmjax.data.tokenizers.huggingface import byte_alphabet, hf_from_files
from llmjax.data.tokenizers.sentencepiece import BYTE, CONTROL, NORMAL, ROUNDING, SPACE, UNIGRAM, UNKNOWN, model_proto


def to_huggingface(tokenizer: Tokenizer) -> dict[str, bytes]:
  """{file name: content} with which Transformers' AutoTokenizer gives the same ids and texts.

  A tokenizer that came from a Hugging Face folder gives that folder's files, with tokens that `extend` added written
  into them. Any other gives a tokenizer.json, where a single text is a prompt (bos before it), and a
  tokenizer_config.json. It reads the name of a special token as text, as we do, unless it has a mask or sentinels,
  which one must be able to write. Where ours differ: what a tokenizer of characters refuses, Transformers leaves out,
  and broken UTF-8, which no text gives, may decode to another number of U+FFFD.

  Raises:
    ConfigError: a kind that cannot be written, or whose ids would differ.
  """
  if tokenizer.name == "hf":
    return _own_files(tokenizer)
  if tokenizer.name not in WRITERS:
    raise ConfigError(
      f"a tokenizer of kind {tokenizer.name!r} cannot be written for Transformers; these can: hf, {', '.join(WRITERS)}"
    )
  parts = WRITERS[tokenizer.name](tokenizer)
  bos = {} if tokenizer.bos_id is None else {tokenizer.names[tokenizer.bos_id]: tokenizer.bos_id}
  added = [added_token(i, name) for i, name in sorted(tokenizer.names.items())]
  settings = tokenizer_json(**parts, added_tokens=added, post_processor=template(bos, {}, bos))
  roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id, "mask": tokenizer.mask_id}
  named = {f"{role}_token": tokenizer.names[i] for role, i in roles.items() if i is not None}
  padding = tokenizer.names.get(tokenizer.pad_id, named.get("eos_token"))
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    "split_special_tokens": tokenizer.mask_id is None and not tokenizer.sentinels,
    **named,
    **({} if padding is None else {"pad_token": padding}),
    "additional_special_tokens": [tokenizer.names[i] for i in tokenizer.sentinels],
  }
  return {"tokenizer.json": _json(settings), "tokenizer_config.json": _json(config)}


def _json(content: Json) -> bytes:
  return json.dumps(content, ensure_ascii=False, indent=1).encode()


def _own_files(tokenizer: Tokenizer) -> dict[str, bytes]:
  """A folder's files, with the tokens that it did not have; Transformers knows no encoder.json."""
  files = tokenizer.to_files()
  if files.pop(EXTRA_FILE, None) is None and "encoder.json" not in files:
    return files
  settings, named = hf_formats.read_tokenizer_folder(files)
  own = hf_from_files(files).vocab_size
  new = [added_token(i, tokenizer.names[i]) for i in range(own, tokenizer.vocab_size)]
  settings = {**settings, "added_tokens": [*settings["added_tokens"], *new]}

  config = {**named, **hf_formats.parse(files, "tokenizer_config.json")}
  if tokenizer.mask_id is not None and tokenizer.mask_id >= own:
    config["mask_token"] = tokenizer.names[tokenizer.mask_id]
  if "added_tokens_decoder" in config:
    config["added_tokens_decoder"] |= {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in new}
  sentinels = [tokenizer.names[i] for i in tokenizer.sentinels if i >= own]
  key = "extra_special_tokens" if "extra_special_tokens" in config else "additional_special_tokens"
  if sentinels and isinstance(config.get(key, []), list):
    config[key] = [*config.get(key, []), *sentinels]

  written = {**files, "tokenizer.json": _json(settings), "tokenizer_config.json": _json(config)}
  if hf_from_files(written).names != tokenizer.names:
    raise ConfigError(
      "the vocabulary of this Hugging Face folder has holes in its ids, so that the package tokenizers would give the "
      "added mask and sentinels other ids than ours; train without them to export it"
    )
  return written


def _sentencepiece(tokenizer: Tokenizer) -> dict[str, Any]:
  """Pieces are written with plain spaces, so that U+2581 in a text is a character like any other that has no piece."""
  proto = model_proto(tokenizer.files["tokenizer.model"])
  rules, trained = proto.normalizer_spec, proto.trainer_spec
  if (
    not trained.byte_fallback
    or not rules.escape_whitespaces
    or any((rules.add_dummy_prefix, rules.remove_extra_whitespaces, rules.precompiled_charsmap))
    or {piece.type for piece in proto.pieces} - {NORMAL, UNKNOWN, CONTROL, BYTE}
  ):
    raise ConfigError(
      "this SentencePiece model changes the text or has no bytes for unknown characters, so a tokenizer.json could not "
      "give the same ids; llmjax can write those that it trains with byte_fallback=True, and any folder's own files "
      "(data.tokenizer.name='hf')"
    )
  text = {piece.piece.replace(SPACE, " "): i for i, piece in enumerate(proto.pieces) if piece.type == NORMAL}
  rest = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type != NORMAL}
  decoder = sequence("decoders", *BYTES_BACK)
  if trained.model_type != UNIGRAM:
    model = bpe(text | rest, hf_formats.merges(text), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    return {"model": model, "decoder": decoder}

  if any(piece.score * ROUNDING % 1 for piece in proto.pieces):
    raise ConfigError(
      "this unigram vocabulary has scores whose sums depend on the order of addition, so a tokenizer.json could not "
      "give the same ids; llmjax rounds the scores of those that it trains, but not yet when it trained this one"
    )
  # What is found in a text is what scores best, and names of bytes are found as any piece. No path through known
  # characters may score worse, and unknown ones, which score worse than anything, are cut out first.
  scores = {i: proto.pieces[i].score for i in text.values()}
  never = min(scores.values(), default=0.0) * 16 - 16
  pieces = sorted((text | rest).items(), key=lambda item: item[1])
  model = {"type": "Unigram", "unk_id": tokenizer.unk_id, "byte_fallback": True}
  unknown = "".join(sorted({character for name in rest for character in name} - set(text)))
  cut = {"type": "Split", "pattern": {"Regex": f"[{re.escape(unknown)}]"}, "behavior": "Isolated", "invert": False}
  return {
    "model": model | {"vocab": [[piece, scores.get(i, never)] for piece, i in pieces]},
    "pre_tokenizer": cut if unknown else None,
    "decoder": decoder,
  }


def _bytes(tokenizer: Tokenizer) -> dict[str, Any]:
  level = hf_formats.BYTE_LEVEL | {"use_regex": False}
  return {"model": bpe(byte_alphabet(), ()), "pre_tokenizer": level, "decoder": level}


def _characters(tokenizer: Tokenizer) -> dict[str, Any]:
  alphabet: Mapping[str, int] = {piece.decode(): i for i, piece in enumerate(tokenizer.pieces) if piece}
  if tokenizer.unk_id is None:
    return {"model": bpe(alphabet, ()), "decoder": {"type": "Fuse"}}
  unknown = tokenizer.names[tokenizer.unk_id]
  return {"model": bpe({**alphabet, unknown: tokenizer.unk_id}, (), unk_token=unknown), "decoder": {"type": "Fuse"}}


WRITERS = {"sentencepiece": _sentencepiece, "bytes": _bytes, "characters": _characters}

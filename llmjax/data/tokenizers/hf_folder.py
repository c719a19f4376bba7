"""The tokenizer of a Hugging Face folder as the content of a tokenizer.json, whichever files the folder has.

A tokenizer.json is used as it is; other vocabularies are converted (`hf_families`). Tokens that the folder's other
files name are added to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmjax.config import ConfigError
from llmjax.data.tokenizers.hf_families import Family, TokenNames, find_family
from llmjax.data.tokenizers.hf_files import (
  Files,
  JsonObject,
  declared_tokens,
  folder_config,
  parse_json_file,
  token_content,
)

TOKEN_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")


def read_tokenizer_folder(files: Files) -> tuple[JsonObject, dict[str, str | None]]:
  """Return the content of a tokenizer.json, and {"bos_token": "<s>", ...} with None for tokens declared absent.

  Raises:
    ConfigError: a file is damaged, or the vocabulary is of a kind that only a tokenizer.json can describe.
  """
  config = folder_config(files)
  family = find_family(files, config)
  if "tokenizer.json" in files:
    settings = parse_json_file(files, "tokenizer.json")
    if not {"model", "decoder", "added_tokens"} <= set(settings):
      raise ConfigError("tokenizer.json: has no model, decoder, added_tokens. Copy the file again")
  else:
    assert family is not None  # otherwise `find_family` raises
    settings = json.loads(family.convert(files, config, {**family.tokens, **declared_tokens(config)}).to_str())
  vocabulary = _model_vocabulary(settings)
  default_names = {} if family is None else {k: v for k, v in family.tokens.items() if v in vocabulary}
  names = {**default_names, **declared_tokens(config)}
  settings["added_tokens"] = _added_tokens(settings, vocabulary, names, files, config)
  if "tokenizer.json" not in files and family is not None:
    ids = {**vocabulary, **{token["content"]: token["id"] for token in settings["added_tokens"]}}
    settings["post_processor"] = _family_template(family, config, names, ids)
  return settings, names


def added_token(index: int, content: str, special: bool = True, **flags: bool) -> JsonObject:
  """Return an entry of "added_tokens"."""
  defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
  return {"id": index, "content": content, **defaults, **flags, "special": special}


def template_processor(
  before: Mapping[str, int], after: Mapping[str, int], between: Mapping[str, int] | None = None
) -> JsonObject:
  """Return a post-processor that puts special tokens {name: id} around a text.

  It is written as JSON because the constructor of the package `tokenizers` cannot express names with a colon.

  Args:
    before, after: tokens before and after a text; `after` also follows each text of a pair.
    between: tokens before the second text of a pair.
  """

  def pieces(tokens: Mapping[str, int], type_id: int) -> list[JsonObject]:
    return [{"SpecialToken": {"id": name, "type_id": type_id}} for name in tokens]

  between = between or {}
  single = [*pieces(before, 0), {"Sequence": {"id": "A", "type_id": 0}}, *pieces(after, 0)]
  second = [*pieces(between, 1), {"Sequence": {"id": "B", "type_id": 1}}, *pieces(after, 1)]
  tokens = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in {**before, **after, **between}.items()}
  return {"type": "TemplateProcessing", "single": single, "pair": single + second, "special_tokens": tokens}


def _model_vocabulary(settings: JsonObject) -> dict[str, int]:
  """Return {token: id} of the model, without added tokens."""
  vocabulary = settings["model"]["vocab"]
  if isinstance(vocabulary, list):  # of a unigram model, with scores
    return {piece: i for i, (piece, _) in enumerate(vocabulary)}
  return dict(vocabulary)


def _added_tokens(
  settings: JsonObject, vocabulary: Mapping[str, int], names: TokenNames, files: Files, config: JsonObject
) -> list[JsonObject]:
  """Return the added tokens of the settings and of the folder's other files, in the order of their ids."""
  named = {name for name in names.values() if name is not None}
  known = {t["content"]: {**t, "special": t["special"] or t["content"] in named} for t in settings["added_tokens"]}
  next_id = max([len(vocabulary), *(token["id"] + 1 for token in known.values())])
  for content, flags in _declared_additions(names, files, config).items():
    if content not in known:
      index = vocabulary.get(content, next_id)
      next_id += index == next_id
      known[content] = added_token(index, content, **{k: bool(v) for k, v in flags.items() if k in TOKEN_FLAGS})
  return sorted(known.values(), key=lambda token: token["id"])


def _declared_additions(names: TokenNames, files: Files, config: JsonObject) -> dict[str, Mapping[str, Any]]:
  """Return {token: flags} of all tokens that the folder's other files name: listed ones by id, then special ones."""
  more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
  more = list(more.values()) if isinstance(more, dict) else more
  named = [name for name in names.values() if name is not None]
  special = dict.fromkeys([*named, *map(token_content, more)])

  additions: dict[str, Mapping[str, Any]]
  if "added_tokens_decoder" in config:
    listed = config["added_tokens_decoder"]
    by_id = [listed[index] for index in sorted(listed, key=int)]
    additions = {t["content"]: {**t, "special": t.get("special", False) or t["content"] in named} for t in by_id}
  else:
    listed = parse_json_file(files, "added_tokens.json")
    additions = {token: {"special": token in special} for token in sorted(listed, key=listed.__getitem__)}
  described = {t["content"]: t for t in (*config.values(), *more) if isinstance(t, dict) and "content" in t}
  for token in special:
    additions.setdefault(token, {**described.get(token, {}), "special": True})
  return additions


def _family_template(family: Family, config: JsonObject, names: TokenNames, ids: Mapping[str, int]) -> JsonObject:
  """Return the post-processor of a folder without a tokenizer.json."""
  uses_bos = family.adds_bos is None or bool(config.get("add_bos_token", family.adds_bos))
  uses_eos = family.adds_eos is None or bool(config.get("add_eos_token", family.adds_eos))

  def with_ids(roles: Sequence[str]) -> dict[str, int]:
    return {name: ids[name] for name in map(names.get, roles) if name is not None}

  return template_processor(
    before=with_ids(family.before if uses_bos else ()),
    after=with_ids(family.after if uses_eos else ()),
    between=with_ids(family.between if uses_bos else ()),
  )

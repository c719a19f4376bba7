"""Files that hold the tokenizer of a Hugging Face folder, and reading them.

tokenizer.json is the format of the package `tokenizers` and describes a tokenizer completely. Older folders have the
vocabulary of GPT-2, BERT or SentencePiece instead, and settings in further files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from llmjax.config import ConfigError

JsonObject: TypeAlias = dict[str, Any]
Files: TypeAlias = Mapping[str, bytes]  # {file name: content}

# Files of a vocabulary; a folder uses the first of these that it has.
VOCABULARY_FILES = (
  ("tokenizer.json",),
  ("vocab.json", "merges.txt"),
  ("encoder.json", "vocab.bpe"),
  ("vocab.txt",),
  ("spiece.model",),
  ("tokenizer.model",),
)
# Further files, all optional.
COMPANION_FILES = (
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "chat_template.json",
)


def parse_json_file(files: Files, name: str) -> JsonObject:
  """Return the content of a JSON file; {} if there is no such file."""
  try:
    content = json.loads(files.get(name, b"{}"))
  except ValueError as error:
    raise ConfigError(f"{name}: not JSON: {error}. Copy the file again") from error
  if not isinstance(content, dict):
    raise ConfigError(f"{name}: must hold an object, got a {type(content).__name__}. Copy the file again")
  return content


def decode_text_file(files: Files, name: str) -> str:
  try:
    return files[name].decode()
  except UnicodeDecodeError as error:
    raise ConfigError(f"{name}: byte {error.start} is not UTF-8. Copy the file again") from error


def folder_config(files: Files) -> JsonObject:
  """Return tokenizer_config.json; if it does not list the added tokens, together with special_tokens_map.json."""
  config = parse_json_file(files, "tokenizer_config.json")
  return config if "added_tokens_decoder" in config else config | parse_json_file(files, "special_tokens_map.json")


def declared_tokens(config: JsonObject) -> dict[str, str | None]:
  """Return {"bos_token": "<s>", ...} of a configuration; None: the folder declares that it has no such token."""
  tokens = {k: v for k, v in config.items() if k.endswith("_token") and (v is None or isinstance(v, (str, dict)))}
  return {k: None if v is None else token_content(v) for k, v in tokens.items()}


def token_content(token: str | Mapping[str, Any]) -> str:
  """Return the text of a token, which files give either alone or with its flags."""
  return token if isinstance(token, str) else str(token["content"])

"""Settings in a Hugging Face folder besides the model's: generation, and sentence embeddings."""

from __future__ import annotations

import json
from pathlib import Path

from llmjax.config import ConfigError, Json
from llmjax.interop.families.base import HfConfig
from llmjax.interop.generation_config import GENERATION_FIELDS, TOKEN_FIELDS

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
MODULES_FILE, SENTENCE_FILE = "modules.json", "sentence_bert_config.json"

# {pooling mode of sentence-transformers: pooling of the contrastive objective}
POOLING_MODES = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last"}


def read_json_object(path: Path) -> dict[str, Json]:
  """Return the object in a JSON file.

  Raises:
    ConfigError: no such file, or not a JSON object.
  """
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise ConfigError(f"{path} does not exist") from error
  except (ValueError, UnicodeDecodeError) as error:
    raise ConfigError(f"{path} is damaged: {error}") from error
  if not isinstance(content, dict):
    raise ConfigError(f"{path} is damaged: it must be a JSON object, got {type(content).__name__}")
  return content


def read_generation_config(folder: Path, config: HfConfig) -> dict[str, Json]:
  """Return a folder's generation_config.json, with the special tokens that only its config.json names.

  Without that file, the fields are those of config.json.
  """
  has_file = (folder / GENERATION_FILE).is_file()
  names = TOKEN_FIELDS if has_file else GENERATION_FIELDS
  fields = {name: value for name, value in config.items() if name in names and value is not None}
  return fields | (read_json_object(folder / GENERATION_FILE) if has_file else {})


def read_sentence_settings(folder: Path) -> dict[str, Json]:
  """Return "pooling" and "seq_len" of a sentence-transformers folder, each if the folder has it.

  Raises:
    ConfigError: a module or a pooling mode that is not supported.
  """
  settings: dict[str, Json] = {}
  if (folder / MODULES_FILE).is_file():
    _check_sentence_modules(folder / MODULES_FILE)
  if (folder / "1_Pooling" / CONFIG_FILE).is_file():
    settings["pooling"] = _read_pooling(folder / "1_Pooling" / CONFIG_FILE)
  if (folder / SENTENCE_FILE).is_file():
    length = read_json_object(folder / SENTENCE_FILE).get("max_seq_length")
    settings |= {} if length is None else {"seq_len": length}
  return settings


def _check_sentence_modules(path: Path) -> None:
  try:
    modules = json.loads(path.read_text(encoding="utf-8"))
    names = [str(module["type"]).rpartition(".")[2] for module in modules]
  except (ValueError, TypeError, LookupError) as error:
    raise ConfigError(f"{path} is damaged: {error}") from error
  unsupported = [name for name in names if name not in ("Transformer", "Pooling", "Normalize")]
  if unsupported:
    raise ConfigError(f"{path}: module {unsupported[0]} is not supported, and changes the embeddings")


def _read_pooling(path: Path) -> str:
  prefix = "pooling_mode_"
  modes = [k.removeprefix(prefix) for k, v in read_json_object(path).items() if k.startswith(prefix) and v is True]
  if len(modes) != 1 or modes[0] not in POOLING_MODES:
    used = " and ".join(modes) or "none"
    raise ConfigError(f"{path}: pooling mode {used} is not supported; allowed is one of {', '.join(POOLING_MODES)}")
  return POOLING_MODES[modes[0]]

"""Models by their names on the Hugging Face hub: from the cache, else downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from llmjax.config import ConfigError

NAME = re.compile(r"(?!.*(--|\.\.))[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?")
# Weights, config and tokenizer; never pickles, nor the same weights in other formats in folders beside them.
WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.bpe", "1_Pooling/config.json")
UNWANTED = ("onnx/*", "openvino/*", "coreml/*", "original/*", "*.onnx.json", "training_args*", "all_results*")


def is_name(text: str) -> bool:
  """Whether this could be NAME, ORG/NAME, or one of them with @REVISION."""
  return NAME.fullmatch(text) is not None


def fetch(name: str) -> Path:
  """The folder of a model: of the cache where it is there, else downloaded.

  Raises:
    ConfigError: there is no such model, or no way to it.
  """
  from huggingface_hub import snapshot_download

  repository, _, revision = name.partition("@")
  settings: dict[str, Any] = {
    "revision": revision or None,
    "allow_patterns": list(WANTED),
    "ignore_patterns": list(UNWANTED),
    "endpoint": os.environ.get("HF_ENDPOINT"),
  }
  for known in (repository, *_owners(repository)):
    try:
      return _complete(Path(snapshot_download(known, local_files_only=True, **settings)))
    except (OSError, ValueError):  # what the package raises where a cache lacks it
      continue
  try:
    return _complete(Path(snapshot_download(repository, **settings)))
  except Exception as error:  # of many kinds: no network, no such name, a gate, a full disk
    reason = str(error).strip().splitlines()[0][:120].rstrip(" .")
    raise ConfigError(
      f"{name}: there is no such folder, it is not in the Hugging Face cache, and it could not be downloaded "
      f"({reason}); give a folder, or run `hf download {repository}` where there is a network"
    ) from error


def _complete(folder: Path) -> Path:
  """A cache may hold a model in part, such as its tokenizer alone."""
  if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
    raise FileNotFoundError(f"it has no config.json or no safetensors ({folder})")
  return folder


def _owners(name: str) -> list[str]:
  """Names in the cache of a model that is called without its organisation, as gpt2 is."""
  from huggingface_hub.constants import HF_HUB_CACHE

  if "/" in name:
    return []
  found = Path(HF_HUB_CACHE).glob(f"models--*--{name}")
  return sorted("/".join(path.name.split("--")[1:]) for path in found)

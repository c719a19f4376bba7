"""Models by their names on the Hugging Face hub: from the cache, else downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from llmjax.config import ConfigError
from llmjax.interop.tensors import INDEX, shards

NAME = re.compile(r"(?!.*(--|\.\.))[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?")
# Weights, config and tokenizer; never pickles, nor the same weights in other formats in folders beside them.
WANTED = ("*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja", "*.bpe")
UNWANTED = ("onnx/*", "openvino/*", "coreml/*", "original/*", "*.onnx.json", "training_args*", "all_results*")


# Whose models are called without their organisation, as the hub itself does.
OWNERS = {
  "gpt2": "openai-community",
  "bert": "google-bert",
  "roberta": "FacebookAI",
  "distilbert": "distilbert",
  "t5": "google-t5",
}


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
  family = re.split("[-.]", repository)[0]
  owned = [f"{OWNERS[family]}/{repository}"] if "/" not in repository and family in OWNERS else []
  for known in (repository, *owned):
    try:
      return _complete(Path(snapshot_download(known, local_files_only=True, **settings)))
    except (OSError, ValueError):  # what the package raises where a cache lacks it
      continue
  try:
    folder = Path(snapshot_download(repository, **settings))
  except Exception as error:  # of many kinds: no network, no such name, a gate, a full disk
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120].rstrip(" .")
    raise ConfigError(
      f"{name}: there is no such folder, it is not in the Hugging Face cache, and it could not be downloaded "
      f"({reason}); give a folder, or run `hf download {repository}` where there is a network"
    ) from error
  if not any(folder.glob("*.safetensors")):
    raise ConfigError(
      f"{name} has no safetensors on the hub; its weights may be pickles, which may run code when they are opened: "
      f'where you trust them, python -c "from transformers import AutoModelForCausalLM as M; '
      f"M.from_pretrained('{repository}').save_pretrained('DIR')\", and give DIR"
    )
  return folder


def _complete(folder: Path) -> Path:
  """A cache may hold a model in part, such as its tokenizer alone."""
  wanted = {"config.json", *({"model.safetensors"} if not (folder / INDEX).is_file() else shards(folder))}
  if not all((folder / file).is_file() for file in wanted):
    raise FileNotFoundError(folder)
  return folder

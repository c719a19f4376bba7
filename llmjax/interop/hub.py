"""Models by their names on the Hugging Face hub: from the local cache, else downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from llmjax.config import ConfigError
from llmjax.interop.folder_settings import CONFIG_FILE
from llmjax.interop.tensors import INDEX_FILE, WEIGHTS_FILE, read_shard_names

HUB_NAME = re.compile(r"(?!.*(--|\.\.))[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?")
# Weights, config and tokenizer. Never pickles, nor the same weights in other formats in subfolders.
ALLOWED_FILES = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja", "*.bpe"]
IGNORED_FILES = ["onnx/*", "openvino/*", "coreml/*", "original/*", "*.onnx.json", "training_args*", "all_results*"]

# Organisations whose models the hub also finds by their short names.
ORGANIZATIONS = {
  "gpt2": "openai-community",
  "bert": "google-bert",
  "roberta": "FacebookAI",
  "distilbert": "distilbert",
  "t5": "google-t5",
}


def is_hub_name(text: str) -> bool:
  """Whether a text can be NAME, ORG/NAME, or one of them with @REVISION."""
  return HUB_NAME.fullmatch(text) is not None


def fetch_from_hub(name: str) -> Path:
  """Return the folder of a model, from the cache if it is there, else downloaded.

  Raises:
    ConfigError: the hub has no such model, or cannot be reached.
  """
  repository, _, revision = name.partition("@")
  short_name = re.split("[-.]", repository)[0]
  names = [repository]
  if "/" not in repository and short_name in ORGANIZATIONS:
    names.append(f"{ORGANIZATIONS[short_name]}/{repository}")
  for candidate in names:
    folder = _find_in_cache(candidate, revision or None)
    if folder is not None:
      return folder
  try:
    folder = _snapshot(repository, revision or None, only_cached=False)
  except Exception as error:  # of many kinds: no network, unknown name, gated model, full disk
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120].rstrip(" .")
    raise ConfigError(
      f"{name} is not a folder, is not in the Hugging Face cache, and could not be downloaded ({reason}); give a "
      f"folder, or run `hf download {repository}` on a machine with a network"
    ) from error
  if not any(folder.glob("*.safetensors")):
    raise ConfigError(
      f"{name} has no safetensors files on the hub; its weights may be pickles, which may run code when they are "
      f'opened. Where you trust them, run python -c "from transformers import AutoModelForCausalLM as M; '
      f"M.from_pretrained('{repository}').save_pretrained('DIR')\", and give DIR"
    )
  return folder


def _snapshot(repository: str, revision: str | None, *, only_cached: bool) -> Path:
  from huggingface_hub import snapshot_download

  folder = snapshot_download(
    repository,
    revision=revision,
    allow_patterns=ALLOWED_FILES,
    ignore_patterns=IGNORED_FILES,
    endpoint=os.environ.get("HF_ENDPOINT"),
    local_files_only=only_cached,
  )
  return Path(folder)


def _find_in_cache(repository: str, revision: str | None) -> Path | None:
  """Return a model's folder in the cache, None if it is missing or has only some of the files."""
  try:
    folder = _snapshot(repository, revision, only_cached=True)
    weights = read_shard_names(folder) if (folder / INDEX_FILE).is_file() else [WEIGHTS_FILE]
  except (OSError, ValueError):  # what huggingface_hub raises if the cache lacks the model
    return None
  return folder if all((folder / file).is_file() for file in (CONFIG_FILE, *weights)) else None

"""Hugging Face folders as pretrained models: `HuggingFaceSource`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from llmjax.checkpoints.heads import HEAD_FIELDS
from llmjax.checkpoints.manifest import Manifest
from llmjax.checkpoints.objectives import infer_head_objective
from llmjax.checkpoints.sources.base import PretrainedSource
from llmjax.checkpoints.sources.init_map import (
  OUTPUT_PREFIXES,
  InitMap,
  may_be_reinitialized,
  other_head_error,
  source_name,
)
from llmjax.checkpoints.upgrade import FORMAT_VERSION
from llmjax.config import ConfigError, default_config, to_dict
from llmjax.config.model import TransformerConfig
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.data.tokenizers.hf_files import VOCABULARY_FILES
from llmjax.data.tokenizers.huggingface import tokenizer_from_folder
from llmjax.interop.config_json import architecture_differences, class_names
from llmjax.interop.families.base import Head
from llmjax.interop.folder_reader import HuggingFaceFolder, open_huggingface_folder, read_folder_params
from llmjax.interop.folder_settings import read_generation_config, read_sentence_settings
from llmjax.trees import Params, flatten_tree
from llmjax.types import Model

DEFAULT_SEQ_LEN = 1024  # tokens of a row in evaluation, if the folder does not say
DEFAULT_BATCH_SIZE = 8


class HuggingFaceSource(PretrainedSource):
  """A folder in the format of Hugging Face."""

  def __init__(self, path: str, folder: Path):
    self._folder = open_huggingface_folder(folder)
    super().__init__(path, folder, folder_manifest(self._folder))

  def read_tokenizer(self, trust: bool) -> Tokenizer | None:
    has_tokenizer = any((self.folder / name).is_file() for names in VOCABULARY_FILES for name in names)
    return tokenizer_from_folder(self.folder) if has_tokenizer else None

  def read_params(self, model: Model, abstract: Params) -> Params:
    self._check_architecture(model.cfg)
    return read_folder_params(self._folder, model.cfg, abstract)

  def read_initial_params(self, model: Model, abstract: Params, init_map: InitMap) -> Params:
    cfg: TransformerConfig = model.cfg
    self._check_architecture(cfg, ignored_fields=HEAD_FIELDS)
    if any(replacement is not None for _, replacement in init_map):
      raise ConfigError(
        f"init_map: {self.path} is a Hugging Face folder, whose names are known; a rule can only be (regex, None)"
      )
    has_same_head = cfg.head == self._folder.cfg.head
    if has_same_head and cfg.num_classes != self._folder.cfg.num_classes:
      outputs = [path for path in flatten_tree(abstract) if path.startswith(OUTPUT_PREFIXES)]
      wanted = [path for path in outputs if source_name(init_map, path) is not None]
      if wanted:
        raise other_head_error(self.path, wanted[0], (cfg.num_classes,), (self._folder.cfg.num_classes,))
    shared = _shared_output_parameters(self._folder, cfg.head)

    def skip(path: str) -> bool:
      is_of_other_head = not has_same_head and path.startswith(OUTPUT_PREFIXES) and path not in shared
      return is_of_other_head or source_name(init_map, path) is None

    return read_folder_params(self._folder, cfg, abstract, skip, may_be_reinitialized)

  def _check_architecture(self, cfg: TransformerConfig, ignored_fields: tuple[str, ...] = ()) -> None:
    """Raise ConfigError if a model computes something else than that of the folder."""
    differences = architecture_differences(cfg, self._folder.cfg)
    for field in sorted(set(differences) - {"max_len", *ignored_fields}):
      here, there = differences[field]
      raise ConfigError(f"init_from={self.path}: model.{field}={here!r}, but {there!r} in the folder; set it to that")


def _shared_output_parameters(folder: HuggingFaceFolder, kind: str) -> set[str]:
  """Return the output parameters that a folder's head shares with the family's head of another kind.

  For example, all heads of ModernBERT start with the same projection.
  """

  def named_parameters(head: Head) -> set[tuple[str, str]]:
    return {(path, tensor) for tensor, parts in head.tensors.items() for path, _ in parts}

  heads = folder.family.heads
  other = next((named_parameters(head) for head in heads.values() if head.kind == kind), set())
  return {path for path, _ in named_parameters(heads[folder.architecture]) & other}


def folder_manifest(folder: HuggingFaceFolder) -> Manifest:
  """Return the manifest that a folder would have as a checkpoint."""
  sentence_settings = read_sentence_settings(folder.path)
  cfg = folder.cfg
  model = {"name": "transformer", **dataclasses.asdict(cfg)}
  config = to_dict(default_config())
  config["model"] = model
  config["seq_len"] = min(sentence_settings.get("seq_len", DEFAULT_SEQ_LEN), cfg.max_len)
  config["batch_size"] = DEFAULT_BATCH_SIZE
  config["data"] |= {"tokenizer": {"name": "hf", "path": str(folder.path)}}
  labels = class_names(folder.config) if cfg.head in ("sequence", "token") else None
  if "pooling" in sentence_settings:
    config["objective"] = {"name": "contrastive", "pooling": sentence_settings["pooling"]}
  elif cfg.head == "lm":
    config["objective"] = dict(folder.family.objective)
  else:
    problem_type = folder.config.get("problem_type")
    config["objective"] = infer_head_objective(cfg.head, labels or (), problem_type, config["seq_len"])
  return {
    "format_version": FORMAT_VERSION,
    "config": config,
    "model": model,
    "objective": config["objective"],
    "family": folder.family.model_type,
    "architecture": folder.architecture,
    "labels": labels,
    "generation": read_generation_config(folder.path, folder.config),
    "ema": False,
    "total_steps": 0,
    "metrics": {},
    "layout": "scanned",
  }

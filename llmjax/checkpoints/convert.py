"""Hugging Face folders to checkpoints of llmjax and back: `llmjax import` and `llmjax export`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from llmjax.checkpoints.manager import Checkpoints
from llmjax.checkpoints.manifest import pack_tokenizer, package_versions
from llmjax.checkpoints.paths import open_path
from llmjax.checkpoints.sources.base import transformer_config_of
from llmjax.checkpoints.sources.init_map import source_name
from llmjax.config import ConfigError, Json
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.data.tokenizers.hf_export import to_huggingface
from llmjax.interop.folder_settings import GENERATION_FILE
from llmjax.interop.folder_writer import write_folder
from llmjax.interop.peft.adapter_folder import adapter_base_path, is_adapter_folder
from llmjax.interop.peft.writer import changed_parameters, write_adapter
from llmjax.models.lora import is_adapter, merge_lora
from llmjax.trees import flatten_tree, match_rules

# {kind of the classification objective: problem_type in config.json}
PROBLEM_TYPES = {
  "single": "single_label_classification",
  "multi": "multi_label_classification",
  "regression": "regression",
}
SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def import_folder(path: str, output: str, **changes: Json) -> tuple[str, int]:
  """Write a Hugging Face folder as the checkpoint OUTPUT/checkpoints/0.

  Args:
    path: a folder or a hub name.
    output: workdir, which must not exist or be empty.
    changes: fields of the model's config with other values, such as param_dtype.

  Returns:
    (architecture, number of parameters).
  """
  workdir = _new_folder(output)
  with open_path(path) as source:
    if "architecture" not in source.manifest:
      raise ConfigError(f"--hf={path} is a checkpoint of llmjax already; give a Hugging Face folder or a hub name")
    _, params, tokenizer = source.load(**changes)
    num_params = sum(x.size for x in jax.tree.leaves(params))
    model = {**source.manifest["model"], **changes}
    manifest = source.manifest | {
      "model": model,
      "config": source.config | {"model": model},
      "tokenizer": None if tokenizer is None else pack_tokenizer(tokenizer),
      "num_params": num_params,
      "data_fingerprint": None,
      "versions": package_versions(),
    }
  checkpoints = Checkpoints(workdir, write=True)
  try:
    checkpoints.save(0, {"params": params}, None, manifest, {})
  finally:
    checkpoints.close()
  return source.manifest["architecture"], num_params


class ExportedFolder(NamedTuple):
  """The result of `export_folder`; `no_tokenizer_reason` is None if the folder has a tokenizer."""

  architecture: str
  files: list[str]
  no_tokenizer_reason: str | None


def export_folder(
  path: str,
  output: str,
  *,
  family: str | None = None,
  dtype: str | None = None,
  max_shard_size: str = "5GB",
  trust: bool = False,
) -> ExportedFolder:
  """Write the model of a PATH as a folder for Transformers' `from_pretrained`. Adapters are merged into the weights.

  Args:
    path: see `open_path`.
    output: folder, which must not exist or be empty.
    family: model_type of the result; None: that of the imported model, else the first that has this architecture.
    dtype: of the tensors; None: that of the parameters.
    max_shard_size: of one file, such as "500MB".
    trust: allow code outside llmjax.

  Raises:
    ConfigError: no family has the model's architecture; the differences from the nearest are named.
  """
  folder = _new_folder(output)
  max_shard_bytes = parse_size(max_shard_size)
  with open_path(path) as source:
    model, params, tokenizer = source.load(trust)
    manifest = source.manifest
  cfg = transformer_config_of(model)
  objective = manifest["objective"] or {}
  generation = manifest.get("generation") or {}
  tokens = _special_token_fields(tokenizer)
  extra = tokens | {key: value for key, value in generation.items() if key.endswith("_token_id")}
  if objective.get("kind") in PROBLEM_TYPES:
    extra["problem_type"] = PROBLEM_TYPES[objective["kind"]]
  tokenizer_files, reason = _export_tokenizer(tokenizer)
  architecture = write_folder(
    folder,
    dataclasses.replace(cfg, lora_rank=0),
    merge_lora(params, cfg),
    prefer=manifest.get("family"),
    only=family,
    labels=objective.get("labels") or manifest.get("labels"),
    extra=extra,
    dtype=dtype,
    max_shard_bytes=max_shard_bytes,
  )
  for name, content in tokenizer_files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
  if cfg.stacks != "encoder" and cfg.head == "lm":
    fields = generation or {key: value for key, value in extra.items() if key in tokens and value is not None}
    (folder / GENERATION_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
  files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
  return ExportedFolder(architecture, files, reason)


def export_adapter(path: str, output: str, *, family: str | None = None, trust: bool = False) -> tuple[str, str]:
  """Write the adapters of a run as PEFT reads them, with its head and its other trained parameters.

  Args:
    path: see `open_path`.
    output, family, trust: see `export_folder`.

  Returns:
    (architecture, PATH of the base model, which the run started from).

  Raises:
    ConfigError: the run has no adapters or no base model, or trained a parameter that an adapter's folder cannot hold.
  """
  folder = _new_folder(output)
  with open_path(path) as source:
    base = source.config["init_from"]
    if base is None:
      raise ConfigError(f"{path} did not start from a pretrained model (init_from), so that its adapters have no base")
    if is_adapter_folder(base):
      base = adapter_base_path(base)
    model, params, _ = source.load(trust)
    cfg, manifest = transformer_config_of(model), source.manifest
  base = str(Path(base).resolve()) if Path(base).exists() else base
  trainable = match_rules(source.config["trainable"], params, "trainable")
  initialized = {path for path in flatten_tree(params) if source_name(source.config["init_map"], path) is None}
  saved = changed_parameters(cfg, trainable) | {path for path in initialized if not is_adapter(path)}
  architecture = write_adapter(folder, params, cfg, base=base, prefer=manifest.get("family"), only=family, saved=saved)
  return architecture, base


def _special_token_fields(tokenizer: Tokenizer | None) -> dict[str, Json]:
  """Return the special tokens for config.json. Missing ones are null: the defaults of Transformers' classes may lie
  outside a small vocabulary."""
  if tokenizer is None:
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
  pad_id = tokenizer.pad_id if "pad_token" in tokenizer.token_names else None
  return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad_id}


def _export_tokenizer(tokenizer: Tokenizer | None) -> tuple[Mapping[str, bytes], str | None]:
  """Return the tokenizer's files for Transformers, or the reason why there are none: weights are useful without."""
  if tokenizer is None:
    return {}, "the model has none"
  try:
    return to_huggingface(tokenizer), None
  except ConfigError as error:
    return {}, str(error)


def parse_size(text: str) -> int:
  """Return the bytes of "5GB", "200MB" or a number."""
  number = text.rstrip("BKMGbkmg")
  unit = text[len(number) :].upper()
  if not number.isdecimal() or int(number) < 1 or unit not in {"", *SIZE_UNITS}:
    raise ConfigError(f"--max_shard_size={text} is not a size; give 5GB, 200MB, or a number of bytes")
  return int(number) * SIZE_UNITS.get(unit, 1)


def _new_folder(output: str) -> Path:
  folder = Path(output)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ConfigError(f"--output={output} exists already; give a folder that does not exist or is empty")
  return folder

"""Hugging Face folders to checkpoints of ours, and back: `llmjax import` and `llmjax export`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from llmjax import trees
from llmjax.checkpoints import manager
from llmjax.checkpoints.manifest import pack_tokenizer, package_versions
from llmjax.checkpoints.sources import open_path, source_name, transformer_config_of
from llmjax.config import ConfigError
from llmjax.data.tokenizers.hf_export import to_huggingface
from llmjax.interop import huggingface, peft
from llmjax.models import lora
from llmjax.trees import match_rules

# What Transformers calls the kinds of `objectives.classification`.
PROBLEMS = {
  "single": "single_label_classification",
  "multi": "multi_label_classification",
  "regression": "regression",
}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def import_folder(path: str, output: str, **changes: Any) -> tuple[str, int]:
  """Writes a Hugging Face folder as a checkpoint of ours, OUTPUT/checkpoints/0.

  Args:
    path: a folder or a hub name.
    changes: fields of the model's config, such as param_dtype.
  Returns:
    (architecture, number of parameters).
  """
  target = _new(output)
  with open_path(path) as source:
    if "architecture" not in source.manifest:
      raise ConfigError(f"--hf={path} is a checkpoint of llmjax already")
    _, params, tokenizer = source.load(**changes)
    count = sum(x.size for x in jax.tree.leaves(params))
    spec = {**source.manifest["model"], **changes}
    manifest = source.manifest | {
      "model": spec,
      "config": source.config | {"model": spec},
      "tokenizer": None if tokenizer is None else pack_tokenizer(tokenizer),
      "num_params": count,
      "data_fingerprint": None,
      "versions": package_versions(),
    }
  checkpoints = manager.Checkpoints(target, write=True)
  try:
    checkpoints.save(0, {"params": params}, None, manifest, {})
  finally:
    checkpoints.close()
  return source.manifest["architecture"], count


def export_folder(
  path: str,
  output: str,
  *,
  family: str | None = None,
  dtype: str | None = None,
  max_shard_size: str = "5GB",
  trust: bool = False,
) -> tuple[str, list[str], str | None]:
  """Writes a PATH as a folder that Transformers opens with `from_pretrained`; adapters are merged into the weights.

  Args:
    path: see `pretrained.open_path`.
    family: the model_type that it shall be; None is the one that it came from, else the first of this shape.
    dtype: of the tensors; None is that of the parameters.
    max_shard_size: of one file, such as "500MB".
  Returns:
    (architecture, names of the files, why the tokenizer is not among them).
  Raises:
    ConfigError: no architecture has the model's shape; what it lacks is named.
  """
  target = _new(output)
  size = parse_size(max_shard_size)
  with open_path(path) as source:
    model, params, tokenizer = source.load(trust)
    manifest = source.manifest
  cfg = dataclasses.replace(transformer_config_of(model), lora_rank=0)
  task = manifest["objective"] or {}
  generates = manifest.get("generation") or {}
  # Null too is said: the defaults of Transformers' classes may lie outside a small vocabulary.
  ends: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
  if tokenizer is not None:
    pad = tokenizer.pad_id if "pad_token" in tokenizer.token_names else None
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad}
  tokenizer_files, reason = _tokenizer_files(tokenizer)
  ends |= {key: value for key, value in generates.items() if key.endswith("_token_id")}
  architecture = huggingface.write_folder(
    target,
    cfg,
    lora.merge_lora(params, transformer_config_of(model)),
    prefer=manifest.get("family"),
    only=family,
    labels=task.get("labels") or manifest.get("labels"),
    extra=ends | ({"problem_type": PROBLEMS[task["kind"]]} if task.get("kind") in PROBLEMS else {}),
    dtype=dtype,
    max_shard_bytes=size,
  )
  for name, content in tokenizer_files.items():
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    (target / name).write_bytes(content)
  if cfg.stacks != "encoder" and cfg.head == "lm":
    settings = generates or {k: v for k, v in ends.items() if v is not None}
    (target / huggingface.GENERATION).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
  return architecture, sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()), reason


def export_adapter(path: str, output: str, *, family: str | None = None, trust: bool = False) -> tuple[str, str]:
  """Writes the adapters of a run alone, as PEFT reads them, with its head and all else that it trained.

  Args:
    path: see `pretrained.open_path`.
    family: see `export_folder`.
  Returns:
    (architecture, PATH of the model that they are for: what the run started from).
  Raises:
    ConfigError: the run has no adapters or started from nothing; what an adapter's folder has no place for.
  """
  target = _new(output)
  with open_path(path) as source:
    base = source.config["init_from"]
    if base is None:
      raise ConfigError(f"{path} did not start from a model (init_from), and adapters are of use beside theirs alone")
    if peft.is_adapter_folder(base):
      base = peft.base_path(base)
    model, params, _ = source.load(trust)
    cfg, manifest = transformer_config_of(model), source.manifest
  learns = match_rules(source.config["trainable"], params, "trainable")
  base = str(Path(base).resolve()) if Path(base).exists() else base
  fresh = {name for name in trees.flatten_tree(params) if source_name(source.config["init_map"], name) is None}
  saved = peft.trained(cfg, learns) | {name for name in fresh if not lora.is_adapter(name)}
  architecture = peft.write_adapter(
    target, params, cfg, base=base, prefer=manifest.get("family"), only=family, saved=saved
  )
  return architecture, base


def _tokenizer_files(tokenizer: Any) -> tuple[dict[str, bytes], str | None]:
  """Its files for Transformers, or why there are none: weights are of use without."""
  if tokenizer is None:
    return {}, "the model has none"
  try:
    return to_huggingface(tokenizer), None
  except ConfigError as error:
    return {}, str(error)


def parse_size(text: str) -> int:
  """Bytes of "5GB", "200MB" or a number."""
  number, unit = text.rstrip("BKMGbkmg"), text.upper()[len(text.rstrip("BKMGbkmg")) :]
  if not number.isdecimal() or int(number) < 1 or unit not in {"", *UNITS}:
    raise ConfigError(f"--max_shard_size={text} is no size; say 5GB, 200MB, or a number of bytes")
  return int(number) * UNITS.get(unit, 1)


def _new(output: str) -> Path:
  target = Path(output)
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise ConfigError(f"--output={output} exists already; give a folder that does not, or is empty")
  return target

"""Hugging Face folders, written: config.json and safetensors that Transformers opens with `from_pretrained`."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from llmjax.config import ConfigError, Json, suggest_name
from llmjax.config.model import CHOICES, TransformerConfig
from llmjax.interop.config_json import (
  architecture_differences,
  default_class_names,
  read_model_config,
  write_model_config,
)
from llmjax.interop.families.base import Family
from llmjax.interop.families.registry import FAMILIES
from llmjax.interop.folder_settings import CONFIG_FILE
from llmjax.interop.tensor_map import TensorEntry, list_tensors, unrolled_parameters
from llmjax.interop.tensors import TensorToWrite, merge_parameters, tensor_shape, write_tensors
from llmjax.trees import Params, flatten_tree


def choose_family(cfg: TransformerConfig, prefer: str | None = None, only: str | None = None) -> tuple[Family, str]:
  """Return the family and the architecture of a model.

  Args:
    prefer: model_type to try first.
    only: the only model_type to try.

  Raises:
    ConfigError: no family has this architecture; the nearest one is named, with the differences.
  """
  if only is not None and only not in FAMILIES:
    raise ConfigError(f"family={only!r} is unknown; {suggest_name(only, FAMILIES)}")
  families = sorted(FAMILIES.values(), key=lambda family: family.model_type != prefer)
  fewest: tuple[int, str] | None = None
  for family in families:
    if only not in (None, family.model_type) or ("num_experts" in family.fields and not cfg.num_experts):
      continue
    for architecture in family.heads:
      try:
        config = {**write_model_config(family, architecture, cfg), **_class_name_fields(cfg, None)}
        read_back = read_model_config(family, architecture, config, family.model_type)
      except ConfigError:
        continue
      differences = architecture_differences(cfg, read_back)
      if not differences:
        return family, architecture
      if fewest is None or len(differences) < fewest[0]:
        values = ", ".join(f"model.{k}={own!r} (there {other!r})" for k, (own, other) in differences.items())
        fewest = len(differences), f"the nearest is {architecture}, but for {values}"
  group = "Hugging Face" if only is None else f"the family {only}"
  raise ConfigError(f"no architecture of {group} matches this model; {fewest[1] if fewest else 'none is similar'}")


def write_folder(
  path: Path,
  cfg: TransformerConfig,
  params: Params,
  *,
  prefer: str | None = None,
  only: str | None = None,
  labels: Sequence[str] | None = None,
  extra: Mapping[str, Json] | None = None,
  dtype: str | None = None,
  max_shard_bytes: int = 5 * 10**9,
) -> str:
  """Write config.json and safetensors files. Returns the architecture.

  Args:
    path: the folder.
    params: parameters without adapters.
    prefer, only: see `choose_family`.
    labels: names of the classes of a head; None: LABEL_0, LABEL_1, ...
    extra: further fields of config.json, such as ids of special tokens.
    dtype: of the tensors; None: that of the parameters.
    max_shard_bytes: maximum size of a file.
  """
  if dtype not in (None, *CHOICES["param_dtype"]):
    raise ConfigError(f"dtype={dtype!r} is not supported; allowed are {', '.join(CHOICES['param_dtype'])}")
  family, architecture = choose_family(cfg, prefer, only)
  tensor_dtype = np.dtype(jax.numpy.dtype(dtype or cfg.param_dtype))
  entries = list_tensors(family, architecture, cfg, unrolled_parameters(cfg, params))
  tensors = _tensors_to_write(entries, architecture, cfg, params, tensor_dtype)
  config = {**write_model_config(family, architecture, cfg), **_class_name_fields(cfg, labels)}
  config |= {"torch_dtype": str(tensor_dtype), **(extra or {})}
  path.mkdir(parents=True, exist_ok=True)
  (path / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
  for file in write_tensors(path, tensors, max_shard_bytes):
    shutil.copymode(path / CONFIG_FILE, file)  # the safetensors library creates files that only their owner can read
  return architecture


def _tensors_to_write(
  entries: Sequence[TensorEntry], architecture: str, cfg: TransformerConfig, params: Params, dtype: np.dtype
) -> list[TensorToWrite]:
  """Return the tensors of all entries, made when their file is written."""
  parameters, leaves = unrolled_parameters(cfg, params), flatten_tree(params)
  without_tensor = set(parameters) - {path for entry in entries for path in entry.paths}
  if without_tensor:
    raise ConfigError(f"a {architecture} has no place for the parameter {min(without_tensor)}")

  def make_tensor(entry: TensorEntry) -> np.ndarray:
    arrays = []
    for path in entry.paths:
      array = leaves[parameters[path].leaf]
      array = array if parameters[path].layer is None else array[parameters[path].layer]
      arrays.append(np.asarray(array if entry.expert is None else array[entry.expert]).astype(dtype))
    return merge_parameters(arrays, entry.patterns)

  def num_bytes(entry: TensorEntry) -> int:
    shapes = [entry.part_shape(parameters[path].shape) for path in entry.paths]
    return math.prod(tensor_shape(entry.patterns, shapes)) * dtype.itemsize

  return [TensorToWrite(entry.name, functools.partial(make_tensor, entry), num_bytes(entry)) for entry in entries]


def _class_name_fields(cfg: TransformerConfig, labels: Sequence[str] | None) -> dict[str, Json]:
  if cfg.head not in ("sequence", "token"):
    return {}
  names = default_class_names(cfg.num_classes) if labels is None else labels
  return {
    "id2label": {str(i): name for i, name in enumerate(names)},
    "label2id": {name: i for i, name in enumerate(names)},
  }

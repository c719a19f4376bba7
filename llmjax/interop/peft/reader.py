"""Adapters of PEFT onto a base model: the fields of its config, and the parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from llmjax.config import ConfigError, Json
from llmjax.config.model import TransformerConfig
from llmjax.distributed import sharding
from llmjax.interop.families.base import Family, ModelFields
from llmjax.interop.families.registry import FAMILIES
from llmjax.interop.folder_writer import choose_family
from llmjax.interop.peft.adapter_folder import Adapter
from llmjax.interop.peft.lora_matrices import LoraPair, check_adapter_tensor, lora_scale, split_lora_tensors
from llmjax.interop.tensor_map import ParameterSlice, TensorEntry, list_tensors, unrolled_parameters
from llmjax.interop.tensors import parameter_view, tensor_shape
from llmjax.models.lora import is_adapter
from llmjax.models.transformer import Transformer
from llmjax.trees import FlatTree, Params, flatten_tree

# {task_type: TransformerConfig.head}; with another task, the head is the base model's
TASK_HEADS = {"SEQ_CLS": "sequence", "TOKEN_CLS": "token", "QUESTION_ANS": "span"}
FRESH_HEAD_HINT = """to initialise it, --config.init_map='((".*head.*", None),)'"""


def adapter_family(manifest: Mapping[str, Json], cfg: TransformerConfig) -> Family:
  """Return the family that gives an adapter's tensors their names.

  Args:
    manifest: the base model's.
    cfg: the base model's config.
  """
  name = str(manifest.get("family"))
  return FAMILIES[name] if name in FAMILIES else choose_family(dataclasses.replace(cfg, lora_rank=0))[0]


def read_adapter_head(adapter: Adapter, family: Family, cfg: TransformerConfig) -> ModelFields:
  """Return "head" and "num_classes" of an adapter that has a head of its own, else no fields.

  Args:
    cfg: the base model's config.

  Raises:
    ConfigError: neither the adapter nor its base has the head that `task_type` requires.
  """
  task = adapter.config.get("task_type")
  kind = TASK_HEADS.get(str(task))
  for head in family.heads.values() if kind is not None else ():
    for name, parts in head.tensors.items():
      if head.kind == kind and parts[0][0] == "head/kernel" and name in adapter.tensors:
        return {"head": kind, "num_classes": len(adapter.tensors[name])}
  if kind not in (None, cfg.head):
    raise ConfigError(
      f"{adapter.path}: task_type={task!r} needs a head, but neither the adapter nor its base model has one; save it "
      "with the adapter (modules_to_save)"
    )
  return {}


class _Projection(NamedTuple):
  """An adapter of one projection, and the factor of its A B."""

  pair: LoraPair
  scale: float


def read_adapter(adapter: Adapter, family: Family, cfg: TransformerConfig) -> tuple[ModelFields, FlatTree]:
  """Return the fields of our config, and the parameters.

  Ranks and scales may differ between matrices. Here all get the largest rank, padded with zeros, and the scale of the
  first one; the others' B are multiplied by the quotient.

  Args:
    cfg: the base model's config with the adapter's head.

  Returns:
    {"lora_rank", "lora_alpha", "lora_dropout", "lora_targets"} and {unrolled path: array}.

  Raises:
    ConfigError: a tensor without a place in the model or with another shape, or no adapter at all.
  """
  adapted_cfg = dataclasses.replace(cfg, lora_rank=1, lora_targets=".*")
  parameters = unrolled_parameters(adapted_cfg, sharding.abstract_parameters(Transformer(adapted_cfg))[0])
  projections, whole = _sort_tensors(adapter, family, cfg, parameters)
  rank = max(projection.pair.a.shape[-1] for projection in projections.values())
  scale = next(iter(projections.values())).scale
  for path, ((a, b), own_scale) in projections.items():
    missing = rank - a.shape[-1]
    whole[f"{path}/lora_a"] = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)])
    b = b if own_scale == scale else (b * (own_scale / scale)).astype(b.dtype)
    whole[f"{path}/lora_b"] = np.pad(b, [(0, missing)] + [(0, 0)] * (b.ndim - 1))
  fields = {
    "lora_rank": rank,
    "lora_alpha": scale * rank,
    "lora_dropout": float(adapter.config.get("lora_dropout") or 0.0),
    "lora_targets": _target_regex(projections),
  }
  return fields, whole


def _sort_tensors(
  adapter: Adapter, family: Family, cfg: TransformerConfig, parameters: Mapping[str, ParameterSlice]
) -> tuple[dict[str, _Projection], FlatTree]:
  """Return {path of a projection: its adapter} and {unrolled path: array} of parameters that were trained whole."""
  tensors = {_without_prefix(name, family): tensor for name, tensor in adapter.tensors.items()}
  projections: dict[str, _Projection] = {}
  whole: FlatTree = {}
  used = set()
  for entry in _entries_with_head(family, cfg, parameters):
    name = _without_prefix(entry.name, family)
    module = name.removesuffix(".weight")
    lora_names = [f"{module}.lora_{letter}.weight" for letter in "AB"]
    shapes = [parameters[path].shape for path in entry.paths]
    lora_a = projection_path(entry.paths[0]) + "/lora_a"
    if name.endswith(".weight") and all(n in tensors for n in lora_names) and lora_a in parameters:
      used.update(lora_names)
      a, b = (tensors[n] for n in lora_names)
      scale = lora_scale(adapter.config, entry.name.removesuffix(".weight"), len(a))
      num_inputs = len(parameters[lora_a].shape) - 1
      pairs = split_lora_tensors(adapter, entry, num_inputs, shapes, a, b)
      for path, pair in zip(entry.paths, pairs, strict=True):
        if pair is not None:
          projections[projection_path(path)] = _Projection(pair, scale)
    elif name in tensors and entry.expert is None:
      used.add(name)
      check_adapter_tensor(adapter, name, tensors[name], tensor_shape(entry.patterns, shapes))
      for i, path in enumerate(entry.paths):
        whole[path] = parameter_view(tensors[name], entry.patterns, shapes, i)
  table = whole.get("embedding/table")
  unused = {name for name in set(tensors) - used if not _is_tied_copy(name, tensors[name], table, family)}
  if unused or not projections:
    reason = f"tensor {min(unused)} has no place in" if unused else "no tensor adapts a matrix of"
    raise ConfigError(f"{adapter.path}: {reason} a {family.model_type} with this head; is it for another model?")
  return projections, whole


def place_adapter_params(
  adapter: Adapter,
  arrays: FlatTree,
  cfg: TransformerConfig,
  abstract: Params,
  skip: Callable[[str], bool] = lambda path: False,
) -> dict[str, jax.Array]:
  """Return an adapter's parameters on their devices.

  Args:
    arrays: parameters as `read_adapter` returns them.
    cfg: config of the model; adapters are placed if it has them.
    abstract: the model's parameters as ShapeDtypeStructs with shardings.
    skip: whether a parameter is not wanted.

  Returns:
    {path: array}. Layers of a stack that the adapter does not adapt have zeros.

  Raises:
    ConfigError: a parameter that the model does not have, or has in another shape.
  """
  parameters, leaves = unrolled_parameters(cfg, abstract), flatten_tree(abstract)
  arrays = {
    path: array for path, array in arrays.items() if not skip(parameters[path].leaf if path in parameters else path)
  }
  unknown = sorted(set(arrays) - set(parameters))
  if unknown:
    raise ConfigError(f"{adapter.path}: {unknown[0]} has no place in this model; set model.lora_* as they are there")
  placed = {}
  for leaf in sorted({parameters[path].leaf for path in arrays}):
    stacked = np.zeros(leaves[leaf].shape, leaves[leaf].dtype)
    for path, parameter in parameters.items():
      if parameter.leaf != leaf or (path not in arrays and is_adapter(path)):
        continue
      if path not in arrays:
        raise ConfigError(f"{adapter.path} has {leaf} for some layers only, but not {path}")
      if arrays[path].shape != parameter.shape:
        hint = "set model.lora_* as they are there" if is_adapter(path) else FRESH_HEAD_HINT
        raise ConfigError(
          f"{adapter.path}: {path} has shape {list(arrays[path].shape)} there and {list(parameter.shape)} here; {hint}"
        )
      stacked[... if parameter.layer is None else parameter.layer] = arrays[path]
    placed[leaf] = jax.device_put(stacked, leaves[leaf].sharding)
  return placed


def _entries_with_head(family: Family, cfg: TransformerConfig, paths: Collection[str]) -> Iterable[TensorEntry]:
  """Return the tensors of all architectures with the model's kind of head, each name once."""
  architectures = [name for name, head in family.heads.items() if head.kind == cfg.head]
  entries = (entry for name in reversed(architectures) for entry in list_tensors(family, name, cfg, paths))
  return {_without_prefix(entry.name, family): entry for entry in entries}.values()


def _without_prefix(name: str, family: Family) -> str:
  """Return a tensor's name in the base model, which has no head."""
  return next((name.removeprefix(p) for p in family.prefixes if name.startswith(p)), name)


def _is_tied_copy(name: str, tensor: np.ndarray, table: np.ndarray | None, family: Family) -> bool:
  """Whether a tensor repeats the embedding table, which was trained whole."""
  return name.endswith((*family.always_tied, *family.tied)) and table is not None and np.array_equal(tensor, table)


def projection_path(path: str) -> str:
  """Return the path of a projection from that of its kernel."""
  return path.removesuffix("/kernel")


def _target_regex(projections: Iterable[str]) -> str:
  """Return a regex that matches these projections, scanned or unrolled, and no others."""
  by_stack: dict[str, set[str]] = {}
  for path in projections:
    stack, _, rest = path.partition("/layers_")
    by_stack.setdefault(stack, set()).update([rest.partition("/")[2]] if rest else [])
  return "|".join(f"{stack}/.*/({'|'.join(sorted(own))})" if own else stack for stack, own in sorted(by_stack.items()))

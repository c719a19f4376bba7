"""Adapters, written as PEFT reads them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from llmjax.config import ConfigError, Json
from llmjax.config.model import TransformerConfig
from llmjax.interop.families.base import Family
from llmjax.interop.folder_writer import choose_family
from llmjax.interop.peft.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TENSOR_PREFIX
from llmjax.interop.peft.lora_matrices import LoraPair, merge_lora_pairs
from llmjax.interop.peft.reader import TASK_HEADS, projection_path
from llmjax.interop.tensor_map import ParameterSlice, TensorEntry, list_tensors, unrolled_parameters
from llmjax.interop.tensors import merge_parameters
from llmjax.models.layer_stacks import HEAD_PREFIXES
from llmjax.models.lora import is_adapter, merge_lora
from llmjax.trees import Params, PyTree, flatten_tree, unflatten_tree


def write_adapter(
  output: str | Path,
  params: Params,
  cfg: TransformerConfig,
  *,
  base: str,
  prefer: str | None = None,
  only: str | None = None,
  saved: Collection[str] = (),
) -> str:
  """Write the adapters of a model and its other trained parameters. Returns the architecture of the base model.

  Args:
    output: the folder.
    base: PATH of the base model.
    prefer, only: see `choose_family`.
    saved: paths of parameters that differ from the base model's, such as a head. Their adapters are merged into them.

  Raises:
    ConfigError: the model has no adapters, or a parameter that an adapter's folder cannot hold.
  """
  from safetensors.numpy import save_file

  if cfg.lora is None:
    raise ConfigError("model.lora_rank=0: the model has no adapters; export it without --adapter")
  if cfg.tie_embeddings and "embedding/table" in saved:
    raise ConfigError(
      "embedding/table was trained and is also the output projection, of which PEFT would save only one; export "
      "without --adapter"
    )
  base_cfg = dataclasses.replace(cfg, lora_rank=0)
  family, architecture = choose_family(base_cfg, prefer, only)
  parameters = unrolled_parameters(cfg, params)
  entries = list_tensors(family, architecture, base_cfg, parameters)
  _check_all_have_entries(entries, parameters, saved, architecture)
  whole = {_module_name(e.name) for e in entries if any(parameters[path].leaf in saved for path in e.paths)}
  tensors, ranks = _make_tensors(entries, whole, params, cfg)
  config = {
    **_adapter_fields(cfg, ranks, {_module_name(entry.name) for entry in entries}),
    "base_model_name_or_path": base,
    "modules_to_save": sorted(_saved_modules(whole, family, architecture, cfg)) or None,
    "fan_in_fan_out": any(_has_inputs_first(entry) for entry in entries if _module_name(entry.name) in ranks),
  }
  folder = Path(output)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
  contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
  save_file(contiguous, folder / ADAPTER_WEIGHTS, {"format": "pt"})
  shutil.copymode(folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS)  # the library makes it readable for its owner only
  return architecture


def changed_parameters(cfg: TransformerConfig, trainable: PyTree) -> set[str]:
  """Return paths of parameters that differ from the base model's, without adapters: trained ones and a new head.

  Args:
    trainable: the tree of parameters, True if trained.
  """
  has_own_head = cfg.head != "lm"
  return {
    path
    for path, is_trained in flatten_tree(trainable).items()
    if not is_adapter(path) and (is_trained or (has_own_head and path.startswith(HEAD_PREFIXES)))
  }


def _check_all_have_entries(
  entries: Sequence[TensorEntry], parameters: Mapping[str, ParameterSlice], saved: Collection[str], architecture: str
) -> None:
  """Raise ConfigError if no tensor holds an adapter or a parameter of `saved`."""
  paths = {path for entry in entries for path in entry.paths}
  paths |= {f"{projection_path(path)}/lora_{letter}" for path in paths for letter in "ab"}
  without_entry = {path for path, p in parameters.items() if is_adapter(path) or p.leaf in saved} - paths
  if without_entry:
    raise ConfigError(f"a {architecture} has no place for the parameter {min(without_entry)}")


def _make_tensors(
  entries: Sequence[TensorEntry], whole: Collection[str], params: Params, cfg: TransformerConfig
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
  """Return {tensor name: tensor} and {adapted module: rank of its tensors}.

  Args:
    whole: modules that are saved whole, with their adapters merged.
  """
  assert cfg.lora is not None
  parameters, leaves = unrolled_parameters(cfg, params), flatten_tree(params)
  in_whole = [path for entry in entries if _module_name(entry.name) in whole for path in entry.paths]
  merged = {projection_path(parameters[path].leaf) for path in in_whole}
  to_merge = {path: leaf for path, leaf in leaves.items() if path.rpartition("/")[0] in merged}
  leaves |= flatten_tree(merge_lora(unflatten_tree(to_merge), cfg))

  def get_array(path: str) -> np.ndarray:
    leaf, layer = leaves[parameters[path].leaf], parameters[path].layer
    return np.asarray(leaf if layer is None else leaf[layer])

  def get_pair(path: str) -> LoraPair | None:
    name = projection_path(path)
    has_adapter = f"{name}/lora_a" in parameters
    return LoraPair(get_array(f"{name}/lora_a"), get_array(f"{name}/lora_b")) if has_adapter else None

  tensors: dict[str, np.ndarray] = {}
  ranks: dict[str, int] = {}
  for entry in entries:
    module = _module_name(entry.name)
    if module in whole:
      arrays = [get_array(path) for path in entry.paths]
      tensors[TENSOR_PREFIX + entry.name] = merge_parameters(arrays, entry.patterns)
      continue
    pairs = [get_pair(path) for path in entry.paths]
    if any(pair is not None for pair in pairs):
      shapes = [parameters[path].shape for path in entry.paths]
      a, b = merge_lora_pairs(entry, shapes, pairs, cfg.lora.rank)
      tensors |= {f"{TENSOR_PREFIX}{module}.lora_A.weight": a, f"{TENSOR_PREFIX}{module}.lora_B.weight": b}
      ranks[module] = len(a)
  return tensors, ranks


def _adapter_fields(cfg: TransformerConfig, ranks: Mapping[str, int], modules: Collection[str]) -> dict[str, Json]:
  """Return adapter_config.json but for what depends on the base model.

  Args:
    ranks: {adapted module: rank of its tensors}.
    modules: all modules of the model.
  """
  assert cfg.lora is not None
  suffixes = {
    rank: _unique_suffixes({module for module in ranks if ranks[module] == rank}, modules)
    for rank in sorted(set(ranks.values()))
  }
  smallest = min(suffixes, default=cfg.lora.rank)
  larger = [(name, rank) for rank, names in suffixes.items() if rank != smallest for name in names]
  return {
    "peft_type": "LORA",
    "task_type": _task_type(cfg),
    "r": smallest,
    "lora_alpha": _integer_if_whole(cfg.lora.scale * smallest),
    "lora_dropout": cfg.lora.dropout,
    "target_modules": sorted({name for names in suffixes.values() for name in names}),
    "rank_pattern": dict(larger),
    "alpha_pattern": {name: _integer_if_whole(cfg.lora.scale * rank) for name, rank in larger},
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "inference_mode": True,
  }


def _saved_modules(whole: Collection[str], family: Family, architecture: str, cfg: TransformerConfig) -> set[str]:
  """Return `modules_to_save`: modules with trained parameters; those of a head by the head's first name."""
  in_head = {_module_name(name) for name in family.heads[architecture].tensors} if cfg.head != "lm" else set()
  return {module.partition(".")[0] if module in in_head else module for module in whole}


def _has_inputs_first(entry: TensorEntry) -> bool:
  """Whether a tensor is a matrix that is stored as [inputs outputs], as in GPT-2."""
  pattern = entry.patterns[0]
  return len(pattern.tensor) == 2 and pattern.tensor[0].letters[0] == pattern.parameter[0]


def _module_name(tensor_name: str) -> str:
  return tensor_name.rpartition(".")[0]


def _unique_suffixes(wanted: Collection[str], modules: Collection[str]) -> set[str]:
  """Return the shortest ends of names, cut at dots, that match the wanted modules and no others."""
  others = [module for module in modules if module not in wanted]
  suffixes = set()
  for module in wanted:
    parts = module.split(".")
    candidates = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
    is_unique = (end for end in candidates if not any(f".{other}".endswith(f".{end}") for other in others))
    suffixes.add(next(is_unique, module))
  return suffixes


def _task_type(cfg: TransformerConfig) -> str | None:
  if cfg.head != "lm":
    return next(task for task, head in TASK_HEADS.items() if head == cfg.head)
  return {"decoder": "CAUSAL_LM", "both": "SEQ_2_SEQ_LM", "encoder": None}[cfg.stacks]


def _integer_if_whole(x: float) -> float:
  """Return an int if x is a whole number: PEFT declares its alpha as one."""
  return int(x) if float(x).is_integer() else float(x)

"""Low-rank adapters as PEFT keeps them: a folder with what was learned, and the name of the model that it is for.

adapter_config.json says how, adapter_model.safetensors has A [r inputs] and B [outputs r] of every adapted matrix,
beside what was trained whole, under the names of that model's tensors. Where a matrix holds several projections of
ours (GPT-2's c_attn), its adapter does, too: A are those of the parts, one below the other, and B a block of each.
https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llmjax.config import ConfigError
from llmjax.config.model import TransformerConfig
from llmjax.distributed import sharding
from llmjax.interop import tensors as tensorlib
from llmjax.interop.families import FAMILIES
from llmjax.interop.family import Family
from llmjax.interop.huggingface import Entry, choose, entries, parameters, read_json
from llmjax.interop.tensors import Dimension, Layout
from llmjax.models.layer_stacks import HEAD_PREFIXES
from llmjax.models.lora import is_adapter, merge_lora
from llmjax.models.transformer import Transformer
from llmjax.trees import FlatTree, flatten_tree, unflatten_tree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
HEAD_OF = {"SEQ_CLS": "sequence", "TOKEN_CLS": "token", "QUESTION_ANS": "span"}  # by task_type; others have the base's
AFRESH = """to start it afresh, --config.init_map='((".*head.*", None),)'"""
NOTHING: tuple[Any, ...] = (None, False, [], {})
SUPPORTED: Mapping[str, Sequence[Any]] = {  # what a field may be where it stands
  "peft_type": ("LORA",),
  "bias": ("none", None),
  "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the base's weights
  **dict.fromkeys(("use_dora", "lora_bias", "use_qalora", "use_bdlora", "velora_config", "monteclora_config"), NOTHING),
  **dict.fromkeys(("kasa_config", "arrow_config", "layer_replication", "trainable_token_indices"), NOTHING),
  **dict.fromkeys(("alora_invocation_tokens", "target_parameters", "megatron_config"), NOTHING),
}


@dataclasses.dataclass(frozen=True)
class Adapter:
  """A folder that PEFT wrote; `tensors` by their names without `PREFIX`."""

  path: Path
  config: Mapping[str, Any]
  tensors: Mapping[str, np.ndarray]


# Reading.


def is_adapter_folder(path: str | Path) -> bool:
  """Whether this is an adapter, which needs a model beside it."""
  return (Path(path) / CONFIG).is_file()


def open_adapter(path: str | Path) -> Adapter:
  """What a folder holds.

  Raises:
    ConfigError: another method than LoRA, or a variant that computes something else; files missing or damaged.
  """
  from safetensors import SafetensorError
  from safetensors.numpy import load_file

  path = Path(path)
  config = read_json(path / CONFIG)
  for name, values in SUPPORTED.items():
    if config.get(name, values[0]) not in values:
      raise ConfigError(
        f"{path / CONFIG}: {name}={config[name]!r} is not supported; of adapters, plain LoRA is, with "
        f"{name}={values[0]!r}"
      )
  for name in ("r", "lora_alpha"):
    if not isinstance(config.get(name), (int, float)):
      raise ConfigError(f"{path / CONFIG}: {name}={config.get(name)!r} must be a number")
  if not (path / WEIGHTS).is_file():
    pickled = f"; {path / 'adapter_model.bin'} is a pickle, which may run code when it is opened"
    raise ConfigError(
      f"{path} has no {WEIGHTS}{pickled if (path / 'adapter_model.bin').is_file() else ''}; let PEFT write it again "
      "with save_pretrained(DIR)"
    )
  try:
    tensors = load_file(path / WEIGHTS)
  except (SafetensorError, ValueError, KeyError, OSError) as error:
    raise ConfigError(f"{path / WEIGHTS} is no safetensors file, or damaged: {error}") from error
  return Adapter(path, config, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})


def base_path(path: str | Path) -> str:
  """The PATH of the model that an adapter is for: a folder, as seen from the adapter's or from here, or a hub name."""
  path = Path(path)
  config = read_json(path / CONFIG)
  name = config.get("base_model_name_or_path")
  if not isinstance(name, str) or not name:
    raise ConfigError(f"{path / CONFIG} does not say which model it is for; set base_model_name_or_path to its PATH")
  for place in (path / name, Path(name)):
    if is_adapter_folder(place):
      raise ConfigError(f"{path / CONFIG}: base_model_name_or_path={name!r} is an adapter itself; name its base")
    if place.is_dir():
      return str(place)
  revision = config.get("revision")
  return name if revision in (None, "main") or "@" in name else f"{name}@{revision}"


def family_of(manifest: Mapping[str, Any], cfg: TransformerConfig) -> Family:
  """The family whose names a base's adapter has, by the base's manifest and its config without adapters."""
  name = str(manifest.get("family"))
  return FAMILIES[name] if name in FAMILIES else choose(dataclasses.replace(cfg, lora_rank=0))[0]


def read_head(adapter: Adapter, family: Family, cfg: TransformerConfig) -> dict[str, Any]:
  """ "head" and "num_classes" of a model with an adapter; nothing where they are the base's.

  Args:
    cfg: the base's.
  Raises:
    ConfigError: neither has the head that the adapter's task_type asks for.
  """
  task = adapter.config.get("task_type")
  kind = HEAD_OF.get(str(task))
  for head in family.heads.values() if kind is not None else ():
    for name, parts in head.names.items():
      if head.fields.get("head") == kind and parts[0][0] == "head/kernel" and name in adapter.tensors:
        return {"head": kind, "num_classes": len(adapter.tensors[name])}
  if kind not in (None, cfg.head):
    raise ConfigError(
      f"{adapter.path}: task_type={task!r} is of a model with a head, and neither the adapter nor its base has one; "
      "save it with the adapter (modules_to_save)"
    )
  return {}


def read_adapter(adapter: Adapter, family: Family, cfg: TransformerConfig) -> tuple[dict[str, Any], FlatTree]:
  """What an adapter says for our config, and its parameters.

  Ranks and scales that differ between matrices become one: the smaller ones get rows of zeros, and B the scale.

  Args:
    cfg: that of the base, with the adapter's head.
  Returns:
    ({"lora_rank", "lora_alpha", "lora_dropout", "lora_targets"}, {unrolled path: array}).
  Raises:
    ConfigError: a tensor that has no place or another shape, or none at all.
  """
  can = dataclasses.replace(cfg, lora_rank=1, lora_targets=".*")
  ours = parameters(can, sharding.abstract_parameters(Transformer(can))[0])
  tensors = {_bare(name, family): tensor for name, tensor in adapter.tensors.items()}
  found: FlatTree = {}
  pairs: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}
  used = set()
  for entry in _all_entries(family, cfg, ours):
    name = _bare(entry.name, family)
    module = name.removesuffix(".weight")
    a, b = (tensors.get(f"{module}.lora_{letter}.weight") for letter in "AB")
    if name.endswith(".weight") and a is not None and b is not None and _stem(entry.paths[0]) + "/lora_a" in ours:
      used |= {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}
      scale = _scale(adapter.config, entry.name.removesuffix(".weight"), len(a))
      shapes = [ours[path].shape for path in entry.paths]
      inputs = len(ours[_stem(entry.paths[0]) + "/lora_a"].shape) - 1
      for path, part in zip(entry.paths, _split(adapter, entry, inputs, shapes, a, b), strict=True):
        if part is not None:
          pairs[_stem(path)] = (*part, scale)
    elif name in tensors and entry.expert is None:
      used.add(name)
      shapes = [ours[path].shape for path in entry.paths]
      _check_shape(adapter, name, tensors[name], tensorlib.tensor_shape(entry.layouts, shapes))
      found |= {p: tensorlib.view(tensors[name], entry.layouts, shapes, i) for i, p in enumerate(entry.paths)}
  left = {
    name for name in set(tensors) - used if not _repeats(name, tensors[name], found.get("embedding/table"), family)
  }
  if left or not pairs:
    what = f"its tensor {min(left)} has no place in" if left else "it has no tensor that adapts a matrix of"
    raise ConfigError(f"{adapter.path}: {what} a {family.model_type} with this head; is it for another model?")
  rank = max(a.shape[-1] for a, _, _ in pairs.values())
  scale = next(iter(pairs.values()))[2]
  for stem, (a, b, own) in pairs.items():
    room = rank - a.shape[-1]
    found[f"{stem}/lora_a"] = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, room)])
    b = b if own == scale else (b * (own / scale)).astype(b.dtype)
    found[f"{stem}/lora_b"] = np.pad(b, [(0, room)] + [(0, 0)] * (b.ndim - 1))
  dropout = float(adapter.config.get("lora_dropout") or 0.0)
  settings = {"lora_rank": rank, "lora_alpha": scale * rank, "lora_dropout": dropout, "lora_targets": _targets(pairs)}
  return settings, found


def place(
  adapter: Adapter,
  found: FlatTree,
  cfg: TransformerConfig,
  abstract: Any,
  skip: Callable[[str], bool] = lambda name: False,
) -> FlatTree:
  """The parameters of `read_adapter`, laid out as `abstract` says (ShapeDtypeStructs with shardings).

  Args:
    cfg: of the model, with adapters where they are wanted.
    skip: which of our parameters are not wanted.
  Returns:
    {path: array} of those that an adapter has; layers of a stack without one get zeros.
  Raises:
    ConfigError: a parameter that the model does not have, or has in another shape.
  """
  ours, leaves = parameters(cfg, abstract), flatten_tree(abstract)
  found = {path: x for path, x in found.items() if not skip(ours[path].leaf if path in ours else path)}
  lost = sorted(set(found) - set(ours))
  if lost:
    raise ConfigError(f"{adapter.path}: its {lost[0]} has no place in this model; set model.lora_* as they are there")
  out: FlatTree = {}
  for leaf in sorted({ours[path].leaf for path in found}):
    parts = {path: parameter for path, parameter in ours.items() if parameter.leaf == leaf}
    array = np.zeros(leaves[leaf].shape, leaves[leaf].dtype)
    for path, parameter in parts.items():
      if path not in found and is_adapter(path):
        continue
      if path not in found:
        raise ConfigError(f"{adapter.path} holds {leaf} of some layers alone, and there is none for {path}")
      if found[path].shape != parameter.shape:
        other = "set model.lora_* as they are there" if is_adapter(path) else AFRESH
        raise ConfigError(
          f"{adapter.path}: {path} is of size {list(found[path].shape)} there and {list(parameter.shape)} here; {other}"
        )
      array[... if parameter.layer is None else parameter.layer] = found[path]
    out[leaf] = jax.device_put(array, leaves[leaf].sharding)
  return out


def _all_entries(family: Family, cfg: TransformerConfig, ours: Collection[str]) -> Iterable[Entry]:
  """Of the architectures with this head: of the names that they share, one."""
  architectures = [name for name, head in family.heads.items() if head.fields.get("head", "lm") == cfg.head]
  each = (entry for name in reversed(architectures) for entry in entries(family, name, cfg, ours))
  return {_bare(entry.name, family): entry for entry in each}.values()


def _bare(name: str, family: Family) -> str:
  """A tensor's name without what stands before those of the model without a head."""
  prefixes = {family.prefix, *(head.prefix for head in family.heads.values())}
  return next((name.removeprefix(p) for p in sorted(filter(None, prefixes)) if name.startswith(p)), name)


def _repeats(name: str, tensor: np.ndarray, table: np.ndarray | None, family: Family) -> bool:
  """Whether a tensor is the embedding table again, which was trained whole."""
  return name.endswith((*family.copies, *family.tied)) and table is not None and np.array_equal(tensor, table)


def _stem(path: str) -> str:
  return path.removesuffix("/kernel")


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
  """alpha / r, or alpha / sqrt(r) (rank-stabilised, Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)."""
  own = (alpha for key, alpha in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({key})$", module))
  alpha = next(own, config["lora_alpha"])
  return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _split(
  adapter: Adapter, entry: Entry, inputs: int, shapes: Sequence[tuple[int, ...]], a: np.ndarray, b: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray] | None]:
  """(A [inputs r], B [r outputs]) of each part of a matrix, None of one without an adapter.

  They share A, unless B is a block of each part, which then has the rows of A that its block reads.
  """
  rank, count = len(a), len(shapes)
  layouts = [_layouts(layout, inputs) for layout in entry.layouts]
  sizes = [((*shape[:inputs], rank), (rank, *shape[inputs:])) for shape in shapes]
  for name, tensor, which in (("lora_A", a, 0), ("lora_B", b, 1)):
    wanted = tensorlib.tensor_shape([each[which] for each in layouts], [each[which] for each in sizes])
    _check_shape(adapter, f"{entry.name.removesuffix('.weight')}.{name}.weight", tensor, wanted)

  def part(tensor: np.ndarray, which: int, i: int) -> np.ndarray:
    return tensorlib.view(tensor, [each[which] for each in layouts], [each[which] for each in sizes], i)

  pairs = [(part(a, 0, i), part(b, 1, i)) for i in range(count)]
  rows = [slice(rank // count * i, rank // count * (i + 1)) for i in range(count)]
  if count > 1 and rank % count == 0 and b.any():
    if not any(np.delete(b_part, own, axis=0).any() for (_, b_part), own in zip(pairs, rows, strict=True)):
      pairs = [(a_part[..., own], b_part[own]) for (a_part, b_part), own in zip(pairs, rows, strict=True)]
  return [(a_part, b_part) if a_part.any() else None for a_part, b_part in pairs]


def _check_shape(adapter: Adapter, name: str, tensor: np.ndarray, wanted: tuple[int, ...]) -> None:
  if tensor.shape != wanted:
    raise ConfigError(
      f"{adapter.path}: tensor {name} has the shape {list(tensor.shape)}, and {list(wanted)} is what fits its base"
    )


def _layouts(layout: Layout, inputs: int) -> tuple[Layout, Layout]:
  """Those of A [r inputs] and B [outputs r], by that of a kernel whose first `inputs` dimensions are contracted."""
  read = layout.parameter[:inputs]
  [into] = [i for i, dimension in enumerate(layout.tensor) if set(dimension.letters) <= set(read)]
  rank = Dimension(("r",), 0, 0)
  a = Layout((rank, layout.tensor[into]), (*read, "r"))
  return a, Layout((layout.tensor[1 - into], rank), ("r", *layout.parameter[inputs:]))


def _targets(stems: Iterable[str]) -> str:
  """A regex that is true of these projections, scanned or unrolled, and of no others."""
  layers: dict[str, set[str]] = {}
  for stem in stems:
    stack, _, rest = stem.partition("/layers_")
    layers.setdefault(stack, set()).update([rest.partition("/")[2]] if rest else [])
  return "|".join(f"{stack}/.*/({'|'.join(sorted(own))})" if own else stack for stack, own in sorted(layers.items()))


# Writing.


def write_adapter(
  output: str | Path,
  params: Mapping[str, Any],
  cfg: TransformerConfig,
  *,
  base: str,
  prefer: str | None = None,
  only: str | None = None,
  saved: Collection[str] = (),
) -> str:
  """Writes the adapters of a model, and what was trained whole; returns the architecture that they are for.

  Args:
    base: a PATH of the model without them.
    prefer, only: see `huggingface.choose`.
    saved: paths of parameters that are not as they are in the base, such as a head; with adapters, they are merged.
  Raises:
    ConfigError: no adapters, or what an adapter's folder has no place for.
  """
  from safetensors.numpy import save_file

  if cfg.lora is None:
    raise ConfigError("the model has no adapters (model.lora_rank=0); export it without --adapter")
  if cfg.tie_embeddings and "embedding/table" in saved:
    raise ConfigError(
      "embedding/table was trained, which is the output projection, too, and PEFT would save one of them; export "
      "without --adapter"
    )
  plain = dataclasses.replace(cfg, lora_rank=0)
  family, architecture = choose(plain, prefer, only)
  ours, leaves = parameters(cfg, params), flatten_tree(params)
  found = entries(family, architecture, plain, ours)
  whole = {_module(e.name) for e in found if any(ours[path].leaf in saved for path in e.paths)}
  held = {_stem(ours[path].leaf) for entry in found if _module(entry.name) in whole for path in entry.paths}
  leaves |= flatten_tree(
    merge_lora(unflatten_tree({k: v for k, v in leaves.items() if k.rpartition("/")[0] in held}), cfg)
  )

  def get(path: str) -> np.ndarray:
    parameter = ours[path]
    leaf = leaves[parameter.leaf]
    return np.asarray(leaf if parameter.layer is None else leaf[parameter.layer])

  tensors: dict[str, np.ndarray] = {}
  ranks: dict[str, int] = {}
  input_first, placed = False, set()
  for entry in found:
    module = _module(entry.name)
    placed |= {*entry.paths, *(f"{_stem(path)}/lora_{letter}" for path in entry.paths for letter in "ab")}
    if module in whole:
      tensors[PREFIX + entry.name] = tensorlib.join([get(path) for path in entry.paths], entry.layouts)
    elif any(f"{_stem(path)}/lora_a" in ours for path in entry.paths):
      pairs = [
        tuple(get(f"{_stem(path)}/{name}") for name in ("lora_a", "lora_b"))
        if f"{_stem(path)}/lora_a" in ours
        else None
        for path in entry.paths
      ]
      a, b = _join(entry, [ours[path].shape for path in entry.paths], pairs, cfg.lora.rank)
      tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
      ranks[module] = len(a)
      input_first |= entry.layouts[0].tensor[0].letters[0] == entry.layouts[0].parameter[0]
  lost = {path for path, p in ours.items() if is_adapter(path) or p.leaf in saved} - placed
  if lost:
    raise ConfigError(f"a {architecture} has no place for the parameter {min(lost)}")
  modules = {_module(entry.name) for entry in found}
  groups = {r: _suffixes({m for m in ranks if ranks[m] == r}, modules) for r in sorted(set(ranks.values()))}
  least = min(groups, default=cfg.lora.rank)
  own_head = {_module(name) for name in family.heads[architecture].names} if cfg.head != "lm" else set()
  config = {
    "peft_type": "LORA",
    "task_type": _task(cfg),
    "base_model_name_or_path": base,
    "r": least,
    "lora_alpha": _number(cfg.lora.scale * least),
    "lora_dropout": cfg.lora.dropout,
    "target_modules": sorted({name for names in groups.values() for name in names}),
    "rank_pattern": {name: r for r, names in groups.items() if r != least for name in names},
    "alpha_pattern": {name: _number(cfg.lora.scale * r) for r, names in groups.items() if r != least for name in names},
    "modules_to_save": sorted({m.partition(".")[0] if m in own_head else m for m in whole}) or None,
    "fan_in_fan_out": input_first,
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "inference_mode": True,
  }
  target = Path(output)
  target.mkdir(parents=True, exist_ok=True)
  (target / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
  save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, target / WEIGHTS, {"format": "pt"})
  shutil.copymode(target / CONFIG, target / WEIGHTS)  # safetensors makes it for its owner alone
  return architecture


def trained(cfg: TransformerConfig, learns: Mapping[str, Any]) -> set[str]:
  """Paths of parameters that are not as they are in the base: what learned besides adapters, and a head of its own.

  Args:
    learns: the tree of parameters, True where they learn.
  """
  return {
    path
    for path, value in flatten_tree(learns).items()
    if not is_adapter(path) and (value or (cfg.head != "lm" and path.startswith(HEAD_PREFIXES)))
  }


def _join(
  entry: Entry, shapes: Sequence[tuple[int, ...]], pairs: Sequence[Any], rank: int
) -> tuple[np.ndarray, np.ndarray]:
  """A [n r inputs] and B [outputs n r] of a matrix of n parts, one block of B each; zeros of a part without adapter."""
  inputs = next(a.ndim - 1 for a, _ in filter(None, pairs))
  kind = next(a.dtype for a, _ in filter(None, pairs))
  layouts = [_layouts(layout, inputs) for layout in entry.layouts]
  total = rank * len(pairs)
  rows, blocks = [], []
  for i, (shape, pair) in enumerate(zip(shapes, pairs, strict=True)):
    block = np.zeros((total, *shape[inputs:]), kind)
    if pair is None:
      rows.append(np.zeros((*shape[:inputs], rank), kind))
    else:
      rows.append(pair[0])
      block[rank * i : rank * (i + 1)] = pair[1]
    blocks.append(block)
  a = np.concatenate([tensorlib.join([x], [layout]) for x, (layout, _) in zip(rows, layouts, strict=True)])
  return a, tensorlib.join(blocks, [layout for _, layout in layouts])


def _module(name: str) -> str:
  return name.rpartition(".")[0]


def _suffixes(wanted: Collection[str], modules: Collection[str]) -> set[str]:
  """The shortest ends of names that are those of these modules and of no others, at a dot."""
  found = set()
  for module in wanted:
    parts = module.split(".")
    ends = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
    others = [m for m in modules if m not in wanted]
    found.add(next((end for end in ends if not any(f".{m}".endswith(f".{end}") for m in others)), module))
  return found


def _task(cfg: TransformerConfig) -> str | None:
  if cfg.head != "lm":
    return next(task for task, head in HEAD_OF.items() if head == cfg.head)
  return {"decoder": "CAUSAL_LM", "both": "SEQ_2_SEQ_LM", "encoder": None}[cfg.stacks]


def _number(x: float) -> float:
  """An integer where it is one: PEFT declares its alpha so."""
  return int(x) if float(x).is_integer() else float(x)

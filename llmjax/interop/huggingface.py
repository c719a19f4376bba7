"""Hugging Face folders, read and written: config.json and safetensors, by what their family's file says.

Reading maps the files into memory and copies what a shard needs, one shard at a time; no tensor is ever whole in
memory unless a device holds it whole.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llmjax.config import ConfigError, suggest_name
from llmjax.config.model import CHOICES, TransformerConfig
from llmjax.interop import tensors as tensorlib
from llmjax.interop.families import FAMILIES, find
from llmjax.interop.family import Family, Names, differences, read_config, write_config
from llmjax.interop.generation_config import FIELDS, TOKENS
from llmjax.models.layer_stacks import HEAD_PREFIXES, layer_locations
from llmjax.trees import flatten_tree, unflatten_tree

CONFIG, GENERATION = "config.json", "generation_config.json"
DEPTH = {"encoder": "encoder_layers", "decoder": "decoder_layers"}


@dataclasses.dataclass(frozen=True)
class Folder:
  """A Hugging Face folder: what its config.json says, and its tensors, not read yet."""

  path: Path
  config: Mapping[str, Any]
  family: Family
  architecture: str
  cfg: TransformerConfig
  tensors: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One of our parameters in the unrolled layout: where it is, which of a stack's layers, and its shape there."""

  leaf: str
  layer: int | None
  shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
  """One of their tensors, and the parameters that it holds: unrolled paths with their layouts."""

  name: str
  paths: tuple[str, ...]
  layouts: tuple[tensorlib.Layout, ...]
  expert: int | None  # which of the parameters' experts; None where they have no such dimension


def open_folder(path: str | Path) -> Folder:
  """A folder with a config.json and safetensors.

  Raises:
    ConfigError: a family that is not known, a config that asks for what we do not have, files missing or damaged.
  """
  path = Path(path)
  config, tensors = read_json(path / CONFIG), None
  if config.get("model_type") in TEXT_PARTS:
    config, tensors = _text_part(config, tensorlib.open_tensors(path), str(path / CONFIG))
  family, architecture = find(config, str(path / CONFIG))
  tensors = tensorlib.open_tensors(path) if tensors is None else tensors
  cfg = read_config(family, architecture, config, str(path / CONFIG), tensors)
  return Folder(path, config, family, architecture, cfg, tensors)


# Models of text and images, of which we have what reads and writes text: its architecture, the beginnings of the names
# of its tensors (of either generation of Transformers) and what follows them, and those of the rest.
TEXT_PARTS = {"gemma3": "Gemma3ForCausalLM"}
_TEXT, _REST = ("language_model.", "model.language_model."), ("vision_tower.", "multi_modal_projector.")


def _text_part(
  config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], where: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The folder that the text model would have alone."""
  said = config.get("text_config")
  if not isinstance(said, dict):
    raise ConfigError(f"{where} has no text_config, which would say what the text model is")
  text = {**said, "architectures": [TEXT_PARTS[config["model_type"]]]}
  kept = {name: x for name, x in tensors.items() if not name.removeprefix("model.").startswith(_REST)}
  own = {}
  for name, x in kept.items():
    old, new = (name.removeprefix(prefix) for prefix in _TEXT)  # "model.x", and "x" for all but the head
    own[old if old != name else f"model.{new}" if new != name else name] = x
  return text, own


def read_json(path: Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise ConfigError(f"{path}: there is no such file") from error
  except (ValueError, UnicodeDecodeError) as error:
    raise ConfigError(f"{path} is damaged: {error}") from error
  if not isinstance(found, dict):
    raise ConfigError(f"{path} is damaged: it holds a {type(found).__name__}, not an object")
  return found


def read_generation(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
  """How a folder's model shall generate: generation_config.json, and the tokens that its config.json names besides.

  Where there is no such file, it is all that config.json says of it.
  """
  told = (path / GENERATION).is_file()
  fields = {k: v for k, v in config.items() if k in (TOKENS if told else FIELDS) and v is not None}
  return fields | (read_json(path / GENERATION) if told else {})


def read_sentence_settings(path: Path) -> dict[str, Any]:
  """ "pooling" and "seq_len" of a folder that sentence-transformers wrote: how a vector is made of a text."""
  found: dict[str, Any] = {}
  if (path / "modules.json").is_file():
    try:
      modules = json.loads((path / "modules.json").read_text(encoding="utf-8"))
      kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    except (ValueError, TypeError, LookupError) as error:
      raise ConfigError(f"{path / 'modules.json'} is damaged: {error}") from error
    other = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if other:
      raise ConfigError(f"{path / 'modules.json'}: a module {other[0]} is not supported, and changes the vectors")
  pooling = path / "1_Pooling" / CONFIG
  if pooling.is_file():
    said = read_json(pooling)
    ours = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last"}
    modes = [k.removeprefix("pooling_mode_") for k, v in said.items() if k.startswith("pooling_mode_") and v is True]
    if len(modes) != 1 or modes[0] not in ours:
      raise ConfigError(
        f"{pooling}: pooling by {' and '.join(modes) or 'nothing'} is not supported; one of {', '.join(ours)}"
      )
    found["pooling"] = ours[modes[0]]
  if (path / "sentence_bert_config.json").is_file():
    length = read_json(path / "sentence_bert_config.json").get("max_seq_length")
    found |= {} if length is None else {"seq_len": length}
  return found


# Parameters and tensors.


def parameters(cfg: TransformerConfig, tree: Any) -> dict[str, Parameter]:
  """{unrolled path: where it is} of a tree of parameters (or of their shapes)."""
  leaves = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  if not cfg.scan:
    return {path: Parameter(path, None, tuple(leaf.shape)) for path, leaf in leaves.items()}
  found, layered = {}, set()
  for stack, depth in DEPTH.items():
    for i, (location, layer) in enumerate(layer_locations(cfg, getattr(cfg, depth))):
      prefix = "/".join((stack, *location)) + "/"
      for path, leaf in leaves.items():
        if path.startswith(prefix):
          shape = tuple(leaf.shape) if layer is None else tuple(leaf.shape[1:])
          found[f"{stack}/layers_{i}/{path.removeprefix(prefix)}"] = Parameter(path, layer, shape)
          layered.add(path)
  return found | {
    path: Parameter(path, None, tuple(leaf.shape)) for path, leaf in leaves.items() if path not in layered
  }


def entries(family: Family, architecture: str, cfg: TransformerConfig, ours: Container[str] | None) -> list[Entry]:
  """Every tensor of a model with these parameters (None: with all that the family may have)."""
  head = family.heads[architecture]
  prefix = family.prefix if head.prefix is None else head.prefix
  base = family.names(cfg) if callable(family.names) else family.names
  own = {path for parts in head.names.values() for path, _ in parts}  # such as the pooler, where the head has its own
  base = {name: parts for name, parts in base.items() if parts[0][0] not in own}
  prefix = "" if architecture.endswith("Model") and not head.names else prefix
  return [
    Entry(theirs, tuple(path for path, _ in parts), tuple(tensorlib.parse(pattern) for _, pattern in parts), expert)
    for theirs, parts, expert in _expand({**{prefix + name: parts for name, parts in base.items()}, **head.names}, cfg)
    if ours is None or all(path in ours for path, _ in parts)
  ]


def _expand(names: Names, cfg: TransformerConfig) -> Iterator[tuple[str, Sequence[tuple[str, str]], int | None]]:
  """The names with their {i} and {e} filled in."""
  for name, parts in names.items():
    depth = getattr(cfg, DEPTH[parts[0][0].split("/")[0]]) if "{i}" in name else 1
    for i in range(depth):
      here = [(path.replace("{i}", str(i)), pattern) for path, pattern in parts]
      for e in range(cfg.num_experts) if "{e}" in name else [None]:
        yield name.replace("{i}", str(i)).replace("{e}", str(e)), here, e


def read_params(
  folder: Folder,
  cfg: TransformerConfig,
  abstract: Any,
  skip: Callable[[str], bool] = lambda name: False,
  optional: Callable[[str], bool] = lambda name: False,
) -> Any:
  """The parameters of a folder, laid out as `abstract` says (ShapeDtypeStructs with shardings).

  Args:
    cfg: the folder's config, or one that differs in what changes no parameter, as `scan`, or in its head.
    skip: which of our parameters are not read; the result lacks them.
    optional: which may be missing; the result then lacks them, too.
  Raises:
    ConfigError: a tensor that is missing, too many, or of another shape.
  """
  ours = parameters(cfg, abstract)
  sources: dict[str, dict[int | None, list[Any]]] = {}
  used = set()
  for entry in entries(folder.family, folder.architecture, cfg, ours):
    name, tensor = _look_up(folder, entry.name)
    held = [ours[path].leaf for path in entry.paths]
    if all(map(skip, held)) or (tensor is None and all(map(optional, held))):
      used.add(name)
      continue
    shapes = [_one(ours[path].shape, entry.expert) for path in entry.paths]
    wanted = tensorlib.tensor_shape(entry.layouts, shapes)
    if tensor is None:
      raise ConfigError(f"{folder.path} has no tensor {entry.name} {list(wanted)}, which its {CONFIG} asks for")
    if tensor.shape != wanted:
      raise ConfigError(
        f"{folder.path}: tensor {name} has the shape {list(tensor.shape)}, where its {CONFIG} asks for {list(wanted)}"
      )
    if tensor.dtype.kind not in "fV":  # V is bfloat16
      raise ConfigError(
        f"{folder.path}: tensor {name} is of type {tensor.dtype}; weights must be floating-point numbers"
      )
    used.add(name)
    for which, path in enumerate(entry.paths):
      one = tensorlib.view(tensor, entry.layouts, shapes, which)
      sources.setdefault(ours[path].leaf, {}).setdefault(ours[path].layer, []).append(one)
  unfilled = {p.leaf for p in ours.values()} - set(sources)
  _check_all(folder, cfg, used, {name for name in unfilled if not (skip(name) or optional(name))})
  leaves = flatten_tree(abstract)
  return unflatten_tree({path: _place(sources[path], leaf) for path, leaf in leaves.items() if path not in unfilled})


def _look_up(folder: Folder, name: str) -> tuple[str, np.ndarray | None]:
  """A tensor by its name, with or without the prefix that base models do not have."""
  prefixes = {folder.family.prefix, *(h.prefix for h in folder.family.heads.values() if h.prefix)}
  bare = next((name.removeprefix(p) for p in prefixes if p and name.startswith(p)), name)
  for candidate in (name, bare, *(p + bare for p in sorted(prefixes))):
    if candidate in folder.tensors:
      return candidate, folder.tensors[candidate]
  return name, None


def _one(shape: tuple[int, ...], expert: int | None) -> tuple[int, ...]:
  return shape if expert is None else shape[1:]


def _check_all(folder: Folder, cfg: TransformerConfig, used: set[str], unfilled: set[str]) -> None:
  """Whether every tensor has a place, and every parameter a tensor."""
  if unfilled:
    raise ConfigError(
      f"{folder.path}: a {folder.architecture} has nothing for {min(unfilled)}; set model.* as it is there"
    )
  family = folder.family
  copies = (*family.copies, *(family.tied if cfg.tie_embeddings else ()))
  copied = {prefix + name for name in copies for prefix in ("", family.prefix)} & set(folder.tensors)
  table = next(e for e in entries(family, folder.architecture, cfg, None) if e.paths == ("embedding/table",))
  whole = _look_up(folder, table.name)[1]
  for name in sorted(copied):
    tensor = folder.tensors[name]
    if whole is not None and tensor.ndim == 2 and not np.array_equal(tensor[::997], whole[::997]):
      raise ConfigError(f"{folder.path}: its {CONFIG} says that {name} is {table.name}, and it is another; mend either")
  used = used | copied
  left = {n for n in folder.tensors if n not in used and not n.endswith(tuple(family.ignored))}
  # Folders keep what is behind the last layer in pretraining, whatever architecture they name.
  left -= {
    _look_up(folder, entry.name)[0]
    for architecture in (family.heads if left else ())
    for entry in entries(family, architecture, cfg, None)
    if entry.paths[0].startswith(HEAD_PREFIXES)
  }
  if left:
    raise ConfigError(
      f"{folder.path} has a tensor {min(left)} {list(folder.tensors[min(left)].shape)} that has no place in a "
      f"{folder.architecture}" + (f", and {len(left) - 1} more" if len(left) > 1 else "")
    )


def _place(sources: Mapping[int | None, list[np.ndarray]], leaf: Any) -> jax.Array:
  """One parameter on its devices; the host holds one shard at a time.

  Args:
    sources: {layer: [its tensor, or one for each expert]}; None is the layer of what has no such dimension.
  """

  def read(index: tuple[slice, ...]) -> np.ndarray:
    shape = tuple(len(range(*cut.indices(size))) for cut, size in zip(index, leaf.shape, strict=True))
    out = np.empty(shape, leaf.dtype)
    stacked = None not in sources
    picked = range(*index[0].indices(leaf.shape[0])) if stacked else [None]
    for n, layer in enumerate(picked):
      _fill(out[n] if stacked else out, sources[layer], index[1:] if stacked else index)
    return out

  def key(index: tuple[slice, ...]) -> tuple[Any, ...]:
    return tuple((cut.start, cut.stop) for cut in index)

  shards: dict[Any, np.ndarray] = {}
  arrays = []
  where = leaf.sharding.addressable_devices_indices_map(leaf.shape)
  for device, index in sorted(where.items(), key=lambda item: repr(key(item[1]))):
    if key(index) not in shards:  # several devices may hold the same
      shards = {key(index): read(index)}
    arrays.append(jax.device_put(shards[key(index)], device))
  return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)


def _fill(out: np.ndarray, tensors: list[np.ndarray], index: tuple[slice, ...]) -> None:
  if tensors[0].ndim == out.ndim:
    out[...] = tensors[0][index]
  else:  # one for each expert
    for n, e in enumerate(range(*index[0].indices(len(tensors)))):
      out[n] = tensors[e][index[1:]]


# Writing.


def choose(cfg: TransformerConfig, prefer: str | None = None, only: str | None = None) -> tuple[Family, str]:
  """The family and architecture that a model is.

  Args:
    prefer: the model_type to try first; `only`: the only one to try.
  Raises:
    ConfigError: there is none; the nearest is named, with what it lacks.
  """
  if only is not None and only not in FAMILIES:
    raise ConfigError(f"family={only!r} is unknown; {suggest_name(only, FAMILIES)}")
  order = sorted(FAMILIES.values(), key=lambda family: family.model_type != prefer)
  order = [family for family in order if only in (None, family.model_type)]
  best: tuple[int, str] | None = None
  for family in order:
    if "num_experts" in family.fields and not cfg.num_experts:
      continue
    for architecture in family.heads:
      try:
        config = write_config(family, architecture, cfg)
        config |= _class_names(cfg, None)
        again = read_config(family, architecture, config, family.model_type)
      except ConfigError:
        continue
      found = differences(cfg, again)
      if not found:
        return family, architecture
      said = ", ".join(f"model.{k}={ours!r} (there {theirs!r})" for k, (ours, theirs) in found.items())
      if best is None or len(found) < best[0]:
        best = len(found), f"the nearest is {architecture}, but for {said}"
  which = "no architecture of Hugging Face's" if only is None else f"no architecture of the family {only}"
  raise ConfigError(f"{which} has this model's shape; {best[1] if best else 'none is near'}")


def write_folder(
  path: Path,
  cfg: TransformerConfig,
  params: Any,
  *,
  prefer: str | None = None,
  only: str | None = None,
  labels: Sequence[str] | None = None,
  extra: Mapping[str, Any] | None = None,
  dtype: str | None = None,
  max_shard_bytes: int = 5 * 10**9,
) -> str:
  """Writes config.json and safetensors; returns the architecture.

  Args:
    prefer, only: see `choose`.
    labels: names of the classes of a head.
    extra: more fields for config.json, such as ids of special tokens.
    dtype: of the tensors; None is that of the parameters.
  """
  if dtype not in (None, *CHOICES["param_dtype"]):
    raise ConfigError(f"dtype={dtype!r} is not supported; known are {', '.join(CHOICES['param_dtype'])}")
  family, architecture = choose(cfg, prefer, only)
  ours = parameters(cfg, params)
  leaves = {
    jax.tree_util.keystr(where, simple=True, separator="/"): leaf
    for where, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  kind = np.dtype(jax.numpy.dtype(dtype or cfg.param_dtype))
  found = entries(family, architecture, cfg, ours)
  lost = set(ours) - {name for entry in found for name in entry.paths}
  if lost:
    raise ConfigError(f"a {architecture} has no place for the parameter {min(lost)}")

  def get(name: str, expert: int | None) -> np.ndarray:
    parameter = ours[name]
    leaf = leaves[parameter.leaf]
    leaf = leaf if parameter.layer is None else leaf[parameter.layer]
    return np.asarray(leaf if expert is None else leaf[expert]).astype(kind)

  def tensor(entry: Entry) -> tuple[str, Callable[[], np.ndarray], int]:
    shapes = [_one(ours[name].shape, entry.expert) for name in entry.paths]
    size = math.prod(tensorlib.tensor_shape(entry.layouts, shapes)) * kind.itemsize

    def make() -> np.ndarray:
      return tensorlib.join([get(name, entry.expert) for name in entry.paths], entry.layouts)

    return entry.name, make, size

  config = write_config(family, architecture, cfg) | _class_names(cfg, labels)
  config |= {"torch_dtype": str(kind), **(extra or {})}
  path.mkdir(parents=True, exist_ok=True)
  (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
  for file in tensorlib.write_tensors(path, [tensor(entry) for entry in found], max_shard_bytes):
    shutil.copymode(path / CONFIG, file)  # safetensors makes them for their owner alone
  return architecture


def _class_names(cfg: TransformerConfig, labels: Sequence[str] | None) -> dict[str, Any]:
  if cfg.head not in ("sequence", "token"):
    return {}
  names = [f"LABEL_{i}" for i in range(cfg.num_classes)] if labels is None else labels
  return {"id2label": {str(i): n for i, n in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}

"""Hugging Face folders, read: config.json and safetensors, by the data sheet of their family.

Files are memory-mapped, and the parameters of a device are assembled one shard at a time. No parameter is whole in
memory unless a device holds it whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import jax
import numpy as np

from llmjax.config import ConfigError
from llmjax.config.model import TransformerConfig
from llmjax.interop.config_json import read_model_config
from llmjax.interop.families.base import Family, HfConfig
from llmjax.interop.families.registry import find_family
from llmjax.interop.folder_settings import CONFIG_FILE, read_json_object
from llmjax.interop.tensor_map import TensorEntry, list_tensors, unrolled_parameters
from llmjax.interop.tensors import open_tensors, parameter_view, tensor_shape
from llmjax.models.layer_stacks import HEAD_PREFIXES
from llmjax.trees import Params, flatten_tree, unflatten_tree

# Multimodal families whose text model is supported: {model_type: architecture of the text model}.
TEXT_ARCHITECTURES = {"gemma3": "Gemma3ForCausalLM"}
# Prefixes of the text model's tensors in files of Transformers 4 and 5, and of all other tensors.
TEXT_PREFIX_4, TEXT_PREFIX_5 = "language_model.", "model.language_model."
OTHER_PREFIXES = ("vision_tower.", "multi_modal_projector.")


@dataclasses.dataclass(frozen=True)
class HuggingFaceFolder:
  """A Hugging Face folder with its config; the tensors are memory-mapped.

  Attributes:
    path: the folder.
    config: the content of config.json.
    family, architecture: of the model.
    cfg: our config of the model.
    tensors: {name: tensor}.
  """

  path: Path
  config: HfConfig
  family: Family
  architecture: str
  cfg: TransformerConfig
  tensors: Mapping[str, np.ndarray]

  def find_tensor(self, name: str) -> tuple[str, np.ndarray | None]:
    """Return a tensor and its name in the file, whichever of the family's prefixes the file uses."""
    prefixes = self.family.prefixes
    bare = next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)
    for candidate in (name, bare, *(prefix + bare for prefix in prefixes)):
      if candidate in self.tensors:
        return candidate, self.tensors[candidate]
    return name, None


def open_huggingface_folder(path: str | Path) -> HuggingFaceFolder:
  """Open a folder with a config.json and safetensors files.

  Raises:
    ConfigError: an unknown family, a config that is not supported, missing or damaged files.
  """
  path = Path(path)
  config_path = str(path / CONFIG_FILE)
  config: HfConfig = read_json_object(path / CONFIG_FILE)
  tensors: Mapping[str, np.ndarray] | None = None
  if config.get("model_type") in TEXT_ARCHITECTURES:
    config, tensors = _select_text_model(config, open_tensors(path), config_path)
  family, architecture = find_family(config, config_path)
  tensors = open_tensors(path) if tensors is None else tensors
  cfg = read_model_config(family, architecture, config, config_path, tensors)
  return HuggingFaceFolder(path, config, family, architecture, cfg, tensors)


def _select_text_model(
  config: HfConfig, tensors: Mapping[str, np.ndarray], config_path: str
) -> tuple[HfConfig, Mapping[str, np.ndarray]]:
  """Return config and tensors of the text model, as a folder of its own would have them."""
  text_config = config.get("text_config")
  if not isinstance(text_config, dict):
    raise ConfigError(f"{config_path} has no text_config, which describes the text model")
  text_config = {**text_config, "architectures": [TEXT_ARCHITECTURES[config["model_type"]]]}
  text_tensors = {}
  for name, tensor in tensors.items():
    if name.removeprefix("model.").startswith(OTHER_PREFIXES):
      continue
    if name.startswith(TEXT_PREFIX_4):
      name = name.removeprefix(TEXT_PREFIX_4)
    elif name.startswith(TEXT_PREFIX_5):
      name = "model." + name.removeprefix(TEXT_PREFIX_5)
    text_tensors[name] = tensor
  return text_config, text_tensors


def read_folder_params(
  folder: HuggingFaceFolder,
  cfg: TransformerConfig,
  abstract: Params,
  skip: Callable[[str], bool] = lambda path: False,
  is_optional: Callable[[str], bool] = lambda path: False,
) -> Params:
  """Return the parameters of a folder.

  Args:
    cfg: the folder's config, or one that differs in its head or in fields that change no parameter, such as `scan`.
    abstract: the model's parameters as ShapeDtypeStructs with shardings.
    skip: whether a parameter is not read; the result does not have it.
    is_optional: whether a parameter may be missing; the result then does not have it.

  Raises:
    ConfigError: a missing or superfluous tensor, or one of another shape or type.
  """
  parameters = unrolled_parameters(cfg, abstract)
  sources: dict[str, dict[int | None, list[np.ndarray]]] = {}  # {leaf: {layer: [tensor, or one for each expert]}}
  used = set()
  for entry in list_tensors(folder.family, folder.architecture, cfg, parameters):
    name, tensor = folder.find_tensor(entry.name)
    leaves = [parameters[path].leaf for path in entry.paths]
    used.add(name)
    if all(map(skip, leaves)) or (tensor is None and all(map(is_optional, leaves))):
      continue
    shapes = [entry.part_shape(parameters[path].shape) for path in entry.paths]
    tensor = _check_tensor(folder, entry, name, tensor, tensor_shape(entry.patterns, shapes))
    for index, path in enumerate(entry.paths):
      view = parameter_view(tensor, entry.patterns, shapes, index)
      sources.setdefault(parameters[path].leaf, {}).setdefault(parameters[path].layer, []).append(view)
  missing = {parameter.leaf for parameter in parameters.values()} - set(sources)
  required = {leaf for leaf in missing if not (skip(leaf) or is_optional(leaf))}
  if required:
    raise ConfigError(
      f"{folder.path}: a {folder.architecture} has no tensor for the parameter {min(required)}; set model.* as it is "
      "there"
    )
  _check_unused_tensors(folder, cfg, used)
  leaves_flat = flatten_tree(abstract)
  return unflatten_tree({p: _assemble(sources[p], leaf) for p, leaf in leaves_flat.items() if p not in missing})


def _check_tensor(
  folder: HuggingFaceFolder, entry: TensorEntry, name: str, tensor: np.ndarray | None, shape: tuple[int, ...]
) -> np.ndarray:
  """Return the tensor; raise ConfigError if it is missing, or does not have the expected shape and a float dtype."""
  if tensor is None:
    raise ConfigError(f"{folder.path} has no tensor {entry.name} {list(shape)}, which its {CONFIG_FILE} requires")
  if tensor.shape != shape:
    raise ConfigError(
      f"{folder.path}: tensor {name} has shape {list(tensor.shape)}, but its {CONFIG_FILE} requires {list(shape)}"
    )
  if tensor.dtype.kind not in "fV":  # V is bfloat16
    raise ConfigError(f"{folder.path}: tensor {name} has dtype {tensor.dtype}; weights must be floating-point numbers")
  return tensor


def _check_unused_tensors(folder: HuggingFaceFolder, cfg: TransformerConfig, used: Collection[str]) -> None:
  """Raise ConfigError if a tensor is not used, or a tied one differs from the embedding table."""
  family, tensors = folder.family, folder.tensors
  tied_names = (*family.always_tied, *(family.tied if cfg.tie_embeddings else ()))
  tied = {prefix + name for name in tied_names for prefix in ("", family.prefix)} & set(tensors)
  table_entry = next(
    entry for entry in list_tensors(family, folder.architecture, cfg, None) if entry.paths == ("embedding/table",)
  )
  _, table = folder.find_tensor(table_entry.name)
  for name in sorted(tied):
    # Some rows are enough to see a difference, and reading whole tables would take as long as the model itself.
    if table is not None and tensors[name].ndim == 2 and not np.array_equal(tensors[name][::997], table[::997]):
      raise ConfigError(
        f"{folder.path}: its {CONFIG_FILE} ties {name} to {table_entry.name}, but their values differ; fix either"
      )
  unused = {n for n in tensors if n not in used and n not in tied and not n.endswith(tuple(family.ignored_suffixes))}
  # Folders keep the heads of pretraining, whatever architecture they declare.
  unused -= {
    folder.find_tensor(entry.name)[0]
    for architecture in (family.heads if unused else ())
    for entry in list_tensors(family, architecture, cfg, None)
    if entry.paths[0].startswith(HEAD_PREFIXES)
  }
  if unused:
    name = min(unused)
    others = f", nor {len(unused) - 1} others" if len(unused) > 1 else ""
    raise ConfigError(
      f"{folder.path}: a {folder.architecture} has no place for tensor {name} {list(tensors[name].shape)}{others}"
    )


def _assemble(sources: Mapping[int | None, list[np.ndarray]], leaf: jax.ShapeDtypeStruct) -> jax.Array:
  """Return one parameter on its devices.

  Args:
    sources: {layer: [its tensor, or one for each expert]}; the layer is None if the parameter has no such axis.
    leaf: shape, dtype and sharding.
  """
  assert leaf.sharding is not None

  def read_shard(index: tuple[slice, ...]) -> np.ndarray:
    shape = tuple(len(range(*part.indices(size))) for part, size in zip(index, leaf.shape, strict=True))
    out = np.empty(shape, leaf.dtype)
    if None in sources:
      _fill_shard(out, sources[None], index)
    else:
      for n, layer in enumerate(range(*index[0].indices(leaf.shape[0]))):
        _fill_shard(out[n], sources[layer], index[1:])
    return out

  def bounds(index: tuple[slice, ...]) -> tuple[tuple[int | None, int | None], ...]:
    return tuple((part.start, part.stop) for part in index)

  shards: dict[tuple[tuple[int | None, int | None], ...], np.ndarray] = {}
  arrays = []
  indices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
  for device, index in sorted(indices.items(), key=lambda item: repr(bounds(item[1]))):
    if bounds(index) not in shards:  # devices with the same shard follow each other, so that one is held at a time
      shards = {bounds(index): read_shard(index)}
    arrays.append(jax.device_put(shards[bounds(index)], device))
  return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)


def _fill_shard(out: np.ndarray, tensors: list[np.ndarray], index: tuple[slice, ...]) -> None:
  """Copy a part of a tensor, or of one tensor for each expert, into `out`."""
  if tensors[0].ndim == out.ndim:
    out[...] = tensors[0][index]
  else:
    for n, expert in enumerate(range(*index[0].indices(len(tensors)))):
      out[n] = tensors[expert][index[1:]]

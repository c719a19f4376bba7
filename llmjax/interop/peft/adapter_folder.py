"""Folders that PEFT writes: config and tensors of an adapter, and the path of its base model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llmjax.config import ConfigError, Json
from llmjax.interop.folder_settings import read_json_object

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
TENSOR_PREFIX = "base_model.model."
UNSET: tuple[Json, ...] = (None, False, [], {})
ALLOWED_VALUES: Mapping[str, Sequence[Json]] = {  # {field: values that are supported}
  "peft_type": ("LORA",),
  "bias": ("none", None),
  "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the base's weights
  **dict.fromkeys(("use_dora", "lora_bias", "use_qalora", "use_bdlora", "velora_config", "monteclora_config"), UNSET),
  **dict.fromkeys(("kasa_config", "arrow_config", "layer_replication", "trainable_token_indices"), UNSET),
  **dict.fromkeys(("alora_invocation_tokens", "target_parameters", "megatron_config"), UNSET),
}


@dataclasses.dataclass(frozen=True)
class Adapter:
  """An adapter's folder.

  Attributes:
    path: the folder.
    config: content of adapter_config.json.
    tensors: {name without `TENSOR_PREFIX`: tensor}.
  """

  path: Path
  config: Mapping[str, Json]
  tensors: Mapping[str, np.ndarray]


def is_adapter_folder(path: str | Path) -> bool:
  """Whether a folder is an adapter, which needs a base model."""
  return (Path(path) / ADAPTER_CONFIG).is_file()


def open_adapter(path: str | Path) -> Adapter:
  """Return the adapter in a folder.

  Raises:
    ConfigError: a method other than LoRA or a variant of it that computes something else; missing or damaged files.
  """
  from safetensors import SafetensorError
  from safetensors.numpy import load_file

  path = Path(path)
  config_path = path / ADAPTER_CONFIG
  config = read_json_object(config_path)
  for name, values in ALLOWED_VALUES.items():
    if config.get(name, values[0]) not in values:
      raise ConfigError(
        f"{config_path}: {name}={config[name]!r} is not supported; only plain LoRA is, with {name}={values[0]!r}"
      )
  for name in ("r", "lora_alpha"):
    if not isinstance(config.get(name), (int, float)):
      raise ConfigError(f"{config_path}: {name}={config.get(name)!r} must be a number")
  if not (path / ADAPTER_WEIGHTS).is_file():
    pickle = path / PICKLED_WEIGHTS
    warning = f"; {pickle} is a pickle, which may run code when it is opened" if pickle.is_file() else ""
    raise ConfigError(f"{path} has no {ADAPTER_WEIGHTS}{warning}; write it again with PEFT's save_pretrained(DIR)")
  try:
    tensors = load_file(path / ADAPTER_WEIGHTS)
  except (SafetensorError, ValueError, KeyError, OSError) as error:
    raise ConfigError(f"{path / ADAPTER_WEIGHTS} is not a safetensors file, or is damaged: {error}") from error
  return Adapter(path, config, {name.removeprefix(TENSOR_PREFIX): tensor for name, tensor in tensors.items()})


def adapter_base_path(path: str | Path) -> str:
  """Return the PATH of an adapter's base model.

  It is a folder, relative to the adapter or to the current directory, or a name on the Hugging Face hub.
  """
  path = Path(path)
  config_path = path / ADAPTER_CONFIG
  config = read_json_object(config_path)
  name = config.get("base_model_name_or_path")
  if not isinstance(name, str) or not name:
    raise ConfigError(f"{config_path} does not name its base model; set base_model_name_or_path to a PATH")
  for folder in (path / name, Path(name)):
    if is_adapter_folder(folder):
      raise ConfigError(f"{config_path}: base_model_name_or_path={name!r} is an adapter itself; name its base model")
    if folder.is_dir():
      return str(folder)
  revision = config.get("revision")
  return name if revision in (None, "main") or "@" in name else f"{name}@{revision}"

"""Checkpoints of earlier versions: names of config keys in their manifests, and of their parameters.

FORMAT_VERSION is that of new checkpoints. It grows when an earlier llmjax could not read them.

  1: layers of a repeated pattern are `slot_{i}`
  2: they are `sublayer_{i}`

Keys of configs are renamed, and new keys get their defaults, whatever the format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import jax

from llmjax.config import ConfigTree, Json, default_config, to_dict
from llmjax.config.defaults import SET_BY_OBJECTIVE
from llmjax.trees import PyTree

FORMAT_VERSION = 2

# Parts of a config with a fixed set of keys.
FIXED_SECTIONS = ("model", "data", "checkpoint", "log", "rules", "early_stopping")

# {former key: key}
RENAMED_KEYS = {
  "optim.ema_decay": "ema_decay",
  "checkpoint.best_is": "checkpoint.best_mode",
  "early_stopping.best_is": "early_stopping.mode",
}
RENAMED_VALUES = {"least": "min", "most": "max"}  # of the two modes

# Keys whose values contain regexes of parameter paths.
REGEX_KEYS = ("trainable", "init_map", "optim.lr_scale", "optim.decay_mask", "model.lora_targets")


def upgrade_manifest(manifest: dict[str, Json]) -> dict[str, Json]:
  """Return a manifest of any format as this version writes it: current names, and defaults of keys that are newer."""
  config = manifest["config"]
  _rename_config_keys(config)
  if manifest["format_version"] < 2:
    for part in (config, {"model": manifest["model"]}):
      _rename_in_regexes(part)
    manifest["format_version"] = 2
  early_stopping = manifest.get("early_stopping")
  if early_stopping and "best_is" in early_stopping:
    early_stopping["mode"] = RENAMED_VALUES[early_stopping.pop("best_is")]
  for key, default in to_dict(default_config()).items():
    value = config.setdefault(key, default)
    if key in FIXED_SECTIONS and (key != "model" or value.get("name") == default["name"]):
      config[key] = {**default, **(SET_BY_OBJECTIVE if key == "model" else {}), **value}
  if manifest["model"].get("name") == config["model"].get("name"):
    manifest["model"] = {**config["model"], **manifest["model"]}
  return manifest


def _rename_config_keys(config: ConfigTree) -> None:
  for old, new in RENAMED_KEYS.items():
    section, _, name = old.rpartition(".")
    if name in config.get(section, {}):
      value = config[section].pop(name)
      target, _, new_name = new.rpartition(".")
      (config[target] if target else config)[new_name] = RENAMED_VALUES.get(value, value)
  for entry in config.get("evals", {}).values():
    if entry.get("name") == "yardsticks":
      entry["name"] = "baselines"


def _rename_in_regexes(config: ConfigTree) -> None:
  """Replace `slot_` in the regexes of a config of format 1, in place."""

  def replace(value: Json) -> Json:
    if isinstance(value, str):
      return value.replace("slot_", "sublayer_")
    return [replace(item) for item in value] if isinstance(value, (list, tuple)) else value

  for key in REGEX_KEYS:
    section, _, name = key.rpartition(".")
    part = config.get(section, {}) if section else config
    if name in part:
      part[name] = replace(part[name])


def current_parameter_path(path: str, format_version: int) -> str:
  """Return this version's path of a leaf in a checkpoint's state, such as "params/decoder/layers/sublayer_0/..."."""
  return path if format_version > 1 else re.sub(r"(^|/)slot_(\d+)(?=/|$)", r"\1sublayer_\2", path)


def to_saved_names(tree: PyTree, format_version: int) -> PyTree:
  """Return a state, or a part of one, with the names that a checkpoint of `format_version` has."""
  return tree if format_version > 1 else _rename_dict_keys(tree, lambda k: re.sub(r"^sublayer_(\d+)$", r"slot_\1", k))


def from_saved_names(tree: PyTree, format_version: int) -> PyTree:
  """Return a state, or a part of one, with this version's names; the inverse of `to_saved_names`."""
  return tree if format_version > 1 else _rename_dict_keys(tree, lambda k: re.sub(r"^slot_(\d+)$", r"sublayer_\1", k))


def _rename_dict_keys(tree: PyTree, rename: Callable[[str], str]) -> PyTree:
  """Return the tree with all keys of dicts renamed, also below other containers, such as an optimizer's tuples."""

  def is_dict(node: object) -> bool:
    return isinstance(node, Mapping)

  def rename_node(node: PyTree) -> PyTree:
    return {rename(k): _rename_dict_keys(v, rename) for k, v in node.items()} if is_dict(node) else node

  return jax.tree.map(rename_node, tree, is_leaf=is_dict)

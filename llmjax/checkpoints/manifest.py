"""The manifest of a checkpoint: versioned JSON with all that is needed to use its parameters without a config file."""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib.metadata
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmjax.config import ConfigTree, Json, default_config, to_dict
from llmjax.config.defaults import SET_BY_OBJECTIVE

FORMAT_VERSION = 1


SECTIONS = (
  "model",
  "data",
  "checkpoint",
  "log",
  "rules",
  "early_stopping",
)  # parts of a config with a fixed set of keys

# Keys and values of configs that were called differently when older checkpoints were written.
RENAMED_KEYS = {
  "optim.ema_decay": "ema_decay",
  "checkpoint.best_is": "checkpoint.best_mode",
  "early_stopping.best_is": "early_stopping.mode",
}
RENAMED_VALUES = {"least": "min", "most": "max"}  # of the two modes

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def make_manifest(program: Any) -> dict[str, Any]:
  """What a checkpoint says about itself besides the step."""
  return {
    "format_version": FORMAT_VERSION,
    "config": program.config,
    "model": program.config["model"],
    "objective": program.config["objective"],
    "tokenizer": pack_tokenizer(program.tokenizer),
    "num_params": program.num_params,
    "total_steps": program.total_steps,
    "layout": "scanned" if program.model.cfg.scan else "unrolled",
    "ema": program.config["ema_decay"] is not None,
    "versions": package_versions() | {"commit": source_commit()},
  }


def package_versions() -> dict[str, str]:
  """Of the packages that a checkpoint was made with; processes that run as one must have the same."""
  return {name: importlib.metadata.version(name) for name in _PACKAGES}


@functools.cache
def source_commit(root: Path = Path(__file__).parents[2]) -> str | None:
  """Of the code that runs, with "-dirty" where tracked files are changed; None where nothing says it.

  Containers have it in LLMJAX_COMMIT, archives that launchers ship in `.commit`, and else git knows it of a checkout.
  """
  with contextlib.suppress(OSError):
    return os.environ.get("LLMJAX_COMMIT") or (root / ".commit").read_text(encoding="utf-8").strip()
  git = ["git", "--no-optional-locks", f"--git-dir={root / '.git'}", f"--work-tree={root}"]
  words = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
  with contextlib.suppress(OSError, subprocess.SubprocessError):
    # What is installed can lie in somebody else's repository, or be part of one.
    if 'name="llmjax"' in (root / "setup.py").read_text(encoding="utf-8"):
      return subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
  return None


def pack_tokenizer(tokenizer: Any) -> dict[str, Any]:
  """A tokenizer as JSON."""
  files = {name: base64.b64encode(data).decode() for name, data in tokenizer.to_files().items()}
  return {"spec": tokenizer.spec(), "files": files}


def tokenizer_files(manifest: Mapping[str, Any]) -> dict[str, bytes]:
  """The tokenizer's files as `Tokenizer.to_files` gave them."""
  return {name: base64.b64decode(data) for name, data in manifest["tokenizer"]["files"].items()}


def upgrade_manifest(manifest: dict[str, Json]) -> dict[str, Json]:
  """Return a manifest with today's names of config keys, and the default of every key that is newer than it."""
  config = manifest["config"]
  _rename_config_keys(config)
  stopping = manifest.get("early_stopping")
  if stopping and "best_is" in stopping:
    stopping["mode"] = RENAMED_VALUES[stopping.pop("best_is")]
  for key, default in to_dict(default_config()).items():
    value = config.setdefault(key, default)
    if key in SECTIONS and (key != "model" or value.get("name") == default["name"]):
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

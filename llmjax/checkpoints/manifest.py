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
from typing import Protocol, TypeAlias

from llmjax.checkpoints.upgrade import FORMAT_VERSION
from llmjax.config import ConfigTree, Json
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.types import Model

Manifest: TypeAlias = dict[str, Json]

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class ManifestContent(Protocol):
  """What a manifest is made of; `training.program.Program` has these attributes."""

  @property
  def config(self) -> ConfigTree: ...
  @property
  def model(self) -> Model: ...
  @property
  def tokenizer(self) -> Tokenizer: ...
  @property
  def num_params(self) -> int: ...
  @property
  def total_steps(self) -> int: ...


def make_manifest(program: ManifestContent) -> Manifest:
  """Return the manifest of a program's checkpoints, without what each save adds: "step", "time" and "metrics".

  Returns:
    "format_version": see `upgrade`.
    "config": the whole config, of which "model" and "objective" are repeated for direct access.
    "tokenizer": see `pack_tokenizer`.
    "num_params", "total_steps": numbers.
    "layout": "scanned" or "unrolled" layers.
    "ema": whether the state has an exponential moving average of the parameters.
    "versions": of packages and source code.
  """
  return {
    "format_version": FORMAT_VERSION,
    "config": program.config,
    "model": program.config["model"],
    "objective": program.config["objective"],
    "tokenizer": pack_tokenizer(program.tokenizer),
    "num_params": program.num_params,
    "total_steps": program.total_steps,
    "layout": program.model.cfg.layer_layout,
    "ema": program.config["ema_decay"] is not None,
    "versions": package_versions() | {"commit": source_commit()},
  }


def package_versions() -> dict[str, str]:
  """Return {package: version} of packages that must be the same in all processes of a run."""
  return {name: importlib.metadata.version(name) for name in _PACKAGES}


@functools.cache
def source_commit(root: Path = Path(__file__).parents[2]) -> str | None:
  """Return the commit of the running code, with "-dirty" if tracked files are changed; None if it is unknown.

  Containers have it in the variable LLMJAX_COMMIT, archives that launchers ship in the file `.commit`, checkouts in
  git.
  """
  with contextlib.suppress(OSError):
    return os.environ.get("LLMJAX_COMMIT") or (root / ".commit").read_text(encoding="utf-8").strip()
  git = ["git", "--no-optional-locks", f"--git-dir={root / '.git'}", f"--work-tree={root}"]
  command = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
  with contextlib.suppress(OSError, subprocess.SubprocessError):
    # An installed package may lie in somebody else's repository, or be a part of one.
    if 'name="llmjax"' in (root / "setup.py").read_text(encoding="utf-8"):
      return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
  return None


def pack_tokenizer(tokenizer: Tokenizer) -> dict[str, Json]:
  """Return a tokenizer as JSON: its spec, and its files in base64."""
  files = {name: base64.b64encode(content).decode() for name, content in tokenizer.to_files().items()}
  return {"spec": tokenizer.spec(), "files": files}


def tokenizer_files(manifest: Mapping[str, Json]) -> dict[str, bytes]:
  """Return the files of a manifest's tokenizer, as `Tokenizer.to_files` returned them."""
  return {name: base64.b64decode(content) for name, content in manifest["tokenizer"]["files"].items()}

"""Runs of llmjax as pretrained models: the checkpoint that a PATH refers to, and `RunSource`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from llmjax.checkpoints.manager import CHECKPOINTS_DIR, Checkpoints
from llmjax.checkpoints.manifest import Manifest, tokenizer_files
from llmjax.checkpoints.sources.base import PretrainedSource
from llmjax.checkpoints.sources.init_map import (
  OUTPUT_PREFIXES,
  InitMap,
  may_be_reinitialized,
  other_head_error,
  source_name,
)
from llmjax.checkpoints.upgrade import FORMAT_VERSION
from llmjax.config import ConfigError, Json
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.data.tokenizers.registry import tokenizer_from_files
from llmjax.interop.folder_settings import CONFIG_FILE
from llmjax.models.layer_stacks import HEAD_PREFIXES
from llmjax.storage.buckets import as_path
from llmjax.trees import FlatTree, Params, flatten_tree, unflatten_tree
from llmjax.types import Model


def open_checkpoint(path: str | Path) -> tuple[Checkpoints, int, Manifest]:
  """Return the checkpoints of a workdir, the step that PATH refers to, and the manifest of that step.

  Args:
    path: a workdir (its newest checkpoint), WORKDIR/checkpoints/STEP or WORKDIR/checkpoints/best.

  Raises:
    ConfigError: there is no such checkpoint, or it is damaged or of a newer format.
  """
  workdir, step = locate_checkpoint(path)
  checkpoints = Checkpoints(workdir)
  if step is not None and step not in checkpoints.steps():
    raise ConfigError(f"{path} is not a complete checkpoint; complete steps are {checkpoints.steps()}")
  newest = checkpoints.newest_manifest() if step is None else (step, checkpoints.read_manifest(step))
  if newest is None:
    raise ConfigError(f"{path} has no complete checkpoint")
  step, manifest = newest
  if manifest["format_version"] > FORMAT_VERSION:
    raise ConfigError(f"{path} was written by a newer llmjax (format {manifest['format_version']}); update llmjax")
  return checkpoints, step, manifest


def locate_checkpoint(path: str | Path) -> tuple[Path, int | None]:
  """Return workdir and step of a PATH; None is the newest step."""
  path = as_path(path)
  is_below_checkpoints = path.parent.name == CHECKPOINTS_DIR
  if (path / CHECKPOINTS_DIR).is_dir():
    return path, None
  if path.name == "best" and is_below_checkpoints and path.parent.is_dir():
    return path.parent.parent, best_step(path.parent.parent)
  if path.name.isdigit() and is_below_checkpoints and path.is_dir():
    return path.parent.parent, int(path.name)
  if not path.exists():
    raise ConfigError(f"{path} does not exist; give a workdir, a checkpoint, a Hugging Face folder or a hub name")
  raise ConfigError(
    f"{path} has no checkpoint; give a workdir of `llmjax train`, WORKDIR/{CHECKPOINTS_DIR}/STEP, or a Hugging Face "
    f"folder with {CONFIG_FILE} and safetensors files"
  )


def best_step(workdir: Path) -> int:
  """Return the step of a workdir with the best value of config.checkpoint.best."""
  checkpoints = Checkpoints(workdir)
  manifests = {step: checkpoints.read_manifest(step) for step in checkpoints.steps()}
  checkpoints.close()
  settings = manifests[max(manifests)]["config"]["checkpoint"] if manifests else {"best": None}
  metric = settings["best"]
  values = {step: m["metrics"][metric] for step, m in manifests.items() if metric in m["metrics"]}
  if not values:
    raise ConfigError(
      f"{workdir}/{CHECKPOINTS_DIR}/best: no checkpoint has a value of checkpoint.best={metric!r}; give STEP"
    )
  return (max if settings["best_mode"] == "max" else min)(values, key=lambda step: values[step])


def checkpoint_tokenizer(manifest: Mapping[str, Json], *, trust: bool = False) -> Tokenizer | None:
  """Return the tokenizer in a checkpoint, None if it has none."""
  if manifest["tokenizer"] is None:
    return None
  return tokenizer_from_files(manifest["tokenizer"]["spec"], tokenizer_files(manifest), trust=trust)


class RunSource(PretrainedSource):
  """A checkpoint of a run. Its parameters are the moving average if the run has one."""

  def __init__(self, path: str, checkpoints: Checkpoints, step: int, manifest: Manifest):
    super().__init__(path, as_path(path), manifest)
    self._checkpoints, self._step = checkpoints, step
    self._trained_part = "ema" if manifest["ema"] else "params"

  @functools.cached_property
  def _shapes(self) -> dict[str, tuple[int, ...]]:
    return self._checkpoints.parameter_shapes(self._step)

  @functools.cached_property
  def _parts(self) -> dict[str, str]:
    """{parameter: part of the state that has it}."""
    split = (path.partition("/") for path in self._shapes)
    return {name: part for part, _, name in split if part in (self._trained_part, "frozen")}

  def read_tokenizer(self, trust: bool) -> Tokenizer | None:
    return checkpoint_tokenizer(self.manifest, trust=trust)

  def read_params(self, model: Model, abstract: Params) -> Params:
    return self._restore({name: name for name in flatten_tree(abstract)}, abstract)

  def read_initial_params(self, model: Model, abstract: Params, init_map: InitMap) -> Params:
    has_same_head = model.cfg.head == self.manifest["model"].get("head", "lm")
    names: dict[str, str] = {}  # {parameter of the model: its name in the checkpoint}
    for path, leaf in flatten_tree(abstract).items():
      name = source_name(init_map, path)
      if name is None or (name not in self._parts and may_be_reinitialized(name)):
        continue
      shape = self._shapes.get(f"{self._parts.get(name)}/{name}")
      if shape not in (None, tuple(leaf.shape)) and path.startswith(OUTPUT_PREFIXES):
        if has_same_head:
          raise other_head_error(self.path, path, leaf.shape, shape)
        continue
      names[path] = name
    unused = set(self._parts) - set(names.values())
    in_body = [n for n in unused if not n.startswith(HEAD_PREFIXES) and source_name(init_map, n) is not None]
    if in_body:
      raise ConfigError(
        f"init_from={self.path}: its {min(in_body)} has no place in this model, which would compute something else "
        "without it; set model.* as it was there"
      )
    return self._restore(names, abstract)

  def _restore(self, names: Mapping[str, str], abstract: Params) -> Params:
    """Return the parameters in `names`, {path in the model: path in the checkpoint}."""
    leaves = flatten_tree(abstract)
    wanted: dict[str, FlatTree] = {}  # {part of the state: leaves}
    for path, name in names.items():
      wanted.setdefault(self._parts.get(name, self._trained_part), {})[name] = leaves[path]
    parts = {part: unflatten_tree(flat) for part, flat in wanted.items()}
    restored = self._checkpoints.restore_parts(self._step, parts)
    arrays = {name: leaf for part in restored.values() for name, leaf in flatten_tree(part).items()}
    return unflatten_tree({path: arrays[name] for path, name in names.items()})

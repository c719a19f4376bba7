"""A PATH resolved: a workdir or one of its checkpoints, to a model, its parameters and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.sharding import Mesh, SingleDeviceSharding

from llmjax import checkpoint, sharding
from llmjax.config import ConfigError, build, resolve
from llmjax.data import tokenizer as tokenizers
from llmjax.models.transformer import MODELS
from llmjax.objectives import OBJECTIVES
from llmjax.types import Objective

HEADS = ("head", "pooler", "sentence_head")  # how the names of parameters behind the last layer begin


class Pretrained(NamedTuple):
  """What `load` returns: `model, params, tokenizer = llmjax.load(PATH)`."""

  model: nn.Module
  params: Any
  tokenizer: Any


def locate(path: str | Path) -> tuple[Path, int | None]:
  """(workdir, step) of a PATH; step None is the newest."""
  path = Path(path)
  if (path / checkpoint.FOLDER).is_dir():
    return path, None
  if path.name.isdigit() and path.parent.name == checkpoint.FOLDER and path.is_dir():
    return path.parent.parent, int(path.name)
  if not path.exists():
    raise ConfigError(f"{path}: no such workdir or checkpoint")
  raise ConfigError(
    f"{path} holds no checkpoint; give a workdir of `llmjax train`, or WORKDIR/{checkpoint.FOLDER}/STEP"
  )


def open_checkpoint(path: str | Path) -> tuple[checkpoint.Checkpoints, int, dict[str, Any]]:
  """The checkpoints that PATH points into, the step it means, and that step's manifest."""
  workdir, step = locate(path)
  checkpoints = checkpoint.Checkpoints(workdir)
  if step is not None and step not in checkpoints.steps():
    raise ConfigError(f"{path} is no complete checkpoint; there are {checkpoints.steps()}")
  found = checkpoints.newest_manifest() if step is None else (step, checkpoints.read(step, "manifest"))
  if found is None:
    raise ConfigError(f"{path} holds no complete checkpoint")
  step, manifest = found
  if manifest["format_version"] > checkpoint.FORMAT_VERSION:
    raise ConfigError(f"{path} was written by a newer llmjax (format {manifest['format_version']}); update llmjax")
  return checkpoints, step, manifest


def load(
  path: str | Path, *, trust: bool = False, mesh: Mesh | None = None, rules: sharding.Rules = sharding.RULES
) -> Pretrained:
  """Model, parameters (the average, where one was kept) and tokenizer from a PATH; needs no config file.

  Args:
    path: a workdir (its newest checkpoint) or WORKDIR/checkpoints/STEP.
    trust: allow the checkpoint to name a model outside llmjax, which runs its code.
    mesh: where the parameters lie, cut by `rules`; None is the first device.
  Raises:
    ConfigError: no such path, no checkpoint in it, or one from a newer format.
  """
  checkpoints, step, manifest = open_checkpoint(path)
  try:
    tokenizer = read_tokenizer(manifest, trust=trust)
    spec = manifest["model"]
    model = build(spec, MODELS, "model", trust=trust)
    part = "ema" if manifest["ema"] else "params"
    params = checkpoints.restore_part(step, part, abstract_params(model, mesh, rules))
  finally:
    checkpoints.close()
  return Pretrained(model, params, tokenizer)


def abstract_params(model: nn.Module, mesh: Mesh | None = None, rules: sharding.Rules = sharding.RULES) -> Any:
  """The parameters as ShapeDtypeStructs with shardings: over a mesh, or on the first device.

  Raises:
    ConfigError: a dimension that its mesh axes do not divide.
  """
  shapes, axes = sharding.parameters(model)
  if mesh is None:
    first = SingleDeviceSharding(jax.local_devices()[0])
    where = jax.tree.map(lambda _: first, shapes)
  else:
    where = sharding.param_shardings(shapes, axes, mesh, rules)
  return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, where)


def read_objective(manifest: dict[str, Any], tokenizer: Any, *, trust: bool = False) -> Objective:
  """The objective that a checkpoint was trained on; one that names code outside llmjax, also in a part, needs
  `trust`."""
  config = manifest["config"]
  if not trust:
    check_trusted(config["objective"])
  return build(config["objective"], OBJECTIVES, "objective", tokenizer=tokenizer, seq_len=config["seq_len"])


def check_trusted(objective: Any) -> None:
  """Refuses every `name` that is none of llmjax's objectives in an objective's config."""
  if isinstance(objective, dict):
    if "name" in objective:
      resolve(objective["name"], OBJECTIVES, "objective", trust=False)
    for part in objective.values():
      check_trusted(part)
  elif isinstance(objective, (list, tuple)):
    for part in objective:
      check_trusted(part)


def read_tokenizer(manifest: dict[str, Any], *, trust: bool = False) -> Any:
  """The tokenizer that a checkpoint carries."""
  return tokenizers.from_files(manifest["tokenizer"]["spec"], checkpoint.tokenizer_files(manifest), trust=trust)


def load_tokenizer(path: str | Path, *, trust: bool = False) -> Any:
  """Only the tokenizer of a PATH."""
  checkpoints, _, manifest = open_checkpoint(path)
  checkpoints.close()
  return read_tokenizer(manifest, trust=trust)


def load_params(path: str | Path, abstract: Any) -> Any:
  """Only the parameters, laid out as `abstract` (ShapeDtypeStructs with shardings) says: `config.init_from`."""
  checkpoints, step, manifest = open_checkpoint(path)
  part = "ema" if manifest["ema"] else "params"
  try:
    saved = {name.removeprefix(f"{part}/") for name in checkpoints.shapes(step) if name.startswith(f"{part}/")}
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    left = sorted(saved - {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves})
    lost = [name for name in left if not name.startswith(HEADS)]
    if lost:
      raise ConfigError(
        f"init_from={path}: its {lost[0]} has no place in this model, which would compute something else without it; "
        "set model.* as it was there"
      )
    return checkpoints.restore_part(step, part, abstract)
  finally:
    checkpoints.close()

"""What a run takes from the PATH in config.init_from: parameters, the model's config, labels, manifest entries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llmjax.checkpoints.heads import FROM_PRETRAINED
from llmjax.checkpoints.paths import open_path
from llmjax.checkpoints.sources.init_map import InitMap, check_init_map, source_name
from llmjax.config import ConfigError, Json, resolve_callable
from llmjax.models.transformer import MODELS
from llmjax.objectives.task import NO_HEAD
from llmjax.trees import Params, flatten_tree
from llmjax.types import Model

INHERITED_ENTRIES = ("family", "generation")  # manifest entries that a run takes over


def load_params(path: str | Path, model: Model, abstract: Params, init_map: InitMap = ()) -> tuple[Params, list[str]]:
  """Return parameters for a model with the same body. Its head and its adapters may differ.

  Args:
    path: see `open_path`.
    abstract: the model's parameters as ShapeDtypeStructs with shardings.
    init_map: ((regex, replacement or None), ...). The first regex that matches the whole path of a parameter gives its
      name in the source, as in `re.sub`; None means that it is not read.

  Returns:
    The parameters that the source has, and the sorted paths of the others, which must be initialised.

  Raises:
    ConfigError: a parameter of the body is missing or has another shape; a rule that matches nothing.
  """
  check_init_map(init_map, abstract)
  with open_path(path) as source:
    params = source.read_initial_params(model, abstract, init_map)
  return params, sorted(set(flatten_tree(abstract)) - set(flatten_tree(params)))


def inherited_manifest_entries(path: str | Path | None) -> dict[str, Json]:
  """Return the manifest entries that a run takes over from init_from: its family and its generation settings."""
  if path is None:
    return {}
  with open_path(path) as source:
    return {key: source.manifest[key] for key in INHERITED_ENTRIES if key in source.manifest}


def labels_of_init(config: Mapping[str, Json]) -> Mapping[str, Json]:
  """Return the labels that a run's head already has, for a config that names none.

  Returns:
    config.objective of init_from with "path" added, or {} if the run does not reuse its head.
  """
  path, objective = config["init_from"], config["objective"]
  has_open_labels = objective.get("labels", ()) is None
  if path is None or not has_open_labels or source_name(config["init_map"], "head/kernel") is None:
    return NO_HEAD
  with open_path(path) as source:
    initial = source.config["objective"] or {}
  has_same_head = initial.get("labels") and initial["name"] == objective["name"]
  return {**initial, "path": path} if has_same_head else NO_HEAD


def pretrained_model_config(config: Mapping[str, Json]) -> tuple[dict[str, Json], str | None]:
  """Return config.model for model.name="pretrained", and the model's family, None if it is unknown.

  It is the model of init_from, changed by the keys of config.model that are not None.
  """
  if config["init_from"] is None:
    raise ConfigError(
      f"model.name={FROM_PRETRAINED!r} is the model of init_from, which is not set; set it, or another model.name"
    )
  changes = {key: value for key, value in config["model"].items() if key != "name" and value is not None}
  with open_path(config["init_from"]) as source:
    model = source.manifest["model"]
    resolve_callable(model["name"], MODELS, "model", trust=False)
    return {**model, **changes}, source.manifest.get("family")

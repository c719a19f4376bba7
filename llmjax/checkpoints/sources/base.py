"""`PretrainedSource`: model, parameters, tokenizer and objective that a PATH refers to."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast

import jax
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from llmjax.checkpoints.manifest import Manifest
from llmjax.checkpoints.objectives import check_trusted_objective, make_objective
from llmjax.checkpoints.sources.init_map import InitMap
from llmjax.config import ConfigError, ConfigTree, Json, build
from llmjax.config.mesh import RULES, Rules
from llmjax.config.model import TransformerConfig
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.data.tokenizers.huggingface import tokenizer_from_folder
from llmjax.distributed import sharding
from llmjax.models.transformer import MODELS
from llmjax.trees import Params
from llmjax.types import Model, Objective


class Pretrained(NamedTuple):
  """The result of `llmjax.load`: `model, params, tokenizer = llmjax.load(PATH)`.

  The tokenizer is None if the PATH has none. Its type does not say so, since nearly every caller has one.
  """

  model: Model
  params: Params
  tokenizer: Tokenizer


class PretrainedSource(abc.ABC):
  """A pretrained model. Its parameters are not read yet.

  Attributes:
    path: PATH as the user gave it.
    folder: the folder that it refers to.
    manifest: as that of a checkpoint, see `make_manifest`. A model of known architecture also has "family", and one
      with generation settings "generation".
  """

  def __init__(self, path: str, folder: Path, manifest: Manifest):
    self.path = path
    self.folder = folder
    self.manifest = manifest

  @abc.abstractmethod
  def read_tokenizer(self, trust: bool) -> Tokenizer | None:
    """Return the tokenizer, None if there is none; `trust` allows code outside llmjax."""

  @abc.abstractmethod
  def read_params(self, model: Model, abstract: Params) -> Params:
    """Return all parameters.

    Args:
      model: the source's own model, perhaps with changes that keep its architecture.
      abstract: the model's parameters as ShapeDtypeStructs with shardings.

    Raises:
      ConfigError: a parameter is missing or has another shape.
    """

  @abc.abstractmethod
  def read_initial_params(self, model: Model, abstract: Params, init_map: InitMap) -> Params:
    """Return the parameters that another model starts from. Heads and adapters may be missing in the result.

    Args:
      model: a model with the same body.
      abstract: its parameters as ShapeDtypeStructs with shardings.
      init_map: names of parameters in the source.

    Raises:
      ConfigError: another body, or a head of the same kind with another size.
    """

  @property
  def config(self) -> ConfigTree:
    """Config of the run; that of a Hugging Face folder has its model, and defaults."""
    config: ConfigTree = self.manifest["config"]
    return config

  def make_model(self, trust: bool = False, **changes: Json) -> Model:
    """Return the model, with changes of fields of its config."""
    spec = {**with_auto_attention(self.manifest["model"]), **changes}
    model: Model = build(spec, MODELS, "model", trust=trust)
    return model

  def load(self, trust: bool = False, mesh: Mesh | None = None, rules: Rules = RULES, **changes: Json) -> Pretrained:
    """Return model, parameters and tokenizer; see `llmjax.checkpoints.paths.load`."""
    tokenizer = cast(Tokenizer, self.read_tokenizer(trust))
    model = self.make_model(trust, **changes)
    return Pretrained(model, self.read_params(model, abstract_params(model, mesh, rules)), tokenizer)

  def tokenizer(self, trust: bool = False) -> Tokenizer:
    """Return the tokenizer.

    Raises:
      ConfigError: there is none.
    """
    tokenizer = self.read_tokenizer(trust)
    return tokenizer_from_folder(self.folder) if tokenizer is None else tokenizer  # raises: names the missing files

  def objective(self, trust: bool = False) -> Objective:
    """Return the objective that the model was trained on; one with code outside llmjax needs `trust`.

    Raises:
      ConfigError: a head whose objective is unknown.
    """
    spec = self.config["objective"]
    if spec is None:
      head = self.manifest["model"]["head"]
      raise ConfigError(f"{self.path} has a head of kind {head!r}, for which no objective is known")
    if not trust:
      check_trusted_objective(spec)
    return make_objective(spec, self.tokenizer(trust), self.config["seq_len"], self.manifest["model"])


def with_auto_attention(model_config: Mapping[str, Json]) -> dict[str, Json]:
  """Return a model's config with the attention kernel chosen anew, for other devices and lengths than in training."""
  return {**model_config, "attention": "auto"} if "attention" in model_config else dict(model_config)


def abstract_params(model: Model, mesh: Mesh | None = None, rules: Rules = RULES) -> Params:
  """Return a model's parameters as ShapeDtypeStructs with shardings.

  Args:
    mesh: devices that the parameters are sharded over by `rules`; None: the first device.

  Raises:
    ConfigError: a dimension that is not divisible by its mesh axes.
  """
  shapes, axes = sharding.abstract_parameters(model)
  if mesh is None:
    first_device = SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: first_device, shapes)
  else:
    shardings = sharding.param_shardings(shapes, axes, mesh, rules)

  def attach(shape: jax.ShapeDtypeStruct, where: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

  return jax.tree.map(attach, shapes, shardings)


def transformer_config_of(model: Model) -> TransformerConfig:
  """Return a model's config.

  Raises:
    ConfigError: the model is not llmjax's Transformer, so that no Hugging Face architecture is known for it.
  """
  cfg = getattr(model, "cfg", None)
  if not isinstance(cfg, TransformerConfig):
    raise ConfigError(
      f"model.name: only llmjax's Transformer has a Hugging Face architecture, got {type(model).__name__}"
    )
  return cfg

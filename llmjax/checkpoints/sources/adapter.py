"""Adapters of PEFT as pretrained models: `AdapterSource`."""

from __future__ import annotations

import re

from llmjax.checkpoints.heads import with_head_fields
from llmjax.checkpoints.objectives import infer_head_objective
from llmjax.checkpoints.sources.base import PretrainedSource, transformer_config_of
from llmjax.checkpoints.sources.init_map import OUTPUT_PREFIXES, InitMap, source_name
from llmjax.config import ConfigError, build
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.interop.config_json import default_class_names
from llmjax.interop.peft.adapter_folder import open_adapter
from llmjax.interop.peft.reader import adapter_family, place_adapter_params, read_adapter, read_adapter_head
from llmjax.models.layer_stacks import HEAD_PREFIXES
from llmjax.models.lora import is_adapter
from llmjax.models.transformer import MODELS
from llmjax.trees import Params, flatten_tree, unflatten_tree
from llmjax.types import Model

ADAPTER_REGEX = r".*lora_[ab]"  # of parameters that a base model does not have


class AdapterSource(PretrainedSource):
  """A base model with an adapter in the format of PEFT.

  Args:
    path: PATH of the adapter.
    base: the base model.
  """

  def __init__(self, path: str, base: PretrainedSource):
    self._base = base
    self._adapter = open_adapter(path)
    cfg = transformer_config_of(base.make_model())
    family = adapter_family(base.manifest, cfg)
    model = {**base.manifest["model"], "lora_rank": 0}
    head = read_adapter_head(self._adapter, family, cfg)
    if head:
      model = with_head_fields(model, head, family.model_type, {"name": model["name"]})
    cfg = transformer_config_of(build(model, MODELS, "model", trust=False))
    lora_fields, self._arrays = read_adapter(self._adapter, family, cfg)
    model |= lora_fields
    objective = base.manifest["objective"]
    labels = {}
    if head:
      names = default_class_names(head["num_classes"])
      objective = infer_head_objective(head["head"], names, None, base.config["seq_len"])
      labels = {"labels": names}
    manifest = {
      **base.manifest,
      "config": base.config | {"model": model, "objective": objective},
      "model": model,
      "objective": objective,
      "family": family.model_type,
      "architecture": f"{family.model_type} with an adapter",
      "ema": False,
      "total_steps": 0,
      **labels,
    }
    super().__init__(path, base.folder, manifest)

  def read_tokenizer(self, trust: bool) -> Tokenizer | None:
    return self._base.read_tokenizer(trust)

  def read_params(self, model: Model, abstract: Params) -> Params:
    own = place_adapter_params(self._adapter, self._arrays, model.cfg, abstract)
    params = self._with_base_params(own, model, abstract, ())
    missing = set(flatten_tree(abstract)) - set(flatten_tree(params))
    if missing:
      raise ConfigError(f"{self.path}: neither the adapter nor its base model {self._base.path} has {min(missing)}")
    return params

  def read_initial_params(self, model: Model, abstract: Params, init_map: InitMap) -> Params:
    has_same_head = model.cfg.head == self.manifest["model"]["head"]
    paths = flatten_tree(abstract)

    def skip(path: str) -> bool:
      is_of_other_head = not has_same_head and path.startswith(OUTPUT_PREFIXES)
      is_missing_here = path.startswith(HEAD_PREFIXES) and path not in paths
      return is_of_other_head or is_missing_here or source_name(init_map, path) is None

    own = place_adapter_params(self._adapter, self._arrays, model.cfg, abstract, skip)
    return self._with_base_params(own, model, abstract, init_map)

  def _with_base_params(self, own: Params, model: Model, abstract: Params, init_map: InitMap) -> Params:
    """Return the adapter's parameters {path: array}, and those of the base model that it does not have."""
    base_abstract = {path: leaf for path, leaf in flatten_tree(abstract).items() if not is_adapter(path)}
    not_read = [(ADAPTER_REGEX, None), *((re.escape(path), None) for path in own if not is_adapter(path))]
    base = self._base.read_initial_params(model, unflatten_tree(base_abstract), (*not_read, *init_map))
    return unflatten_tree({**flatten_tree(base), **own})

"""Which parameters are trained, and their learning rates by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmjax.config import ConfigError
from llmjax.config.model import ModelConfig, TransformerConfig
from llmjax.models.layer_stacks import HEAD_PREFIXES, layer_locations
from llmjax.trees import FlatTree, Params, PyTree, flatten_tree, match_rules, unflatten_tree

EMBEDDINGS = ("embedding", "positions", "token_types", "embedding_norm", "project_in")  # top names of their parameters


def match_trainable(params: Params, rules: Sequence[tuple[str, bool]]) -> PyTree:
  """Return the tree of bools that config.trainable gives: which parameters are trained.

  Raises:
    ConfigError: a value that is not a bool, nothing to train, or an error of `match_rules`.
  """
  trainable = match_rules(rules, params, "trainable")
  values = list(flatten_tree(trainable).values())
  for value in values:
    if not isinstance(value, bool):
      raise ConfigError(f"trainable: {value!r} must be True or False")
  if not any(values):
    raise ConfigError("trainable: no parameter is trained; give a rule with True")
  return trainable


def layer_lr_scales(params: Params, cfg: ModelConfig, decay: float) -> PyTree:
  """Return factors of the learning rate: `decay` once for each layer above a parameter.

  Parameters after the last layer have 1, the last layer `decay`, the first layer decay^N, the embeddings decay^(N+1)
  (Howard & Ruder 2018, https://arxiv.org/abs/1801.06146; Clark et al. 2020, https://arxiv.org/abs/2003.10555). Each of
  two stacks counts its own N.

  Returns:
    A tree of floats, and of Float[N 1 ...] for stacked parameters.

  Raises:
    ConfigError: `decay` is not in (0, 1], or the layers of the model are unknown.
  """
  if not isinstance(cfg, TransformerConfig):
    raise ConfigError("optim.layer_decay needs a model whose layers are known, not a custom one; set it to none")
  if not 0 < decay <= 1:
    raise ConfigError(f"optim.layer_decay={decay} must be above 0 and at most 1; none turns it off")
  depths = {"encoder": cfg.encoder_layers, "decoder": cfg.decoder_layers}
  scales: FlatTree = {}
  for path, leaf in flatten_tree(params).items():
    top, *rest = path.split("/")
    if top in HEAD_PREFIXES or top.startswith("head"):
      scales[path] = 1.0
    elif top in EMBEDDINGS or rest[:1] == ["relative"]:
      scales[path] = decay ** (depths.get(top, max(depths.values())) + 1)
    elif rest[:1] == ["final_norm"] or top not in depths:
      scales[path] = 1.0
    else:
      scales[path] = _stack_lr_scale(rest, leaf.shape, cfg, depths[top], decay)
  return unflatten_tree(scales)


def _stack_lr_scale(
  path: list[str], shape: tuple[int, ...], cfg: TransformerConfig, depth: int, decay: float
) -> float | np.ndarray:
  """Return the factor of a parameter inside a stack of `depth` layers."""
  if not cfg.scan:
    return decay ** (depth - int(path[0].removeprefix("layers_")))
  locations = enumerate(layer_locations(cfg, depth))
  layers = [(i, index) for i, (prefix, index) in locations if tuple(path[: len(prefix)]) == prefix]
  if layers[0][1] is None:  # a layer of its own, before or after the groups
    return decay ** (depth - layers[0][0])
  scale = np.array([decay ** (depth - i) for i, _ in layers], np.float32)
  return scale.reshape(-1, *(1,) * (len(shape) - 1))

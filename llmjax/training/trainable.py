"""What of a model learns, and how fast: frozen parts, rates by layer, low-rank adapters merged into what they adapt.

Parameters are nested dicts. What learns and what is frozen are two of them, which together hold every leaf once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llmjax.config import ConfigError
from llmjax.config.model import TransformerConfig
from llmjax.models.layer_stacks import HEADS, layer_locations
from llmjax.trees import FlatTree, flatten_tree, unflatten_tree

EMBEDDINGS = ("embedding", "positions", "token_types", "embedding_norm", "project_in")


def match_trainable(params: Any, rules: Any, match: Callable[[Any, Any, str], Any]) -> Any:
  """Which parameters learn, a tree of bools, by config.trainable; `match` is `optim.match_rules`.

  Raises:
    ConfigError: a value that is no bool, nothing that learns, or what `match` raises.
  """
  chosen = match(rules, params, "trainable")
  values = flatten_tree(chosen).values()
  strange = [value for value in values if not isinstance(value, bool)]
  if strange:
    raise ConfigError(f"trainable: {strange[0]!r} must be True or False")
  if not any(values):
    raise ConfigError("trainable: no parameter learns; give a rule with True")
  return chosen


def layer_lr_scales(params: Mapping[str, Any], cfg: TransformerConfig, decay: float) -> Any:
  """What multiplies the learning rate of every parameter: `decay` once for each layer above it (Howard & Ruder 2018;
  Clark et al. 2020).

  What is behind the last layer has 1, the last layer `decay`, the first decay^N, the embeddings decay^(N+1); each of
  two stacks counts its own N.

  Returns:
    The tree of floats, or, for stacked parameters, of Float[N 1 ...].
  Raises:
    ConfigError: `decay` is not in (0, 1].
  """
  if not isinstance(cfg, TransformerConfig):
    raise ConfigError("optim.layer_decay needs a model whose layers are known, and this is one of your own; unset it")
  if not 0 < decay <= 1:
    raise ConfigError(f"optim.layer_decay={decay} must be above 0 and at most 1; none turns it off")
  depths = {"encoder": cfg.encoder_layers, "decoder": cfg.decoder_layers}
  scales: FlatTree = {}
  for path, leaf in flatten_tree(params).items():
    top, *rest = path.split("/")
    if top in HEADS or top.startswith("head"):
      scales[path] = 1.0
    elif top in EMBEDDINGS or rest[:1] == ["relative"]:
      scales[path] = decay ** (depths.get(top, max(depths.values())) + 1)
    elif rest[:1] == ["final_norm"] or top not in depths:
      scales[path] = 1.0
    else:
      scales[path] = _layer_scale(rest, leaf, cfg, depths[top], decay)
  return unflatten_tree(scales)


def _layer_scale(path: list[str], leaf: Any, cfg: TransformerConfig, depth: int, decay: float) -> Any:
  """Of a parameter inside a stack."""
  if not cfg.scan:
    return decay ** (depth - int(path[0].removeprefix("layers_")))
  here = [
    (i, index) for i, (place, index) in enumerate(layer_locations(cfg, depth)) if tuple(path[: len(place)]) == place
  ]
  if here[0][1] is None:
    return decay ** (depth - here[0][0])
  scale = np.array([decay ** (depth - i) for i, _ in here], np.float32)
  return scale.reshape(-1, *(1,) * (len(leaf.shape) - 1))


# Low-rank adapters.

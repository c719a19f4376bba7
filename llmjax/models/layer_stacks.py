"""Where the parameters of each layer are stored, and conversion between the scanned and the unrolled layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmjax.config.model import TransformerConfig
from llmjax.trees import Params

# First parts of the paths of parameters after the last layer, which a model with another head does not share.
HEAD_PREFIXES = ("head", "pooler", "sentence_head", "crf")


class LayerLocation(NamedTuple):
  """Where the parameters of one layer are, in the parameters of a stack."""

  path: tuple[str, ...]  # keys of nested dicts
  scan_index: int | None  # index along the leading axis N of scanned layers, None for a layer of its own


def layer_locations(cfg: TransformerConfig, depth: int) -> list[LayerLocation]:
  """Return where the parameters of each layer of a scanned stack are, in the order of the layers.

  Args:
    cfg: the model's config.
    depth: number of layers of the stack.
  """
  num_first, period, repeats = cfg.layout(depth)
  paths = [("layers",)] if period == 1 else [("layers", f"sublayer_{i}") for i in range(period)]
  first = [LayerLocation(("first",), None)] * num_first
  scanned = [LayerLocation(paths[i % period], i // period) for i in range(period * repeats)]
  last = [LayerLocation((f"last_{i}",), None) for i in range(depth - num_first - period * repeats)]
  return [*first, *scanned, *last]


def unstack_layers(params: Params, cfg: TransformerConfig) -> Params:
  """Return scanned parameters [N ...] in the unrolled layout: `layers_0` to `layers_{N-1}` in each stack."""

  def to_unrolled(stack: Params, depth: int) -> Params:
    locations = layer_locations(cfg, depth)
    scanned_names = {location.path[0] for location in locations}
    unrolled = {name: subtree for name, subtree in stack.items() if name not in scanned_names}
    for i, (path, index) in enumerate(locations):
      layer = functools.reduce(lambda tree, name: tree[name], path, stack)
      unrolled[f"layers_{i}"] = layer if index is None else jax.tree.map(lambda x, index=index: x[index], layer)
    return unrolled

  return _map_stacks(to_unrolled, params, cfg)


def stack_layers(params: Params, cfg: TransformerConfig) -> Params:
  """Return unrolled parameters in the scanned layout; the inverse of `unstack_layers`."""

  def to_scanned(stack: Params, depth: int) -> Params:
    scanned = {name: subtree for name, subtree in stack.items() if not name.startswith("layers_")}
    layers: dict[tuple[str, ...], list[Params]] = {}  # {path: the layers that are stored there, in their order}
    for i, location in enumerate(layer_locations(cfg, depth)):
      layers.setdefault(location.path, []).append(stack[f"layers_{i}"])
    stacked_paths = {location.path for location in layer_locations(cfg, depth) if location.scan_index is not None}
    for path, subtrees in layers.items():
      parent = scanned if len(path) == 1 else scanned.setdefault(path[0], {})
      is_stacked = path in stacked_paths
      parent[path[-1]] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *subtrees) if is_stacked else subtrees[0]
    return scanned

  return _map_stacks(to_scanned, params, cfg)


def _map_stacks(function: Callable[[Params, int], Params], params: Params, cfg: TransformerConfig) -> Params:
  """Return the parameters with `function` applied to those of each stack, given with its depth."""
  depths = {"encoder": cfg.encoder_layers, "decoder": cfg.decoder_layers}
  return {**params, **{name: function(params[name], depth) for name, depth in depths.items() if depth}}

"""Where the parameters of each layer are, and from the scanned layout to the unrolled one and back."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.config.model import TransformerConfig

HEADS = ("head", "pooler", "sentence_head", "crf")  # how the names of parameters behind the last layer begin

Location = tuple[tuple[str, ...], int | None]


def layer_locations(cfg: TransformerConfig, depth: int) -> list[Location]:
  """Where the parameters of every layer of a scanned stack are: (path, index in the leading dimension or None)."""
  first, period, repeats = cfg.layout(depth)
  slots: list[tuple[str, ...]] = [("layers",)] if period == 1 else [("layers", f"slot_{i}") for i in range(period)]
  middle: list[Location] = [(slots[i % period], i // period) for i in range(period * repeats)]
  last: list[Location] = [((f"last_{i}",), None) for i in range(depth - first - period * repeats)]
  return [*[(("first",), None)] * first, *middle, *last]


def unstack_layers(params: Any, cfg: TransformerConfig) -> Any:
  """Scanned parameters [N ...] -> unrolled: `layers` becomes `layers_0` ... `layers_{N-1}`, in each stack."""

  def one(stack: Any, depth: int) -> Any:
    found = layer_locations(cfg, depth)
    out = {k: v for k, v in stack.items() if k not in {path[0] for path, _ in found}}
    for i, (path, index) in enumerate(found):
      part = functools.reduce(lambda tree, name: tree[name], path, stack)
      out[f"layers_{i}"] = part if index is None else jax.tree.map(lambda x, index=index: x[index], part)
    return out

  return _each_stack(one, params, cfg)


def stack_layers(params: Any, cfg: TransformerConfig) -> Any:
  """Unrolled parameters -> scanned; the inverse of `unstack`."""

  def one(stack: Any, depth: int) -> Any:
    out = {k: v for k, v in stack.items() if not k.startswith("layers_")}
    parts: dict[tuple[str, ...], list[Any]] = {}
    for i, (path, _) in enumerate(layer_locations(cfg, depth)):
      parts.setdefault(path, []).append(stack[f"layers_{i}"])
    stacked = {path for path, index in layer_locations(cfg, depth) if index is not None}
    for path, each in parts.items():
      holder = out if len(path) == 1 else out.setdefault(path[0], {})
      holder[path[-1]] = jax.tree.map(lambda *xs: jnp.stack(xs), *each) if path in stacked else each[0]
    return out

  return _each_stack(one, params, cfg)


def _each_stack(function: Any, params: Any, cfg: TransformerConfig) -> Any:
  depths = {"encoder": cfg.encoder_layers, "decoder": cfg.decoder_layers}
  return {**params, **{name: function(params[name], depth) for name, depth in depths.items() if depth}}

"""What of a model learns, and how fast: frozen parts, rates by layer, low-rank adapters merged into what they adapt.

Parameters are nested dicts. What learns and what is frozen are two of them, which together hold every leaf once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.config import ConfigError
from llmjax.models.config import TransformerConfig
from llmjax.models.layout import HEADS, locations

ADAPTERS = ("lora_a", "lora_b")
EMBEDDINGS = ("embedding", "positions", "token_types", "embedding_norm", "project_in")
Flat = dict[str, Any]  # {"a/b/c": leaf}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Flat:
  """{"a/b/c": leaf} of nested dicts, whatever the leaves are."""
  flat: Flat = {}
  for name, value in tree.items():
    flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten`."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def split(tree: Mapping[str, Any], chosen: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
  """(what learns, what is frozen) of a tree; `chosen` is the same tree of bools. None where nothing is frozen."""
  learns = flatten(chosen)
  parts = [{path: leaf for path, leaf in flatten(tree).items() if learns[path] is keep} for keep in (True, False)]
  return unflatten(parts[0]), unflatten(parts[1]) or None


def join(learned: Mapping[str, Any], frozen: Mapping[str, Any] | None) -> Any:
  """The inverse of `split`."""
  return learned if frozen is None else unflatten({**flatten(learned), **flatten(frozen)})


def select(tree: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
  """The leaves of a tree that are in another one."""
  wanted = flatten(like)
  return unflatten({path: leaf for path, leaf in flatten(tree).items() if path in wanted})


def trainable(params: Any, rules: Any, match: Callable[[Any, Any, str], Any]) -> Any:
  """Which parameters learn, a tree of bools, by config.trainable; `match` is `optim.match_rules`.

  Raises:
    ConfigError: a value that is no bool, nothing that learns, or what `match` raises.
  """
  chosen = match(rules, params, "trainable")
  values = flatten(chosen).values()
  strange = [value for value in values if not isinstance(value, bool)]
  if strange:
    raise ConfigError(f"trainable: {strange[0]!r} must be True or False")
  if not any(values):
    raise ConfigError("trainable: no parameter learns; give a rule with True")
  return chosen


def layer_scales(params: Mapping[str, Any], cfg: TransformerConfig, decay: float) -> Any:
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
  scales: Flat = {}
  for path, leaf in flatten(params).items():
    top, *rest = path.split("/")
    if top in HEADS or top.startswith("head"):
      scales[path] = 1.0
    elif top in EMBEDDINGS or rest[:1] == ["relative"]:
      scales[path] = decay ** (depths.get(top, max(depths.values())) + 1)
    elif rest[:1] == ["final_norm"] or top not in depths:
      scales[path] = 1.0
    else:
      scales[path] = _layer_scale(rest, leaf, cfg, depths[top], decay)
  return unflatten(scales)


def _layer_scale(path: list[str], leaf: Any, cfg: TransformerConfig, depth: int, decay: float) -> Any:
  """Of a parameter inside a stack."""
  if not cfg.scan:
    return decay ** (depth - int(path[0].removeprefix("layers_")))
  here = [(i, index) for i, (place, index) in enumerate(locations(cfg, depth)) if tuple(path[: len(place)]) == place]
  if here[0][1] is None:
    return decay ** (depth - here[0][0])
  scale = np.array([decay ** (depth - i) for i, _ in here], np.float32)
  return scale.reshape(-1, *(1,) * (len(leaf.shape) - 1))


# Low-rank adapters.


def is_adapter(path: str) -> bool:
  """Whether a parameter is part of an adapter."""
  return path.rpartition("/")[2] in ADAPTERS


def merge_lora(params: Mapping[str, Any], cfg: TransformerConfig) -> dict[str, Any]:
  """Parameters without adapters, each added to the kernel that it adapts: W + alpha / rank * A B (Hu et al. 2021)."""
  if cfg.lora is None:
    return dict(params)
  flat = flatten(params)
  merged = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
  for path, a in flat.items():
    parent, _, name = path.rpartition("/")
    if name == "lora_a":
      kernel = f"{parent}/kernel"
      merged[kernel] = _add(merged[kernel], a, flat[f"{parent}/lora_b"], cfg.lora.scale)
  return unflatten(merged)


@jax.jit
def _add(kernel: Any, a: Any, b: Any, scale: float) -> Any:
  """A [N? inputs r] and B [N? r outputs] onto a kernel [N? inputs outputs]; float32, at full precision."""
  stacked = a.ndim + b.ndim - 2 > kernel.ndim  # all three have a leading N
  inputs = a.ndim - stacked - 1

  def one(kernel: Any, a: Any, b: Any) -> Any:
    letters = "abcdefgh"
    left, right = letters[:inputs], letters[inputs : kernel.ndim]
    product = jnp.einsum(
      f"{left}r,r{right}->{left}{right}", a.astype(jnp.float32), b.astype(jnp.float32), precision="highest"
    )
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)

  return jax.vmap(one)(kernel, a, b) if stacked else one(kernel, a, b)


def check_targets(params: Mapping[str, Any], cfg: TransformerConfig) -> None:
  """Raises ConfigError where adapters are asked for, and no projection matches."""
  if getattr(cfg, "lora", None) is not None and not any(map(is_adapter, flatten(params))):
    kernels = [path.removesuffix("/kernel") for path in flatten(params) if re.search(r"/kernel$", path)]
    raise ConfigError(
      f"model.lora_targets={cfg.lora_targets!r} matches no projection; a regex must match a whole path, of "
      f"{', '.join(kernels)}"
    )

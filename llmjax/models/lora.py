"""Low-rank adapters (LoRA): which parameters are adapters, and merging them into the kernels that they adapt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.config import ConfigError
from llmjax.config.model import ModelConfig, TransformerConfig
from llmjax.trees import flatten_tree, unflatten_tree

ADAPTERS = ("lora_a", "lora_b")


def is_adapter(path: str) -> bool:
  """Whether a parameter is part of an adapter."""
  return path.rpartition("/")[2] in ADAPTERS


def merge_lora(params: Mapping[str, Any], cfg: TransformerConfig) -> dict[str, Any]:
  """Parameters without adapters, each added to the kernel that it adapts: W + alpha / rank * A B (Hu et al. 2021)."""
  if cfg.lora is None:
    return dict(params)
  flat = flatten_tree(params)
  merged = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
  for path, a in flat.items():
    parent, _, name = path.rpartition("/")
    if name == "lora_a":
      kernel = f"{parent}/kernel"
      merged[kernel] = _add(merged[kernel], a, flat[f"{parent}/lora_b"], cfg.lora.scale)
  return unflatten_tree(merged)


@jax.jit
def _add(kernel: Any, a: Any, b: Any, scale: Any) -> Any:
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


def check_lora_targets(params: Mapping[str, Any], cfg: ModelConfig) -> None:
  """Raises ConfigError where adapters are asked for, and no projection matches."""
  if cfg.lora is not None and not any(map(is_adapter, flatten_tree(params))):
    kernels = [path.removesuffix("/kernel") for path in flatten_tree(params) if re.search(r"/kernel$", path)]
    raise ConfigError(
      f"model.lora_targets={cfg.lora.targets!r} matches no projection; a regex must match a whole path, of "
      f"{', '.join(kernels)}"
    )

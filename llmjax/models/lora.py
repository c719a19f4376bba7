"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): their parameters, and merging them into kernels.

`layers.Projection` applies them: y = x W + alpha / rank * x A B.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmjax.config import ConfigError
from llmjax.config.model import ModelConfig, TransformerConfig
from llmjax.trees import Params, flatten_tree, unflatten_tree

ADAPTER_NAMES = ("lora_a", "lora_b")


def is_adapter(path: str) -> bool:
  """Whether the parameter at a path, such as ".../query/lora_a", belongs to an adapter."""
  return path.rpartition("/")[2] in ADAPTER_NAMES


def merge_lora(params: Params, cfg: TransformerConfig) -> Params:
  """Return the parameters without adapters, each merged into its kernel: W + alpha / rank * A B."""
  if cfg.lora is None:
    return dict(params)
  flat = flatten_tree(params)
  merged = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
  for path, lora_a in flat.items():
    parent, _, name = path.rpartition("/")
    if name == "lora_a":
      kernel = f"{parent}/kernel"
      merged[kernel] = _merge_into_kernel(merged[kernel], lora_a, flat[f"{parent}/lora_b"], cfg.lora.scale)
  return unflatten_tree(merged)


@jax.jit
def _merge_into_kernel(kernel: Array, lora_a: Array, lora_b: Array, scale: Float[Array, ""] | float) -> Array:
  """Return kernel + scale * lora_a lora_b, computed in float32 at full precision.

  Args:
    kernel: [inputs outputs], where inputs and outputs are one or more dimensions; scanned layers add a leading N.
    lora_a: [inputs r], with a leading N as the kernel.
    lora_b: [r outputs], with a leading N as the kernel.
    scale: alpha / rank.
  """
  is_stacked = lora_a.ndim + lora_b.ndim - 2 > kernel.ndim
  num_inputs = lora_a.ndim - is_stacked - 1

  def merge(kernel: Array, lora_a: Array, lora_b: Array) -> Array:
    letters = "abcdefgh"
    inputs, outputs = letters[:num_inputs], letters[num_inputs : kernel.ndim]
    product = jnp.einsum(
      f"{inputs}r,r{outputs}->{inputs}{outputs}",
      lora_a.astype(jnp.float32),
      lora_b.astype(jnp.float32),
      precision="highest",
    )
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)

  return jax.vmap(merge)(kernel, lora_a, lora_b) if is_stacked else merge(kernel, lora_a, lora_b)


def check_lora_targets(params: Params, cfg: ModelConfig) -> None:
  """Check that a model with adapters has at least one.

  Raises:
    ConfigError: model.lora_targets matches no projection.
  """
  if cfg.lora is not None and not any(map(is_adapter, flatten_tree(params))):
    kernels = [path.removesuffix("/kernel") for path in flatten_tree(params) if re.search(r"/kernel$", path)]
    raise ConfigError(
      f"model.lora_targets={cfg.lora.targets!r} matches no projection; a regex must match a whole path, one of "
      f"{', '.join(kernels)}"
    )

"""Rotary positions (Su et al. 2021): frequencies, the scalings that stretch them over longer texts, the rotation."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llmjax.config.rotary_scaling import RotaryScaling


def frequencies(width: int, base: float, max_len: int, scaling: RotaryScaling | None = None) -> np.ndarray:
  """Float32[width / 2], radians a position, of the rotated part of a head."""
  exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
  if scaling is not None and scaling.name == "dynamic":
    assert scaling.original_max_len is not None
    stretch = scaling.factor * max(max_len / scaling.original_max_len, 1) - (scaling.factor - 1)
    base = base * stretch ** (width / (width - 2))
  plain = 1 / np.float32(base) ** exponents
  if scaling is None or scaling.name == "dynamic":
    return plain
  if scaling.name == "linear":
    return plain / np.float32(scaling.factor)
  assert scaling.original_max_len is not None
  if scaling.name == "longrope":
    factors = scaling.long_factors if max_len > scaling.original_max_len else scaling.short_factors
    return 1 / (np.array(factors, np.float32) * np.float32(base) ** exponents)
  keep = _llama3_keep(plain, scaling) if scaling.name == "llama3" else _yarn_keep(width, base, scaling)
  return (keep * plain + (1 - keep) * plain / scaling.factor).astype(np.float32)


def _yarn_keep(width: int, base: float, scaling: RotaryScaling) -> np.ndarray:
  """How much of each frequency stays: 1 for fast ones, 0 for slow ones, a ramp between, linear in the dimension."""

  def dimension(rotations: float) -> float:
    """The one that rotates so often within the original context."""
    assert scaling.original_max_len is not None
    return width * math.log(scaling.original_max_len / (rotations * 2 * math.pi)) / (2 * math.log(base))

  low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, width - 1)
  high += 0.001 if low == high else 0
  return 1 - np.clip((np.arange(width // 2, dtype=np.float32) - low) / (high - low), 0, 1)


def _llama3_keep(plain: np.ndarray, scaling: RotaryScaling) -> np.ndarray:
  """The same, linear in the rotations within the original context."""
  rotations = scaling.original_max_len * plain / (2 * np.pi)
  low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
  return np.clip((rotations - low) / (high - low), 0, 1)


def angles(positions: Int[Array, "B L"], rates: np.ndarray, amplitude: float = 1.0) -> tuple[Array, Array]:
  """sin and cos of the angles at these positions, each Float[B L half], times `amplitude`."""
  radians = positions[:, :, None].astype(jnp.float32) * rates[None, None]
  return jnp.sin(radians) * amplitude, jnp.cos(radians) * amplitude


def rotate(
  x: Float[Array, "B L H A"], sin: Float[Array, "B L half"], cos: Float[Array, "B L half"]
) -> Float[Array, "B L H A"]:
  """Rotates the pairs (i, i + half) of every head, the layout of GPT-NeoX and Llama checkpoints; in float32.

  What is beyond 2 half of the head's width stays as it is.
  """
  half = sin.shape[-1]
  first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
  sin, cos = sin[:, :, None], cos[:, :, None]
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
  return rotated if 2 * half == x.shape[-1] else jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)

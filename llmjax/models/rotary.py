"""Rotary positions (RoPE, Su et al. 2021, arXiv:2104.09864): frequencies, their scaling to long texts, the rotation."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llmjax.config.rotary_scaling import RotaryScaling


def rotary_frequencies(width: int, base: float, max_len: int, scaling: RotaryScaling | None = None) -> np.ndarray:
  """Return the frequency of each pair of rotated dimensions, in radians per position.

  Args:
    width: number of rotated dimensions of a head.
    base: theta; unscaled frequencies are theta^(-2 i / width).
    max_len: longest sequence in tokens, on which "dynamic" and "longrope" scaling depend.
    scaling: None: no scaling.

  Returns:
    Float32[width / 2].
  """
  exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
  if scaling is not None and scaling.name == "dynamic":
    assert scaling.original_max_len is not None
    stretch = scaling.factor * max(max_len / scaling.original_max_len, 1) - (scaling.factor - 1)
    base = base * stretch ** (width / (width - 2))
  unscaled = 1 / np.float32(base) ** exponents
  if scaling is None or scaling.name == "dynamic":
    return unscaled
  if scaling.name == "linear":
    return unscaled / np.float32(scaling.factor)
  assert scaling.original_max_len is not None
  if scaling.name == "longrope":
    factors = scaling.long_factors if max_len > scaling.original_max_len else scaling.short_factors
    return 1 / (np.array(factors, np.float32) * np.float32(base) ** exponents)
  keep = _llama3_keep_share(unscaled, scaling) if scaling.name == "llama3" else _yarn_keep_share(width, base, scaling)
  return (keep * unscaled + (1 - keep) * unscaled / scaling.factor).astype(np.float32)


def _yarn_keep_share(width: int, base: float, scaling: RotaryScaling) -> np.ndarray:
  """Return the share of each frequency that YaRN keeps: 1 for high ones, 0 for low ones, linear in the dimension."""

  def dimension_of(rotations: float) -> float:
    """Return the dimension that rotates this many times within the original context."""
    assert scaling.original_max_len is not None
    return width * math.log(scaling.original_max_len / (rotations * 2 * math.pi)) / (2 * math.log(base))

  low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, width - 1)
  high += 0.001 if low == high else 0  # no division by zero
  ramp: np.ndarray = np.clip((np.arange(width // 2, dtype=np.float32) - low) / (high - low), 0, 1)
  return 1 - ramp


def _llama3_keep_share(unscaled: np.ndarray, scaling: RotaryScaling) -> np.ndarray:
  """Return the share of each frequency that Llama 3 keeps, linear in the rotations within the original context."""
  rotations = scaling.original_max_len * unscaled / (2 * np.pi)
  low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
  share: np.ndarray = np.clip((rotations - low) / (high - low), 0, 1)
  return share


def rotary_angles(
  positions: Int[Array, "B L"], frequencies: np.ndarray, amplitude: float = 1.0
) -> tuple[Float[Array, "B L half"], Float[Array, "B L half"]]:
  """Return amplitude * sin and amplitude * cos of the angle of each position and frequency.

  Args:
    positions: positions of the tokens.
    frequencies: Float32[half], radians per position.
    amplitude: factor of rotated queries and keys.
  """
  radians = positions[:, :, None].astype(jnp.float32) * frequencies[None, None]
  return jnp.sin(radians) * amplitude, jnp.cos(radians) * amplitude


def apply_rotary(
  x: Float[Array, "B L H A"], sin: Float[Array, "B L half"], cos: Float[Array, "B L half"]
) -> Float[Array, "B L H A"]:
  """Rotate the pairs (i, i + half) of dimensions of every head, in float32.

  This pairing is that of GPT-NeoX and Llama checkpoints. GPT-J has (2 i, 2 i + 1).

  Args:
    x: queries or keys; dimensions from 2 half on stay as they are.
    sin: from `rotary_angles`.
    cos: from `rotary_angles`.
  """
  half = sin.shape[-1]
  first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
  sin, cos = sin[:, :, None], cos[:, :, None]
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
  return rotated if 2 * half == x.shape[-1] else jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)

"""Rotary positions (Su et al. 2021): frequencies, the scalings that stretch them over longer texts, the rotation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llmjax.config import ConfigError, suggest_name

SCALINGS = ("linear", "dynamic", "yarn", "llama3", "longrope")


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
  """How rotary frequencies are stretched so that a model reads texts longer than those it was pretrained on.

  Scalings that elsewhere depend on the length of the text at hand (dynamic, longrope) take the model's `max_len`
  instead, so that a token's keys do not depend on what comes after it.

  Attributes:
    name: "linear", all frequencies / factor (Chen et al. 2023); "dynamic", a base that grows with the length (NTK-aware
      interpolation); "yarn", only the slow ones are interpolated (Peng et al. 2023); "llama3", the same with other
      bands (Grattafiori et al. 2024); "longrope", a divisor for each (Ding et al. 2024).
    factor: by how much the context is stretched.
    original_max_len: the context before that.
    attention_factor: of queries and keys, None = the method's own (yarn and longrope; 1 for others).
    beta_fast, beta_slow: rotations within the original context above which a frequency stays, and below which it is
      interpolated in full (yarn); `truncate`: whether these limits are rounded to whole dimensions.
    low_frequency_factor, high_frequency_factor: the same for llama3.
    short_factors, long_factors: divisors up to the original context, and beyond it (longrope).
  """

  name: str
  factor: float = 1.0
  original_max_len: int | None = None
  attention_factor: float | None = None
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  short_factors: tuple[float, ...] = ()
  long_factors: tuple[float, ...] = ()

  def __post_init__(self) -> None:
    if self.name not in SCALINGS:
      raise ConfigError(f"model.rotary_scaling.name={self.name!r}: {suggest_name(str(self.name), SCALINGS)}")
    if not self.factor >= 1:
      raise ConfigError(f"model.rotary_scaling.factor={self.factor} must be at least 1")
    if self.name != "linear" and (self.original_max_len is None or self.original_max_len < 1):
      raise ConfigError(f"model.rotary_scaling.original_max_len={self.original_max_len} must be set for {self.name!r}")

  def check_width(self, width: int) -> None:
    """Raises ConfigError where the factors of longrope are not one a frequency."""
    for field in ("short_factors", "long_factors"):
      if self.name == "longrope" and len(getattr(self, field)) != width // 2:
        raise ConfigError(
          f"model.rotary_scaling.{field} has {len(getattr(self, field))} numbers; longrope needs {width // 2}, half of "
          "the rotated part of head_dim"
        )

  @property
  def amplitude(self) -> float:
    """What queries and keys are multiplied by."""
    if self.attention_factor is not None:
      return self.attention_factor
    if self.factor <= 1 or self.original_max_len is None:
      return 1.0
    if self.name == "yarn":
      return 0.1 * math.log(self.factor) + 1
    if self.name == "longrope":
      return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_len))
    return 1.0


def make_scaling(fields: Mapping[str, Any]) -> RotaryScaling:
  """A RotaryScaling from config keys."""
  known = {f.name for f in dataclasses.fields(RotaryScaling)}
  for key in fields:
    if key not in known:
      raise ConfigError(f"model.rotary_scaling.{key} is no such key; {suggest_name(key, known)}")
  lists = {key: tuple(fields[key]) for key in ("short_factors", "long_factors") if key in fields}  # JSON has no tuples
  return RotaryScaling(**{"name": "", **fields, **lists})


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

"""Scaling of rotary positions for texts longer than those of pretraining."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from llmjax.config.errors import ConfigError, suggest_name

SCALINGS = ("linear", "dynamic", "yarn", "llama3", "longrope")


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
  """How rotary frequencies are scaled.

  Implementations elsewhere let "dynamic" and "longrope" depend on the length of the current text. Here they depend on
  the model's `max_len`, so that the key of a token does not change when tokens follow it.
  """

  # "linear": all frequencies / factor (Chen et al. 2023, arXiv:2306.15595).
  # "dynamic": a rotary base that grows with the context (NTK-aware interpolation).
  # "yarn": interpolates low frequencies only (Peng et al. 2023, arXiv:2309.00071).
  # "llama3": the same with other bands (Grattafiori et al. 2024, arXiv:2407.21783).
  # "longrope": one divisor for each frequency (Ding et al. 2024, arXiv:2402.13753).
  name: str
  factor: float = 1.0  # new context / original context
  original_max_len: int | None = None  # original context, in tokens
  attention_factor: float | None = None  # of queries and keys; None: the method's own (1 but for yarn and longrope)
  beta_fast: float = 32.0  # yarn: frequencies with more rotations within the original context are kept
  beta_slow: float = 1.0  # yarn: frequencies with fewer rotations are interpolated in full
  truncate: bool = True  # yarn: round the limits of the ramp to whole dimensions
  low_frequency_factor: float = 1.0  # llama3: the limits, in rotations within the original context
  high_frequency_factor: float = 4.0
  short_factors: tuple[float, ...] = ()  # longrope: divisors within the original context
  long_factors: tuple[float, ...] = ()  # longrope: divisors beyond it

  def __post_init__(self) -> None:
    if self.name not in SCALINGS:
      raise ConfigError(f"model.rotary_scaling.name={self.name!r}: {suggest_name(str(self.name), SCALINGS)}")
    if not self.factor >= 1:
      raise ConfigError(f"model.rotary_scaling.factor={self.factor} must be at least 1")
    if self.name != "linear" and (self.original_max_len is None or self.original_max_len < 1):
      raise ConfigError(f"model.rotary_scaling.original_max_len={self.original_max_len} must be set for {self.name!r}")

  def check_width(self, width: int) -> None:
    """Raise ConfigError if longrope does not have one factor for each frequency of `width` rotated dimensions."""
    for field in ("short_factors", "long_factors"):
      if self.name == "longrope" and len(getattr(self, field)) != width // 2:
        raise ConfigError(
          f"model.rotary_scaling.{field} has {len(getattr(self, field))} numbers; longrope needs {width // 2}, half of "
          "the rotated part of head_dim"
        )

  @property
  def amplitude(self) -> float:
    """Factor that queries and keys are multiplied by."""
    if self.attention_factor is not None:
      return self.attention_factor
    if self.factor <= 1 or self.original_max_len is None:
      return 1.0
    if self.name == "yarn":
      return 0.1 * math.log(self.factor) + 1
    if self.name == "longrope":
      return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_len))
    return 1.0


def make_rotary_scaling(fields: Mapping[str, Any]) -> RotaryScaling:
  """Return the RotaryScaling of config keys; raise ConfigError for an unknown key."""
  known = {f.name for f in dataclasses.fields(RotaryScaling)}
  for key in fields:
    if key not in known:
      raise ConfigError(f"model.rotary_scaling.{key} does not exist; {suggest_name(key, known)}")
  lists = {key: tuple(fields[key]) for key in ("short_factors", "long_factors") if key in fields}  # JSON has no tuples
  return RotaryScaling(**{"name": "", **fields, **lists})

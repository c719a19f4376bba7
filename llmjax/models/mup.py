"""How initial values, multipliers and learning rates follow the width: maximal update parametrisation, muP.

Yang et al. 2022, "Tensor Programs V", https://arxiv.org/abs/2203.03466, in the form of its table 8, which keeps
embeddings tied: what was tuned on a base model holds for wider ones. All of it is relative to the base, where it is
1 throughout. A parameter's logical axes say what it is:

  table, vector  what it reads does not grow: initial values and rate (Adam's) stay
  hidden matrix  initial standard deviation by 1 / sqrt(growth of fan-in), rate by 1 / growth
  readout        width to vocabulary, classes or experts: what it reads by 1 / growth, initial values and rate stay

`ratios`, here, is {logical axis: its length over that of the base model}; what is missing does not grow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmjax.config.model import TransformerConfig

Axes = tuple[str | None, ...]  # the logical names of a parameter's dimensions; here without those of STACKED in front
Ratios = Mapping[str, float]

STACKED = ("layers", "experts")  # axes in front, along which a parameter is several matrices
OUTSIDE = {"vocab", "positions", "token_types", "classes", "experts"}  # axes of what is not a hidden matrix
READOUTS = ("vocab", "classes", "experts")


def unstacked(axes: Axes) -> Axes:
  """Without the axes of `STACKED` in front."""
  return axes[next((i for i, name in enumerate(axes) if name not in STACKED), len(axes)) :]


def matrix_inputs(axes: Axes) -> tuple[int, ...] | None:
  """Which dimensions of a hidden matrix are its input side; None for what is no such matrix.

  Tables and output heads (an axis of `OUTSIDE`) are none, nor are biases of heads, whose two dimensions lack "embed".
  """
  if len(axes) < 2 or OUTSIDE & set(axes):
    return None
  if axes[0] == "embed":
    return (0,)
  return tuple(range(len(axes) - 1)) if axes[-1] == "embed" else None


def input_axes(axes: Axes) -> Axes:
  """What a parameter reads; vectors read nothing."""
  if axes[-1] in ("embed", "lora"):
    return axes[:-1]
  return axes[:1] if axes[0] == "embed" else ()


def width_multiplier(axes: Axes, ratios: Ratios) -> float:
  """How many times the product of these dimensions is that of the base model."""
  return math.prod((ratios[name] for name in axes if name is not None and name in ratios), start=1.0)


def is_readout(axes: Axes) -> bool:
  return axes[0] == "embed" and axes[-1] in READOUTS


def input_multiplier(axes: Axes, ratios: Ratios) -> float:
  """Of what a kernel reads."""
  return 1 / width_multiplier(input_axes(axes), ratios) if is_readout(axes) else 1.0


def init_scale(axes: Axes, ratios: Ratios) -> float:
  """The initial standard deviation of a kernel, over that of the base model's."""
  return 1.0 if is_readout(axes) else width_multiplier(input_axes(axes), ratios) ** -0.5


def lr_multiplier(optimizer: Mapping[str, Any], axes: Axes, ratios: Ratios) -> float:
  """What multiplies the learning rate of a parameter.

  Of gradient descent it is the growth of the fan-out over that of the fan-in, times the square of that of a readout.
  Muon's step of a hidden matrix meets the spectral condition by itself (Yang et al. 2023,
  https://arxiv.org/abs/2310.17813); with `consistent_rms` it needs 1 / sqrt(growth). Adafactor's `parameter_scale`
  brings what initial values have. All others, one's own too, are taken to normalise every element as Adam does.

  Args:
    optimizer: {"name", **its keys}.
  """
  read = input_axes(axes)
  fan_in, fan_out = width_multiplier(read, ratios), width_multiplier(axes[len(read) :], ratios)
  own = 1 / input_multiplier(axes, ratios)
  if optimizer["name"] == "sgd":
    return own**2 * fan_out / fan_in
  if optimizer["name"] == "muon" and matrix_inputs(axes) is not None:
    return 1.0 if optimizer.get("consistent_rms") is None else fan_in**-0.5
  if optimizer["name"] == "adafactor" and optimizer.get("parameter_scale"):
    own /= init_scale(axes, ratios)
  return own / fan_in


def kernel_init_scale(cfg: TransformerConfig, axes: Axes) -> float:
  """Return the factor of a kernel's initial standard deviation, besides `init_stddev`, by its logical axes."""
  axes = unstacked(axes)
  scale = init_scale(axes, cfg.width_ratios)
  if cfg.init_stddev is None:  # 1 / sqrt(fan-in) follows the width by itself
    scale *= width_multiplier(input_axes(axes), cfg.width_ratios) ** 0.5
  return scale


def kernel_input_multiplier(cfg: TransformerConfig, axes: Axes) -> float:
  """Return the factor of a kernel's input, by its logical axes."""
  return input_multiplier(unstacked(axes), cfg.width_ratios)

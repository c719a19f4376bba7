"""Maximal update parametrisation (muP): how initial values, input multipliers and learning rates follow the width.

A learning rate that was tuned on a narrow base model then also holds for wider models. The rules are those of table 8
of Yang et al. 2022, "Tensor Programs V", arXiv:2203.03466, which allows tied embeddings. All factors are relative to
the base model, where they are 1. The logical axes of a parameter decide its kind (learning rates are Adam's):

  kind                              init. stddev           input multiplier     learning rate
  table, vector                     1                      1                    1
  hidden matrix                     1 / sqrt(fan-in)       1                    1 / fan-in
  readout (to vocabulary, ...)      1                      1 / fan-in           1

Fan-in and fan-out stand for their ratios to those of the base model. `ratios` in this module is {logical axis: its
length / its length in the base model}; an axis that is not in it does not grow with the width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from llmjax.config import ConfigTree
from llmjax.config.model import TransformerConfig
from llmjax.distributed.sharding import LogicalAxes

WidthRatios = Mapping[str, float]

STACKED_AXES = ("layers", "experts")  # leading axes along which a parameter is several matrices
READOUT_AXES = ("vocab", "classes", "experts")  # last axes of readouts
NON_HIDDEN_AXES = {"vocab", "positions", "token_types", "classes", "experts"}  # no hidden matrix has such an axis


def strip_stacked_axes(axes: LogicalAxes) -> LogicalAxes:
  """Return the axes without leading `STACKED_AXES`, as the other functions of this module need them."""
  return axes[next((i for i, name in enumerate(axes) if name not in STACKED_AXES), len(axes)) :]


def matrix_input_dims(axes: LogicalAxes) -> tuple[int, ...] | None:
  """Return the input dimensions of a hidden matrix, None for other parameters.

  Biases of heads are not matrices, although they have two dimensions: neither is "embed".
  """
  if len(axes) < 2 or NON_HIDDEN_AXES & set(axes):
    return None
  if axes[0] == "embed":
    return (0,)
  return tuple(range(len(axes) - 1)) if axes[-1] == "embed" else None


def input_axes(axes: LogicalAxes) -> LogicalAxes:
  """Return the axes of a parameter's input; () for vectors."""
  if axes[-1] in ("embed", "lora"):
    return axes[:-1]
  return axes[:1] if axes[0] == "embed" else ()


def width_multiplier(axes: LogicalAxes, ratios: WidthRatios) -> float:
  """Return the product of the axes' lengths, divided by that of the base model."""
  return math.prod((ratios[name] for name in axes if name is not None and name in ratios), start=1.0)


def is_readout(axes: LogicalAxes) -> bool:
  """Whether a parameter maps from the width to something that does not grow with it, such as the vocabulary."""
  return axes[0] == "embed" and axes[-1] in READOUT_AXES


def input_multiplier(axes: LogicalAxes, ratios: WidthRatios) -> float:
  """Return the factor of a kernel's input."""
  return 1 / width_multiplier(input_axes(axes), ratios) if is_readout(axes) else 1.0


def init_scale(axes: LogicalAxes, ratios: WidthRatios) -> float:
  """Return the factor of a kernel's initial standard deviation."""
  return 1.0 if is_readout(axes) else width_multiplier(input_axes(axes), ratios) ** -0.5


def lr_multiplier(optimizer: ConfigTree, axes: LogicalAxes, ratios: WidthRatios) -> float:
  """Return the factor of a parameter's learning rate.

  Optimizers differ in how the size of their update depends on that of the gradient:

  - Gradient descent ("sgd") needs fan-out / fan-in, and the square of a readout's fan-in in addition.
  - "muon" gives updates of hidden matrices the right spectral norm by itself (Yang et al. 2023, arXiv:2310.17813).
    With `consistent_rms` it needs 1 / sqrt(fan-in).
  - "adafactor" with `parameter_scale` multiplies updates by the size of the parameter, which has the factor of the
    initial values already.
  - All others, also those of your own, are assumed to normalise each element, as Adam does.

  Args:
    optimizer: the optimizer's config: {"name": name, **its keys}.
    axes: the parameter's logical axes, without `STACKED_AXES`.
    ratios: {logical axis: its length / its length in the base model}.
  """
  fan_in_axes = input_axes(axes)
  fan_in, fan_out = width_multiplier(fan_in_axes, ratios), width_multiplier(axes[len(fan_in_axes) :], ratios)
  readout = 1 / input_multiplier(axes, ratios)
  if optimizer["name"] == "sgd":
    return readout**2 * fan_out / fan_in
  if optimizer["name"] == "muon" and matrix_input_dims(axes) is not None:
    return 1.0 if optimizer.get("consistent_rms") is None else fan_in**-0.5
  if optimizer["name"] == "adafactor" and optimizer.get("parameter_scale"):
    readout /= init_scale(axes, ratios)
  return readout / fan_in


def kernel_init_scale(cfg: TransformerConfig, axes: LogicalAxes) -> float:
  """Return the factor of a kernel's initial standard deviation, by its logical axes."""
  axes = strip_stacked_axes(axes)
  scale = init_scale(axes, cfg.width_ratios)
  if cfg.init_stddev is None:  # the standard deviation is 1 / sqrt(fan-in) and follows the width by itself
    scale *= width_multiplier(input_axes(axes), cfg.width_ratios) ** 0.5
  return scale


def kernel_input_multiplier(cfg: TransformerConfig, axes: LogicalAxes) -> float:
  """Return the factor of a kernel's input, by its logical axes."""
  return input_multiplier(strip_stacked_axes(axes), cfg.width_ratios)

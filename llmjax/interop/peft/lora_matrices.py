"""Matrices of adapters: PEFT's A and B of a whole tensor, and ours of each projection in it.

PEFT adapts a tensor [outputs inputs] by scale * B A with A [r inputs] and B [outputs r]. Ours adapts a kernel [inputs
outputs] by scale * A B, where inputs and outputs may be several axes, such as heads and head width.

The projections in a fused tensor have adapters of their own here, and share one there. It has rank n r for n
projections: A are their matrices below each other, and B is zero but for one block of each projection.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llmjax.config import ConfigError, Json
from llmjax.interop.peft.adapter_folder import Adapter
from llmjax.interop.tensor_map import TensorEntry
from llmjax.interop.tensors import (
  Dimension,
  Shape,
  TensorPattern,
  merge_parameters,
  parameter_view,
  tensor_shape,
)


class LoraPair(NamedTuple):
  """The adapter of one projection: A [inputs r] and B [r outputs]."""

  a: np.ndarray
  b: np.ndarray


def lora_scale(config: Mapping[str, Json], module: str, rank: int) -> float:
  """Return the factor of B A for a module: alpha / r.

  With `use_rslora` it is alpha / sqrt(r) (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
  """
  patterns = (config.get("alpha_pattern") or {}).items()
  matching = (alpha for regex, alpha in patterns if re.match(rf"(.*\.)?({regex})$", module))
  alpha = next(matching, config["lora_alpha"])
  return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def lora_patterns(pattern: TensorPattern, num_inputs: int) -> tuple[TensorPattern, TensorPattern]:
  """Return the patterns of A and B.

  Args:
    pattern: that of the adapted tensor; its kernel has the inputs first.
    num_inputs: number of the kernel's axes that are inputs.
  """
  inputs = pattern.parameter[:num_inputs]
  [input_axis] = [i for i, dimension in enumerate(pattern.tensor) if set(dimension.letters) <= set(inputs)]
  rank = Dimension(("r",), num_fused=0, skip=0)
  a = TensorPattern((rank, pattern.tensor[input_axis]), (*inputs, "r"))
  b = TensorPattern((pattern.tensor[1 - input_axis], rank), ("r", *pattern.parameter[num_inputs:]))
  return a, b


def split_lora_tensors(
  adapter: Adapter, entry: TensorEntry, num_inputs: int, shapes: Sequence[Shape], a: np.ndarray, b: np.ndarray
) -> list[LoraPair | None]:
  """Return the adapter of each projection in a tensor, None for a projection without one.

  The projections share A, unless B is a block of each. Then each has the rows of A that its block reads.

  Args:
    adapter: for messages.
    entry: the adapted tensor.
    num_inputs: number of the kernels' axes that are inputs.
    shapes: of the projections' kernels.
    a, b: PEFT's tensors.
  """
  rank, count = len(a), len(shapes)
  patterns_a, patterns_b = zip(*(lora_patterns(pattern, num_inputs) for pattern in entry.patterns), strict=True)
  shapes_a = [(*shape[:num_inputs], rank) for shape in shapes]
  shapes_b = [(rank, *shape[num_inputs:]) for shape in shapes]
  module = entry.name.removesuffix(".weight")
  check_adapter_tensor(adapter, f"{module}.lora_A.weight", a, tensor_shape(patterns_a, shapes_a))
  check_adapter_tensor(adapter, f"{module}.lora_B.weight", b, tensor_shape(patterns_b, shapes_b))
  parts_a = [parameter_view(a, patterns_a, shapes_a, i) for i in range(count)]
  parts_b = [parameter_view(b, patterns_b, shapes_b, i) for i in range(count)]
  rows = [slice(rank // count * i, rank // count * (i + 1)) for i in range(count)]
  if count > 1 and rank % count == 0 and b.any():
    if not any(np.delete(part, own, axis=0).any() for part, own in zip(parts_b, rows, strict=True)):
      parts_a = [part[..., own] for part, own in zip(parts_a, rows, strict=True)]
      parts_b = [part[own] for part, own in zip(parts_b, rows, strict=True)]
  return [LoraPair(x, y) if x.any() else None for x, y in zip(parts_a, parts_b, strict=True)]


def merge_lora_pairs(
  entry: TensorEntry, shapes: Sequence[Shape], pairs: Sequence[LoraPair | None], rank: int
) -> tuple[np.ndarray, np.ndarray]:
  """Return A [n r inputs] and B [outputs n r] of a tensor with n projections; one without adapter has zeros.

  Args:
    entry: the adapted tensor.
    shapes: of the projections' kernels.
    pairs: the adapter of each projection, at least one of them.
    rank: r of each.
  """
  first = next(pair for pair in pairs if pair is not None)
  num_inputs, dtype = first.a.ndim - 1, first.a.dtype
  patterns_a, patterns_b = zip(*(lora_patterns(pattern, num_inputs) for pattern in entry.patterns), strict=True)
  rows, blocks = [], []
  for i, (shape, pair) in enumerate(zip(shapes, pairs, strict=True)):
    block = np.zeros((rank * len(pairs), *shape[num_inputs:]), dtype)
    if pair is not None:
      block[rank * i : rank * (i + 1)] = pair.b
    rows.append(np.zeros((*shape[:num_inputs], rank), dtype) if pair is None else pair.a)
    blocks.append(block)
  a = np.concatenate([merge_parameters([part], [pattern]) for part, pattern in zip(rows, patterns_a, strict=True)])
  return a, merge_parameters(blocks, patterns_b)


def check_adapter_tensor(adapter: Adapter, name: str, tensor: np.ndarray, shape: Shape) -> None:
  """Raise ConfigError if a tensor does not have the shape that fits the base model."""
  if tensor.shape != shape:
    raise ConfigError(
      f"{adapter.path}: tensor {name} has shape {list(tensor.shape)}, but its base model requires {list(shape)}"
    )

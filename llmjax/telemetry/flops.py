"""Count model FLOPs from a traced program, and list the peak FLOPs of known devices."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax

from llmjax.trees import PyTree


def forward_flops(function: Callable[..., PyTree], *arguments: PyTree) -> float:
  """Return the floating-point operations of all matrix products in one call of a function.

  A training step has three times as many model FLOPs, as the PaLM paper counts them (arXiv:2204.02311, appendix B). The
  backward pass counts twice, a causal mask does not halve attention, and recomputation does not count.

  Args:
    function: function that JAX can trace.
    arguments: arrays or jax.ShapeDtypeStructs.
  """
  return _dot_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _dot_flops(jaxpr: Any) -> float:
  total = 0.0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
      total += 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
    repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
    for value in equation.params.values():  # the bodies of loops, calls and branches
      for part in value if isinstance(value, (tuple, list)) else (value,):
        body = getattr(part, "jaxpr", part)
        if hasattr(body, "eqns"):
          total += repeats * _dot_flops(body)
  return total


_BF16 = ("bfloat16",)
_HALF = ("bfloat16", "float16")

# (regex of the device kind, dense peak in TFLOP/s, dtypes); the first match counts. Sources: Google Cloud TPU
# documentation; NVIDIA data sheets and white papers, without sparsity, GeForce with float32 accumulation; AMD Instinct
# data sheets. JAX counts each of the two cores of v2, v3 and 7x, and each of the two dies of MI250, as a device.
_PEAKS: tuple[tuple[str, float, tuple[str, ...]], ...] = (
  (r"TPU v2", 46 / 2, _BF16),
  (r"TPU v3", 123 / 2, _BF16),
  (r"TPU v4$", 275, _BF16),
  (r"TPU v5 ?(lite|e)", 197, _BF16),
  (r"TPU v5p?$", 459, _BF16),
  (r"TPU v6 ?(lite|e)", 918, _BF16),
  (r"TPU ?v?7x", 2307 / 2, _BF16),
  (r"GB[23]00", 2500, _HALF),
  (r"B[23]00", 2250, _HALF),
  (r"H[12]00 NVL", 835.5, _HALF),
  (r"H100 PCIe", 756, _HALF),
  (r"H100|H200|GH200|H800", 989.4, _HALF),
  (r"H20\b", 148, _HALF),
  (r"A100|A800", 312, _HALF),
  (r"A10G", 70, _HALF),
  (r"A10\b", 125, _HALF),
  (r"A40\b", 149.7, _HALF),
  (r"RTX A6000", 154.8, _HALF),
  (r"RTX 6000 Ada", 364.2, _HALF),
  (r"L40S", 362, _HALF),
  (r"L40\b", 181, _HALF),
  (r"L4\b", 121, _HALF),
  (r"RTX 3090(?! Ti)", 71, _HALF),
  (r"RTX 4090(?! D| Laptop)", 165.2, _HALF),
  (r"RTX 5090(?! D| Laptop)", 209.5, _HALF),
  (r"V100", 125, ("float16",)),
  (r"\bT4\b", 65, ("float16",)),
  (r"MI210", 181, _HALF),
  (r"MI250X", 383 / 2, _HALF),
  (r"MI250\b", 362.1 / 2, _HALF),
  (r"MI300A", 980.6, _HALF),
  (r"MI3(00X|25X)", 1307.4, _HALF),
)


def peak_flops(device_kind: str, dtype: str) -> float | None:
  """Return the published dense matmul peak of a device in FLOP/s, None if unknown, as for CPUs and for float32.

  Args:
    device_kind: `jax.devices()[0].device_kind`.
    dtype: dtype of matmuls, "bfloat16" or "float16".
  """
  for pattern, tflops, dtypes in _PEAKS:
    if re.search(pattern, device_kind):
      return tflops * 1e12 if str(dtype) in dtypes else None
  return None

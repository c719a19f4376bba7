"""Comparison of two measurements: which arrays differ by more than rounding."""

from __future__ import annotations

import dataclasses

import numpy as np

from llmjax.diagnostics.measurement import PARTS, FlatArrays, Measurement

TOLERANCE = 1e-5  # of the norm of an array
# Of the norm of the whole tree. An array with a smaller norm, such as the gradient of a key's bias, is mostly rounding.
MIN_NORM_FRACTION = 1e-3


@dataclasses.dataclass(frozen=True)
class Difference:
  """Deviation of an array, as a multiple of the tolerance.

  Attributes:
    part: one of PARTS.
    name: path of a parameter, or name of a metric.
    excess: 0 if equal, above 1 if the deviation is too large.
  """

  part: str
  name: str
  excess: float


def compare_measurements(expected: Measurement, actual: Measurement) -> list[Difference]:
  """Return the deviations of all arrays, the largest first.

  A deviation is |actual - expected| / (TOLERANCE * max(|expected|, MIN_NORM_FRACTION * |tree of expected|)), with L2
  norms. Each metric is compared on its own, without the second term. An array that only one measurement has, or that is
  not finite, has an infinite deviation.
  """
  differences = [
    difference for part in PARTS for difference in _compare_part(part, expected.parts[part], actual.parts[part])
  ]
  return sorted(differences, key=lambda difference: -difference.excess)


def _compare_part(part: str, expected: FlatArrays, actual: FlatArrays) -> list[Difference]:
  is_metric = part in ("loss", "held out")
  tree_norm = 0.0 if is_metric else float(np.sqrt(sum(l2_norm(x) ** 2 for x in expected.values())))
  differences = []
  for name in sorted({*expected, *actual}):
    if name not in expected or name not in actual or expected[name].shape != actual[name].shape:
      differences.append(Difference(part, name, np.inf))
      continue
    error = l2_norm(actual[name] - expected[name])
    allowed = TOLERANCE * max(l2_norm(expected[name]), MIN_NORM_FRACTION * tree_norm)
    excess = 0.0 if error == 0 else error / max(allowed, float(np.finfo(float).tiny))
    differences.append(Difference(part, name, excess if np.isfinite(excess) else np.inf))
  return differences


def l2_norm(x: np.ndarray) -> float:
  """Return the L2 norm, computed in float64."""
  return float(np.sqrt(np.sum(np.square(x, dtype=float))))

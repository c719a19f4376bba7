"""Deviations of measurements as multiples of the tolerance."""

import numpy as np
import pytest

from llmjax.diagnostics.comparison import MIN_NORM_FRACTION, TOLERANCE, Difference, compare_measurements
from llmjax.diagnostics.measurement import PARTS, Measurement


def measurement(part, **arrays):
  parts = {name: {} for name in PARTS}
  parts[part] = {name: np.asarray(value, np.float32) for name, value in arrays.items()}
  return Measurement(parts, {}, {})


def test_deviation_is_a_multiple_of_the_tolerance():
  [difference] = compare_measurements(measurement("gradient", a=[4.0, 0.0]), measurement("gradient", a=[4.0, 0.001]))
  assert difference.excess == pytest.approx(0.001 / (4 * TOLERANCE))


def test_deviation_of_a_small_array_is_relative_to_the_tree():
  expected, actual = ({"a": [3.0], "b": [b]} for b in (0.0, 0.001))
  largest = compare_measurements(measurement("gradient", **expected), measurement("gradient", **actual))[0]
  assert largest.name == "b" and largest.excess == pytest.approx(0.001 / (3 * MIN_NORM_FRACTION * TOLERANCE))


def test_deviation_of_a_metric_is_relative_to_itself():
  largest = compare_measurements(measurement("loss", a=100.0, b=1.0), measurement("loss", a=100.0, b=1.001))[0]
  assert largest.name == "b" and largest.excess == pytest.approx(0.001 / TOLERANCE, rel=1e-3)


@pytest.mark.parametrize("actual", [{}, {"a": [1.0, 2.0]}, {"a": [np.nan]}], ids=["missing", "shape", "nan"])
def test_deviation_of_an_array_that_does_not_fit_is_infinite(actual):
  differences = compare_measurements(measurement("after", a=[1.0]), measurement("after", **actual))
  assert differences == [Difference("after", "a", np.inf)]

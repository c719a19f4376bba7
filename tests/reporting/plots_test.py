"""Curves without noise, and labels beside lines without overlap."""

import itertools
import math

import pytest

from llmjax.reporting.plots import format_metric, smooth, spread_heights


@pytest.mark.parametrize(
  "value, metric, text",
  [
    (0.12345, "accuracy", "12.3 %"),
    (1.23456, "loss", "1.235"),
    (1234.5, "loss", "1,234"),
    (54_321.0, "tokens_per_second", "54.3k"),
    (math.nan, "loss", "nan"),
  ],
)
def test_format_metric_depends_on_metric_and_size(value, metric, text):
  assert format_metric(value, metric) == text


def test_smooth_keeps_lines_and_constants():
  assert smooth([2.0] * 100) == pytest.approx([2.0] * 100)
  line = [float(i) for i in range(100)]
  assert smooth(line)[:90] == pytest.approx(line[:90])
  assert smooth([math.nan, *line])[1:3] == pytest.approx([0.5, 1.5])  # the means of (0, 1) and of (0, 1, 2, 3)


def test_spread_heights_keep_order_and_minimum_distance():
  heights = [0.5, 0.5, 0.99, 0.1, 0.51, 0.98]
  out = spread_heights(heights, 0.1)
  order = sorted(range(6), key=lambda i: (heights[i], i))
  gaps = [out[b] - out[a] for a, b in itertools.pairwise(order)]
  assert min(gaps) >= 0.1 - 1e-9 and max(out) <= 1 + 1e-9
  assert spread_heights([0.2, 0.8], 0.1) == [0.2, 0.8]

"""Sums of metrics and their means."""

import math
import random

import pytest

from llmjax.metrics.sums import add_metrics, metric_means


def test_add_metrics_adds_sums_and_weights_by_name():
  a = {"loss": (1.0, 2.0), "only_a": (3.0, 1.0)}
  b = {"loss": (4.0, 6.0), "only_b": (5.0, 1.0)}
  assert add_metrics(a, b) == {"loss": (5.0, 8.0), "only_a": (3.0, 1.0), "only_b": (5.0, 1.0)}


def test_metric_means_do_not_depend_on_the_partition():
  rng = random.Random(0)
  parts = [{"loss": (rng.random(), rng.randrange(4)), "extra": (rng.random(), 1.0)} for _ in range(6)]
  parts[3].pop("extra")  # a part may lack a metric
  left = {}
  for part in parts:
    left = add_metrics(left, part)
  right = add_metrics(add_metrics(parts[5], parts[4]), add_metrics(add_metrics(parts[3], parts[2]), {}))
  right = add_metrics(add_metrics(parts[0], parts[1]), right)
  assert metric_means(left) == pytest.approx(metric_means(right))
  loss = sum(part["loss"][0] for part in parts) / sum(part["loss"][1] for part in parts)
  assert metric_means(left)["loss"] == pytest.approx(loss)


def test_metric_means_drop_weight_zero_and_keep_nan():
  assert metric_means({"a": (0.0, 0.0), "b": (math.nan, 2.0)}).keys() == {"b"}

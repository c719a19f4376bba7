"""Metrics as (sum, weight) pairs, which are added over microbatches, batches and processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def add_metrics(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
  """{name: (sum, weight)} of two parts of the data together; a name that one of them lacks counts as nothing there."""
  both = {name: (a[name][0] + b[name][0], a[name][1] + b[name][1]) for name in a if name in b}
  return {**a, **b, **both}


def metric_means(metrics: Mapping[str, Any]) -> dict[str, float]:
  """{name: (sum, weight)} to {name: sum / weight}, without the names of weight zero: they have measured nothing."""
  return {name: float(total) / float(weight) for name, (total, weight) in metrics.items() if float(weight) != 0}

"""Metrics as (sum, weight) pairs, which are added over microbatches, batches and processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, SupportsFloat, TypeVar


class Summable(SupportsFloat, Protocol):
  """A scalar of JAX, NumPy or Python."""

  def __add__(self, other: Any, /) -> Any: ...


Scalar = TypeVar("Scalar", bound=Summable)


def add_metrics(
  a: Mapping[str, tuple[Scalar, Scalar]], b: Mapping[str, tuple[Scalar, Scalar]]
) -> dict[str, tuple[Scalar, Scalar]]:
  """Return the metrics of two parts of the data together.

  Args:
    a: {name: (sum, weight)} of the first part.
    b: the same of the second part. A name that one of the two lacks adds nothing there.
  """
  both = {name: (a[name][0] + b[name][0], a[name][1] + b[name][1]) for name in a if name in b}
  return {**a, **b, **both}


def metric_means(metrics: Mapping[str, tuple[SupportsFloat, SupportsFloat]]) -> dict[str, float]:
  """Return {name: sum / weight}, without the names of weight zero, which have measured nothing."""
  return {name: float(total) / float(weight) for name, (total, weight) in metrics.items() if float(weight) != 0}

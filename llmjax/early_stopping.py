"""When a run is as good as it gets: a metric that has not become better for some time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from llmjax.config import ConfigError, nearest

DIRECTIONS = ("least", "most")


def check_metric(name: str | None, best_is: str, evals: Mapping[str, Any], key: str) -> None:
  """Raises ConfigError where a metric, or what is best in it, cannot be; `key` is the config key of the metric."""
  if best_is not in DIRECTIONS:
    part = key.partition(".")[0]
    raise ConfigError(f"{part}.best_is={best_is!r} must be 'least' or 'most'")
  if name is not None and name.split("/")[:2] not in [["eval", entry] for entry in evals]:
    known = ", ".join(f"eval/{entry}/..." for entry in evals)
    raise ConfigError(f"{key}={name!r} is none of the run's measurements: {known or 'there are no evals'}")


@dataclasses.dataclass
class EarlyStopping:
  """Counts evaluations that did not beat the best; its state is JSON, and goes with the checkpoints.

  Attributes:
    metric: its name in the curves, None never stops.
    best_is: "least" or "most".
    patience: how many evaluations in a row may fail to beat the best.
    best, failures: the state.
  """

  metric: str | None
  best_is: str
  patience: int
  best: float | None = None
  failures: int = 0

  def __post_init__(self) -> None:
    if self.patience < 1:
      raise ConfigError(f"early_stopping.patience={self.patience} must be at least 1")

  def update(self, measured: Mapping[str, float]) -> bool:
    """Takes what an evaluation measured, if the metric is among it; whether it is time to stop.

    Raises:
      ConfigError: the metric's evaluation has no such number.
    """
    if self.metric is None:
      return False
    entry = "/".join(self.metric.split("/")[:2]) + "/"
    if self.metric not in measured:
      found = [name for name in measured if name.startswith(entry)]
      if found:
        raise ConfigError(f"early_stopping.metric={self.metric!r} was not measured; {nearest(self.metric, found)}")
      return False
    value = measured[self.metric]
    sign = 1 if self.best_is == "least" else -1
    if math.isfinite(value) and (self.best is None or sign * value < sign * self.best):
      self.best, self.failures = value, 0
    else:
      self.failures += 1
    return self.failures >= self.patience

  @property
  def state(self) -> dict[str, Any]:
    return {"best": self.best, "failures": self.failures}

  def restore(self, state: Mapping[str, Any] | None) -> None:
    """What `state` gave; None is the beginning."""
    self.best, self.failures = (None, 0) if state is None else (state["best"], state["failures"])

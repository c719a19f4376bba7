"""When a run is as good as it gets: a metric that has not become better for some time."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from llmjax.config import ConfigError, suggest_name

DIRECTIONS = ("least", "most")

# Metrics of which it is known what is best, by their names in an evaluation; the first that matches counts.
HIGH = "accuracy|f1|precision|recall|exact|mrr|rouge(1|2|L|Lsum)|bleu|chrf|matthews|pearson|spearman|nmi|ari"
KNOWN = {
  "most": rf"(.+[/_])?({HIGH})(_macro|_micro|_match|_at_\d+|/.+)?",
  "least": r"(.+[/_])?(loss|perplexity|bits_per_byte|mse)",
}


def check_metric(name: str | None, best_is: str, evals: Mapping[str, Any], key: str) -> None:
  """Raises ConfigError where a metric, or what is best in it, cannot be; `key` is the config key of the metric."""
  part = key.partition(".")[0]
  if best_is not in DIRECTIONS:
    raise ConfigError(f"{part}.best_is={best_is!r} must be 'least' or 'most'")
  if name is not None and name.split("/")[:2] not in [["eval", entry] for entry in evals]:
    known = ", ".join(f"eval/{entry}/..." for entry in evals)
    raise ConfigError(f"{key}={name!r} is none of the run's measurements: {known or 'there are no evals'}")
  what = "" if name is None else "/".join(name.split("/")[2:])
  known = next((direction for direction, names in KNOWN.items() if re.fullmatch(names, what)), best_is)
  if best_is != known:
    raise ConfigError(
      f"{key}={name!r} with {part}.best_is={best_is!r} would take the worst for the best; set {part}.best_is={known!r}"
    )


def metric_value(metric: str, measured: Mapping[str, float], key: str) -> float | None:
  """A metric among what was measured; None where its evaluation was not due.

  Raises:
    ConfigError: its evaluation has no such number.
  """
  entry = "/".join(metric.split("/")[:2]) + "/"
  found = [name for name in measured if name.startswith(entry)]
  if found and metric not in measured:
    raise ConfigError(f"{key}={metric!r} was not measured; {suggest_name(metric, found)}")
  return measured.get(metric)


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

  @property
  def should_stop(self) -> bool:
    """Whether it is time to stop."""
    return self.metric is not None and self.failures >= self.patience

  def update(self, measured: Mapping[str, float]) -> bool:
    """Takes what an evaluation measured, if the metric is among it; whether it is time to stop."""
    value = None if self.metric is None else metric_value(self.metric, measured, "early_stopping.metric")
    if value is None:
      return False
    sign = 1 if self.best_is == "least" else -1
    if math.isfinite(value) and (self.best is None or sign * value < sign * self.best):
      self.best, self.failures = value, 0
    else:
      self.failures += 1
    return self.should_stop

  @property
  def state(self) -> dict[str, Any]:
    return {"metric": self.metric, "best_is": self.best_is, "best": self.best, "failures": self.failures}

  def restore(self, state: Mapping[str, Any] | None) -> None:
    """What `state` gave; None, or the state of another metric, is the beginning."""
    same = state is not None and (state["metric"], state["best_is"]) == (self.metric, self.best_is)
    self.best, self.failures = (state["best"], state["failures"]) if state is not None and same else (None, 0)

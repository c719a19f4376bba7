"""Early stopping: end a run whose metric has not improved for some evaluations."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from llmjax.config import ConfigError, Json, suggest_name

MODES = ("min", "max")

# Metrics whose better direction is known, by their names in an evaluation; the first mode that matches counts.
MAXIMIZED = "accuracy|f1|precision|recall|exact|mrr|rouge(1|2|L|Lsum)|bleu|chrf|matthews|pearson|spearman|nmi|ari"
KNOWN_MODES = {
  "max": rf"(.+[/_])?({MAXIMIZED})(_macro|_micro|_match|_at_\d+|/.+)?",
  "min": r"(.+[/_])?(loss|perplexity|bits_per_byte|mse)",
}


def check_metric(name: str | None, mode: str, evals: Mapping[str, Any], key: str, mode_key: str) -> None:
  """Raise ConfigError if a metric cannot exist, or if `mode` would select its worst value.

  Args:
    name: the metric, None: no metric is used.
    mode: "min" or "max".
    evals: the entries of config.evals.
    key, mode_key: config keys of the metric and of the mode, for messages.
  """
  if mode not in MODES:
    raise ConfigError(f"{mode_key}={mode!r} must be 'min' or 'max'")
  if name is not None and name.split("/")[:2] not in [["eval", entry] for entry in evals]:
    known = ", ".join(f"eval/{entry}/..." for entry in evals)
    raise ConfigError(f"{key}={name!r} is not measured by this run; metrics are {known or 'none: there are no evals'}")
  metric = "" if name is None else "/".join(name.split("/")[2:])
  right = next((known for known, names in KNOWN_MODES.items() if re.fullmatch(names, metric)), mode)
  if mode != right:
    raise ConfigError(f"{key}={name!r} with {mode_key}={mode!r} would select the worst value; set {mode_key}={right!r}")


def metric_value(metric: str, measured: Mapping[str, float], key: str) -> float | None:
  """Return a metric, or None if its evaluation was not due.

  Raises:
    ConfigError: its evaluation has no metric of that name.
  """
  entry = "/".join(metric.split("/")[:2]) + "/"
  siblings = [name for name in measured if name.startswith(entry)]
  if siblings and metric not in measured:
    raise ConfigError(f"{key}={metric!r} was not measured; {suggest_name(metric, siblings)}")
  return measured.get(metric)


@dataclasses.dataclass
class EarlyStopping:
  """Counts evaluations without improvement. Its state is JSON and is saved with the checkpoints.

  Attributes:
    metric: name of the logged metric; None: never stop.
    mode: "min" or "max".
    patience: evaluations in a row without improvement after which to stop.
    best, failures: the state.
  """

  metric: str | None
  mode: str
  patience: int
  best: float | None = None
  failures: int = 0

  def __post_init__(self) -> None:
    if self.patience < 1:
      raise ConfigError(f"early_stopping.patience={self.patience} must be at least 1")

  @property
  def should_stop(self) -> bool:
    """Whether the metric has not improved for `patience` evaluations."""
    return self.metric is not None and self.failures >= self.patience

  def update(self, measured: Mapping[str, float]) -> bool:
    """Take the metric from an evaluation, if it was measured; return `should_stop` then, else False."""
    value = None if self.metric is None else metric_value(self.metric, measured, "early_stopping.metric")
    if value is None:
      return False
    sign = 1 if self.mode == "min" else -1
    if math.isfinite(value) and (self.best is None or sign * value < sign * self.best):
      self.best, self.failures = value, 0
    else:
      self.failures += 1
    return self.should_stop

  @property
  def state(self) -> dict[str, Json]:
    return {"metric": self.metric, "mode": self.mode, "best": self.best, "failures": self.failures}

  def restore(self, state: Mapping[str, Json] | None) -> None:
    """Restore `state`. None, or the state of another metric or mode, resets it."""
    if state is not None and (state["metric"], state["mode"]) == (self.metric, self.mode):
      self.best, self.failures = state["best"], state["failures"]
    else:
      self.best, self.failures = None, 0

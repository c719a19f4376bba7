"""The results of a sweep: a row for each trial, averages over seeds, and the points of the figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from llmjax.config import ConfigError, Json
from llmjax.storage.buckets import translate_storage_errors
from llmjax.sweeps.job import ENDED, FINISHED, Job
from llmjax.sweeps.trials import COST_COLUMNS, Sweep, identity, plain_numbers, short_keys
from llmjax.telemetry.curves import Curve, read_curves
from llmjax.telemetry.progress import format_number

Row: TypeAlias = dict[str, Json]  # {column: value}; columns are changed keys, COST_COLUMNS, metrics, "trial", "state"
X: TypeAlias = float | int | str  # a position on the horizontal axis: a number, or a name


class Group(NamedTuple):
  """Trials that differ in their seeds only."""

  first_row: Row
  line: str  # label of the line in the figure
  x: X | None  # None if it was not measured
  values: list[float]  # final metric of each trial, NaN if it has none
  has_failed: bool  # at least one of the trials

  @property
  def mean(self) -> float:
    """Mean of the metric, NaN unless all trials have it."""
    return statistics.fmean(self.values)


class Point(NamedTuple):
  """The best group of one line at one x, with the range of its seeds."""

  x: X
  mean: float
  low: float
  high: float
  num_groups: int  # groups with this x


def read_trial_curves(job: Job) -> dict[str, Curve]:
  """Return the metrics that a trial has logged; {} if there are none yet, or if a bucket cannot be reached."""
  try:
    with translate_storage_errors(job.workdir):
      return read_curves(job.workdir)
  except (ConfigError, OSError):
    return {}


def make_result_row(job: Job, curves: Mapping[str, Curve]) -> Row:
  """Return the changes and costs of a trial, and the last value of every metric."""
  step = max((steps[-1] for steps, _ in curves.values()), default=0)
  return {
    **{"trial": job.name, "state": job.state, **plain_numbers(job.trial), "step": step},
    **{"parameters": job.facts["parameters"], "tokens": step * job.facts["tokens"], "flops": step * job.facts["flops"]},
    "seconds": round(job.seconds, 1),
    **{name: values[-1] for name, (_, values) in sorted(curves.items()) if not name.startswith("baseline/")},
    **{"error": job.error, "command": job.command},
  }


def final_metric(plan: Sweep, row: Row) -> float:
  """Return the sweep's metric of a trial, NaN unless the trial is finished and the value finite."""
  value = float(row.get(plan.metric, math.nan)) if row["state"] == FINISHED else math.nan
  return value if math.isfinite(value) else math.nan


def to_minimize(plan: Sweep, value: float) -> float:
  """Return the value of a metric, negated if its maximum is best."""
  return -value if plan.mode == "max" else value


def x_value(plan: Sweep, row: Row) -> X | None:
  """Return the x of a trial, None if it was not measured or is a cost of 0. Other values than numbers become names."""
  x = row.get(plan.x, math.nan if "/" in plan.x else "unset")
  if isinstance(x, bool) or not isinstance(x, (int, float)):
    return str(x)
  return x if math.isfinite(x) and (x or plan.x not in COST_COLUMNS) else None


def group_seeds(plan: Sweep, jobs: Sequence[Job], rows: Sequence[Row]) -> list[Group]:
  """Return the groups of trials that differ in their seeds only, unless seeds are an axis of the figure.

  The x of a group is a mean: the costs of its trials may differ, in particular if one has failed.
  """
  members: dict[str, list[Row]] = {}
  for job, row in zip(jobs, rows):
    key = identity({k: v for k, v in job.trial.items() if k != "seed" or k in (plan.x, *plan.lines)})
    members.setdefault(key, []).append(row)
  return [_make_group(plan, group) for group in members.values()]


def _make_group(plan: Sweep, rows: list[Row]) -> Group:
  xs = [x for row in rows if (x := x_value(plan, row)) is not None]
  numbers = [x for x in xs if not isinstance(x, str)]
  mean_x = None if not xs else xs[0] if len(set(xs)) == 1 else statistics.fmean(numbers)
  values = [final_metric(plan, row) for row in rows]
  has_failed = any(row["state"] in ENDED and math.isnan(value) for row, value in zip(rows, values))
  return Group(rows[0], line_label(plan, rows[0]), mean_x, values, has_failed)


def rank_groups(plan: Sweep, groups: Sequence[Group]) -> list[Group]:
  """Return the groups whose trials all have the metric, the best mean first."""
  return sorted((g for g in groups if math.isfinite(g.mean)), key=lambda g: to_minimize(plan, g.mean))


def line_label(plan: Sweep, row: Row) -> str:
  """Return the label of a trial's line: strings as they are, numbers after their key."""
  short = short_keys([dict.fromkeys(plan.lines)])
  values = {key: row.get(key) for key in plan.lines}
  return ", ".join(v if isinstance(v, str) else f"{short[key]} {format_value(v)}" for key, v in values.items())


def format_value(value: Json) -> str:
  """Return a value of a trial, with numbers shortened to three digits."""
  if isinstance(value, float) or (isinstance(value, int) and value >= 10_000):
    return format_number(value) if 1e4 <= abs(value) < 1e15 else f"{value:.3g}"
  return str(value)


def line_points(plan: Sweep, groups: Sequence[Group]) -> dict[str, list[Point]]:
  """Return {label of a line: points in the order of x}.

  If several groups of a line share an x, such as learning rates at the same number of parameters, the best one is the
  point. Their mean would be the result of no training.
  """
  at: dict[str, dict[X, list[Group]]] = {}  # {line: {x: groups}}
  for group in groups:
    if math.isfinite(group.mean) and group.x is not None:
      at.setdefault(group.line, {}).setdefault(group.x, []).append(group)
  lines: dict[str, list[Point]] = {}
  for line, groups_at in at.items():
    for x in sorted_x_values(groups):
      if x in groups_at:
        best = rank_groups(plan, groups_at[x])[0]
        point = Point(x, best.mean, min(best.values), max(best.values), len(groups_at[x]))
        lines.setdefault(line, []).append(point)
  return lines


def sorted_x_values(groups: Sequence[Group]) -> list[X]:
  """Return all x in order: ascending numbers, then names in the order of the trials."""
  xs = list(dict.fromkeys(group.x for group in groups if group.x is not None))
  return [*sorted(x for x in xs if not isinstance(x, str)), *(x for x in xs if isinstance(x, str))]


def pareto_front(plan: Sweep, lines: Mapping[str, Sequence[Point]]) -> list[tuple[float, float]]:
  """Return the points (x, mean) for which no point with a smaller or equal x is better."""
  front: list[tuple[float, float]] = []
  points = [(point.x, point.mean) for line in lines.values() for point in line if not isinstance(point.x, str)]
  for x, y in sorted(points, key=lambda p: (p[0], to_minimize(plan, p[1]))):
    if not front or to_minimize(plan, y) < to_minimize(plan, front[-1][1]):
      front.append((x, y))
  return front

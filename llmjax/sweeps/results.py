"""The numbers of a sweep: a row for each trial, seeds put together, and what is drawn of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llmjax.config import ConfigError
from llmjax.reporting.plots import Curve
from llmjax.storage.buckets import translate_storage_errors
from llmjax.sweeps.trials import COSTS, Sweep, identity, short_keys
from llmjax.telemetry.curves import read_curves
from llmjax.telemetry.progress import human_number

ENDED = ("finished", "failed")
Row = dict[str, Any]  # {column: value}; "trial", "state", those of the trial's changes, COSTS, metrics


class Group(NamedTuple):
  """Trials that differ in their seeds alone."""

  first: Row
  line: str  # its label
  x: Any  # a number or a name; None where there is neither
  values: list[float]  # the metric of each trial, as `measured`
  failed: bool  # one of them at least

  @property
  def mean(self) -> float:
    """NaN unless all have a number."""
    return statistics.fmean(self.values)


class Point(NamedTuple):
  """The best of the groups of one line at one x, with the spread of its seeds."""

  x: Any
  mean: float
  least: float
  most: float
  among: int  # groups


def curves_of(job: Any) -> dict[str, Curve]:
  """What a trial has logged so far."""
  try:
    with translate_storage_errors(job.workdir):
      return read_curves(job.workdir)
  except (ConfigError, OSError):  # not yet, or a bucket that cannot be reached now
    return {}


def make_result_row(job: Any, curves: Mapping[str, Curve]) -> Row:
  """The last value of every metric, beside what the trial changes and costs."""
  step = max((steps[-1] for steps, _ in curves.values()), default=0)
  costs = {"parameters": job.facts["parameters"], **{key: step * job.facts[key] for key in ("tokens", "flops")}}
  last = {name: values[-1] for name, (_, values) in sorted(curves.items()) if not name.startswith("baseline/")}
  changes = {
    key: value.item() if hasattr(value, "item") else value for key, value in job.trial.items()
  }  # NumPy's numbers
  return {
    **{"trial": job.name, "state": job.state, **changes, "step": step, **costs, "seconds": round(job.seconds, 1)},
    **last,
    **{"error": job.error, "command": job.command},
  }


def measured(plan: Sweep, row: Row) -> float:
  """What decides on a trial; NaN where it has not come to its end with a finite number."""
  value = float(row.get(plan.metric, math.nan)) if row["state"] == "finished" else math.nan
  return value if math.isfinite(value) else math.nan


def to_minimize(plan: Sweep, value: float) -> float:
  """The value, with its sign turned where the most is best: less is better."""
  return -value if plan.mode == "max" else value


def x_value(plan: Sweep, row: Row) -> Any:
  """A row's x; what is no number is a name. None where it was not measured, or nothing was spent yet."""
  x = row.get(plan.x, math.nan if "/" in plan.x else "unset")
  if isinstance(x, bool) or not isinstance(x, (int, float)):
    return str(x)
  return x if math.isfinite(x) and (x or plan.x not in COSTS) else None


def grouped(plan: Sweep, jobs: Sequence[Any], rows: Sequence[Row]) -> list[Group]:
  """Seeds are put together, unless they are what is drawn. A group's x is the mean of those that its trials have: what
  they cost may differ, most of all where one of them has failed."""
  found: dict[str, list[Row]] = {}
  for job, row in zip(jobs, rows):
    key = identity({k: v for k, v in job.trial.items() if k != "seed" or k in (plan.x, *plan.lines)})
    found.setdefault(key, []).append(row)

  def group(of: list[Row]) -> Group:
    xs = [x for x in (x_value(plan, row) for row in of) if x is not None] or [None]
    values = [measured(plan, row) for row in of]
    failed = any(row["state"] in ENDED and math.isnan(value) for row, value in zip(of, values))
    x = xs[0] if len(set(xs)) == 1 else statistics.fmean(xs)
    return Group(of[0], label(plan, of[0]), x, values, failed)

  return [group(of) for of in found.values()]


def ranked(plan: Sweep, groups: Sequence[Group]) -> list[Group]:
  """Those whose trials all are finished, with a finite number; the best mean first."""
  return sorted((g for g in groups if math.isfinite(g.mean)), key=lambda g: to_minimize(plan, g.mean))


def label(plan: Sweep, row: Row) -> str:
  """Of the line that a row belongs to; a name stands for itself, a number beside its key."""
  short = short_keys([{key: None for key in plan.lines}])
  values = {key: row.get(key) for key in plan.lines}
  return ", ".join(v if isinstance(v, str) else f"{short[key]} {format_value(v)}" for key, v in values.items())


def format_value(value: Any) -> str:
  if isinstance(value, float) or (isinstance(value, int) and value >= 10_000):
    return human_number(value) if 1e4 <= abs(value) < 1e15 else f"{value:.3g}"
  return str(value)


def points(plan: Sweep, groups: Sequence[Group]) -> dict[str, list[Point]]:
  """{label of a line: its points in the order of x}. Where several groups of a line share an x, as learning rates do
  along "parameters", the point is the best of them: their mean would be of nothing that was run."""
  found: dict[str, dict[Any, list[Group]]] = {}
  for group in groups:
    if math.isfinite(group.mean) and group.x is not None:
      found.setdefault(group.line, {}).setdefault(group.x, []).append(group)

  def point(x: Any, of: list[Group]) -> Point:
    best = ranked(plan, of)[0]
    return Point(x, best.mean, min(best.values), max(best.values), len(of))

  return {line: [point(x, at[x]) for x in places(groups) if x in at] for line, at in found.items()}


def places(groups: Sequence[Group]) -> list[Any]:
  """All x in order: numbers first, then names as trials have them."""
  xs = list(dict.fromkeys(group.x for group in groups if group.x is not None))
  return [*sorted(x for x in xs if not isinstance(x, str)), *(x for x in xs if isinstance(x, str))]


def frontier(plan: Sweep, lines: Mapping[str, list[Point]]) -> list[tuple[float, float]]:
  """The points that none with a smaller or equal x is better than (Pareto)."""
  out: list[tuple[float, float]] = []
  drawn = [(point.x, point.mean) for line in lines.values() for point in line]
  for x, y in sorted(drawn, key=lambda p: (p[0], to_minimize(plan, p[1]))):
    if not out or to_minimize(plan, y) < to_minimize(plan, out[-1][1]):
      out.append((x, y))
  return out

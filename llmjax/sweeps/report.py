"""Write the results of a sweep: its numbers as CSV and Parquet, a figure, and a page."""

from __future__ import annotations

import csv
import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from llmjax.config import Json
from llmjax.reporting.pages import render_page, themed_image
from llmjax.reporting.plots import format_metric
from llmjax.sweeps import results
from llmjax.sweeps.figure import draw_metric_figure, draw_trial_curves
from llmjax.sweeps.job import FAILED, FINISHED, RUNNING, WAITING, Job
from llmjax.sweeps.results import Group, Row, final_metric, format_value, line_points, rank_groups, to_minimize
from llmjax.sweeps.trials import Sweep, short_keys
from llmjax.telemetry.curves import Curve
from llmjax.telemetry.progress import format_duration, format_number

if TYPE_CHECKING:
  import pyarrow

Curves: TypeAlias = Mapping[str, Mapping[str, Curve]]  # {trial: {metric: curve}}
MAX_LISTED = 5


def write_results(plan: Sweep, jobs: Sequence[Job], workdir: Path) -> str:
  """Write results.csv, results.parquet, sweep.png and sweep.html; return the best trials as text."""
  curves = {job.name: results.read_trial_curves(job) for job in jobs}
  rows = [results.make_result_row(job, curves[job.name]) for job in jobs]
  write_tables(rows, workdir)
  groups = results.group_seeds(plan, jobs, rows)
  best = rank_groups(plan, groups)
  unread = [job.name for job in jobs if job.state == FINISHED and not curves[job.name]]
  lines = [f"finished, but its curves cannot be read: {name}" for name in unread]
  if not best:
    lines.append(f"no trial is finished with {plan.metric} yet; the numbers so far: {workdir / 'results.csv'}")
    return "\n".join(lines)
  (workdir / "sweep.html").write_bytes(_render_sweep(plan, jobs, rows, groups, curves, workdir.name))
  files = ["sweep.html", "results.csv", "results.parquet"]
  if line_points(plan, groups):
    (workdir / "sweep.png").write_bytes(draw_metric_figure(plan, groups, workdir.name, "png"))
    files.insert(1, "sweep.png")
  lines.append(f"{plan.metric}, {plan.mode} is best:")
  lines += [f"  {format_metric(group.mean):>10}  {_group_name(group)}" for group in best[:MAX_LISTED]]
  lines += [f"by {best[0].first_row['command']}", f"in {workdir}: {', '.join(files)}"]
  return "\n".join(lines)


def _group_name(group: Group) -> str:
  """Return the name of a trial, without the seed if there are several."""
  name = group.first_row["trial"]
  return name if len(group.values) == 1 else f"{re.sub(r',seed=[^,]*', '', name)} {_seeds_note(group)}"


def _seeds_note(group: Group) -> str:
  return f"(mean of {len(group.values)} seeds)" if len(group.values) > 1 else ""


def write_tables(rows: Sequence[Row], workdir: Path) -> None:
  """Write results.csv and results.parquet."""
  import pyarrow
  from pyarrow import parquet

  columns = list(dict.fromkeys(column for row in rows for column in row if column not in ("error", "command")))
  columns += ["error", "command"]
  with open(workdir / "results.csv", "w", encoding="utf-8", newline="") as file:
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(rows)
  table = pyarrow.table({column: arrow_column([row.get(column) for row in rows]) for column in columns})
  parquet.write_table(table, workdir / "results.parquet")


def arrow_column(values: Sequence[Json]) -> pyarrow.Array:
  """Return a column of numbers if all values are numbers or None, else of texts."""
  import pyarrow

  if all(value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)) for value in values):
    return pyarrow.array(values)
  return pyarrow.array([None if value is None else str(value) for value in values])


def _render_sweep(
  plan: Sweep, jobs: Sequence[Job], rows: Sequence[Row], groups: Sequence[Group], curves: Curves, title: str
) -> bytes:
  best = rank_groups(plan, groups)[0]
  short = short_keys(job.trial for job in jobs)

  def sort_key(row: Row) -> tuple[bool, float]:
    value = final_metric(plan, row)
    return (True, 0.0) if math.isnan(value) else (False, to_minimize(plan, value))

  sorted_rows = sorted(rows, key=sort_key)
  counts = {state: sum(row["state"] == state for row in rows) for state in (FINISHED, FAILED, RUNNING, WAITING)}
  duration = format_duration(sum(row["seconds"] for row in rows))
  figure = functools.partial(draw_metric_figure, plan, groups, title, "svg")
  images = []
  for metric in dict.fromkeys((plan.metric, "train/loss")):
    metric_curves = {trial: of_trial[metric] for trial, of_trial in curves.items() if metric in of_trial}
    if metric_curves:
      draw = functools.partial(draw_trial_curves, plan, metric, rows, groups, metric_curves)
      images.append(themed_image(metric, draw))
  return render_page(
    "sweeps/sweep.html",
    title=title,
    subtitle=", ".join(f"{n} {state}" for state, n in counts.items() if n) + f" · {duration} of trials",
    x=plan.x,
    figure=themed_image(plan.metric, figure) if line_points(plan, groups) else None,
    best={"trial": _seeds_note(best), "command": best.first_row["command"]},
    best_value=format_metric(best.mean),
    best_changes=[(key, format_value(best.first_row[key])) for key in short if key in best.first_row],
    trial_head=[plan.metric, *short.values(), "state", "steps", "parameters", "FLOPs", "time"],
    trial_rows=[_table_cells(plan, row, list(short)) for row in sorted_rows],
    curves=images,
    rows=sorted_rows,
  )


def _table_cells(plan: Sweep, row: Row, keys: Sequence[str]) -> list[str]:
  value = final_metric(plan, row)
  return [
    format_metric(value) if math.isfinite(value) else "",
    *(format_value(row[key]) if key in row else "" for key in keys),
    row["state"] + (f": {row['error']}" if row["error"] else ""),
    f"{row['step']:,}",
    format_number(row["parameters"]),
    f"{row['flops']:.3g}",
    format_duration(row["seconds"]),
  ]

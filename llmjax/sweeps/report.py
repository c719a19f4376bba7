"""What has come of a sweep: its numbers as CSV and Parquet, and a page with a figure, the curves of all trials, the
best of them, and the command of each."""

from __future__ import annotations

import csv
import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmjax.reporting.html import fold, picture, section, table, whole
from llmjax.reporting.plots import Curve, number
from llmjax.sweeps.figure import figure, trajectories
from llmjax.sweeps.results import (
  Group,
  Row,
  curves_of,
  format_value,
  grouped,
  make_result_row,
  measured,
  points,
  ranked,
  to_minimize,
)
from llmjax.sweeps.trials import Sweep, short_keys
from llmjax.telemetry.progress import human_number, human_time


def write_results(plan: Sweep, jobs: Sequence[Any], workdir: Path) -> str:
  """Writes results.csv, results.parquet, sweep.png and sweep.html; returns the best trials as text."""
  curves = {job.name: curves_of(job) for job in jobs}
  rows = [make_result_row(job, curves[job.name]) for job in jobs]
  _write_tables(rows, workdir)
  groups = grouped(plan, jobs, rows)
  best = ranked(plan, groups)
  unread = [job.name for job in jobs if job.state == "finished" and not curves[job.name]]
  lines = [f"finished, but its curves cannot be read: {name}" for name in unread]
  if not best:
    lines.append(f"no trial has come to its end with {plan.metric} yet; the numbers so far: {workdir / 'results.csv'}")
    return "\n".join(lines)
  (workdir / "sweep.html").write_text(_page(plan, jobs, rows, groups, curves, workdir.name), encoding="utf-8")
  files = ["sweep.html", "results.csv", "results.parquet"]
  if points(plan, groups):
    (workdir / "sweep.png").write_bytes(figure(plan, groups, workdir.name, "png"))
    files.insert(1, "sweep.png")
  return "\n".join(
    [
      *lines,
      f"{plan.metric}, {plan.mode} is best:",
      *(f"  {number(group.mean):>10}  {_named(group.first['trial'], len(group.values))}" for group in best[:5]),
      f"by {best[0].first['command']}",
      f"in {workdir}: {', '.join(files)}",
    ]
  )


def _named(trial: str, count: int) -> str:
  """A trial, or several that differ in their seeds alone."""
  return trial if count == 1 else f"{re.sub(r',seed=[^,]*', '', trial)} (mean of {count} seeds)"


def _write_tables(rows: Sequence[Row], workdir: Path) -> None:
  import pyarrow
  from pyarrow import parquet

  columns = list(dict.fromkeys(column for row in rows for column in row))
  columns = [*(c for c in columns if c not in ("error", "command")), "error", "command"]
  with open(workdir / "results.csv", "w", encoding="utf-8", newline="") as file:
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(rows)

  def plain(values: list[Any]) -> list[Any]:
    """A column of one type: numbers where all are, else text."""
    numbers = all(
      value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)) for value in values
    )
    if numbers:
      whole_numbers = all(value is None or isinstance(value, int) for value in values)
      return [value if value is None or whole_numbers else float(value) for value in values]
    return [None if value is None else str(value) for value in values]

  parquet.write_table(
    pyarrow.table({c: plain([row.get(c) for row in rows]) for c in columns}), workdir / "results.parquet"
  )


def _page(
  plan: Sweep,
  jobs: Sequence[Any],
  rows: Sequence[Row],
  groups: Sequence[Group],
  curves: Mapping[str, Mapping[str, Curve]],
  title: str,
) -> str:
  best = ranked(plan, groups)[0]
  short = short_keys(job.trial for job in jobs)

  def order(row: Row) -> tuple[bool, float]:
    value = measured(plan, row)
    return (True, 0.0) if math.isnan(value) else (False, to_minimize(plan, value))

  shown = sorted(rows, key=order)
  head = [plan.metric, *short.values(), "state", "steps", "parameters", "FLOPs", "time"]
  body = [
    [
      number(measured(plan, row)) if math.isfinite(measured(plan, row)) else "",
      *(format_value(row[key]) if key in row else "" for key in short),
      row["state"] + (f": {row['error']}" if row["error"] else ""),
      *(f"{row['step']:,}", human_number(row["parameters"]), f"{row['flops']:.3g}", human_time(row["seconds"])),
    ]
    for row in shown
  ]
  followed = [name for name in dict.fromkeys((plan.metric, "train/loss")) if any(name in of for of in curves.values())]

  def all_of(name: str) -> str:
    mine = {trial: of[name] for trial, of in curves.items() if name in of}
    return picture(lambda theme: trajectories(plan, name, rows, groups, mine, theme), name)

  def drawn(theme: str) -> str:
    return figure(plan, groups, title, "svg", theme).decode()

  ended = {state: sum(row["state"] == state for row in rows) for state in ("finished", "failed", "running", "waiting")}
  spent = human_time(sum(row["seconds"] for row in rows))
  subtitle = ", ".join(f"{n} {state}" for state, n in ended.items() if n) + f" · {spent} of trials"
  changes = [[key, format_value(best.first[key])] for key in short if key in best.first]
  command = _command({**best.first, "trial": _named("", len(best.values))})
  lead = (
    picture(drawn, plan.metric) if points(plan, groups) else f"No trial has {html.escape(plan.x)} to be drawn along."
  )
  parts = [
    f'<div class="wide lead">{lead}</div>',
    section(f"The best: {number(best.mean)}", table(["", ""], changes) + command),
    section("Trials", table(head, body)),
    *(section(f"All curves: {html.escape(name)}", f'<div class="wide lead">{all_of(name)}</div>') for name in followed),
    fold("The command of each trial", (_command(row) for row in shown)),
  ]
  return whole(title, subtitle, parts)


def _command(row: Row) -> str:
  return f"<p>{html.escape(row['trial'])}</p><pre>{html.escape(row['command'])}</pre>"

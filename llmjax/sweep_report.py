"""What has come of a sweep: a live table while it runs, then its numbers as CSV and Parquet, and a page with a figure,
the curves of all trials, the best of them, and the command of each."""

from __future__ import annotations

import csv
import html
import io
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmjax.config import ConfigError, nearest
from llmjax.data.buckets import in_bucket
from llmjax.metrics import human_number, human_time, read
from llmjax.page import fold, picture, section, table, whole
from llmjax.plots import COLOURS, THEMES, Curve, number, spread, style
from llmjax.trials import COSTS, Sweep, identity, short_keys

ENDED = ("finished", "failed")
Row = dict[str, Any]  # {column: value}; "trial", "state", those of the trial's changes, COSTS, metrics
Point = tuple[Any, float, float, float]  # x, mean, least and most of y


def curves_of(job: Any) -> dict[str, Curve]:
  """What a trial has logged so far."""
  try:
    return read(job.workdir)
  except (ConfigError, OSError):  # not yet, or a bucket that cannot be reached now
    return {}


def make_row(job: Any, curves: Mapping[str, Curve]) -> Row:
  """The last value of every metric, beside what the trial changes and costs."""
  step = max((steps[-1] for steps, _ in curves.values()), default=0)
  costs = {"parameters": job.facts["parameters"], **{key: step * job.facts[key] for key in ("tokens", "flops")}}
  last = {name: values[-1] for name, (_, values) in sorted(curves.items()) if not name.startswith("yardstick/")}
  return {
    **{"trial": job.name, "state": job.state, **job.trial, "step": step, **costs, "seconds": round(job.seconds, 1)},
    **last,
    **{"error": job.error, "command": job.command},
  }


def measured(plan: Sweep, row: Row) -> float:
  """What decides on a trial; NaN where it has not come to its end."""
  return float(row.get(plan.metric, math.nan)) if row["state"] == "finished" else math.nan


def ranked(plan: Sweep, jobs: Sequence[Any], rows: Sequence[Row]) -> list[tuple[float, int, Row]]:
  """(mean of the metric, of how many, the first of them) of trials that differ in their seeds alone, the best first;
  where all of them are finished, with a finite number."""
  groups: dict[str, list[Row]] = {}
  for job, row in zip(jobs, rows):
    groups.setdefault(identity({k: v for k, v in job.trial.items() if k != "seed"}), []).append(row)
  means = [(statistics.fmean(measured(plan, row) for row in of), len(of), of[0]) for of in groups.values()]
  finite = [entry for entry in means if math.isfinite(entry[0])]
  return sorted(finite, key=lambda entry: entry[0], reverse=plan.best_is == "most")


class Table:
  """The trials while they run: a live table on a terminal, elsewhere a line for each that changes its state."""

  def __init__(self, plan: Sweep, jobs: Sequence[Any], say: Callable[[str], None]):
    from rich.console import Console

    self.plan, self.say, self.console = plan, say, Console()
    self.live: Any = None
    self.states: dict[str, str] = {job.name: job.state for job in jobs}
    self.drawn = 0.0
    self.period = 30 if any(in_bucket(job.workdir) for job in jobs) else 1  # seconds

  def __enter__(self) -> Table:
    if self.console.is_terminal:
      from rich.live import Live

      self.live = Live(console=self.console, auto_refresh=False, vertical_overflow="visible").__enter__()
    return self

  def __exit__(self, *error: Any) -> None:
    if self.live is not None:
      self.live.__exit__(*error)

  def show(self, jobs: Sequence[Any]) -> None:
    """Called often; draws when something has changed, and once a second (of trials in a bucket, twice a minute)."""
    changed = [job for job in jobs if self.states[job.name] != job.state]
    self.states |= {job.name: job.state for job in changed}
    if self.live is None:
      for job in changed:
        after = f" after {human_time(job.seconds)}" if job.state in ENDED and job.seconds else ""
        self.say(f"{job.name}: {job.state}{after}{self._result(job)}{': ' + job.error if job.error else ''}")
    elif changed or time.time() > self.drawn + self.period:
      self.drawn = time.time()
      self.live.update(self._table(jobs), refresh=True)

  def _result(self, job: Any) -> str:
    curves = curves_of(job) if job.state in ENDED else {}
    if self.plan.metric in curves:
      steps, values = curves[self.plan.metric]
      return f", {self.plan.metric} {number(values[-1])} at step {steps[-1]:,}"
    return f", without {self.plan.metric}; {nearest(self.plan.metric, curves)}" if job.state == "finished" else ""

  def _table(self, jobs: Sequence[Any]) -> Any:
    """What runs and the latest that ended; the others as a count."""
    from rich.markup import escape
    from rich.table import Table as Grid

    grid = Grid(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("trial", "state", "step", self.plan.metric, "time"):
      grid.add_column(name, justify="left" if name in ("trial", "state") else "right", no_wrap=True)
    running = [job for job in jobs if job.state == "running"]
    room = max(self.console.height - len(running) - 5, 3)
    shown = [job for job in jobs if job.state in ENDED][-room:] + running
    for job in shown:
      curves = curves_of(job)
      step = max((steps[-1] for steps, _ in curves.values()), default=0)
      value = curves.get(self.plan.metric, ([], [math.nan]))[1][-1]
      spent = job.seconds + (time.time() - job.started if job.state == "running" else 0)
      of = f"{step:,}/{job.facts['steps']:,}"
      result = number(value) if math.isfinite(value) else job.error[:40]
      look = "bold" if job.state == "running" else ""
      grid.add_row(escape(job.name), job.state, of, escape(result), human_time(spent), style=look)
    counts = {state: sum(job.state == state for job in jobs) for state in ("finished", "running", "waiting", "failed")}
    grid.caption = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return grid


def write_results(plan: Sweep, jobs: Sequence[Any], workdir: Path) -> str:
  """Writes results.csv, results.parquet, sweep.png and sweep.html; returns the best trials as text."""
  curves = {job.name: curves_of(job) for job in jobs}
  rows = [make_row(job, curves[job.name]) for job in jobs]
  _write_tables(rows, workdir)
  best = ranked(plan, jobs, rows)
  if not best:
    return f"no trial has come to its end with {plan.metric} yet; the numbers so far: {workdir / 'results.csv'}"
  groups = points(plan, rows)
  with open(workdir / "sweep.png", "wb") as file:
    file.write(figure(plan, groups, failures(plan, rows), workdir.name, "png"))
  (workdir / "sweep.html").write_text(_page(plan, jobs, rows, curves, workdir.name), encoding="utf-8")
  lines = [f"  {number(mean):>10}  {_named(row['trial'], count)}" for mean, count, row in best[:5]]
  return "\n".join(
    [
      f"{plan.metric}, {plan.best_is} is best:",
      *lines,
      f"the best again: {best[0][2]['command']}",
      f"in {workdir}: sweep.html, sweep.png, results.csv, results.parquet",
    ]
  )


def _named(trial: str, count: int) -> str:
  """A trial, and how many seeds there are of it."""
  return trial if count == 1 else f"{trial} (mean of {count} seeds)"


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


def label(plan: Sweep, row: Row) -> str:
  """Of the line that a row belongs to; a name stands for itself, a number beside its key."""
  short = short_keys([{key: None for key in plan.lines}])
  values = {key: row.get(key) for key in plan.lines}
  return ", ".join(v if isinstance(v, str) else f"{short[key]} {_written(v)}" for key, v in values.items())


def _written(value: Any) -> str:
  if isinstance(value, float) or (isinstance(value, int) and value >= 10_000):
    return human_number(value) if 1e4 <= abs(value) < 1e12 else f"{value:.3g}"
  return str(value)


def points(plan: Sweep, rows: Sequence[Row]) -> dict[str, list[Point]]:
  """{label of a line: its points in the order of x}; rows with the same x are averaged, and there is no point where one
  of them has failed."""
  found: dict[str, dict[Any, list[float]]] = {}
  failed = {(name, x) for name, x in failures(plan, rows)}
  for row in rows:
    value, x = measured(plan, row), along(plan, row)
    if math.isfinite(value) and (label(plan, row), x) not in failed:
      found.setdefault(label(plan, row), {}).setdefault(x, []).append(value)
  return {
    name: [
      (x, statistics.fmean(of), min(of), max(of)) for x, of in sorted(line.items(), key=lambda item: _order(item[0]))
    ]
    for name, line in found.items()
  }


def failures(plan: Sweep, rows: Sequence[Row]) -> list[tuple[str, Any]]:
  """(label of a line, x) of trials that failed, or ended without a finite number."""
  ended = [row for row in rows if row["state"] in ENDED]
  return [(label(plan, row), along(plan, row)) for row in ended if not math.isfinite(measured(plan, row))]


def along(plan: Sweep, row: Row) -> Any:
  """A row's x; what is no number is a name."""
  x = row.get(plan.x)
  return x if isinstance(x, (int, float)) and not isinstance(x, bool) else str(x)


def _order(x: Any) -> Any:
  return (1, 0, x) if isinstance(x, str) else (0, x, "")


def frontier(plan: Sweep, groups: Mapping[str, list[Point]]) -> list[tuple[float, float]]:
  """The points that none with a smaller or equal x is better than (Pareto)."""
  sign = -1 if plan.best_is == "most" else 1
  out: list[tuple[float, float]] = []
  for x, y in sorted(((x, y) for line in groups.values() for x, y, *_ in line), key=lambda p: (p[0], sign * p[1])):
    if not out or sign * y < sign * out[-1][1]:
      out.append((x, y))
  return out


def figure(
  plan: Sweep,
  groups: Mapping[str, list[Point]],
  failed: Sequence[tuple[str, Any]],
  title: str,
  form: str,
  theme: str = "light",
) -> bytes:
  """The metric along `plan.x`: a line for each group with the spread of its seeds and its best point marked, a cross at
  the edge where a trial failed; where x is a cost, the Pareto front as well."""
  from matplotlib.figure import Figure
  from matplotlib.ticker import FuncFormatter, NullLocator

  xs = [*(x for line in groups.values() for x, *_ in line), *(x for _, x in failed)]
  named = any(isinstance(x, str) for x in xs)
  places = {x: i for i, x in enumerate(sorted(set(xs), key=_order))} if named else {x: x for x in sorted(set(xs))}
  best = max if plan.best_is == "most" else min
  looks = line_looks(list(groups), theme)
  with style(theme):
    canvas = Figure(figsize=(10, 5.2), dpi=160)
    longest = max(len(f"{name}  {number(line[-1][1])}") for name, line in groups.items())
    axes = canvas.add_axes((0.08, 0.14, min(0.8, 0.89 - 0.0085 * longest), 0.72))  # notes stand beside it
    if not named and min(xs) > 0 and max(xs) > 8 * min(xs):
      axes.set_xscale("log")
    axes.set_ylim(*_limits(plan, groups))
    notes = []
    for name, line in groups.items():
      look, at = looks[name], [places[x] for x, *_ in line]
      axes.plot(at, [y for _, y, *_ in line], marker="o", markersize=4, linewidth=1.8, zorder=3, **look)
      low, high = ([point[side] for point in line] for side in (2, 3))
      axes.fill_between(at, low, high, color=look["color"], alpha=0.15, lw=0)
      x, y, *_ = best(line, key=lambda point: point[1])
      axes.plot([places[x]], [y], color=look["color"], marker="o", markersize=9, zorder=4)
      notes.append((line[-1][1], f"{name}  {number(y)}".strip(), look["color"]))
    edge = axes.get_ylim()[0 if plan.best_is == "most" else 1]
    for name, x in failed:
      colour = looks[name]["color"] if name in looks else THEMES[theme]["muted"]
      axes.plot([places[x]], [edge], color=colour, marker="x", markersize=8, clip_on=False, zorder=5)
    if plan.x in COSTS:
      front = zip(*frontier(plan, groups))
      axes.step(*front, where="post", color=THEMES[theme]["muted"], linestyle=(0, (4, 3)), linewidth=1, zorder=2)
    if named or len(places) <= 10:
      axes.set_xticks(list(places.values()), [_written(x) for x in places])
    else:
      axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _written(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(plan.x.removeprefix(":"), color=THEMES[theme]["muted"])
    ink = THEMES[theme]["ink"]
    axes.set_title(f"{title}: {plan.metric}", loc="left", color=ink, fontsize=13, fontweight="bold", pad=14)
    plain(axes, theme)
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [min(max(to_axes.transform((axes.get_xlim()[0], y))[1], 0.0), 1.0) for y, *_ in notes]
    for (_, text, colour), height in zip(notes, spread(wanted, 0.05)):
      axes.annotate(
        text, (1.02, height), xycoords="axes fraction", color=colour, va="center", fontweight="bold", fontsize=9
      )
    out = io.BytesIO()
    canvas.savefig(out, format=form, metadata={"Date": None} if form == "svg" else None)
  return out.getvalue()


def line_looks(names: Sequence[str], theme: str) -> dict[str, dict[str, Any]]:
  """{line: its colour, and dashes where the colours have all been used}."""
  colours = COLOURS[theme]
  dashes = ("-", "--", ":", "-.")
  return {
    name: {"color": colours[i % len(colours)], "linestyle": dashes[i // len(colours) % len(dashes)]}
    for i, name in enumerate(names)
  }


def plain(axes: Any, theme: str) -> None:
  """Axes without a frame."""
  axes.tick_params(which="both", colors=THEMES[theme]["muted"], length=0, pad=5)
  axes.grid(axis="y", color=THEMES[theme]["grid"], linewidth=0.8)
  for side, spine in axes.spines.items():
    spine.set_visible(side == "bottom")
    spine.set_color(THEMES[theme]["grid"])


def _limits(plan: Sweep, groups: Mapping[str, list[Point]]) -> tuple[float, float]:
  """Room for what lies near the best: a trial that has diverged must not flatten all others."""
  values = sorted(y for line in groups.values() for _, *of in line for y in of)
  if plan.best_is == "most":
    values = [-value for value in reversed(values)]
  best, middle = values[0], statistics.median(values)
  worst = min(values[-1], best + 4 * max(middle - best, abs(best) * 0.01))
  room = 0.06 * (worst - best) or 0.05 * abs(best) or 1.0
  low, high = best - room, worst + room
  return (-high, -low) if plan.best_is == "most" else (low, high)


def trajectories(plan: Sweep, name: str, rows: Sequence[Row], curves: Mapping[str, Curve], theme: str) -> str:
  """One metric of all trials against the step, coloured by their line, as SVG."""
  from matplotlib.figure import Figure

  looks = line_looks(list(dict.fromkeys(label(plan, row) for row in rows)), theme)
  finite = sorted(v for _, values in curves.values() for v in values if math.isfinite(v))
  with style(theme):
    canvas = Figure(figsize=(10, 3.7))
    axes = canvas.add_axes((0.06, 0.1, 0.68, 0.84))
    for row in rows:
      if row["trial"] in curves:
        steps, values = curves[row["trial"]]
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, values, linewidth=1, alpha=0.8, marker=marker, markersize=4, **looks[label(plan, row)])
    if finite:  # what has diverged must not flatten the others
      most = finite[-1] if name == plan.metric and plan.best_is == "most" else finite[int(0.98 * (len(finite) - 1))]
      axes.set_ylim(finite[0], most + 0.02 * abs(most) or 1)
    plain(axes, theme)
    for i, (line, look) in enumerate(looks.items()):
      axes.annotate(line, (1.02, 0.95 - 0.07 * i), xycoords="axes fraction", color=look["color"], fontsize=9)
    out = io.StringIO()
    canvas.savefig(out, format="svg", metadata={"Date": None})
  return out.getvalue()


def _page(
  plan: Sweep, jobs: Sequence[Any], rows: Sequence[Row], curves: Mapping[str, Mapping[str, Curve]], title: str
) -> str:
  mean, count, best = ranked(plan, jobs, rows)[0]
  short = short_keys(job.trial for job in jobs)
  sign = -1 if plan.best_is == "most" else 1

  def order(row: Row) -> tuple[bool, float]:
    value = measured(plan, row)
    return not math.isfinite(value), sign * value if math.isfinite(value) else 0.0

  shown = sorted(rows, key=order)
  head = [plan.metric, *short.values(), "state", "steps", "parameters", "FLOPs", "time"]
  body = [
    [
      number(measured(plan, row)) if math.isfinite(measured(plan, row)) else "",
      *(_written(row[key]) if key in row else "" for key in short),
      row["state"] + (f": {row['error']}" if row["error"] else ""),
      *(f"{row['step']:,}", human_number(row["parameters"]), f"{row['flops']:.3g}", human_time(row["seconds"])),
    ]
    for row in shown
  ]
  followed = [name for name in dict.fromkeys((plan.metric, "train/loss")) if any(name in of for of in curves.values())]
  groups, failed = points(plan, rows), failures(plan, rows)

  def all_of(name: str) -> str:
    mine = {trial: of[name] for trial, of in curves.items() if name in of}
    return picture(lambda theme: trajectories(plan, name, rows, mine, theme), name)

  def drawn(theme: str) -> str:
    return figure(plan, groups, failed, title, "svg", theme).decode()

  ended = {state: sum(row["state"] == state for row in rows) for state in ("finished", "failed", "running", "waiting")}
  spent = human_time(sum(row["seconds"] for row in rows))
  subtitle = ", ".join(f"{n} {state}" for state, n in ended.items() if n) + f" · {spent} of trials"
  changes = [[key, _written(best[key])] for key in short if key in best]
  parts = [
    f'<div class="wide lead">{picture(drawn, plan.metric)}</div>',
    section(f"The best: {number(mean)}", table(["", ""], changes) + _command({**best, "trial": _named("", count)})),
    section("Trials", table(head, body)),
    *(section(f"All curves: {html.escape(name)}", f'<div class="wide lead">{all_of(name)}</div>') for name in followed),
    fold("The command of each trial", (_command(row) for row in shown)),
  ]
  return whole(title, subtitle, parts)


def _command(row: Row) -> str:
  return f"<p>{html.escape(row['trial'])}</p><pre>{html.escape(row['command'])}</pre>"

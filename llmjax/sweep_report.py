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

from llmjax.config import ConfigError
from llmjax.data.buckets import in_bucket
from llmjax.metrics import human_number, human_time, read
from llmjax.page import fold, picture, section, table, whole
from llmjax.plots import COLOURS, THEMES, Curve, number, spread, style
from llmjax.trials import Sweep, short_keys

COSTS = ("parameters", "tokens", "flops", "seconds")
ENDED = ("finished", "failed")
Row = dict[str, Any]  # {column: value}; "trial", "state", those of the trial's changes, COSTS, metrics
Point = tuple[Any, float, float, float]  # x, mean, least and most of y


def curves_of(job: Any) -> dict[str, Curve]:
  """What a trial has logged so far."""
  try:
    return read(job.workdir)
  except ConfigError:
    return {}


def make_row(job: Any, curves: Mapping[str, Curve]) -> Row:
  """The last value of every metric, beside what the trial changes and costs."""
  step = max((steps[-1] for steps, _ in curves.values()), default=0)
  tokens = step * job.facts.get("tokens", 0)
  costs = {"parameters": job.facts.get("parameters"), "tokens": tokens, "flops": step * job.facts.get("flops", 0)}
  last = {name: values[-1] for name, (_, values) in sorted(curves.items()) if not name.startswith("yardstick/")}
  return {
    **{"trial": job.name, "state": job.state, **job.trial, "step": step, **costs, "seconds": round(job.seconds, 1)},
    **last,
    **{"error": job.error, "command": job.command},
  }


def ranked(plan: Sweep, rows: Sequence[Row]) -> list[Row]:
  """The rows that have the metric as a finite number, the best first."""
  having = [row for row in rows if math.isfinite(row.get(plan.metric, math.nan))]
  return sorted(having, key=lambda row: row[plan.metric], reverse=plan.best_is == "most")


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
    steps, values = curves_of(job).get(self.plan.metric, ([], []))
    return f", {self.plan.metric} {number(values[-1])} at step {steps[-1]:,}" if values and job.state in ENDED else ""

  def _table(self, jobs: Sequence[Any]) -> Any:
    """What runs and the latest that ended; the others as a count."""
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
      of = f"{step:,}/{job.facts['steps']:,}" if "steps" in job.facts else f"{step:,}"
      result = number(value) if math.isfinite(value) else job.error[:40]
      grid.add_row(job.name, job.state, of, result, human_time(spent), style="bold" if job.state == "running" else "")
    counts = {state: sum(job.state == state for job in jobs) for state in ("finished", "running", "waiting", "failed")}
    grid.caption = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return grid


def write_results(plan: Sweep, jobs: Sequence[Any], workdir: Path) -> str:
  """Writes results.csv, results.parquet, sweep.png and sweep.html; returns the best trials as text."""
  curves = {job.name: curves_of(job) for job in jobs}
  rows = [make_row(job, curves[job.name]) for job in jobs]
  _write_tables(rows, workdir)
  best = ranked(plan, rows)
  if not best:
    return f"no trial has measured {plan.metric} yet; the numbers so far: {workdir / 'results.csv'}"
  groups = points(plan, rows)
  with open(workdir / "sweep.png", "wb") as file:
    file.write(figure(plan, groups, workdir.name, "png"))
  (workdir / "sweep.html").write_text(_page(plan, rows, curves, groups, workdir.name), encoding="utf-8")
  lines = [f"  {number(row[plan.metric]):>10}  {row['trial']}" for row in best[:5]]
  return "\n".join(
    [
      f"{plan.metric}, {plan.best_is} is best, of {len(best)} trials:",
      *lines,
      f"the best again: {best[0]['command']}",
      f"in {workdir}: sweep.html, sweep.png, results.csv, results.parquet",
    ]
  )


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
  """Of the line that a row belongs to."""
  short = short_keys([{key: None for key in plan.lines}])
  return ", ".join(f"{short[key]} {_written(row.get(key))}" for key in plan.lines)


def _written(value: Any) -> str:
  if isinstance(value, float) or (isinstance(value, int) and value >= 10_000):
    return human_number(value) if 1e4 <= abs(value) < 1e12 else f"{value:.3g}"
  return str(value)


def points(plan: Sweep, rows: Sequence[Row]) -> dict[str, list[Point]]:
  """{label of a line: its points in the order of x}; rows with the same x are averaged."""
  found: dict[str, dict[Any, list[float]]] = {}
  for row in rows:
    value, x = row.get(plan.metric, math.nan), row.get(plan.x)
    if math.isfinite(value) and x is not None:
      found.setdefault(label(plan, row), {}).setdefault(x, []).append(value)

  def order(x: Any) -> Any:
    return (0, x, "") if isinstance(x, (int, float)) else (1, 0, str(x))

  return {
    name: [
      (x, statistics.mean(of), min(of), max(of)) for x, of in sorted(line.items(), key=lambda item: order(item[0]))
    ]
    for name, line in found.items()
  }


def frontier(plan: Sweep, groups: Mapping[str, list[Point]]) -> list[tuple[float, float]]:
  """The points that none with a smaller or equal x is better than (Pareto)."""
  sign = -1 if plan.best_is == "most" else 1
  out: list[tuple[float, float]] = []
  for x, y in sorted(((x, y) for line in groups.values() for x, y, *_ in line), key=lambda p: (p[0], sign * p[1])):
    if not out or sign * y < sign * out[-1][1]:
      out.append((x, y))
  return out


def figure(plan: Sweep, groups: Mapping[str, list[Point]], title: str, form: str, theme: str = "light") -> bytes:
  """The metric along `plan.x`: a line for each group with the spread of its seeds and its best point marked; where x
  is a cost, the Pareto front as well."""
  from matplotlib.figure import Figure
  from matplotlib.ticker import FuncFormatter, NullLocator

  colours, ink, muted = COLOURS[theme], THEMES[theme]["ink"], THEMES[theme]["muted"]
  xs = [x for line in groups.values() for x, *_ in line]
  named = not all(isinstance(x, (int, float)) for x in xs)
  places = {x: i for i, x in enumerate(dict.fromkeys(xs))} if named else {x: x for x in xs}
  best = max if plan.best_is == "most" else min
  with style(theme):
    canvas = Figure(figsize=(10, 5.2), dpi=160)
    axes = canvas.add_axes((0.08, 0.14, 0.68, 0.72))
    if not named and min(xs) > 0 and max(xs) > 8 * min(xs):
      axes.set_xscale("log")
    axes.set_ylim(*_limits(plan, groups))
    notes = []
    for (name, line), colour in zip(groups.items(), colours * len(groups)):
      at = [places[x] for x, *_ in line]
      axes.plot(at, [y for _, y, *_ in line], color=colour, marker="o", markersize=4, linewidth=1.8, zorder=3)
      axes.fill_between(at, [low for *_, low, _ in line], [high for *_, high in line], color=colour, alpha=0.15, lw=0)
      x, y, *_ = best(line, key=lambda point: point[1])
      axes.plot([places[x]], [y], color=colour, marker="o", markersize=9, zorder=4)
      notes.append((line[-1][1], f"{name}  {number(y)}".strip(), colour))
    if plan.x in COSTS:
      front = frontier(plan, groups)
      axes.step(*zip(*front), where="post", color=muted, linestyle=(0, (4, 3)), linewidth=1, zorder=2)
    ticks = dict(sorted(places.items(), key=lambda item: item[1]))
    if named or len(ticks) <= 10:
      axes.set_xticks(list(ticks.values()), [_written(x) for x in ticks])
    else:
      axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _written(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(plan.x.removeprefix(":"), color=muted)
    axes.set_title(f"{title}: {plan.metric}", loc="left", color=ink, fontsize=13, fontweight="bold", pad=14)
    axes.tick_params(which="both", colors=muted, length=0, pad=5)
    axes.grid(axis="y", color=THEMES[theme]["grid"], linewidth=0.8)
    for side, spine in axes.spines.items():
      spine.set_visible(side == "bottom")
      spine.set_color(THEMES[theme]["grid"])
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [min(max(to_axes.transform((axes.get_xlim()[0], y))[1], 0.0), 1.0) for y, *_ in notes]
    for (_, text, colour), height in zip(notes, spread(wanted, 0.05)):
      axes.annotate(
        text, (1.02, height), xycoords="axes fraction", color=colour, va="center", fontweight="bold", fontsize=9
      )
    out = io.BytesIO()
    canvas.savefig(out, format=form, metadata={"Date": None} if form == "svg" else None)
  return out.getvalue()


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


def trajectories(plan: Sweep, rows: Sequence[Row], curves: Mapping[str, Curve], theme: str) -> str:
  """One metric of all trials against the step, coloured by their line, as SVG."""
  from matplotlib.figure import Figure

  names = list(dict.fromkeys(label(plan, row) for row in rows))
  palette = dict(zip(names, COLOURS[theme] * len(names)))
  finite = sorted(v for _, values in curves.values() for v in values if math.isfinite(v))
  with style(theme):
    canvas = Figure(figsize=(10, 3.7))
    axes = canvas.add_axes((0.06, 0.1, 0.7, 0.84))
    for row in rows:
      if row["trial"] in curves:
        axes.plot(*curves[row["trial"]], color=palette[label(plan, row)], linewidth=1, alpha=0.8)
    if finite:
      axes.set_ylim(finite[0], finite[int(0.98 * (len(finite) - 1))] * 1.02 or 1)
    axes.tick_params(which="both", colors=THEMES[theme]["muted"], length=0)
    axes.grid(axis="y", color=THEMES[theme]["grid"], linewidth=0.8)
    for side, spine in axes.spines.items():
      spine.set_visible(side == "bottom")
      spine.set_color(THEMES[theme]["grid"])
    for i, name in enumerate(filter(None, names)):
      axes.annotate(name, (1.02, 0.95 - 0.07 * i), xycoords="axes fraction", color=palette[name], fontsize=9)
    out = io.StringIO()
    canvas.savefig(out, format="svg", metadata={"Date": None})
  return out.getvalue()


def _page(plan: Sweep, rows: Sequence[Row], curves: Mapping[str, Mapping[str, Curve]], groups: Any, title: str) -> str:
  best = ranked(plan, rows)
  keys = list(dict.fromkeys(key for row in rows for key in row if key.startswith(":") or "." in key or key == "seed"))
  short = short_keys([{key: None for key in keys}])
  shown = [*best, *(row for row in rows if row not in best)]
  head = [plan.metric, *short.values(), "state", "steps", "parameters", "FLOPs", "time"]
  body = [
    [
      number(row[plan.metric]) if row in best else "",
      *(_written(row[key]) if key in row else "" for key in keys),
      row["state"] + (f": {row['error']}" if row["error"] else ""),
      *(f"{row['step']:,}", human_number(row["parameters"] or 0), f"{row['flops']:.3g}", human_time(row["seconds"])),
    ]
    for row in shown
  ]
  followed = [name for name in dict.fromkeys((plan.metric, "train/loss")) if any(name in of for of in curves.values())]

  def all_of(name: str) -> str:
    mine = {trial: of[name] for trial, of in curves.items() if name in of}
    return picture(lambda theme: trajectories(plan, rows, mine, theme), name)

  ended = {state: sum(row["state"] == state for row in rows) for state in ("finished", "failed", "running", "waiting")}
  spent = human_time(sum(row["seconds"] for row in rows))
  subtitle = ", ".join(f"{count} {state}" for state, count in ended.items() if count) + f" · {spent} of trials"
  parts = [
    f'<div class="wide lead">{picture(lambda t: figure(plan, groups, title, "svg", t).decode(), plan.metric)}</div>',
    section("The best", _command(best[0])),
    section("Trials", table(head, body)),
    *(section(f"All curves: {html.escape(name)}", f'<div class="wide lead">{all_of(name)}</div>') for name in followed),
    fold("The command of each trial", (_command(row) for row in shown)),
  ]
  return whole(title, subtitle, parts)


def _command(row: Row) -> str:
  return f"<p>{html.escape(row['trial'])}</p><pre>{html.escape(row['command'])}</pre>"

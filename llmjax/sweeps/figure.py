"""The pictures of a sweep: its metric along `Sweep.x`, and the curves of all trials."""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from llmjax.reporting.plots import COLOURS, THEMES, Curve, number, spread, style
from llmjax.sweeps.results import Group, Point, Row, format_value, frontier, label, places, points, to_minimize
from llmjax.sweeps.trials import COSTS, Sweep


def figure(plan: Sweep, groups: Sequence[Group], title: str, form: str, theme: str = "light") -> bytes:
  """The metric along `plan.x`: lines through `points`, with the spread of seeds and the best marked; a cross for groups
  that have failed; where x is a cost, the Pareto front as well. There must be a point."""
  from matplotlib.figure import Figure

  lines = points(plan, groups)
  failed = [group for group in groups if group.failed and group.x is not None]
  used = {*(point.x for line in lines.values() for point in line), *(group.x for group in failed)}
  xs = [x for x in places(groups) if x in used]
  named = any(isinstance(x, str) for x in xs)
  at = {x: i if named else x for i, x in enumerate(xs)}
  looks, ink, muted = line_looks(groups, theme), THEMES[theme]["ink"], THEMES[theme]["muted"]
  with style(theme):
    canvas = Figure(figsize=(10, 5.2), dpi=160)
    longest = max(len(f"{clipped(name)}  {number(line[-1].mean)}") for name, line in lines.items())
    axes = canvas.add_axes((0.08, 0.17, min(0.8, 0.89 - 0.0085 * longest), 0.7))  # notes stand beside it
    axes.set_ylim(*_limits(plan, lines))
    edge = axes.get_ylim()[0 if plan.mode == "max" else 1]
    notes = []  # height, text, colour
    for name, line in lines.items():
      look, across = looks[name], [at[point.x] for point in line]
      axes.plot(across, [point.mean for point in line], marker="o", markersize=4, linewidth=1.8, zorder=3, **look)
      low, high = [point.least for point in line], [point.most for point in line]
      axes.fill_between(across, low, high, color=look["color"], alpha=0.15, lw=0)
      best = min(line, key=lambda point: to_minimize(plan, point.mean))
      axes.plot([at[best.x]], [best.mean], color=look["color"], marker="o", markersize=9, zorder=4)
      notes.append((line[-1].mean, f"{clipped(name)}  {number(best.mean)}".strip(), look["color"]))
    axes.plot(list(at.values()), [edge] * len(at), linestyle="none")  # room for the crosses
    for x in {group.x for group in failed}:
      names = list(dict.fromkeys(group.line for group in failed if group.x == x))
      for i, name in enumerate(names):
        side = 8 * (i - (len(names) - 1) / 2)  # points, so that none hides another
        look = {"color": looks[name]["color"], "ha": "center", "va": "center", "fontsize": 13}
        axes.annotate("×", (at[x], edge), xytext=(side, 0), textcoords="offset points", **look)
    lost = dict.fromkeys(group.line for group in failed if group.line not in lines)
    notes += [(edge, f"{clipped(name)}  failed", looks[name]["color"]) for name in lost]
    if plan.x in COSTS:
      axes.step(*zip(*frontier(plan, lines)), where="post", color=muted, linestyle=(0, (4, 3)), linewidth=1, zorder=2)
    _ticks(axes, at, named)
    axes.set_xlabel(plan.x.removeprefix(":"), color=muted)
    axes.set_title(f"{title}: {plan.metric}", loc="left", color=ink, fontsize=13, fontweight="bold", pad=14)
    canvas.text(0.08, 0.02, caption(plan, groups), color=muted, fontsize=8)
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


def _ticks(axes: Any, at: Mapping[Any, float], named: bool) -> None:
  """At the x that there are, unless they are too close; logarithmic where they span more than a factor of eight."""
  from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

  wanted = list(at.values())
  wide = not named and wanted[0] > 0 and wanted[-1] > 8 * wanted[0]
  if wide:
    axes.set_xscale("log")
  scaled = [math.log(x) if wide else x for x in wanted]
  if named or all(12 * (b - a) >= scaled[-1] - scaled[0] for a, b in itertools.pairwise(scaled)):
    axes.set_xticks(wanted, [clipped(format_value(x), max(90 // len(at), 8)) for x in at])
  else:
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value)))
    if wide:
      axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_minor_locator(NullLocator())


def clipped(text: str, room: int = 36) -> str:
  """At most `room` characters, without those in the middle."""
  return text if len(text) <= room else f"{text[: room - room // 3 - 1]}…{text[-(room // 3) :]}"


def caption(plan: Sweep, groups: Sequence[Group]) -> str:
  """What the marks of a figure mean, as far as it has them, and what it lacks."""
  among = {point.among for line in points(plan, groups).values() for point in line}
  counts = {len(group.values) for group in groups}
  seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts)}"
  absent = sum(group.x is None and (group.failed or math.isfinite(group.mean)) for group in groups)
  says = {
    "large dots, and numbers: the best of a line": any(len(line) > 1 for line in points(plan, groups).values()),
    f"a point is the best of {'up to ' if len(among) > 1 else ''}{max(among)} settings": max(among) > 1,
    f"lines are means of {seeds} seeds, bands from the least to the most": max(counts) > 1,
    "× failed": any(group.failed and group.x is not None for group in groups),
    "dashed: nothing cheaper is better": plan.x in COSTS,
    f"not drawn: {absent} without {plan.x}": absent > 0,
  }
  return "  ·  ".join(text for text, true in says.items() if true)


def line_looks(groups: Sequence[Group], theme: str) -> dict[str, dict[str, Any]]:
  """{line: its colour, and dashes where the colours have all been used}; the same in every picture of a sweep."""
  colours = COLOURS[theme]
  dashes = ("-", "--", ":", "-.")
  return {
    name: {"color": colours[i % len(colours)], "linestyle": dashes[i // len(colours) % len(dashes)]}
    for i, name in enumerate(dict.fromkeys(group.line for group in groups))
  }


def plain(axes: Any, theme: str) -> None:
  """Axes without a frame."""
  axes.tick_params(which="both", colors=THEMES[theme]["muted"], length=0, pad=5)
  axes.grid(axis="y", color=THEMES[theme]["grid"], linewidth=0.8)
  for side, spine in axes.spines.items():
    spine.set_visible(side == "bottom")
    spine.set_color(THEMES[theme]["grid"])


def _limits(plan: Sweep, lines: Mapping[str, list[Point]]) -> tuple[float, float]:
  """Room for what lies near the best: a trial that has diverged must not flatten all others."""
  drawn = [point for line in lines.values() for point in line]
  values = sorted(to_minimize(plan, y) for point in drawn for y in (point.mean, point.least, point.most))
  best, middle = values[0], statistics.median(values)
  worst = min(values[-1], best + 4 * max(middle - best, abs(best) * 0.01))
  room = 0.06 * (worst - best) or 0.05 * abs(best) or 1.0
  low, high = best - room, worst + room
  return (-high, -low) if plan.mode == "max" else (low, high)


def trajectories(
  plan: Sweep, name: str, rows: Sequence[Row], groups: Sequence[Group], curves: Mapping[str, Curve], theme: str
) -> str:
  """One metric of all trials against the step, coloured by their line, as SVG."""
  from matplotlib.figure import Figure

  looks = line_looks(groups, theme)
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
      most = finite[-1] if name == plan.metric and plan.mode == "max" else finite[int(0.98 * (len(finite) - 1))]
      axes.set_ylim(finite[0], most + 0.02 * abs(most) or 1)
    plain(axes, theme)
    for i, (line, look) in enumerate(looks.items()):
      axes.annotate(clipped(line), (1.02, 0.95 - 0.07 * i), xycoords="axes fraction", color=look["color"], fontsize=9)
    out = io.StringIO()
    canvas.savefig(out, format="svg", metadata={"Date": None})
  return out.getvalue()

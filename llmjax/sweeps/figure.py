"""Draw a sweep: its metric along `Sweep.x`, and the curves of all trials."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from llmjax.reporting import plots
from llmjax.reporting.plots import THEMES, format_metric
from llmjax.sweeps import results
from llmjax.sweeps.results import Group, Point, Row, X, format_value, to_minimize
from llmjax.sweeps.trials import COST_COLUMNS, Sweep
from llmjax.telemetry.curves import Curve

if TYPE_CHECKING:
  from matplotlib.axes import Axes

CROSS_DISTANCE = 8.0  # points between the crosses of lines at the same x
LABEL_SIZE = 9.0  # points
MAX_LABEL_LENGTH = 36


class LineStyle(NamedTuple):
  color: str
  dashes: str


def draw_metric_figure(plan: Sweep, groups: Sequence[Group], title: str, form: str, theme: str = "light") -> bytes:
  """Return the figure of the metric along `plan.x`, as "png" or "svg".

  Lines connect the points, and bands show the range of seeds. Large dots are the best points of lines, crosses are
  failed groups. If x is a cost, a dashed line is the Pareto front.

  Args:
    plan: the sweep.
    groups: its groups, of which at least one has a point.
    title: title of the figure.
    form: file format.
    theme: "light" or "dark".
  """
  from matplotlib.figure import Figure

  lines = results.line_points(plan, groups)
  failed = [group for group in groups if group.has_failed and group.x is not None]
  used = {*(point.x for line in lines.values() for point in line), *(group.x for group in failed)}
  xs = [x for x in results.sorted_x_values(groups) if x in used]
  has_names = any(isinstance(x, str) for x in xs)
  positions: dict[X | None, float] = {x: float(i if has_names else x) for i, x in enumerate(xs)}
  styles, colors = line_styles(groups, theme), THEMES[theme]
  with plots.matplotlib_style(theme):
    figure = Figure(figsize=(10, 5.2), dpi=160)
    longest = max(len(f"{shorten(name)}  {format_metric(line[-1].mean)}") for name, line in lines.items())
    axes = figure.add_axes((0.08, 0.17, min(0.8, 0.89 - 0.0085 * longest), 0.7))  # labels need the rest of the width
    axes.set_ylim(*_metric_limits(plan, lines))
    edge = axes.get_ylim()[0 if plan.mode == "max" else 1]  # crosses are at the worst value
    labels = [_draw_line(axes, plan, name, line, positions, styles[name]) for name, line in lines.items()]
    axes.plot(list(positions.values()), [edge] * len(positions), linestyle="none")  # widens the axis for the crosses
    _draw_crosses(axes, failed, positions, edge, styles)
    without_points = dict.fromkeys(group.line for group in failed if group.line not in lines)
    labels += [plots.EndLabel(edge, f"{shorten(name)}  failed", styles[name].color) for name in without_points]
    if plan.x in COST_COLUMNS:
      front_x, front_y = zip(*results.pareto_front(plan, lines))
      axes.step(front_x, front_y, where="post", color=colors.muted, linestyle=plots.DASHED, linewidth=1, zorder=2)
    _set_x_ticks(axes, positions, has_names)
    axes.set_xlabel(plan.x.removeprefix(":"), color=colors.muted)
    axes.set_title(f"{title}: {plan.metric}", loc="left", color=colors.ink, fontsize=13, fontweight="bold", pad=14)
    figure.text(0.08, 0.02, figure_caption(plan, groups), color=colors.muted, fontsize=8)
    plots.hide_frame(axes, theme)
    plots.annotate_line_ends(axes, labels, LABEL_SIZE)
    return plots.figure_bytes(figure, form)


def _draw_line(
  axes: Axes, plan: Sweep, name: str, line: Sequence[Point], positions: Mapping[X | None, float], style: LineStyle
) -> plots.EndLabel:
  """Draw a line with its band and best point; return its label, which is at the last point and has the best value."""
  xs, means = [positions[point.x] for point in line], [point.mean for point in line]
  axes.plot(xs, means, marker="o", markersize=4, linewidth=1.8, zorder=3, color=style.color, linestyle=style.dashes)
  low, high = [point.low for point in line], [point.high for point in line]
  axes.fill_between(xs, low, high, color=style.color, alpha=0.15, lw=0)
  best = min(line, key=lambda point: to_minimize(plan, point.mean))
  axes.plot([positions[best.x]], [best.mean], color=style.color, marker="o", markersize=9, zorder=4)
  return plots.EndLabel(line[-1].mean, f"{shorten(name)}  {format_metric(best.mean)}".strip(), style.color)


def _draw_crosses(
  axes: Axes,
  failed: Sequence[Group],
  positions: Mapping[X | None, float],
  edge: float,
  styles: Mapping[str, LineStyle],
) -> None:
  """Draw a cross for each line with a failed group at an x, side by side."""
  for x in {group.x for group in failed}:
    names = list(dict.fromkeys(group.line for group in failed if group.x == x))
    for i, name in enumerate(names):
      offset = (CROSS_DISTANCE * (i - (len(names) - 1) / 2), 0.0)
      cross = axes.annotate("×", (positions[x], edge), xytext=offset, textcoords="offset points")
      cross.set(color=styles[name].color, fontsize=13, ha="center", va="center")


def _set_x_ticks(axes: Axes, positions: Mapping[X | None, float], has_names: bool) -> None:
  """Set ticks at all x, unless they are too close. The scale is logarithmic if x spans more than a factor of eight."""
  from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

  ticks = list(positions.values())
  is_log = not has_names and ticks[0] > 0 and ticks[-1] > 8 * ticks[0]
  if is_log:
    axes.set_xscale("log")
  scaled = [math.log(x) if is_log else x for x in ticks]
  if has_names or all(12 * (b - a) >= scaled[-1] - scaled[0] for a, b in itertools.pairwise(scaled)):
    axes.set_xticks(ticks, [shorten(format_value(x), max(90 // len(ticks), 8)) for x in positions])
  else:
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value)))
    if is_log:
      axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_minor_locator(NullLocator())


def shorten(text: str, max_length: int = MAX_LABEL_LENGTH) -> str:
  """Return a text in which an ellipsis replaces the middle if it is too long."""
  end = max_length // 3
  return text if len(text) <= max_length else f"{text[: max_length - end - 1]}…{text[-end:]}"


def figure_caption(plan: Sweep, groups: Sequence[Group]) -> str:
  """Return an explanation of the marks in the figure, and the number of trials that it does not show."""
  lines = results.line_points(plan, groups).values()
  num_groups = {point.num_groups for line in lines for point in line}
  counts = {len(group.values) for group in groups}
  seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts)}"
  absent = sum(group.x is None and (group.has_failed or math.isfinite(group.mean)) for group in groups)
  notes = {
    "large dots, and numbers: the best of a line": any(len(line) > 1 for line in lines),
    f"a point is the best of {'up to ' if len(num_groups) > 1 else ''}{max(num_groups)} settings": max(num_groups) > 1,
    f"lines are means of {seeds} seeds, bands from min to max": max(counts) > 1,
    "× failed": any(group.has_failed and group.x is not None for group in groups),
    "dashed: Pareto front": plan.x in COST_COLUMNS,
    f"not drawn: {absent} without {plan.x}": absent > 0,
  }
  return "  ·  ".join(note for note, applies in notes.items() if applies)


def line_styles(groups: Sequence[Group], theme: str) -> dict[str, LineStyle]:
  """Return {line: colour and dashes}, equal in all figures of a sweep; dashes change when the colours are used up."""
  colors, dashes = THEMES[theme].lines, ("-", "--", ":", "-.")
  return {
    name: LineStyle(colors[i % len(colors)], dashes[i // len(colors) % len(dashes)])
    for i, name in enumerate(dict.fromkeys(group.line for group in groups))
  }


def _metric_limits(plan: Sweep, lines: Mapping[str, Sequence[Point]]) -> tuple[float, float]:
  """Return limits around the best values: a trial that has diverged must not flatten all others."""
  points = [point for line in lines.values() for point in line]
  values = sorted(to_minimize(plan, y) for point in points for y in (point.mean, point.low, point.high))
  best, median = values[0], statistics.median(values)
  worst = min(values[-1], best + 4 * max(median - best, abs(best) * 0.01))
  margin = 0.06 * (worst - best) or 0.05 * abs(best) or 1.0
  low, high = best - margin, worst + margin
  return (-high, -low) if plan.mode == "max" else (low, high)


def draw_trial_curves(
  plan: Sweep, metric: str, rows: Sequence[Row], groups: Sequence[Group], curves: Mapping[str, Curve], theme: str
) -> bytes:
  """Return one metric of all trials against the step as SVG, in the colours of their lines."""
  from matplotlib.figure import Figure

  styles = line_styles(groups, theme)
  finite = sorted(v for _, values in curves.values() for v in values if math.isfinite(v))
  with plots.matplotlib_style(theme):
    figure = Figure(figsize=(10, 3.7))
    axes = figure.add_axes((0.06, 0.1, 0.68, 0.84))
    for row in rows:
      if row["trial"] in curves:
        (steps, values), style = curves[row["trial"]], styles[results.line_label(plan, row)]
        marker = "o" if len(steps) == 1 else ""
        lines = axes.plot(steps, values, linewidth=1, alpha=0.8, marker=marker, markersize=4)
        lines[0].set(color=style.color, linestyle=style.dashes)
    if finite:  # without diverged trials, which would flatten the others
      high = finite[-1] if metric == plan.metric and plan.mode == "max" else finite[int(0.98 * (len(finite) - 1))]
      axes.set_ylim(finite[0], high + 0.02 * abs(high) or 1)
    plots.hide_frame(axes, theme)
    for i, (line, style) in enumerate(styles.items()):
      height = 0.95 - 0.07 * i
      axes.annotate(shorten(line), (1.02, height), xycoords="axes fraction", color=style.color, fontsize=LABEL_SIZE)
    return plots.figure_bytes(figure, "svg")

"""Draw curves with Matplotlib: several on one axis, with names and last values beside the ends of the lines."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llmjax.telemetry.curves import Curve
from llmjax.telemetry.progress import format_number

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure


class Theme(NamedTuple):
  """Colours of figures on a light or dark page."""

  paper: str
  ink: str
  muted: str
  grid: str
  lines: tuple[str, ...]


LIGHT_LINES = ("#2f6fde", "#d4521a", "#1a8754", "#8250c4", "#b0246f", "#8a6d00")
DARK_LINES = ("#6ea3ff", "#ff935c", "#4fc48a", "#b794f6", "#f47fb7", "#d9b84a")
THEMES = {
  "light": Theme(paper="#ffffff", ink="#1f2328", muted="#6e7781", grid="#e8ebee", lines=LIGHT_LINES),
  "dark": Theme(paper="#14181d", ink="#e6e9ec", muted="#8b949e", grid="#272d34", lines=DARK_LINES),
}
FONTS = ("Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans")  # Matplotlib ships the last one
ACCURACIES = {"accuracy", "masked_accuracy", "sentence_accuracy", "span_accuracy"}
PERCENT_METRICS = {*ACCURACIES, "mfu", "recall_at_1", "recall_at_10"}
ZERO_BASED_METRICS = {*PERCENT_METRICS, "learning_rate", "mrr", "tokens_per_second"}
NOISELESS_METRICS = {"learning_rate"}
MAX_MARKED_POINTS = 40  # longer curves are smoothed, over a faint raw curve; shorter ones have a mark at each point
DASHED = (0, (4, 3))


@dataclasses.dataclass(frozen=True)
class Panel:
  """Curves of one metric, with at least one finite value."""

  metric: str  # determines the number format and the scale
  title: str
  curves: Mapping[str, Curve]  # {label: curve}
  levels: Mapping[str, float] = dataclasses.field(default_factory=dict)  # {label: value}: horizontal lines


class EndLabel(NamedTuple):
  """A text to the right of the axes, at the height of a value."""

  value: float
  text: str
  color: str
  weight: str = "bold"


def format_metric(value: float, metric: str = "") -> str:
  """Return a value in the format of its metric."""
  if not math.isfinite(value):
    return str(value)
  if metric in PERCENT_METRICS:
    return f"{100 * value:.1f} %"
  if abs(value) >= 1e4:
    return format_number(value)
  return f"{value:.4g}" if abs(value) < 100 else f"{value:,.0f}"


def smooth(values: Sequence[float]) -> list[float]:
  """Return centred means over up to a twentieth of the curve; values that are not finite become NaN.

  The window is empty at the first point and grows, so that the steep fall of the first steps stays.
  """
  reach, means = max(len(values) // 40, 1), []
  for i in range(len(values)):
    half = min(i, reach)
    window = [v for v in values[i - half : i + half + 1] if math.isfinite(v)]
    means.append(sum(window) / len(window) if math.isfinite(values[i]) else math.nan)
  return means


def trend(values: Sequence[float], metric: str) -> list[float]:
  """Return a curve without its noise and without infinities."""
  finite = [v if math.isfinite(v) else math.nan for v in values]
  return smooth(finite) if len(values) > MAX_MARKED_POINTS and metric not in NOISELESS_METRICS else finite


def last_value(values: Sequence[float], metric: str) -> float:
  """Return the last finite value of a curve's trend, NaN if there is none."""
  return next((v for v in reversed(trend(values, metric)) if math.isfinite(v)), math.nan)


def spread_heights(heights: Sequence[float], gap: float) -> list[float]:
  """Return heights near the given ones, in the same order, at least `gap` apart, and below 1 if there is room."""
  order = sorted(range(len(heights)), key=heights.__getitem__)
  out = list(heights)
  for below, above in itertools.pairwise(order):
    out[above] = max(out[above], out[below] + gap)
  ceiling = max(1.0, gap * (len(out) - 1))
  for i in reversed(order):
    out[i] = min(out[i], ceiling)
    ceiling = out[i] - gap
  return out


def draw_panel(axes: Axes, panel: Panel, theme: str, font_size: float) -> None:
  """Draw a panel; `font_size` is in points."""
  colors = THEMES[theme]
  labels = []
  for (label, (steps, raw)), color in zip(panel.curves.items(), itertools.cycle(colors.lines)):
    is_long = len(steps) > MAX_MARKED_POINTS
    if is_long and panel.metric not in NOISELESS_METRICS:
      axes.plot(steps, raw, color=color, alpha=0.25, linewidth=0.7, zorder=2)
    marker, width = "" if is_long else "o", font_size / 5
    shown = trend(raw, panel.metric)
    axes.plot(
      steps, shown, color=color, linewidth=width, marker=marker, markersize=font_size / 2.2, zorder=3, clip_on=False
    )
    value = last_value(raw, panel.metric)
    name = "" if len(panel.curves) == 1 and not panel.levels else label + "  "
    labels.append(EndLabel(value, name + format_metric(value, panel.metric), color))
  for label, value in panel.levels.items():
    axes.axhline(value, color=colors.muted, linewidth=0.9, linestyle=DASHED, zorder=1)
    labels.append(EndLabel(value, f"{label}  {format_metric(value, panel.metric)}", colors.muted, "normal"))
  _set_scales(axes, panel)
  axes.set_title(panel.title, loc="left", color=colors.ink, fontsize=font_size * 1.15, fontweight="bold", pad=font_size)
  hide_frame(axes, theme)
  axes.tick_params(which="both", labelsize=font_size * 0.9)
  axes.set_axisbelow(True)
  annotate_line_ends(axes, labels, font_size * 0.95)


def hide_frame(axes: Axes, theme: str) -> None:
  """Leave the bottom line and horizontal grid lines of axes."""
  axes.tick_params(which="both", colors=THEMES[theme].muted, length=0, pad=5)
  axes.grid(axis="y", color=THEMES[theme].grid, linewidth=0.8)
  for side, spine in axes.spines.items():
    spine.set_visible(side == "bottom")
    spine.set_color(THEMES[theme].grid)


def annotate_line_ends(axes: Axes, labels: Sequence[EndLabel], font_size: float) -> None:
  """Write labels to the right of the axes, near the heights of their values, without overlap."""
  figure = axes.get_figure()
  assert figure is not None
  to_axes = axes.transData + axes.transAxes.inverted()
  left = axes.get_xlim()[0]
  heights = [min(max(to_axes.transform((left, label.value))[1], 0.0), 1.0) for label in labels]
  offset = (font_size * 0.85, 0.0)
  gap = font_size * 1.4 * figure.dpi / 72 / axes.get_window_extent().height
  for label, height in zip(labels, spread_heights(heights, gap)):
    annotation = axes.annotate(
      label.text, (1, height), xycoords="axes fraction", xytext=offset, textcoords="offset points", va="center"
    )
    annotation.set(color=label.color, fontweight=label.weight, fontsize=font_size)


def _set_scales(axes: Axes, panel: Panel) -> None:
  """Set limits and ticks; the scale is logarithmic if values span more than a factor of three."""
  from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

  values = [v for _, raw in panel.curves.values() for v in raw if math.isfinite(v)] + list(panel.levels.values())
  low, high = min(values), max(values)
  if panel.metric in ZERO_BASED_METRICS or low <= 0 or high <= 3 * low:
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if panel.metric in ZERO_BASED_METRICS and low >= 0:
      axes.set_ylim(0, high * 1.08 or 1)
  else:
    axes.set_yscale("log")
    subs = (1, 1.5, 2, 3, 4, 5, 7) if high < 10 * low else (1, 2, 5) if high < 300 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
  axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: format_metric(v, panel.metric).replace(".0 %", " %")))
  axes.yaxis.set_minor_formatter(NullFormatter())
  start = min(steps[0] for steps, _ in panel.curves.values())
  end = max(steps[-1] for steps, _ in panel.curves.values())
  margin = 1 if start == end else 0
  axes.set_xlim(start - margin, end + margin)
  axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))


@contextlib.contextmanager
def matplotlib_style(theme: str) -> Iterator[None]:
  """Set fonts and background colours inside the context."""
  import matplotlib
  from matplotlib.font_manager import fontManager

  known = set(fontManager.get_font_names())
  paper = THEMES[theme].paper
  settings: Any = {
    "font.family": next(f for f in FONTS if f in known),
    "figure.facecolor": paper,
    "axes.facecolor": paper,
    "svg.hashsalt": "llmjax",  # the same figure gives the same bytes
    "text.parse_math": False,  # a dollar sign in a run's name does not start a formula
  }
  with matplotlib.rc_context(settings):
    yield


def figure_bytes(figure: Figure, form: str) -> bytes:
  """Return a figure as "png" or "svg", without the date of its creation."""
  file = io.BytesIO()
  figure.savefig(file, format=form, metadata={"Date": None} if form == "svg" else None)
  return file.getvalue()


def draw_poster(panels: Sequence[Panel], title: str, subtitle: str, theme: str = "light") -> bytes:
  """Return a PNG, 1600 pixels wide: the first panel large, the others below in rows of three."""
  from matplotlib.figure import Figure

  first, *others = panels
  height = 5.1 + 2.15 * math.ceil(len(others) / 3)  # inches; positions below are fractions of it, from the bottom
  with matplotlib_style(theme):
    figure = Figure(figsize=(10, height), dpi=160)
    ink, muted = THEMES[theme].ink, THEMES[theme].muted
    figure.text(0.055, 1 - 0.42 / height, title, color=ink, fontsize=15, fontweight="bold", va="center")
    figure.text(0.055, 1 - 0.72 / height, subtitle, color=muted, fontsize=9, va="center")
    draw_panel(figure.add_axes((0.055, 1 - 4.65 / height, 0.7, 3.3 / height)), first, theme, 9)
    for i, panel in enumerate(others):
      top = 6.75 + 2.15 * (i // 3)
      axes = figure.add_axes((0.055 + 0.325 * (i % 3), 1 - top / height, 0.185, 1.3 / height))
      draw_panel(axes, panel, theme, 7.5)
    return figure_bytes(figure, "png")


def panel_svg(panel: Panel, theme: str, is_wide: bool) -> bytes:
  """Return one panel as SVG; a wide one fills the width of a page, of the others three do."""
  from matplotlib.figure import Figure

  width, height, font_size = (10.0, 3.7, 9.5) if is_wide else (4.2, 2.2, 9.0)
  left, right = (0.04, 0.72) if is_wide else (0.12, 0.58)
  with matplotlib_style(theme):
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left, 0.3 / height, right, (height - 0.85) / height))
    draw_panel(axes, panel, theme, font_size)
    return figure_bytes(figure, "svg")

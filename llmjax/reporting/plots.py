"""Curves as pictures: several on one axis, with names and last values beside the ends of the lines."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from llmjax.telemetry.progress import human_number

Curve = tuple[list[int], list[float]]  # (steps, values)

THEMES = {
  "light": {"paper": "#ffffff", "ink": "#1f2328", "muted": "#6e7781", "grid": "#e8ebee"},
  "dark": {"paper": "#14181d", "ink": "#e6e9ec", "muted": "#8b949e", "grid": "#272d34"},
}
COLOURS = {
  "light": ("#2f6fde", "#d4521a", "#1a8754", "#8250c4", "#b0246f", "#8a6d00"),
  "dark": ("#6ea3ff", "#ff935c", "#4fc48a", "#b794f6", "#f47fb7", "#d9b84a"),
}
FONTS = ("Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans")  # the last one comes with Matplotlib
PERCENT = {"accuracy", "masked_accuracy", "mfu", "recall_at_1", "recall_at_10", "sentence_accuracy", "span_accuracy"}
FROM_ZERO = {*PERCENT, "learning_rate", "mrr", "tokens_per_second"}
EXACT = {"learning_rate"}  # no noise to smooth away
NOISY = 40  # a curve of more points is smoothed over a faint raw one; fewer are marked one by one


@dataclasses.dataclass(frozen=True)
class Panel:
  """Curves that share an axis; at least one finite value."""

  key: str  # the metric, which says how values are written
  title: str
  curves: Mapping[str, Curve]  # {label: curve}
  levels: Mapping[str, float] = dataclasses.field(default_factory=dict)  # {label: value}: horizontal lines


def number(value: float, key: str = "") -> str:
  """A value of the metric `key`, as people write it."""
  if not math.isfinite(value):
    return str(value)
  if key in PERCENT:
    return f"{100 * value:.1f} %"
  if abs(value) >= 1e4:
    return human_number(value)
  return f"{value:.4g}" if abs(value) < 100 else f"{value:,.0f}"


def smooth(values: list[float]) -> list[float]:
  """A centred mean over up to a twentieth of the curve; what is no finite number stays a gap.

  The window begins at nothing, so that the steep fall of the first steps stays as it was.
  """
  reach, out = max(len(values) // 40, 1), []
  for i in range(len(values)):
    half = min(i, reach)
    window = [v for v in values[i - half : i + half + 1] if math.isfinite(v)]
    out.append(sum(window) / len(window) if math.isfinite(values[i]) else math.nan)
  return out


def trend(values: list[float], metric: str) -> list[float]:
  """What a curve shows without its noise; its last value is the one that reports give."""
  finite = [v if math.isfinite(v) else math.nan for v in values]
  return smooth(finite) if len(values) > NOISY and metric not in EXACT else finite


def last(values: list[float], metric: str) -> float:
  """The last number of a curve's trend, NaN where there is none."""
  return next((v for v in reversed(trend(values, metric)) if math.isfinite(v)), math.nan)


def spread(wanted: list[float], gap: float) -> list[float]:
  """Heights at least `gap` apart, in the order of the wanted ones and near them, below 1 as far as there is room."""
  order = sorted(range(len(wanted)), key=wanted.__getitem__)
  out = list(wanted)
  for below, above in itertools.pairwise(order):
    out[above] = max(out[above], out[below] + gap)
  ceiling = max(1.0, gap * (len(out) - 1))
  for i in reversed(order):
    out[i] = min(out[i], ceiling)
    ceiling = out[i] - gap
  return out


def draw(axes: Any, panel: Panel, theme: str, size: float) -> None:
  """Draws a panel. `size`: of the type, in points."""
  colours = THEMES[theme]
  notes = []  # (height, text, colour, weight)
  for (label, (steps, raw)), colour in zip(panel.curves.items(), COLOURS[theme] * len(panel.curves)):
    shown = trend(raw, panel.key)
    if len(steps) > NOISY and panel.key not in EXACT:
      axes.plot(steps, raw, color=colour, alpha=0.25, linewidth=0.7, zorder=2)
    line = axes.plot(steps, shown, color=colour, linewidth=size / 5, zorder=3, clip_on=False)[0]
    if len(steps) <= NOISY:
      line.set(marker="o", markersize=size / 2.2)
    name = "" if len(panel.curves) == 1 and not panel.levels else label + "  "
    notes.append((last(raw, panel.key), name + number(last(raw, panel.key), panel.key), colour, "bold"))
  for label, value in panel.levels.items():
    axes.axhline(value, color=colours["muted"], linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    notes.append((value, f"{label}  {number(value, panel.key)}", colours["muted"], "normal"))
  _scales(axes, panel)
  axes.set_title(panel.title, loc="left", color=colours["ink"], fontsize=size * 1.15, fontweight="bold", pad=size)
  axes.tick_params(which="both", colors=colours["muted"], labelsize=size * 0.9, length=0, pad=5)
  axes.grid(axis="y", color=colours["grid"], linewidth=0.8)
  axes.set_axisbelow(True)
  for side, spine in axes.spines.items():
    spine.set_visible(side == "bottom")
    spine.set_color(colours["grid"])
  to_axes = axes.transData + axes.transAxes.inverted()
  gap = size * 1.35 * axes.figure.dpi / 72 / axes.get_window_extent().height
  heights = spread([to_axes.transform((axes.get_xlim()[0], y))[1] for y, *_ in notes], gap)
  for (_, text, colour, weight), height in zip(notes, heights):
    place = {"xycoords": "axes fraction", "xytext": (size * 0.8, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (1, height), color=colour, fontweight=weight, fontsize=size * 0.95, **place)


def _scales(axes: Any, panel: Panel) -> None:
  """Limits and ticks; logarithmic where values span more than a factor of three."""
  from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

  values = [v for _, raw in panel.curves.values() for v in raw if math.isfinite(v)] + list(panel.levels.values())
  low, high = min(values), max(values)
  if panel.key in FROM_ZERO or low <= 0 or high <= 3 * low:
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if panel.key in FROM_ZERO and low >= 0:
      axes.set_ylim(0, high * 1.08 or 1)
  else:
    axes.set_yscale("log")
    subs = (1, 1.5, 2, 3, 4, 5, 7) if high < 10 * low else (1, 2, 5) if high < 300 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
  axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v, panel.key).replace(".0 %", " %")))
  axes.yaxis.set_minor_formatter(NullFormatter())
  start = min(steps[0] for steps, _ in panel.curves.values())
  end = max(steps[-1] for steps, _ in panel.curves.values())
  alone = 1 if start == end else 0
  axes.set_xlim(start - alone, end + alone)
  axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))


@contextlib.contextmanager
def style(theme: str) -> Iterator[None]:
  import matplotlib
  from matplotlib.font_manager import fontManager

  known = set(fontManager.get_font_names())
  paper = THEMES[theme]["paper"]
  settings: Any = {  # a dollar sign in a run's name is no formula
    "font.family": next(f for f in FONTS if f in known),
    "figure.facecolor": paper,
    "axes.facecolor": paper,
    "svg.hashsalt": "llmjax",
    "text.parse_math": False,
  }
  with matplotlib.rc_context(settings):
    yield


def poster(panels: list[Panel], title: str, subtitle: str, theme: str = "light") -> bytes:
  """A PNG, 1600 pixels wide: the first panel large, the others below in rows of three."""
  from matplotlib.figure import Figure

  first, *others = panels
  height = 5.1 + 2.15 * math.ceil(len(others) / 3)  # inches; positions below are fractions of it, from the bottom
  with style(theme):
    figure = Figure(figsize=(10, height), dpi=160)
    ink, muted = THEMES[theme]["ink"], THEMES[theme]["muted"]
    figure.text(0.055, 1 - 0.42 / height, title, color=ink, fontsize=15, fontweight="bold", va="center")
    figure.text(0.055, 1 - 0.72 / height, subtitle, color=muted, fontsize=9, va="center")
    draw(figure.add_axes((0.055, 1 - 4.65 / height, 0.7, 3.3 / height)), first, theme, 9)
    for i, panel in enumerate(others):
      top = 6.75 + 2.15 * (i // 3)
      draw(figure.add_axes((0.055 + 0.325 * (i % 3), 1 - top / height, 0.185, 1.3 / height)), panel, theme, 7.5)
    out = io.BytesIO()
    figure.savefig(out, format="png")
  return out.getvalue()


def svg(panel: Panel, theme: str, wide: bool) -> str:
  """One panel alone as SVG; a wide one fills a page's width, three others do together."""
  from matplotlib.figure import Figure

  width, height, size = (10.0, 3.7, 9.5) if wide else (4.2, 2.2, 9.0)
  with style(theme):
    figure = Figure(figsize=(width, height))
    left, right = (0.04, 0.72) if wide else (0.12, 0.58)
    draw(figure.add_axes((left, 0.3 / height, right, (height - 0.85) / height)), panel, theme, size)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
  return out.getvalue()

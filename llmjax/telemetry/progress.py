"""Show the progress of a run: one live line on a terminal, one plain line per update elsewhere."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Sequence
from typing import TextIO

BLOCKS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 20
OTHER_COLUMNS_WIDTH = 64  # a narrower terminal has no room for the sparkline
COLUMNS = (
  "step {task.completed:,}/{task.total:,}",
  "loss {task.fields[loss]:.4f}",
  "{task.fields[curve]}",
  "{task.percentage:.0f}%",
  "{task.fields[speed]}",
  "{task.fields[time_left]}",
)


def sparkline(values: Sequence[float], width: int = SPARKLINE_WIDTH) -> str:
  """Return a curve in at most `width` characters, without values that are not finite.

  Early values, where a loss falls fast, get more characters than late ones.
  """
  heights = [v for v in values if math.isfinite(v)]
  if not heights or width < 1:
    return ""
  if (count := len(heights)) > width:
    edges = [int(count * (column / width) ** 2) for column in range(width + 1)]
    bins = [heights[a : max(b, a + 1)] for a, b in itertools.pairwise(edges)]
    heights = [sum(values) / len(values) for values in bins]
  low, high = min(heights), max(heights)
  return "".join(BLOCKS[round((h - low) / (high - low) * 7) if high > low else 0] for h in heights)


def replace_control_characters(text: str) -> str:
  """Return text that is safe on a terminal: models may write escape sequences. Newlines and tabs stay."""
  return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def format_duration(seconds: float) -> str:
  """Return "0:59" for 59, "1:01:01" for 3661, "2d 7h" for 200000."""
  total = round(seconds)
  minutes, hours = total // 60 % 60, total // 3600
  if hours >= 48:
    return f"{hours // 24}d {hours % 24}h"
  return f"{hours}:{minutes:02}:{total % 60:02}" if hours else f"{minutes}:{total % 60:02}"


def format_number(value: float) -> str:
  """Return three digits and a unit: "1.23k" for 1234, "5.6G" for 5.6e9."""
  for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if abs(value) >= scale:
      return f"{value / scale:.3g}{unit}" if abs(value) < 999.5 * scale else f"{value / scale:.0f}{unit}"
  return f"{value:.3g}"


class Progress:
  """Display of the progress of a run.

  Args:
    total_steps: number of steps of the whole run.
    first_step: step at which this process began.
    tokens_per_step: tokens of a global batch, for the time left.
    stream: output, stderr by default.
  """

  def __init__(self, total_steps: int, first_step: int, tokens_per_step: int, stream: TextIO | None = None) -> None:
    from rich import progress
    from rich.console import Console

    self._tokens_per_step = tokens_per_step
    self._losses: list[float] = []
    self._console = Console(file=sys.stderr if stream is None else stream, highlight=False, emoji=False)
    # Not `console.is_terminal`, which is true for files if FORCE_COLOR is set.
    self._is_live = self._console.file.isatty() and not self._console.is_dumb_terminal
    columns = [progress.TextColumn(column, style="bold") for column in COLUMNS]
    self._display = progress.Progress(*columns, console=self._console, auto_refresh=False)
    self._task = self._display.add_task("", total=total_steps, completed=first_step, visible=False)
    self._display.update(self._task, loss=math.nan, curve="", speed="", time_left="")
    if self._is_live:
      self._display.start()

  def update(self, step: int, loss: float, tokens_per_second: float | None) -> None:
    """Show the loss after `step` updates. The speed is None as long as it is not known."""
    self._losses.append(float(loss))
    task = self._display.tasks[0]
    if tokens_per_second:
      seconds_left = (int(task.total or 0) - step) * self._tokens_per_step / tokens_per_second
      speed, time_left = f"{format_number(tokens_per_second)} tok/s", f"{format_duration(seconds_left)} left"
      self._display.update(self._task, speed=speed, time_left=time_left)
    width = min(SPARKLINE_WIDTH, self._console.width - OTHER_COLUMNS_WIDTH) if self._is_live else SPARKLINE_WIDTH
    curve = "" if self._console.options.ascii_only else sparkline(self._losses, width)
    self._display.update(self._task, completed=step, visible=True, loss=float(loss), curve=curve)
    if self._is_live:
      self._display.refresh()
    else:
      self.print_above("  ".join(filter(None, (column.format(task=task) for column in COLUMNS))))

  def print_above(self, text: str) -> None:
    """Print text above the live line."""
    self._console.print(replace_control_characters(text), markup=False, soft_wrap=True)

  def close(self) -> None:
    """Stop the live line; its last state stays on the terminal."""
    if self._is_live:
      self._display.stop()

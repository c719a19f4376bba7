"""Show the progress of a run: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import itertools
import math
import re
import sys
from typing import Any, TextIO

_LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 20) -> str:
  """A curve in at most `width` characters; the early values, where a loss falls fast, get more room than the late.

  Values that are no finite numbers are left out.
  """
  heights = [v for v in values if math.isfinite(v)]
  if not heights or width < 1:
    return ""
  if (count := len(heights)) > width:
    edges = [int(count * (column / width) ** 2) for column in range(width + 1)]
    buckets = [heights[a : max(b, a + 1)] for a, b in itertools.pairwise(edges)]
    heights = [sum(bucket) / len(bucket) for bucket in buckets]
  low, high = min(heights), max(heights)
  return "".join(_LEVELS[round((h - low) / (high - low) * 7) if high > low else 0] for h in heights)


def printable(text: str) -> str:
  """Text that is safe on a terminal: a model may well write escape sequences. Newlines and tabs stay."""
  return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def human_time(seconds: float) -> str:
  """59 -> "0:59", 3661 -> "1:01:01", 200000 -> "2d 7h"."""
  whole = round(seconds)
  minutes, hours = whole // 60 % 60, whole // 3600
  if hours >= 48:
    return f"{hours // 24}d {hours % 24}h"
  return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def human_number(value: float) -> str:
  """Three digits and a unit: 1234 -> "1.23k", 5.6e9 -> "5.6G"."""
  for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if abs(value) >= scale:
      return f"{value / scale:.3g}{unit}" if abs(value) < 999.5 * scale else f"{value / scale:.0f}{unit}"
  return f"{value:.3g}"


class Progress:
  """How far a run is: one live line on a terminal, plain lines elsewhere, one for each update.

  Args:
    total_steps: of the whole run.
    first_step: where this run began.
    tokens_per_step: of the whole batch, for the time that is left.
    stream: where to write.
  """

  def __init__(self, total_steps: int, first_step: int, tokens_per_step: int, stream: TextIO | None = None):
    from rich.console import Console
    from rich.live import Live

    self._total, self._tokens = total_steps, tokens_per_step
    self._stream = sys.stderr if stream is None else stream
    self._console = Console(file=self._stream, highlight=False)
    self._losses: list[float] = []
    self._live: Live | None = None
    if self._stream.isatty() and not self._console.is_dumb_terminal:
      self._live = Live(self, console=self._console, auto_refresh=False)
      self._live.start()
    self._state: tuple[int, float | None, float | None] = (first_step, None, None)

  def __rich__(self) -> Any:
    from rich.text import Text

    return Text(self.line(self._console.width - 1), style="bold", no_wrap=True, overflow="crop")

  def line(self, width: int = 100) -> str:
    """The state of the run in at most `width` characters; what matters less gives way first."""
    step, loss, speed = self._state
    percent = f"{100 * step / self._total:.0f}%" if self._total else "100%"
    left = human_time((self._total - step) * self._tokens / speed) if speed else ""
    rate = human_number(speed) if speed else ""
    number = "" if loss is None else f"{loss:.4f}"
    count = f"{step:,}/{self._total:,}"
    words = (f"step {count}", number and f"loss {number}"), (percent, rate and f"{rate} tok/s", left and f"{left} left")
    brief = (count, number), (percent, rate and f"{rate}/s", left)
    for room, (head, tail) in ((20, words), (10, words), (10, brief), (6, brief), (0, brief)):
      line = "  ".join(filter(None, (*head, self._curve(room), *tail)))
      if len(line) <= width:
        return line
    return "  ".join(filter(None, (count, number)))[:width]

  def _curve(self, width: int) -> str:
    try:
      _LEVELS.encode(self._stream.encoding or "utf-8")
    except UnicodeEncodeError:
      return ""
    return sparkline(self._losses, width)

  def update(self, step: int, loss: float, tokens_per_second: float | None) -> None:
    """After `step` updates. A speed of None is not known yet."""
    self._state = step, float(loss), tokens_per_second
    self._losses.append(float(loss))
    if self._live is not None:
      self._live.refresh()
    else:
      print(self.line(), file=self._stream, flush=True)

  def print_above(self, text: str) -> None:
    """Print above the live line."""
    if self._live is not None:
      self._console.print(printable(text), markup=False, soft_wrap=True)
    else:
      print(printable(text), file=self._stream, flush=True)

  def close(self) -> None:
    """Leaves the last state on the terminal."""
    if self._live is not None:
      self._live.stop()
      self._live = None

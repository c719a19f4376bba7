"""The trials of a sweep while they run: a live table on a terminal, elsewhere a line for each change."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmjax.config import suggest_name
from llmjax.reporting.plots import number
from llmjax.storage.buckets import in_bucket
from llmjax.sweeps.results import ENDED, curves_of
from llmjax.sweeps.trials import Sweep
from llmjax.telemetry.curves import CURVES
from llmjax.telemetry.progress import human_time

Newest = dict[str, tuple[int, float]]  # {metric: (step, value)}


@dataclasses.dataclass
class Tail:
  """How far a trial's growing file of curves has been read."""

  inode: int = -1  # a run that is resumed writes another file
  end: int = 0  # bytes
  newest: Newest = dataclasses.field(default_factory=dict)

  def follow(self, path: Path) -> Newest:
    """Reads the lines that have been added; one that is half written is left for later, what is no record left out."""
    try:
      file = open(path, "rb")
    except OSError:
      return {}
    with file:
      found = os.fstat(file.fileno())
      if found.st_ino != self.inode or found.st_size < self.end:
        self.inode, self.end, self.newest = found.st_ino, 0, {}
      file.seek(self.end)
      for line in file:
        if not line.endswith(b"\n"):
          break
        self.end += len(line)
        try:
          record = json.loads(line)
          step = int(record.pop("step"))
          self.newest |= {name: (step, float(value)) for name, value in record.items() if name != "time"}
        except (ValueError, TypeError, KeyError, AttributeError):
          continue
    return self.newest


class Table:
  """The trials while they run: a live table on a terminal, elsewhere a line for each that changes its state."""

  def __init__(self, plan: Sweep, jobs: Sequence[Any], say: Callable[[str], None]):
    from rich.console import Console

    self.plan, self.say, self.console = plan, say, Console()
    self.live: Any = None
    self.states: dict[str, str] = {job.name: job.state for job in jobs}
    self.tails: dict[str, Tail] = {job.name: Tail() for job in jobs}
    self.fetched: dict[str, Newest] = {}  # of trials in a bucket that have ended
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

  def _newest(self, job: Any) -> Newest:
    """What a trial has logged last; asked for once a second."""
    if not in_bucket(job.workdir):
      return self.tails[job.name].follow(Path(job.workdir) / CURVES)
    if job.name in self.fetched:
      return self.fetched[job.name]
    newest = {name: (steps[-1], values[-1]) for name, (steps, values) in curves_of(job).items()}
    if newest and job.state in ENDED:
      self.fetched[job.name] = newest
    return newest

  def _result(self, job: Any) -> str:
    newest = self._newest(job) if job.state in ENDED else {}
    if self.plan.metric in newest:
      step, value = newest[self.plan.metric]
      return f", {self.plan.metric} {number(value)} at step {step:,}"
    return f", without {self.plan.metric}; {suggest_name(self.plan.metric, newest)}" if job.state == "finished" else ""

  def _table(self, jobs: Sequence[Any]) -> Any:
    """What runs and the latest that ended; the others as a count."""
    from rich.markup import escape
    from rich.table import Table as Grid

    grid = Grid(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("trial", "state", "step", escape(self.plan.metric), "time"):
      grid.add_column(name, justify="left" if name in ("trial", "state") else "right", no_wrap=True)
    running = [job for job in jobs if job.state == "running"]
    room = max(self.console.height - len(running) - 5, 3)
    shown = [job for job in jobs if job.state in ENDED][-room:] + running
    for job in shown:
      newest = self._newest(job)
      step = max((step for step, _ in newest.values()), default=0)
      _, value = newest.get(self.plan.metric, (0, None))
      result = job.error[:40] if value is None or (job.error and not math.isfinite(value)) else number(value)
      spent = job.seconds + (time.time() - job.started if job.state == "running" and job.started else 0)
      of = f"{step:,}/{job.facts['steps']:,}"
      look = "bold" if job.state == "running" else ""
      grid.add_row(escape(job.name), job.state, of, escape(result), human_time(spent), style=look)
    counts = {state: sum(job.state == state for job in jobs) for state in ("finished", "running", "waiting", "failed")}
    grid.caption = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return grid

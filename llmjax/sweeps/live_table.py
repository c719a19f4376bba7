"""Show the trials of a sweep while they run: a live table on a terminal, one line per change of state elsewhere."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from llmjax.config import suggest_name
from llmjax.reporting.plots import format_metric
from llmjax.storage.buckets import in_bucket
from llmjax.sweeps.job import ENDED, FAILED, FINISHED, RUNNING, WAITING, Job
from llmjax.sweeps.results import read_trial_curves
from llmjax.sweeps.trials import Sweep
from llmjax.telemetry.curves import METRICS_FILE
from llmjax.telemetry.progress import format_duration

LatestValues: TypeAlias = dict[str, tuple[int, float]]  # {metric: (step, value)}
REDRAW_SECONDS, BUCKET_REDRAW_SECONDS = 1.0, 30.0
OTHER_LINES = 5  # of the terminal: header, caption, and lines around the table


@dataclasses.dataclass
class MetricsTail:
  """Reader of the lines that are appended to a trial's file of metrics."""

  inode: int = -1  # a resumed run replaces the file
  offset: int = 0  # bytes that have been read
  latest: LatestValues = dataclasses.field(default_factory=dict)

  def read_new_lines(self, path: Path) -> LatestValues:
    """Return the latest values. An incomplete last line is read later; lines that are not records are skipped."""
    try:
      file = open(path, "rb")
    except OSError:
      return {}
    with file:
      status = os.fstat(file.fileno())
      if status.st_ino != self.inode or status.st_size < self.offset:
        self.inode, self.offset, self.latest = status.st_ino, 0, {}
      file.seek(self.offset)
      for line in file:
        if not line.endswith(b"\n"):
          break
        self.offset += len(line)
        try:
          record = json.loads(line)
          step = int(record.pop("step"))
          self.latest |= {name: (step, float(value)) for name, value in record.items() if name != "time"}
        except (ValueError, TypeError, KeyError, AttributeError):
          continue
    return self.latest


class LiveTable:
  """The states of trials: a live table on a terminal, one line per change elsewhere.

  Args:
    plan: the sweep.
    jobs: its trials.
    print_line: prints a line if the output is not a terminal.
  """

  def __init__(self, plan: Sweep, jobs: Sequence[Job], print_line: Callable[[str], None]) -> None:
    self.plan, self.print_line, self.console = plan, print_line, Console()
    self.live: Live | None = None
    self.states = {job.name: job.state for job in jobs}
    self.tails = {job.name: MetricsTail() for job in jobs}
    self.fetched: dict[str, LatestValues] = {}  # final values of trials in a bucket
    self.drawn_at = 0.0
    self.interval = BUCKET_REDRAW_SECONDS if any(in_bucket(job.workdir) for job in jobs) else REDRAW_SECONDS

  def __enter__(self) -> LiveTable:
    if self.console.is_terminal:
      self.live = Live(console=self.console, auto_refresh=False, vertical_overflow="visible")
      self.live.start()
    return self

  def __exit__(self, *error: object) -> None:
    if self.live is not None:
      self.live.stop()

  def show(self, jobs: Sequence[Job]) -> None:
    """Draw changes of state at once, and new metrics at intervals. May be called at any rate."""
    changed = [job for job in jobs if self.states[job.name] != job.state]
    self.states |= {job.name: job.state for job in changed}
    if self.live is None:
      for job in changed:
        after = f" after {format_duration(job.seconds)}" if job.state in ENDED and job.seconds else ""
        error = f": {job.error}" if job.error else ""
        self.print_line(f"{job.name}: {job.state}{after}{self._describe_result(job)}{error}")
    elif changed or time.time() > self.drawn_at + self.interval:
      self.drawn_at = time.time()
      self.live.update(self._make_table(jobs), refresh=True)

  def latest_values(self, job: Job) -> LatestValues:
    """Return the latest metrics of a trial. For an ended trial in a bucket they are fetched once."""
    if not in_bucket(job.workdir):
      return self.tails[job.name].read_new_lines(Path(job.workdir) / METRICS_FILE)
    if job.name in self.fetched:
      return self.fetched[job.name]
    latest = {name: (steps[-1], values[-1]) for name, (steps, values) in read_trial_curves(job).items()}
    if latest and job.state in ENDED:
      self.fetched[job.name] = latest
    return latest

  def _describe_result(self, job: Job) -> str:
    latest = self.latest_values(job) if job.state in ENDED else {}
    if self.plan.metric in latest:
      step, value = latest[self.plan.metric]
      return f", {self.plan.metric} {format_metric(value)} at step {step:,}"
    return f", without {self.plan.metric}; {suggest_name(self.plan.metric, latest)}" if job.state == FINISHED else ""

  def _make_table(self, jobs: Sequence[Job]) -> Table:
    """Return a table of the running trials and as many ended ones as the terminal has room for, and all counts."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("trial", "state", "step", escape(self.plan.metric), "time"):
      table.add_column(name, justify="left" if name in ("trial", "state") else "right", no_wrap=True)
    running = [job for job in jobs if job.state == RUNNING]
    room = max(self.console.height - len(running) - OTHER_LINES, 3)
    for job in [job for job in jobs if job.state in ENDED][-room:] + running:
      latest = self.latest_values(job)
      step = max((step for step, _ in latest.values()), default=0)
      _, value = latest.get(self.plan.metric, (0, None))
      result = job.error[:40] if value is None or (job.error and not math.isfinite(value)) else format_metric(value)
      seconds = job.seconds + (time.time() - job.started if job.state == RUNNING and job.started else 0)
      steps = f"{step:,}/{job.facts['steps']:,}"
      style = "bold" if job.state == RUNNING else ""
      table.add_row(escape(job.name), job.state, steps, escape(result), format_duration(seconds), style=style)
    counts = {state: sum(job.state == state for job in jobs) for state in (FINISHED, RUNNING, WAITING, FAILED)}
    table.caption = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return table

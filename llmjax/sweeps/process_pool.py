"""Run the trials of a sweep in parallel processes, on this machine or through a launcher.

A trial takes a slot. If a launcher cannot report how a trial ended, the trial may still run. It keeps its slot, and the
next call of the sweep resumes it there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Sequence

from llmjax.config import ConfigError
from llmjax.sweeps.job import (
  FAILED,
  FINISHED,
  LOCK_FILE,
  LOG_FILE,
  RUNNING,
  WAITING,
  Job,
  is_trial_finished,
  was_killed,
)
from llmjax.sweeps.launchers import Launcher, Slot

MAX_RETRIES = 2  # of a trial that was killed
POLL_SECONDS = 0.2
EXIT_UNKNOWN = 75  # exit code of a launcher that cannot report how the run ended


class ProcessPool:
  """Runs trials until all have ended.

  Args:
    jobs: all trials with their states, which change.
    launcher: launcher of the trials.
    slots: one for each trial that may run at a time.
    show: called with the jobs whenever something may have changed.
  """

  def __init__(
    self, jobs: Sequence[Job], launcher: Launcher, slots: Sequence[Slot], show: Callable[[Sequence[Job]], None]
  ) -> None:
    self._jobs, self._launcher, self._slots, self._show = jobs, launcher, slots, show
    self._running: dict[int, Job] = {}  # {slot number: job}
    self._closed: dict[int, str] = {}  # {slot number: reason why nothing is started there any more}
    self._detached = [job for job in jobs if job.process is not None]
    self._used_slots = {job.slot for job in jobs if job.exit_unknown or job.process is not None}
    self._signals: list[int] = []

  def run(self) -> None:
    """Run the trials that are not finished.

    Raises:
      KeyboardInterrupt: a signal asked to stop.
      ConfigError: no slot is left, because the launcher failed; the trials are as they were.
    """
    handled = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if not is_signal_ignored(number)]
    previous = {number: signal.signal(number, self._stop_trials) for number in handled}
    try:
      while True:
        self._record_exits()
        self._start_jobs()
        with contextlib.suppress(OSError, ConfigError):  # an unreadable file must not end the sweep
          self._show(self._jobs)
        if not self._running and (self._signals or not self._detached):
          break
        time.sleep(POLL_SECONDS)
    finally:
      for slot in sorted(self._used_slots - {job.slot for job in self._detached}):
        self._launcher.delete_machines(slot)
      for number, handler in previous.items():
        signal.signal(number, handler)
    if self._signals:
      others = f" ({len(self._detached)} trials of an earlier call continue)" if self._detached else ""
      raise KeyboardInterrupt(
        f"interrupted; {self._launcher.spec.interrupt_note}{others}. The same command resumes the sweep."
      )
    if self._closed and any(job.state == WAITING for job in self._jobs):
      reason = self._closed[min(self._closed)]
      raise ConfigError(f"{reason}; nothing is lost. The same command resumes the sweep.")

  def _stop_trials(self, number: int, _: object) -> None:
    """Handle a signal: pass it on to all trials, the second Ctrl-C as SIGKILL."""
    self._signals.append(number)
    for job in list(self._running.values()):
      self._stop_trial(job)

  def _stop_trial(self, job: Job) -> None:
    if isinstance(job.process, subprocess.Popen):
      job.process.send_signal(signal.SIGKILL if self._signals.count(signal.SIGINT) > 1 else signal.SIGTERM)

  def _record_exits(self) -> None:
    for job in [job for job in self._detached if exit_code(job) is not None]:
      self._detached.remove(job)
      record_detached_exit(job)
    for number, job in list(self._running.items()):
      code = exit_code(job)
      if code is not None:
        del self._running[number]
        if not record_exit(job, code, bool(self._signals), self._launcher.name != "local"):
          self._closed[number] = job.error

  def _start_jobs(self) -> None:
    busy = {*self._running, *self._closed, *(job.slot for job in self._detached)}
    for slot, job in pair_with_slots(self._jobs, self._slots, busy, bool(self._launcher.spec.cleanup)):
      if self._signals or len(self._running) + len(self._detached) >= len(self._slots):
        break
      start_job(job, self._launcher.prefix(job, slot.number), slot)
      self._running[slot.number] = job
      self._used_slots.add(slot.number)
      if self._signals:  # a signal arrived while the trial was being started
        self._stop_trial(job)


def pair_with_slots(
  jobs: Sequence[Job], slots: Sequence[Slot], busy: Collection[int], is_sticky: bool
) -> list[tuple[Slot, Job]]:
  """Return the waiting trials to start next, with their slots.

  Args:
    jobs: all trials.
    slots: slots of the pool.
    busy: numbers of slots in which nothing can start.
    is_sticky: resume a trial whose exit is unknown only in its own slot, where it may still run, even if that is not
      one of `slots`.
  """
  waiting = [job for job in jobs if job.state == WAITING]
  bound = {job.slot: job for job in waiting if is_sticky and job.exit_unknown}
  known = {slot.number: slot for slot in slots}
  pairs = [(known.get(number, Slot(number)), job) for number, job in sorted(bound.items()) if number not in busy]
  free = [slot for slot in slots if slot.number not in {*busy, *bound}]
  return pairs + list(zip(free, (job for job in waiting if job not in bound.values())))


def exit_code(job: Job) -> int | None:
  """Return the exit code of a trial's process, None while it runs."""
  return None if job.process is None else job.process.poll()


def start_job(job: Job, prefix: Sequence[str], slot: Slot) -> None:
  """Start or resume a trial. Its process inherits the lock, and holds it as long as it lives."""
  job.folder.mkdir(parents=True, exist_ok=True)
  with open(job.folder / LOCK_FILE, "a") as lock, open(job.folder / LOG_FILE, "ab") as log:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.truncate(0)
    lock.write(str(slot.number))
    lock.flush()
    job.write_record(None)
    job.process = subprocess.Popen(
      job.process_arguments(prefix),
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      pass_fds=[lock.fileno()],
      env={**os.environ, **slot.environment},
      start_new_session=True,  # Ctrl-C reaches this process only, which passes it on once
    )
  if slot.cores and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(job.process.pid, slot.cores)  # before the process makes its threads
  job.state, job.error, job.started, job.attempts = RUNNING, "", time.time(), job.attempts + 1


def record_exit(job: Job, code: int, is_stopping: bool, has_launcher: bool) -> bool:
  """Record how the process of a trial ended; return whether that tells how the trial ended.

  Args:
    job: the trial.
    code: exit code of the process.
    is_stopping: the sweep has been interrupted.
    has_launcher: the process is a launcher, which the training may outlive.
  """
  job.seconds += time.time() - job.started
  job.process, job.started = None, 0.0
  job.error = f"killed by signal {-code}" if code < 0 else job.last_log_line() if code else ""
  is_unknown = has_launcher and code == EXIT_UNKNOWN
  if code == 0:
    job.state = FINISHED
  elif is_unknown or (was_killed(code) and (is_stopping or job.attempts <= MAX_RETRIES)):
    job.state = WAITING
  else:
    job.state = FAILED
  may_still_run = job.state == WAITING and (is_unknown or (has_launcher and code < 0))
  job.write_record(None if may_still_run else code)
  return not is_unknown


def record_detached_exit(job: Job) -> None:
  """Record that a trial of an earlier call has ended. Its exit code is unknown, so its workdir decides."""
  job.process, job.started, job.state = None, 0.0, WAITING
  with contextlib.suppress(ConfigError, OSError):  # if the bucket cannot be reached, the trial runs and finds out
    if is_trial_finished(job):
      job.state = FINISHED
      job.write_record(0)


def is_signal_ignored(number: int) -> bool:
  """Whether a signal is ignored, as `nohup` does with SIGHUP."""
  return signal.getsignal(number) is signal.SIG_IGN

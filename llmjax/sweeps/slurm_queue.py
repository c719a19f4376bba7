"""Run the trials of a sweep as an array job of a SLURM cluster, through launch/slurm.py, and follow them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from llmjax.config import ConfigError
from llmjax.sweeps.job import ENDED, FAILED, FINISHED, LOG_FILE, RUNNING, WAITING, Job, is_trial_finished
from llmjax.sweeps.launchers import find_launch_script
from llmjax.telemetry.curves import METRICS_FILE

SCRIPT = "launch/slurm.py"
POLL_SECONDS = 5.0
MAX_FAILED_POLLS = 120  # in a row


def run_queue(
  jobs: Sequence[Job],
  flags: Sequence[str],
  folder: Path,
  max_parallel: int,
  retry: bool,
  show: Callable[[Sequence[Job]], None],
) -> None:
  """Submit the trials that are neither finished nor queued, and follow them. Ctrl-C leaves the queue as it is.

  Args:
    jobs: all trials with their states, which change.
    flags: flags of launch/slurm.py.
    folder: folder of the sweep, which all nodes see.
    max_parallel: maximal number of trials at a time.
    retry: submit failed trials again.
    show: called with the jobs whenever something may have changed.
  """
  queued = queued_trials(folder)
  for job in jobs:
    if job.state == WAITING and job.exit_unknown and job.name not in queued:  # ended while no sweep followed it
      record_queue_exit(job)
      job.state = WAITING if job.state == FAILED and retry else job.state
  new = [job for job in jobs if job.state == WAITING and job.name not in queued]
  if new:
    submit_trials(new, flags, folder, max_parallel)
    for job in new:
      job.write_record(None)
  followed = [job for job in jobs if job.state == WAITING]
  failed_polls = 0
  try:
    while followed:
      try:
        update_states(followed, folder)
        failed_polls = 0
      except (ConfigError, OSError):  # controllers and buckets are unreachable at times
        failed_polls += 1
        if failed_polls > MAX_FAILED_POLLS:
          raise
      followed = [job for job in followed if job.state not in ENDED]
      show(jobs)
      time.sleep(POLL_SECONDS if followed else 0)
  except KeyboardInterrupt:
    cancel = f"{find_launch_script(SCRIPT)} cancel --folder={folder}"
    raise KeyboardInterrupt(
      f"trials continue in the queue. The same command follows them, `{cancel}` ends them."
    ) from None


def update_states(jobs: Sequence[Job], folder: Path) -> None:
  """Set the states of trials that were queued."""
  queued = queued_trials(folder)
  for job in jobs:
    if job.name in queued:
      has_started = (job.folder / LOG_FILE).exists() or (job.folder / METRICS_FILE).exists()
      job.state = RUNNING if has_started else WAITING
    else:
      record_queue_exit(job)


def queued_trials(folder: Path) -> set[str]:
  """Return the names of the trials that are pending or running."""
  words = [sys.executable, str(find_launch_script(SCRIPT)), "queued", f"--folder={folder}"]
  done = subprocess.run(words, capture_output=True, text=True, check=False)
  if done.returncode:
    raise ConfigError(done.stderr.strip().split("\n")[-1] or f"{SCRIPT} queued failed")
  return set(done.stdout.split("\n")) - {""}


def submit_trials(
  jobs: Sequence[Job], flags: Sequence[str], folder: Path, max_parallel: int, dry_run: bool = False
) -> None:
  """Submit trials as one array job; with `dry_run`, print the job script only."""
  lines = [json.dumps({"name": j.name, "workdir": str(j.folder), "arguments": j.arguments}) + "\n" for j in jobs]
  with tempfile.TemporaryDirectory() as temporary:
    commands = Path(temporary) / "commands.jsonl"
    commands.write_text("".join(lines), encoding="utf-8")
    words = [sys.executable, str(find_launch_script(SCRIPT)), "array", f"--commands={commands}", f"--folder={folder}"]
    more = [f"--max_parallel={max_parallel}", *flags, *(["--dry_run"] if dry_run else [])]
    if subprocess.run([*words, *more], check=False).returncode:
      raise ConfigError(f"{SCRIPT} could not submit the trials, see its message above")


def record_queue_exit(job: Job) -> None:
  """Record how a trial ended that is no longer in the queue."""
  job.seconds = sum(map(float, re.findall(r"^-- job .* after (\d+) seconds$", job.read_log(), re.MULTILINE)))
  is_finished = is_trial_finished(job)
  job.error = "" if is_finished else f"left the queue before its end: {job.last_log_line() or 'nothing was logged'}"
  job.state = FINISHED if is_finished else FAILED
  job.write_record(0 if is_finished else 1)

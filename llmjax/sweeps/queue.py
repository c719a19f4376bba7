"""Runs the trials of a sweep as an array of a SLURM cluster, by launch/slurm.py, and follows them."""

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
from llmjax.sweeps.jobs import FAILED, FINISHED, LOG, RUNNING, WAITING, Job, at_its_end, last_words, write_record
from llmjax.sweeps.pool import launch_script
from llmjax.telemetry.curves import CURVES

SCRIPT = "launch/slurm.py"
POLL = 5.0  # seconds between two looks at the queue
PATIENCE = 120  # looks in a row that may go wrong


def run_queue(
  jobs: Sequence[Job],
  flags: Sequence[str],
  folder: Path,
  max_parallel: int,
  retry: bool,
  show: Callable[[Sequence[Job]], None],
) -> None:
  """Submits what is neither finished nor queued, and follows it; a Ctrl-C leaves the queue as it is.

  Args:
    jobs: all trials, looked at; their states change.
    flags: of launch/slurm.py.
    folder: the sweep's, which all nodes see.
    max_parallel: trials at a time.
    retry: submit what has failed again.
    show: called with the jobs whenever something may have changed.
  """
  there = queued(folder)
  for job in jobs:
    if job.state == WAITING and job.open and job.name not in there:  # ended while nobody followed it
      close(job)
      job.state = WAITING if job.state == FAILED and retry else job.state
  new = [job for job in jobs if job.state == WAITING and job.name not in there]
  if new:
    submit(new, flags, folder, max_parallel)
    for job in new:
      write_record(job, None)
  followed = [job for job in jobs if job.state == WAITING]
  failures = 0
  try:
    while followed:
      try:
        there = queued(folder)
        for job in followed:
          if job.name in there:
            begun = (job.folder / LOG).exists() or (job.folder / CURVES).exists()
            job.state = RUNNING if begun else WAITING
          else:
            close(job)
        failures = 0
      except (ConfigError, OSError):  # the controller has its pauses, and a bucket too
        failures += 1
        if failures > PATIENCE:
          raise
      followed = [job for job in followed if job.state in (WAITING, RUNNING)]
      show(jobs)
      time.sleep(POLL if followed else 0)
  except KeyboardInterrupt:
    ending = f"{launch_script(SCRIPT)} cancel --folder={folder}"
    raise KeyboardInterrupt(f"trials go on in the queue; the same command follows them, `{ending}` ends them") from None


def queued(folder: Path) -> set[str]:
  """The names of trials that are pending or running."""
  words = [sys.executable, str(launch_script(SCRIPT)), "queued", f"--folder={folder}"]
  done = subprocess.run(words, capture_output=True, text=True, check=False)
  if done.returncode:
    raise ConfigError(done.stderr.strip().split("\n")[-1] or f"{SCRIPT} queued failed")
  return set(done.stdout.split("\n")) - {""}


def submit(jobs: Sequence[Job], flags: Sequence[str], folder: Path, max_parallel: int, dry_run: bool = False) -> None:
  """Submits trials as one array; `dry_run` prints how."""
  lines = [json.dumps({"name": j.name, "workdir": str(j.folder), "arguments": j.arguments}) + "\n" for j in jobs]
  with tempfile.TemporaryDirectory() as there:
    commands = Path(there) / "commands.jsonl"
    commands.write_text("".join(lines), encoding="utf-8")
    words = [sys.executable, str(launch_script(SCRIPT)), "array", f"--commands={commands}", f"--folder={folder}"]
    more = [f"--max_parallel={max_parallel}", *flags, *(["--dry_run"] if dry_run else [])]
    if subprocess.run([*words, *more], check=False).returncode:
      raise ConfigError(f"{SCRIPT} could not submit the trials, see above")


def close(job: Job) -> None:
  """What has become of a trial that is no longer in the queue."""
  log = job.folder / LOG
  text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
  job.seconds = sum(map(float, re.findall(r"^-- job .* after (\d+) seconds$", text, re.MULTILINE)))
  done = at_its_end(job)
  job.error = "" if done else f"left the queue before its end: {last_words(log) or 'nothing was logged'}"
  job.state = FINISHED if done else FAILED
  write_record(job, 0 if done else 1)

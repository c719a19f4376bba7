"""A trial of a sweep on its way: what is run for it, and what its folder says has become of it.

TRIAL is the record of its last attempt, from its start on; while one runs on this machine it holds a lock on LOCK,
which outlives the process that started it. LOG is what it has said.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmjax.config import ConfigError
from llmjax.sweeps.trials import Trial

TRIAL, LOCK, LOG = "trial.json", "trial.lock", "log.txt"
WAITING, RUNNING, FINISHED, FAILED = "waiting", "running", "finished", "failed"
KILLED = (130, 137, 143)  # exit codes of what was interrupted, beside those below 0


@dataclasses.dataclass
class Job:
  """One trial on its way."""

  name: str
  trial: Trial
  arguments: list[str]  # of `llmjax`, such as ["train", "--config=...", "--workdir=..."]
  folder: Path  # what this sweep keeps of it
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # from `admission.admit`
  state: str = WAITING
  error: str = ""
  seconds: float = 0.0  # of all attempts
  attempts: int = 0
  process: Any = None  # with `poll`; None where it does not run
  started: float = 0.0  # when the attempt that runs began, 0 where that is not known
  open: bool = False  # it has begun, and nobody has heard how that ended

  @property
  def workdir(self) -> str:
    """Where the trial writes: its folder, or one in a bucket."""
    return self.arguments[-1].removeprefix("--workdir=")

  @property
  def command(self) -> str:
    """As it can be typed."""
    return shlex.join(["llmjax", *self.arguments])

  @property
  def slot(self) -> int:
    """The slot that its last attempt took, see `pool.Slot`."""
    lock = self.folder / LOCK
    text = lock.read_text() if lock.exists() else ""
    return int(text) if text.isdigit() else 0


@dataclasses.dataclass(frozen=True)
class Elsewhere:
  """A trial that an earlier call has started, and that goes on without it."""

  lock: Path

  def poll(self) -> int | None:
    with file_lock(self.lock) as free:
      return -1 if free else None


def look(job: Job, retry: bool) -> None:
  """What an earlier call has left of a trial.

  Raises ConfigError where its folder holds the trial with another config.
  """
  record = read_record(job)
  lock = job.folder / LOCK
  if lock.exists() and Elsewhere(lock).poll() is None:
    job.state, job.process, job.started = RUNNING, Elsewhere(lock), time.time()
  if not record:
    return
  job.seconds = record["seconds"]
  if record["config"] != job.facts["config"] or record["steps"] > job.facts["steps"]:
    raise ConfigError(
      f"{job.folder} holds trial {job.name} with another config, or with more steps; change that back, or use another "
      "--workdir"
    )
  job.open = record["code"] is None
  if job.state == RUNNING or job.open or record["steps"] < job.facts["steps"]:
    return
  if record["code"] == 0:
    job.state = FINISHED
  elif not killed(record["code"]) and not retry:
    job.state, job.error = FAILED, record["error"]


def killed(code: int) -> bool:
  """Whether an exit code is that of a run that was told to end, not of one that failed."""
  return code < 0 or code in KILLED


def at_its_end(job: Job) -> bool:
  """Whether what lies in its workdir is a finished run.

  Raises ConfigError or OSError where that is a bucket that cannot be reached.
  """
  from llmjax.storage.buckets import as_path, translate_storage_errors
  from llmjax.training.resume import is_finished

  with translate_storage_errors(job.workdir):
    return is_finished(as_path(job.workdir), job.facts["steps"])


def read_record(job: Job) -> dict[str, Any]:
  """What is known of the last attempt; {} where there was none, or the record was lost."""
  path = job.folder / TRIAL
  try:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  except ValueError:  # a power cut
    return {}


def write_record(job: Job, code: int | None) -> None:
  """Notes how an attempt ended, None that it has begun; a crash in the middle leaves the old record whole."""
  job.folder.mkdir(parents=True, exist_ok=True)
  job.open = code is None
  facts = {key: job.facts[key] for key in ("config", "steps")}
  record = {"trial": job.trial, **facts, "code": code, "error": job.error, "seconds": job.seconds}
  new = job.folder / (TRIAL + ".new")
  new.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
  os.replace(new, job.folder / TRIAL)


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[bool]:
  """Takes a lock for a while; gives whether it was free."""
  with open(path, "a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      yield False
    else:
      yield True


def program(job: Job, prefix: Sequence[str]) -> list[str]:
  """What is run for a trial."""
  return [*prefix, "--", *job.arguments] if prefix else [sys.executable, "-m", "llmjax", *job.arguments]


def last_words(log: Path) -> str:
  """The last line that is neither empty nor the launcher's own; "" where there is none."""
  if not log.exists():
    return ""
  lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
  return next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith("-- job ")), "")

"""The state of a trial of a sweep, in memory and in files of its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from llmjax.config import ConfigError, Json
from llmjax.sweeps.trials import Trial

RECORD_FILE = "trial.json"  # config, exit code and duration of the last attempt, written when it starts and ends
LOCK_FILE = "trial.lock"  # locked while an attempt runs on this machine, also if the sweep has ended; holds its slot
LOG_FILE = "log.txt"  # output of all attempts
WAITING, RUNNING, FINISHED, FAILED = "waiting", "running", "finished", "failed"
ENDED = (FINISHED, FAILED)
KILLED_CODES = (130, 137, 143)  # exit codes of interrupted processes, as well as negative ones


class TrialFacts(TypedDict, total=False):
  """Properties of a trial, from `trial_checks.check_trials`."""

  parameters: int
  steps: int
  tokens: int  # of a step
  flops: float  # of a step
  evals: list[str]  # names of the entries of config.evals
  config: str  # digest of the config without keys that a resumed trial may change
  program: str  # digest of what determines the compiled train step
  error: str  # reason why the trial cannot run; then the other keys are missing


@dataclasses.dataclass
class Job:
  """A trial and its state."""

  name: str
  trial: Trial
  arguments: list[str]  # of `llmjax`: ["train", "--config=...", ..., "--workdir=..."]
  folder: Path  # local folder with the files of this module
  facts: TrialFacts = dataclasses.field(default_factory=TrialFacts)
  state: str = WAITING
  error: str = ""
  seconds: float = 0.0  # duration of all attempts
  attempts: int = 0
  process: subprocess.Popen[bytes] | DetachedProcess | None = None  # of the running attempt
  started: float = 0.0  # time at which the running attempt began, 0 if unknown
  exit_unknown: bool = False  # an attempt has begun, and its end was not recorded

  @property
  def workdir(self) -> str:
    """The workdir of the trial: its folder, or one in a bucket."""
    return self.arguments[-1].removeprefix("--workdir=")

  @property
  def command(self) -> str:
    """The shell command that trains the trial."""
    return shlex.join(["llmjax", *self.arguments])

  @property
  def slot(self) -> int:
    """Number of the slot of the last attempt, see `launchers.Slot`."""
    lock = self.folder / LOCK_FILE
    text = lock.read_text() if lock.exists() else ""
    return int(text) if text.isdigit() else 0

  def load_state(self, retry: bool) -> None:
    """Set the state that an earlier call of the sweep left in the folder.

    Args:
      retry: run trials that have failed again.
    Raises:
      ConfigError: the folder holds the trial with another config.
    """
    detached = DetachedProcess(self.folder / LOCK_FILE)
    if detached.lock.exists() and detached.poll() is None:
      self.state, self.process, self.started = RUNNING, detached, time.time()
    record = self.read_record()
    if not record:
      return
    self.seconds = record["seconds"]
    if record["config"] != self.facts["config"] or record["steps"] > self.facts["steps"]:
      raise ConfigError(
        f"{self.folder}: holds trial {self.name} with another config, or with more steps. Change that back, or use "
        "another --workdir."
      )
    code = record["code"]
    self.exit_unknown = code is None
    if self.state == RUNNING or code is None or record["steps"] < self.facts["steps"]:
      return
    if code == 0:
      self.state = FINISHED
    elif not was_killed(code) and not retry:
      self.state, self.error = FAILED, record["error"]

  def read_record(self) -> dict[str, Json]:
    """Return the record of the last attempt; {} if there was none, or if a power cut has damaged it."""
    path = self.folder / RECORD_FILE
    try:
      return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
      return {}

  def write_record(self, code: int | None) -> None:
    """Record the exit code of an attempt, None at its start. A crash in between leaves the old record intact."""
    self.folder.mkdir(parents=True, exist_ok=True)
    self.exit_unknown = code is None
    facts = {"config": self.facts["config"], "steps": self.facts["steps"]}
    record = {"trial": self.trial, **facts, "code": code, "error": self.error, "seconds": self.seconds}
    new = self.folder / (RECORD_FILE + ".new")
    new.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(new, self.folder / RECORD_FILE)

  def process_arguments(self, prefix: Sequence[str]) -> list[str]:
    """Return the arguments of the process that runs the trial, after the prefix of a launcher if there is one."""
    return [*prefix, "--", *self.arguments] if prefix else [sys.executable, "-m", "llmjax", *self.arguments]

  def last_log_line(self) -> str:
    """Return the last line of the log, without empty lines and lines of the launcher; "" if there is none."""
    lines = self.read_log().split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith("-- job ")), "")

  def read_log(self) -> str:
    log = self.folder / LOG_FILE
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


@dataclasses.dataclass(frozen=True)
class DetachedProcess:
  """The process of a trial that an earlier call of the sweep started, and that outlived it."""

  lock: Path

  def poll(self) -> int | None:
    """Return None while the process runs, then -1, as its exit code is unknown."""
    with file_lock(self.lock) as is_free:
      return -1 if is_free else None


def was_killed(code: int) -> bool:
  """Whether an exit code means that a process was told to end, rather than that it failed."""
  return code < 0 or code in KILLED_CODES


def is_trial_finished(job: Job) -> bool:
  """Whether the workdir of a trial holds a finished run.

  Raises:
    ConfigError, OSError: the workdir is in a bucket that cannot be reached.
  """
  from llmjax.storage.buckets import as_path, translate_storage_errors
  from llmjax.training.resume import is_finished

  with translate_storage_errors(job.workdir):
    return is_finished(as_path(job.workdir), job.facts["steps"])


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[bool]:
  """Try to lock a file inside the context; yield whether it was free."""
  with open(path, "a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      yield False
    else:
      yield True

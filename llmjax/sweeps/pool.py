"""Runs the trials of a sweep side by side, each in a process of its own, on this machine or by a launcher.

A trial takes one of the slots: a share of this machine, or machines elsewhere that its trials use one after the other,
and that are ended when there are no more. Whatever a launcher cannot say of a run is no verdict on it: the trial keeps
its slot, where it may still be at work, and the same command asks again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmjax.config import ConfigError, config_roots
from llmjax.sweeps.jobs import (
  FAILED,
  FINISHED,
  LOCK,
  LOG,
  RUNNING,
  WAITING,
  Job,
  at_its_end,
  killed,
  last_words,
  program,
  write_record,
)

RETRIES = 2  # of a trial that was killed
POLL = 0.2  # seconds between two looks
EXIT_UNKNOWN = 75  # a launcher's exit code: how the run ends is not known
# What stands before `train` on the machine that a trial runs on; the trials of one slot follow each other.
LAUNCHERS: dict[str, list[str]] = {
  "local": [],
  "tpu_vm": ["launch/tpu_vm.py", "run", "--name={sweep}-{slot}", "--keep"],
  "gke": ["launch/gke.py", "run", "--name={sweep}-{trial}"],
}
AWAY = ("tpu_vm", "gke")  # on machines that do not have this one's disk
# What ends the machines of a slot when its trials are over, one after the other: a run that is still there saves first.
ENDING = {"tpu_vm": [["launch/tpu_vm.py", word, "--name={sweep}-{slot}"] for word in ("stop", "delete")]}
SHARED = r"--(zone|project|slices|internal_ips)\b"  # those of a launcher's flags that ENDING wants too
LEFT = {  # what is true after a Ctrl-C
  "local": "what ran has saved",
  "tpu_vm": "what ran has saved, and its machines are gone",
  "gke": "what ran goes on in the cluster",
}


class Slot(NamedTuple):
  """What one of the trials that run side by side has of this machine."""

  number: int
  cores: set[int] | None = None  # None: all
  environment: Mapping[str, str] = {}


def slots(count: int, launcher: str) -> list[Slot]:
  """Shares this machine's GPUs, or else its cores, among `count` trials.

  Raises ConfigError: it has accelerators, and fewer than trials.
  """
  if launcher != "local" or count == 1:
    return [Slot(number) for number in range(count)]
  asked = os.environ.get("CUDA_VISIBLE_DEVICES")
  cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or asked == ""
  gpus = [] if cpu else sorted(path.name for path in Path("/proc/driver/nvidia/gpus").glob("*"))
  devices = [str(i) for i in range(len(gpus))] if asked is None else [d for d in asked.split(",") if d]
  tpus = not cpu and any(list(Path("/dev").glob(name)) for name in ("accel[0-9]*", "vfio/[0-9]*"))
  if (gpus and len(devices) < count) or (tpus and not gpus):
    most = len(devices) if gpus else 1
    raise ConfigError(f"--max_parallel={count}: this machine's accelerators serve {most} trials at a time")
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

  def share(of: list[Any], number: int) -> list[Any]:
    each = len(of) // count
    return of[number * each : (number + 1) * each]

  if gpus:
    return [Slot(i, environment={"CUDA_VISIBLE_DEVICES": ",".join(share(devices, i))}) for i in range(count)]
  return [Slot(i, set(share(cores, i)) or None) for i in range(count)]


def run_pool(
  jobs: Sequence[Job],
  launcher: str,
  flags: Sequence[str],
  sweep: str,
  places: Sequence[Slot],
  show: Callable[[Sequence[Job]], None],
) -> None:
  """Runs what is not finished.

  Args:
    jobs: all trials, looked at; their states change.
    launcher: one of LAUNCHERS.
    flags: of the launcher.
    sweep: what the names of what a launcher makes begin with, see `name`.
    places: one for each trial that may run at a time.
    show: called with the jobs whenever something may have changed.
  Raises:
    KeyboardInterrupt: it was asked to stop.
    ConfigError: no slot is left, since the launcher could not do its work; the trials are as they were.
  """
  taken: dict[int, Job] = {}
  closed: dict[int, str] = {}  # {slot: why nothing is started there any more}
  foreign = [job for job in jobs if job.process is not None]
  used = {job.slot for job in jobs if job.open or job in foreign}
  asked: list[int] = []

  def tell(job: Job) -> None:
    job.process.send_signal(signal.SIGKILL if asked.count(signal.SIGINT) > 1 else signal.SIGTERM)

  def stop(number: int, _: Any) -> None:
    asked.append(number)
    for job in list(taken.values()):
      tell(job)

  heard = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if listened(number)]
  previous = {number: signal.signal(number, stop) for number in heard}
  try:
    while True:
      for job in [job for job in foreign if job.process.poll() is not None]:
        foreign.remove(job)
        settle_foreign(job)
      for number, job in [(number, job) for number, job in taken.items() if job.process.poll() is not None]:
        del taken[number]
        if not record_exit(job, bool(asked), launcher != "local"):
          closed[number] = job.error
      busy = {*taken, *closed, *(job.slot for job in foreign)}
      for place, job in pair(jobs, places, busy, launcher in ENDING):
        if asked or len(taken) + len(foreign) >= len(places):
          break
        start(job, prefix(launcher, flags, parts_of_names(sweep, place.number, job)), place)
        taken[place.number] = job
        used.add(place.number)
        if asked:  # while it was started
          tell(job)
      with contextlib.suppress(OSError, ConfigError):  # a look at what goes on must not end it
        show(jobs)
      if not taken and (asked or not foreign):
        break
      time.sleep(POLL)
  finally:
    kept = [flag for flag in flags if re.match(SHARED, flag)]
    for slot in sorted(used - {job.slot for job in foreign}):
      for words in ENDING.get(launcher, ()):  # whatever signals come now, machines are not left behind
        subprocess.run(_launch(words, kept, parts_of_names(sweep, slot)), check=False, start_new_session=True)
    for number, handler in previous.items():
      signal.signal(number, handler)
  if asked:
    others = f" ({len(foreign)} of an earlier call go on)" if foreign else ""
    raise KeyboardInterrupt(f"interrupted; {LEFT[launcher]}{others}: the same command goes on")
  if closed and any(job.state == WAITING for job in jobs):
    raise ConfigError(f"{closed[min(closed)]}; nothing is lost: the same command goes on")


def pair(jobs: Sequence[Job], places: Sequence[Slot], busy: Collection[int], sticky: bool) -> list[tuple[Slot, Job]]:
  """Which waiting trials are next, and where.

  Args:
    busy: numbers of slots that nothing can start in.
    sticky: what has begun goes on in its own slot alone, where it may still be at work, even one beyond `places`.
  """
  waiting = [job for job in jobs if job.state == WAITING]
  bound = {job.slot: job for job in waiting if sticky and job.open}
  known = {place.number: place for place in places}
  out = [(known.get(number, Slot(number)), job) for number, job in sorted(bound.items()) if number not in busy]
  free = [place for place in places if place.number not in {*busy, *bound}]
  return out + list(zip(free, (job for job in waiting if job not in bound.values())))


def start(job: Job, before: Sequence[str], slot: Slot) -> None:
  """Begins or continues a trial. The lock is the child's as well, so that it holds for as long as that lives."""
  job.folder.mkdir(parents=True, exist_ok=True)
  with open(job.folder / LOCK, "a") as lock, open(job.folder / LOG, "ab") as log:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.truncate(0)
    lock.write(str(slot.number))
    lock.flush()
    write_record(job, None)
    job.process = subprocess.Popen(
      program(job, before),
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      pass_fds=[lock.fileno()],
      env={**os.environ, **slot.environment},
      start_new_session=True,  # a Ctrl-C is for this process, which passes it on once
    )
  if slot.cores and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(job.process.pid, slot.cores)  # before it makes its threads
  job.state, job.error, job.started, job.attempts = RUNNING, "", time.time(), job.attempts + 1


def record_exit(job: Job, stopping: bool, away: bool) -> bool:
  """Notes that a trial's process has ended, and how; returns whether that says how the trial ended.

  Args:
    away: the process is a launcher's, and what it has started may outlive it.
  """
  code = job.process.poll()
  job.seconds += time.time() - job.started
  job.process, job.started = None, 0.0
  job.error = f"killed by signal {-code}" if code < 0 else last_words(job.folder / LOG) if code else ""
  unsettled = away and code == EXIT_UNKNOWN
  if code == 0:
    job.state = FINISHED
  elif unsettled or (killed(code) and (stopping or job.attempts <= RETRIES)):
    job.state = WAITING
  else:
    job.state = FAILED
  may_go_on = job.state == WAITING and (unsettled or (away and code < 0))
  write_record(job, None if may_go_on else code)
  return not unsettled


def settle_foreign(job: Job) -> None:
  """Notes that a trial of an earlier call has ended; nobody has heard its exit code."""
  job.process, job.started, job.state = None, 0.0, WAITING
  with contextlib.suppress(ConfigError, OSError):  # else the same command says at once whether it is finished
    if at_its_end(job):
      job.state = FINISHED
      write_record(job, 0)


def listened(number: int) -> bool:
  """Whether a signal is not ignored, as `nohup` has it."""
  return signal.getsignal(number) is not signal.SIG_IGN


def name(workdir: Path, trials_in: str | None) -> str:
  """What the names of a sweep's machines begin with: short and plain, as a cloud wants them, and of no other sweep."""
  own = hashlib.sha256(f"{workdir} {trials_in}".encode()).hexdigest()[:6]
  plain = re.sub(r"[^a-z0-9]+", "-", workdir.name.lower()).strip("-")[:20].strip("-")
  return "-".join(filter(None, ["s", plain, own]))


def parts_of_names(sweep: str, slot: int, job: Job | None = None) -> dict[str, str]:
  """What the names of machines are made of."""
  trial = "" if job is None else hashlib.sha256(job.command.encode()).hexdigest()[:8]
  return {"sweep": sweep, "slot": str(slot), "trial": trial}


def prefix(launcher: str, flags: Sequence[str], parts: Mapping[str, str]) -> list[str]:
  """What stands before the arguments of `llmjax` where trials run."""
  return _launch(LAUNCHERS[launcher], flags, parts) if LAUNCHERS[launcher] else []


def _launch(words: Sequence[str], flags: Sequence[str], parts: Mapping[str, str]) -> list[str]:
  script, *more = words
  return [sys.executable, str(launch_script(script)), *(word.format(**parts) for word in more), *flags]


def launch_script(script: str) -> Path:
  path = next((root / script for root in config_roots() if (root / script).is_file()), None)
  if path is None:
    raise ConfigError(f"{script} is not here; run the sweep in a clone of llmjax, or use --launcher=local")
  return path


def rehearse(job: Job, before: Sequence[str]) -> None:
  """Raises ConfigError where a launcher refuses a trial: a flag of its own, changes that are not committed."""
  done = subprocess.run(program(job, [*before, "--dry_run"]), capture_output=True, text=True, check=False)
  if done.returncode:
    said = (done.stderr.strip().split("\n") or [""])[-1]
    raise ConfigError(f"nothing has been started: {said or f'{before[1]} ended with exit code {done.returncode}'}")

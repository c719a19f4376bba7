"""Runs the trials of a sweep file: looks at all of them first, then runs them side by side, each as a `llmjax train` of
its own in a folder of its own, and goes on where an earlier call was cut off.

What has become of a trial lies in its folder: TRIAL says how its last attempt ended, and while one runs it holds a
lock on LOCK, which outlives this process. This process never starts JAX: devices belong to the trials.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from llmjax import trials as algebra
from llmjax.config import ConfigError, find, nearest, open_roots, roots, run_file, split_reference
from llmjax.metrics import CURVES, human_time
from llmjax.trials import Sweep, Trial

TRIAL, LOCK, LOG = "trial.json", "trial.lock", "log.txt"
RETRIES = 2  # of a trial that was killed
POLL = 0.2  # seconds
WAITING, RUNNING, FINISHED, FAILED = "waiting", "running", "finished", "failed"
# What stands before `train` on the machine that a trial runs on; the trials of one slot follow each other.
LAUNCHERS: dict[str, list[str]] = {
  "local": [],
  "tpu_vm": ["launch/tpu_vm.py", "run", "--name={sweep}-{slot}", "--keep"],
  "gke": ["launch/gke.py", "run", "--name={sweep}-{number}"],
  "slurm": ["launch/slurm.py"],
}
AWAY = ("tpu_vm", "gke")  # on machines that do not have this one's disk
# What ends the machines of a slot when its trials are over, and which of the launcher's flags that wants.
ENDING = {
  "tpu_vm": (["launch/tpu_vm.py", "delete", "--name={sweep}-{slot}"], r"--(zone|project|slices|internal_ips)\b")
}


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
  started: float = 0.0

  @property
  def workdir(self) -> str:
    """Where the trial writes: its folder, or one in a bucket."""
    return self.arguments[-1].removeprefix("--workdir=")

  @property
  def command(self) -> str:
    """As it can be typed."""
    return shlex.join(["llmjax", *self.arguments])


@dataclasses.dataclass(frozen=True)
class Elsewhere:
  """A trial that an earlier call has started, and that goes on without it."""

  lock: Path

  def poll(self) -> int | None:
    with held(self.lock) as free:
      return -1 if free else None

  def send_signal(self, number: int) -> None:
    """It is not ours to end."""


def load(arguments: list[str], workdir: Path, trials_in: str | None = None) -> tuple[Sweep, list[Job]]:
  """A sweep and its trials, from `--config=FILE[:argument] [--config.KEY=VALUE ...]`.

  Args:
    arguments: those of the command line; what they change holds for all trials that do not change it themselves.
    workdir: where the sweep lives.
    trials_in: where the workdirs of its trials lie, if elsewhere, such as in a bucket.
  """
  reference, rest = split_reference(arguments)
  path, _ = find(reference)
  open_roots()
  sweep = run_file(path, "get_sweep")
  if not isinstance(sweep, Sweep):
    raise ConfigError(f"{path}: get_sweep must return an llmjax.trials.Sweep, not {type(sweep).__name__}")
  jobs = []
  for name, trial in zip(algebra.names(sweep.trials), sweep.trials):
    first, *changes = algebra.flags(reference, trial)
    place = f"{trials_in.rstrip('/')}/{name}" if trials_in else str(workdir / name)
    jobs.append(Job(name, trial, ["train", first, *rest, *changes, f"--workdir={place}"], workdir / name))
  return sweep, jobs


def admit(jobs: Sequence[Job], compiling: bool) -> None:
  """Fills in what each trial is.

  Raises ConfigError where any cannot run, with the reasons; then none has been started.
  """
  asked = {job.name: [flag for flag in job.arguments[1:] if not flag.startswith("--workdir=")] for job in jobs}
  with tempfile.TemporaryDirectory() as folder:
    question, answer = Path(folder) / "question.json", Path(folder) / "answer.json"
    question.write_text(json.dumps({"trials": asked, "compiling": compiling}), encoding="utf-8")
    code = subprocess.run(
      [sys.executable, "-m", "llmjax", "sweep", f"--admit={question}", f"--workdir={answer}"], check=False
    ).returncode
    if code:
      raise ConfigError(f"looking at the trials ended with exit code {code}; nothing has been started")
    found = json.loads(answer.read_text(encoding="utf-8"))
  errors: dict[str, list[str]] = {}
  for job in jobs:
    job.facts = found[job.name]
    if "error" in job.facts:
      errors.setdefault(job.facts["error"], []).append(job.name)
  if errors:
    several = {error: f"{of[0]}" + (f" and {len(of) - 1} more" if of[1:] else "") for error, of in errors.items()}
    raise ConfigError("nothing has been started: " + "; ".join(f"trial {of}: {error}" for error, of in several.items()))


def answer(question: str, output: str) -> None:
  """The process that `admit` starts."""
  from llmjax import admission

  asked = json.loads(Path(question).read_text(encoding="utf-8"))
  Path(output).write_text(json.dumps(admission.admit(asked["trials"], asked["compiling"])), encoding="utf-8")


def look(job: Job) -> None:
  """What an earlier call has left of a trial."""
  record = read_record(job)
  job.seconds, job.attempts = record.get("seconds", 0.0), 0
  same = record.get("arguments") == job.arguments
  if same and record.get("code") == 0:
    job.state = FINISHED
  elif same and record.get("code", -1) > 0 and record["code"] != 130:
    job.state, job.error = FAILED, record["error"]
  elif (job.folder / LOCK).exists() and Elsewhere(job.folder / LOCK).poll() is None:
    job.state, job.process, job.started = RUNNING, Elsewhere(job.folder / LOCK), time.time()


def read_record(job: Job) -> dict[str, Any]:
  path = job.folder / TRIAL
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_record(job: Job, code: int) -> None:
  """How an attempt ended; a crash in the middle leaves the old record whole."""
  record = {"trial": job.trial, "arguments": job.arguments, "code": code, "error": job.error, "seconds": job.seconds}
  new = job.folder / (TRIAL + ".new")
  new.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
  os.replace(new, job.folder / TRIAL)


class held:
  """Takes a lock for a while; gives whether it was free."""

  def __init__(self, path: Path):
    self.file: TextIO = open(path, "a")

  def __enter__(self) -> bool:
    try:
      fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      return False
    return True

  def __exit__(self, *_: Any) -> None:
    self.file.close()


def program(job: Job, prefix: Sequence[str]) -> list[str]:
  """What is run for a trial."""
  return [*prefix, "--", *job.arguments] if prefix else [sys.executable, "-m", "llmjax", *job.arguments]


def start(job: Job, prefix: Sequence[str], cores: set[int] | None) -> None:
  """Begins or continues a trial. The lock is the child's as well, so that it holds for as long as that lives."""
  job.folder.mkdir(parents=True, exist_ok=True)
  lock = open(job.folder / LOCK, "a")
  fcntl.flock(lock, fcntl.LOCK_EX)
  with open(job.folder / LOG, "ab") as log:
    job.process = subprocess.Popen(
      program(job, prefix),
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      pass_fds=[lock.fileno()],
      start_new_session=True,  # a Ctrl-C is for this process, which passes it on once
    )
  if cores and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(job.process.pid, cores)  # before it makes its threads
  lock.close()
  job.state, job.started, job.attempts = RUNNING, time.time(), job.attempts + 1


def settle(job: Job, stopping: bool) -> None:
  """Notes that a trial has ended, and how."""
  code = job.process.poll()
  foreign = isinstance(job.process, Elsewhere)
  job.process = None
  if foreign:  # nobody has heard its exit code: the same command says at once whether it is finished
    job.state = WAITING
    return
  job.seconds += time.time() - job.started
  job.error = "" if code == 0 else last_words(job.folder / LOG) or f"exit code {code}"
  killed = code < 0 or code == 130
  if code == 0:
    job.state = FINISHED
  elif killed and (stopping or job.attempts <= RETRIES):
    job.state = WAITING
  else:
    job.state = FAILED
  write_record(job, code)


def last_words(log: Path) -> str:
  """The last line that is no empty one."""
  lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
  return next((line.strip() for line in reversed(lines) if line.strip()), "")


def slots(count: int, launcher: str) -> Iterator[set[int] | None]:
  """The cores of each of `count` trials that run side by side on this machine; None leaves them all."""
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  share = len(cores) // count
  for slot in range(count):
    yield set(cores[slot * share : (slot + 1) * share]) if launcher == "local" and count > 1 and share else None


def run(jobs: Sequence[Job], launcher: str, flags: Sequence[str], sweep: str, max_parallel: int, show: Any) -> None:
  """Runs what is not finished.

  Args:
    jobs: all trials, looked at; their states change.
    launcher: one of LAUNCHERS.
    flags: of the launcher.
    sweep: the sweep's name, for what a launcher makes.
    max_parallel: how many trials run at a time.
    show: called with the jobs whenever something may have changed.
  Raises:
    KeyboardInterrupt: it was asked to stop; the trials that ran have saved.
  """
  cores = list(slots(max_parallel, launcher))
  taken: dict[int, Job] = {}
  used: set[int] = set()
  foreign = [job for job in jobs if job.process is not None]
  asked: list[int] = []

  def stop(number: int, _: Any) -> None:
    asked.append(number)
    for job in taken.values():
      job.process.send_signal(signal.SIGTERM if len(asked) == 1 else signal.SIGKILL)

  previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
  try:
    while True:
      for job in [job for job in (*taken.values(), *foreign) if job.process.poll() is not None]:
        settle(job, bool(asked))
        foreign = [other for other in foreign if other is not job]
        taken = {slot: other for slot, other in taken.items() if other is not job}
      free = [slot for slot in range(max_parallel - len(foreign)) if slot not in taken]
      waiting = [job for job in jobs if job.state == WAITING] if not asked else []
      for slot, job in zip(free, waiting):
        start(job, prefix(launcher, flags, parts_of_names(sweep, slot, jobs.index(job))), cores[slot])
        taken[slot] = job
        used.add(slot)
      show(jobs)
      if not taken and (asked or (not foreign and not waiting)):
        break
      time.sleep(POLL)
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
    for slot in sorted(used) if launcher in ENDING else ():
      words, wanted = ENDING[launcher]
      kept = [flag for flag in flags if re.match(wanted, flag)]
      subprocess.run(_command(words, kept, parts_of_names(sweep, slot)), check=False)
  if asked:
    raise KeyboardInterrupt("interrupted; what ran has saved: the same command goes on")


def parts_of_names(sweep: str, slot: int, number: int = 0) -> dict[str, str]:
  """What the names of machines are made of; a cloud wants them short and plain."""
  name = re.sub(r"[^a-z0-9]+", "-", sweep.lower()).strip("-")[:40]
  return {"sweep": name or "sweep", "slot": str(slot), "number": str(number)}


def prefix(launcher: str, flags: Sequence[str], parts: Mapping[str, str]) -> list[str]:
  """What stands before the arguments of `llmjax` where trials run."""
  return _command(LAUNCHERS[launcher], flags, parts) if LAUNCHERS[launcher] else []


def _command(words: Sequence[str], flags: Sequence[str], parts: Mapping[str, str]) -> list[str]:
  script, *more = words
  return [sys.executable, str(launch_script(script)), *(word.format(**parts) for word in more), *flags]


def launch_script(script: str) -> Path:
  path = next((root / script for root in roots() if (root / script).is_file()), None)
  if path is None:
    raise ConfigError(f"{script} is not here; run the sweep in a clone of llmjax, or use --launcher=local")
  return path


def run_slurm(jobs: Sequence[Job], flags: Sequence[str], folder: Path, max_parallel: int, show: Any) -> None:
  """Submits what is neither finished nor queued as an array, and follows it; a Ctrl-C leaves the queue as it is."""
  script = [sys.executable, str(launch_script("launch/slurm.py"))]

  def queued() -> set[str]:
    done = subprocess.run([*script, "queued", f"--folder={folder}"], capture_output=True, text=True, check=False)
    if done.returncode:
      raise ConfigError(last_line(done.stderr) or "launch/slurm.py queued failed")
    return set(done.stdout.split("\n")) - {""}

  there = queued()
  new = [job for job in jobs if job.state == WAITING and job.name not in there]
  if new:
    commands = folder / "commands.jsonl"
    lines = [json.dumps({"name": j.name, "workdir": str(j.folder), "arguments": j.arguments}) for j in new]
    commands.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    asked = [*script, "array", f"--commands={commands}", f"--folder={folder}", f"--max_parallel={max_parallel}", *flags]
    if subprocess.run(asked, check=False).returncode:
      raise ConfigError("launch/slurm.py could not submit the trials, see above")
  mine = [job for job in jobs if job.state == WAITING]
  try:
    while mine:
      there = queued()
      for job in mine:
        if job.name in there:
          job.state = RUNNING if (job.folder / LOG).exists() or (job.folder / CURVES).exists() else WAITING
        else:
          close_queued(job)
      mine = [job for job in mine if job.name in there]
      show(jobs)
      time.sleep(POLL if not mine else 5)
  except KeyboardInterrupt:
    raise KeyboardInterrupt(
      f"the trials go on in the queue; the same command follows them, and {script[1]} cancel ends them"
    ) from None


def close_queued(job: Job) -> None:
  """What has become of a trial that is no longer in the queue."""
  from llmjax.data.buckets import place
  from llmjax.resume import over

  code = 0 if over(place(job.workdir)) else 1
  job.state = FAILED if code else FINISHED
  said = last_words(job.folder / LOG) if code and (job.folder / LOG).exists() else ""
  job.error = f"left the queue before its end: {said or 'nothing was logged'}" if code else ""
  write_record(job, code)


def last_line(text: str) -> str:
  return next((line for line in reversed(text.strip().split("\n")) if line), "")


def sweep(
  arguments: list[str],
  workdir: str | Path,
  *,
  launcher: str = "local",
  launcher_flags: str = "",
  max_parallel: int = 1,
  trials_in: str | None = None,
  retry: bool = False,
  dry_run: bool = False,
  say: Callable[[str], None] = print,
) -> bool:
  """Runs or continues a sweep, and writes what came of it; returns whether all its trials are finished."""
  from llmjax.sweep_report import Table, write_results

  if launcher not in LAUNCHERS:
    raise ConfigError(f"--launcher={launcher}: {nearest(launcher, LAUNCHERS)}")
  if max_parallel < 1:
    raise ConfigError(f"--max_parallel={max_parallel} must be at least 1")
  if launcher in AWAY and trials_in is None:
    raise ConfigError(f"--launcher={launcher} runs trials where {workdir} is not; give --trials_in=gs://BUCKET/FOLDER")
  workdir = Path(workdir).absolute()
  plan, jobs = load(arguments, workdir, trials_in)
  if dry_run:
    admit(jobs, compiling=launcher == "local")
    programs = len({job.facts["program"] for job in jobs})
    for number, job in enumerate(jobs):
      say(
        shlex.join(program(job, prefix(launcher, shlex.split(launcher_flags), parts_of_names(workdir.name, 0, number))))
      )
    say(f"{len(jobs)} trials, {programs} programs, {sum(j.facts['flops'] * j.facts['steps'] for j in jobs):.3g} FLOPs")
    return True
  workdir.mkdir(parents=True, exist_ok=True)
  with held(workdir / "sweep.lock") as free:
    if not free:
      raise ConfigError(f"{workdir}: another `llmjax sweep` is at work there; wait for it, or use another --workdir")
    for job in jobs:
      look(job)
      if retry and job.state == FAILED:
        job.state, job.error = WAITING, ""
    start_time = time.time()
    admit(jobs, compiling=launcher == "local")
    programs = len({job.facts["program"] for job in jobs})
    left = sum(job.state == WAITING for job in jobs)
    say(
      f"{len(jobs)} trials of {programs} programs, {left} to run; looked at in {human_time(time.time() - start_time)}"
    )
    with Table(plan, jobs, say) as table:
      try:
        if launcher == "slurm":
          run_slurm(jobs, shlex.split(launcher_flags), workdir, max_parallel, table.show)
        else:
          run(jobs, launcher, shlex.split(launcher_flags), workdir.name, max_parallel, table.show)
      finally:
        written = write_results(plan, jobs, workdir)
    say(written)
  return all(job.state == FINISHED for job in jobs)

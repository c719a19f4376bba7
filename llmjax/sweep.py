"""Runs the trials of a sweep file: looks at all of them first, then runs them side by side, each as a `llmjax train` of
its own in a folder of its own, and goes on where an earlier call was cut off.

What has become of a trial lies in its folder: TRIAL says how its last attempt ended, and while one runs it holds a
lock on LOCK, which outlives this process. This process takes no device: they belong to the trials.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
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
from typing import Any, NamedTuple

from llmjax import trials as algebra
from llmjax.config import ConfigError, find, nearest, open_roots, roots, run_file, split_reference
from llmjax.early_stopping import check_metric
from llmjax.metrics import CURVES, human_time
from llmjax.trials import COSTS, Sweep, Trial

TRIAL, LOCK, LOG = "trial.json", "trial.lock", "log.txt"
RETRIES = 2  # of a trial that was killed
POLL, QUEUE_POLL = 0.2, 5.0  # seconds between two looks, at processes and at a queue
WAITING, RUNNING, FINISHED, FAILED = "waiting", "running", "finished", "failed"
# What stands before `train` on the machine that a trial runs on; the trials of one slot follow each other.
LAUNCHERS: dict[str, list[str]] = {
  "local": [],
  "tpu_vm": ["launch/tpu_vm.py", "run", "--name={sweep}-{slot}", "--keep"],
  "gke": ["launch/gke.py", "run", "--name={sweep}-{trial}"],
  "slurm": ["launch/slurm.py"],
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

  @property
  def slot(self) -> int:
    """The one that it takes."""
    text = self.lock.read_text()
    return int(text) if text.isdigit() else 0


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
  varied = {key for trial in sweep.trials for key in trial}
  for field, column in (("x", sweep.x), *(("lines", line) for line in sweep.lines)):
    if column not in varied and (column not in COSTS or field == "lines"):
      raise ConfigError(f"{path}: Sweep.{field}={column!r} is nothing that trials change; {nearest(column, varied)}")
  jobs = []
  for name, trial in zip(algebra.names(sweep.trials), sweep.trials):
    first, *changes = algebra.flags(reference, trial)
    place = f"{trials_in.rstrip('/')}/{name}" if trials_in else str(workdir / name)
    jobs.append(Job(name, trial, ["train", first, *rest, *changes, f"--workdir={place}"], workdir / name))
  return sweep, jobs


def admit(plan: Sweep, jobs: Sequence[Job], compiling: Sequence[str], environment: Mapping[str, str]) -> None:
  """Fills in what each trial is.

  Args:
    plan: whose metric all of them must measure.
    compiling: the names of those to compile as well.
    environment: of a trial, so that only its devices are seen.
  Raises ConfigError where any cannot run, with the reasons; then none has been started.
  """
  asked = {job.name: [flag for flag in job.arguments[1:] if not flag.startswith("--workdir=")] for job in jobs}
  with tempfile.TemporaryDirectory() as folder:
    question, answer = Path(folder) / "question.json", Path(folder) / "answer.json"
    question.write_text(json.dumps({"trials": asked, "compiling": list(compiling)}), encoding="utf-8")
    words = [sys.executable, "-m", "llmjax", "sweep", f"--admit={question}", f"--workdir={answer}"]
    code = subprocess.run(words, check=False, env={**os.environ, **environment}).returncode
    if code:
      raise ConfigError(f"looking at the trials ended with exit code {code}; nothing has been started")
    found = json.loads(answer.read_text(encoding="utf-8"))
  errors: dict[str, list[str]] = {}
  for job in jobs:
    job.facts = found[job.name]
    error = job.facts.get("error") or misjudged(plan, job.facts["evals"])
    if error:
      errors.setdefault(error, []).append(job.name)
  if errors:
    several = {error: f"{of[0]}" + (f" and {len(of) - 1} more" if of[1:] else "") for error, of in errors.items()}
    raise ConfigError("nothing has been started: " + "; ".join(f"trial {of}: {error}" for error, of in several.items()))


def misjudged(plan: Sweep, evals: Sequence[str]) -> str:
  """Why the sweep's metric cannot decide on a trial with these evaluations; "" where it can."""
  try:
    if not plan.metric.startswith("train/"):
      check_metric(plan.metric, plan.best_is, dict.fromkeys(evals), "Sweep.metric")
  except ConfigError as error:
    return str(error)
  return ""


def answer(question: str, output: str) -> None:
  """The process that `admit` starts."""
  from llmjax import admission

  asked = json.loads(Path(question).read_text(encoding="utf-8"))
  Path(output).write_text(json.dumps(admission.admit(asked["trials"], asked["compiling"])), encoding="utf-8")


def look(job: Job, retry: bool) -> None:
  """What an earlier call has left of a trial.

  Raises ConfigError where its folder holds the trial with another config.
  """
  record = read_record(job)
  job.seconds = record.get("seconds", 0.0)
  lock = job.folder / LOCK
  if lock.exists() and Elsewhere(lock).poll() is None:
    job.state, job.process, job.started = RUNNING, Elsewhere(lock), time.time()
  if not record:
    return
  if record["config"] != job.facts["config"] or record["steps"] > job.facts["steps"]:
    raise ConfigError(
      f"{job.folder} holds trial {job.name} with another config, or with more steps; change that back, or use another "
      "--workdir"
    )
  if job.state == RUNNING or record["steps"] < job.facts["steps"]:
    return
  if record["code"] == 0:
    job.state = FINISHED
  elif not killed(record["code"]) and not retry:
    job.state, job.error = FAILED, record["error"]


def killed(code: int) -> bool:
  """Whether an exit code is that of a run that was told to end, not of one that failed."""
  return code < 0 or code in KILLED


def read_record(job: Job) -> dict[str, Any]:
  """How the last attempt ended; {} where there was none, or its end was lost."""
  path = job.folder / TRIAL
  try:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
  except ValueError:  # a power cut
    return {}


def write_record(job: Job, code: int) -> None:
  """Notes how an attempt ended; a crash in the middle leaves the old record whole."""
  job.folder.mkdir(parents=True, exist_ok=True)
  facts = {key: job.facts[key] for key in ("config", "steps")}
  record = {"trial": job.trial, **facts, "code": code, "error": job.error, "seconds": job.seconds}
  new = job.folder / (TRIAL + ".new")
  new.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
  os.replace(new, job.folder / TRIAL)


@contextlib.contextmanager
def held(path: Path) -> Iterator[bool]:
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


def start(job: Job, prefix: Sequence[str], slot: Slot) -> None:
  """Begins or continues a trial. The lock is the child's as well, so that it holds for as long as that lives."""
  job.folder.mkdir(parents=True, exist_ok=True)
  with open(job.folder / LOCK, "a") as lock, open(job.folder / LOG, "ab") as log:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.truncate(0)
    lock.write(str(slot.number))
    lock.flush()
    job.process = subprocess.Popen(
      program(job, prefix),
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


def settle(job: Job, stopping: bool) -> None:
  """Notes that a trial has ended, and how."""
  code = job.process.poll()
  foreign = isinstance(job.process, Elsewhere)
  job.process = None
  if foreign:  # nobody has heard its exit code: the same command says at once whether it is finished
    job.state = WAITING
    return
  job.seconds += time.time() - job.started
  if code < 0:
    job.error = f"killed by signal {-code}"
  else:
    job.error = last_words(job.folder / LOG) if code else ""
  if code == 0:
    job.state = FINISHED
  elif killed(code) and (stopping or job.attempts <= RETRIES):
    job.state = WAITING
  else:
    job.state = FAILED
  write_record(job, code)


def last_words(log: Path) -> str:
  """The last line that is neither empty nor the launcher's own."""
  lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
  return next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith("-- job ")), "")


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
  gpus = sorted(path.name for path in Path("/proc/driver/nvidia/gpus").glob("*"))
  devices = [str(i) for i in range(len(gpus))] if asked is None else [d for d in asked.split(",") if d]
  tpus = len(list(Path("/dev").glob("accel[0-9]*")))
  if (gpus and len(devices) < count) or tpus:
    most = max(len(devices), 1) if gpus else 1
    raise ConfigError(f"--max_parallel={count}: this machine's accelerators serve {most} trials at a time")
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

  def share(of: list[Any], number: int) -> list[Any]:
    each = len(of) // count
    return of[number * each : (number + 1) * each]

  if gpus:
    return [Slot(i, environment={"CUDA_VISIBLE_DEVICES": ",".join(share(devices, i))}) for i in range(count)]
  return [Slot(i, set(share(cores, i)) or None) for i in range(count)]


def run(
  jobs: Sequence[Job], launcher: str, flags: Sequence[str], sweep: str, places: Sequence[Slot], show: Any
) -> None:
  """Runs what is not finished.

  Args:
    jobs: all trials, looked at; their states change.
    launcher: one of LAUNCHERS.
    flags: of the launcher.
    sweep: the sweep's name, for what a launcher makes.
    places: one for each trial that may run at a time.
    show: called with the jobs whenever something may have changed.
  Raises:
    KeyboardInterrupt: it was asked to stop.
  """
  taken: dict[int, Job] = {}
  used: set[int] = set()
  foreign = [job for job in jobs if job.process is not None]
  asked: list[int] = []

  def tell(job: Job) -> None:
    job.process.send_signal(signal.SIGTERM if len(asked) == 1 else signal.SIGKILL)

  def stop(number: int, _: Any) -> None:
    asked.append(number)
    for job in list(taken.values()):
      tell(job)

  heard = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if listened(number)]
  previous = {number: signal.signal(number, stop) for number in heard}
  try:
    while True:
      for job in [job for job in (*taken.values(), *foreign) if job.process.poll() is not None]:
        foreign = [other for other in foreign if other is not job]
        taken = {slot: other for slot, other in taken.items() if other is not job}
        settle(job, bool(asked))
      busy = {*taken, *(job.process.slot for job in foreign)}
      free = [place for place in places if place.number not in busy][: len(places) - len(taken) - len(foreign)]
      waiting = [job for job in jobs if job.state == WAITING]
      for place, job in zip(free, waiting):
        if asked:
          break
        start(job, prefix(launcher, flags, parts_of_names(sweep, place.number, job)), place)
        taken[place.number] = job
        used.add(place.number)
        if asked:  # while it was started
          tell(job)
      show(jobs)
      if not taken and (asked or (not foreign and not waiting)):
        break
      time.sleep(POLL)
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
    kept = [flag for flag in flags if re.match(SHARED, flag)]
    for slot in sorted(used):
      for words in ENDING.get(launcher, ()):
        subprocess.run(_launch(words, kept, parts_of_names(sweep, slot)), check=False)
  if asked:
    raise KeyboardInterrupt(f"interrupted; {LEFT[launcher]}: the same command goes on")


def listened(number: int) -> bool:
  """Whether a signal is not ignored, as `nohup` has it."""
  return signal.getsignal(number) is not signal.SIG_IGN


def parts_of_names(sweep: str, slot: int, job: Job | None = None) -> dict[str, str]:
  """What the names of machines are made of; a cloud wants them short and plain."""
  name = re.sub(r"[^a-z0-9]+", "-", f"s-{sweep}".lower())[:28].strip("-")
  trial = "" if job is None else hashlib.sha256(job.command.encode()).hexdigest()[:8]
  return {"sweep": name, "slot": str(slot), "trial": trial}


def prefix(launcher: str, flags: Sequence[str], parts: Mapping[str, str]) -> list[str]:
  """What stands before the arguments of `llmjax` where trials run."""
  return _launch(LAUNCHERS[launcher], flags, parts) if LAUNCHERS[launcher] else []


def _launch(words: Sequence[str], flags: Sequence[str], parts: Mapping[str, str]) -> list[str]:
  script, *more = words
  return [sys.executable, str(launch_script(script)), *(word.format(**parts) for word in more), *flags]


def rehearse(job: Job, before: Sequence[str]) -> None:
  """Raises ConfigError where a launcher refuses a trial: a flag of its own, changes that are not committed."""
  done = subprocess.run(program(job, [*before, "--dry_run"]), capture_output=True, text=True, check=False)
  if done.returncode:
    said = (done.stderr.strip().split("\n") or [""])[-1]
    raise ConfigError(f"nothing has been started: {said or f'{before[1]} ended with exit code {done.returncode}'}")


def launch_script(script: str) -> Path:
  path = next((root / script for root in roots() if (root / script).is_file()), None)
  if path is None:
    raise ConfigError(f"{script} is not here; run the sweep in a clone of llmjax, or use --launcher=local")
  return path


def run_slurm(
  jobs: Sequence[Job], flags: Sequence[str], folder: Path, max_parallel: int, retry: bool, show: Any
) -> None:
  """Submits what is neither finished nor queued as an array, and follows it; a Ctrl-C leaves the queue as it is."""
  script = [sys.executable, str(launch_script(LAUNCHERS["slurm"][0]))]

  def queued() -> set[str]:
    done = subprocess.run([*script, "queued", f"--folder={folder}"], capture_output=True, text=True, check=False)
    if done.returncode:
      raise ConfigError(done.stderr.strip().split("\n")[-1] or "launch/slurm.py queued failed")
    return set(done.stdout.split("\n")) - {""}

  there = queued()
  before = {name for path in (folder / "slurm").glob("*.json") for name in json.loads(path.read_text())["names"]}
  for job in jobs:
    if job.state == WAITING and job.name in before - there:  # ended while nobody followed it
      close_queued(job)
      job.state = WAITING if job.state == FAILED and retry else job.state
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
      time.sleep(QUEUE_POLL if mine else 0)
  except KeyboardInterrupt:
    ending = f"{script[1]} cancel --folder={folder}"
    raise KeyboardInterrupt(f"trials go on in the queue; the same command follows them, `{ending}` ends them") from None


def close_queued(job: Job) -> None:
  """What has become of a trial that is no longer in the queue."""
  from llmjax.data.buckets import place
  from llmjax.resume import over

  done, log = over(place(job.workdir), job.facts["steps"]), job.folder / LOG
  text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
  job.seconds = sum(map(float, re.findall(r"^-- job .* after (\d+) seconds$", text, re.MULTILINE)))
  said = (last_words(log) if text else "") or "nothing was logged"
  job.error = "" if done else f"left the queue before its end: {said}"
  job.state = FINISHED if done else FAILED
  write_record(job, 0 if done else 1)


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
  if launcher in AWAY and not (trials_in or "").startswith("gs://"):
    raise ConfigError(f"--launcher={launcher} runs trials where {workdir} is not; give --trials_in=gs://BUCKET/FOLDER")
  if "://" in str(workdir):
    raise ConfigError(f"--workdir={workdir} must be a folder here; trials may lie in a bucket, by --trials_in")
  try:
    flags = shlex.split(launcher_flags)
  except ValueError as error:
    raise ConfigError(f"--launcher_flags={launcher_flags!r}: {error}") from None
  if any(not flag.startswith("--") for flag in flags):
    raise ConfigError(f"--launcher_flags={launcher_flags!r} must be --FLAG or --FLAG=VALUE each, without a space")
  workdir = Path(workdir).absolute()
  plan, jobs = load(arguments, workdir, trials_in)
  places = slots(max_parallel, launcher)
  if launcher in AWAY:
    rehearse(jobs[0], prefix(launcher, flags, parts_of_names(workdir.name, 0, jobs[0])))
  if dry_run:
    admit(plan, jobs, [job.name for job in jobs if launcher == "local"], places[0].environment)
    programs = len({job.facts["program"] for job in jobs})
    for job in jobs:
      before = prefix(launcher, flags, parts_of_names(workdir.name, 0, job)) if launcher != "slurm" else []
      say(shlex.join(program(job, before)))
    say(f"{len(jobs)} trials, {programs} programs, {sum(j.facts['flops'] * j.facts['steps'] for j in jobs):.3g} FLOPs")
    return True
  workdir.mkdir(parents=True, exist_ok=True)
  with held(workdir / "sweep.lock") as free:
    if not free:
      raise ConfigError(f"{workdir}: another `llmjax sweep` is at work there; wait for it, or use another --workdir")
    began = time.time()
    unfinished = [job.name for job in jobs if read_record(job).get("code") != 0]
    admit(plan, jobs, unfinished if launcher == "local" else [], places[0].environment)
    for job in jobs:
      look(job, retry)
    programs = len({job.facts["program"] for job in jobs})
    left = sum(job.state == WAITING for job in jobs)
    say(f"{len(jobs)} trials of {programs} programs, {left} to run; looked at in {human_time(time.time() - began)}")
    with Table(plan, jobs, say) as table:
      try:
        if launcher == "slurm":
          run_slurm(jobs, flags, workdir, max_parallel, retry, table.show)
        else:
          run(jobs, launcher, flags, workdir.name, places, table.show)
      finally:
        written = write_results(plan, jobs, workdir)
    say(written)
  return all(job.state == FINISHED for job in jobs)

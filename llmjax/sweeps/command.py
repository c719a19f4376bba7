"""Runs the trials of a sweep file: looks at all of them first, then runs them side by side, each as a `llmjax train` of
its own in a folder of its own, and goes on where an earlier call was cut off. This process takes no device: they
belong to the trials.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llmjax.config import ConfigError, add_config_roots, call_in_file, find_config_file, split_config_flag, suggest_name
from llmjax.storage.buckets import as_path, translate_storage_errors
from llmjax.sweeps import pool, queue
from llmjax.sweeps import trials as algebra
from llmjax.sweeps.jobs import FAILED, FINISHED, WAITING, Job, file_lock, look, program, read_record
from llmjax.sweeps.trials import COSTS, Sweep
from llmjax.telemetry.progress import human_time
from llmjax.training.early_stopping import check_metric

LAUNCHERS = (*pool.LAUNCHERS, "slurm")


def load_sweep(arguments: list[str], workdir: Path, trials_in: str | None = None) -> tuple[Sweep, list[Job]]:
  """A sweep and its trials, from `--config=FILE[:argument] [--config.KEY=VALUE ...]`.

  Args:
    arguments: those of the command line; what they change holds for all trials that do not change it themselves.
    workdir: where the sweep lives.
    trials_in: where the workdirs of its trials lie, if elsewhere, such as in a bucket.
  """
  reference, rest = split_config_flag(arguments)
  path, _ = find_config_file(reference)
  add_config_roots()
  sweep = call_in_file(path, "get_sweep")
  if not isinstance(sweep, Sweep):
    raise ConfigError(f"{path}: get_sweep must return an llmjax.sweeps.trials.Sweep, not {type(sweep).__name__}")
  varied = {key for trial in sweep.trials for key in trial}
  for field, column in (("x", sweep.x), *(("lines", line) for line in sweep.lines)):
    measured = column in COSTS or column.startswith(("eval/", "train/"))
    if column not in varied and (not measured or field == "lines"):
      known = {*varied, *(COSTS if field == "x" else ())}
      raise ConfigError(
        f"{path}: Sweep.{field}={column!r} is nothing that trials change; {suggest_name(column, known)}"
      )
  jobs = []
  for name, trial in zip(algebra.names(sweep.trials), sweep.trials):
    first, *changes = algebra.flags(reference, trial)
    own = f"{trials_in.rstrip('/')}/{name}" if trials_in else str(workdir / name)
    jobs.append(Job(name, trial, ["train", first, *rest, *changes, f"--workdir={own}"], workdir / name))
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
      check_metric(plan.metric, plan.mode, dict.fromkeys(evals), "Sweep.metric", "Sweep.mode")
  except ConfigError as error:
    return str(error)
  return ""


def answer(question: str, output: str) -> None:
  """The process that `admit` starts."""
  from llmjax.sweeps import admission

  asked = json.loads(Path(question).read_text(encoding="utf-8"))
  Path(output).write_text(json.dumps(admission.admit(asked["trials"], asked["compiling"])), encoding="utf-8")


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
  from llmjax.sweeps.report import write_results
  from llmjax.sweeps.results import curves_of
  from llmjax.sweeps.table import Table

  if launcher not in LAUNCHERS:
    raise ConfigError(f"--launcher={launcher}: {suggest_name(launcher, LAUNCHERS)}")
  if max_parallel < 1:
    raise ConfigError(f"--max_parallel={max_parallel} must be at least 1")
  if launcher in pool.AWAY and not (trials_in or "").startswith("gs://"):
    raise ConfigError(f"--launcher={launcher} runs trials where {workdir} is not; give --trials_in=gs://BUCKET/FOLDER")
  if "://" in str(workdir):
    raise ConfigError(f"--workdir={workdir} must be a folder here; trials may lie in a bucket, by --trials_in")
  try:
    flags = shlex.split(launcher_flags)
  except ValueError as error:
    raise ConfigError(f"--launcher_flags={launcher_flags!r}: {error}") from None
  if any(not flag.startswith("--") for flag in flags):
    raise ConfigError(f"--launcher_flags={launcher_flags!r} must be --FLAG or --FLAG=VALUE each, without a space")
  if launcher == "local" and flags:
    raise ConfigError(f"--launcher_flags={launcher_flags!r} needs a --launcher that takes them: slurm, tpu_vm or gke")
  workdir = Path(workdir).absolute()
  plan, jobs = load_sweep(arguments, workdir, trials_in)
  name, local = pool.name(workdir, trials_in), launcher == "local"
  places = pool.slots(max_parallel, launcher)

  def before(job: Job, slot: int = 0) -> list[str]:
    return pool.prefix(launcher, flags, pool.parts_of_names(name, slot, job))

  say(f"looking at {len(jobs)} trials{', compiling each program once' if local else ''}")
  if launcher in pool.AWAY:
    pool.rehearse(jobs[0], before(jobs[0]))
  if dry_run:
    admit(plan, jobs, [job.name for job in jobs if local], places[0].environment)
    if launcher == "slurm":
      queue.submit(jobs, flags, workdir, max_parallel, dry_run)
    else:
      for number, job in enumerate(jobs):
        say(shlex.join(program(job, before(job, number % max_parallel))))
    programs = len({job.facts["program"] for job in jobs})
    say(f"{len(jobs)} trials, {programs} programs, {sum(j.facts['flops'] * j.facts['steps'] for j in jobs):.3g} FLOPs")
    return True
  if trials_in is not None:
    with translate_storage_errors(trials_in):
      as_path(trials_in).exists()
  workdir.mkdir(parents=True, exist_ok=True)
  with file_lock(workdir / "sweep.lock") as free:
    if not free:
      raise ConfigError(f"{workdir}: another `llmjax sweep` is at work there; wait for it, or use another --workdir")
    began = time.time()
    unfinished = [job.name for job in jobs if read_record(job).get("code") != 0]
    admit(plan, jobs, unfinished if local else [], places[0].environment)
    for job in jobs:
      look(job, retry)
    programs = len({job.facts["program"] for job in jobs})
    left = sum(job.state == WAITING for job in jobs)
    say(f"{len(jobs)} trials, {programs} programs, {left} to run; looked at in {human_time(time.time() - began)}")
    with Table(plan, jobs, say) as table:
      try:
        if launcher == "slurm":
          queue.run_queue(jobs, flags, workdir, max_parallel, retry, table.show)
        else:
          pool.run_pool(jobs, launcher, flags, name, places, table.show)
      finally:
        written = write_results(plan, jobs, workdir)
    say(written)
  finished = [job for job in jobs if job.state == FINISHED]
  failed = [job for job in jobs if job.state == FAILED]
  found = [curves for curves in map(curves_of, finished) if curves]  # a bucket may be out of reach now
  if found and not any(plan.metric in curves for curves in found):
    hint = suggest_name(plan.metric, found[0])
    raise ConfigError(f"Sweep.metric={plan.metric!r} was not measured; {hint}; mend it, and the same command goes on")
  if failed:
    say(f"{len(failed)} of {len(jobs)} failed, such as {failed[0].name}: {failed[0].error}; --retry runs them again")
  return len(finished) == len(jobs)

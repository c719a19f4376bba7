"""Load and run a sweep: check all trials, run them in parallel, and report their results.

Each trial is a `llmjax train` in a folder of its own. The same command resumes an interrupted sweep. This process uses
no device, as they belong to the trials.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from llmjax.config import ConfigError, add_config_roots, call_in_file, find_config_file, split_config_flag, suggest_name
from llmjax.storage.buckets import as_path, translate_storage_errors
from llmjax.sweeps.job import FAILED, FINISHED, WAITING, Job, file_lock
from llmjax.sweeps.launchers import LAUNCHERS, Launcher, machine_name_prefix, make_slots
from llmjax.sweeps.preflight import check_jobs
from llmjax.sweeps.process_pool import ProcessPool
from llmjax.sweeps.slurm_queue import run_queue, submit_trials
from llmjax.sweeps.trials import COST_COLUMNS, Sweep, trial_flags, trial_names
from llmjax.telemetry.progress import format_duration

LAUNCHER_NAMES = (*LAUNCHERS, "slurm")


def load_sweep(arguments: list[str], workdir: Path, trials_in: str | None = None) -> tuple[Sweep, list[Job]]:
  """Return a sweep and its trials.

  Args:
    arguments: `--config=FILE[:argument] [--config.KEY=VALUE ...]`; the values hold for all trials that do not change
      these keys themselves.
    workdir: folder of the sweep.
    trials_in: parent of the workdirs of the trials, if it is not `workdir`, such as a bucket.
  Raises:
    ConfigError: the file has no valid sweep.
  """
  reference, rest = split_config_flag(arguments)
  path, _ = find_config_file(reference)
  add_config_roots()
  plan = call_in_file(path, "get_sweep")
  if not isinstance(plan, Sweep):
    raise ConfigError(f"{path}: get_sweep must return an llmjax.sweeps.trials.Sweep, got {type(plan).__name__}")
  varied = {key for trial in plan.trials for key in trial}
  if not plan.x.startswith(("eval/", "train/")):
    check_column(f"{path}: Sweep.x", plan.x, {*varied, *COST_COLUMNS})
  for line in plan.lines:
    check_column(f"{path}: Sweep.lines", line, varied)
  jobs = []
  for name, trial in zip(trial_names(plan.trials), plan.trials):
    config_flag, *changes = trial_flags(reference, trial)
    trial_workdir = f"{trials_in.rstrip('/')}/{name}" if trials_in else str(workdir / name)
    flags = ["train", config_flag, *rest, *changes, f"--workdir={trial_workdir}"]
    jobs.append(Job(name, trial, flags, workdir / name))
  return plan, jobs


def check_column(field: str, column: str, known: set[str]) -> None:
  if column not in known:
    raise ConfigError(f"{field}={column!r} is not a key that trials change; {suggest_name(column, known)}")


def run_sweep(
  arguments: list[str],
  workdir: str | Path,
  *,
  launcher: str = "local",
  launcher_flags: str = "",
  max_parallel: int = 1,
  trials_in: str | None = None,
  retry: bool = False,
  dry_run: bool = False,
  print_line: Callable[[str], None] = print,
) -> bool:
  """Run or resume a sweep, and write its results; return whether all trials are finished.

  Args:
    arguments: config flags, see `load_sweep`.
    workdir: folder of the sweep.
    launcher: a name of LAUNCHER_NAMES.
    launcher_flags: flags of the launcher's script, separated by spaces.
    max_parallel: maximal number of trials at a time.
    trials_in: parent of the workdirs of the trials, if it is not `workdir`, such as a bucket.
    retry: run failed trials again.
    dry_run: only check the trials and print their commands.
    print_line: prints a line of progress.
  Raises:
    ConfigError: an argument or a trial is invalid, or the launcher failed.
    KeyboardInterrupt: the sweep was interrupted; it can be resumed.
  """
  from llmjax.sweeps.live_table import LiveTable
  from llmjax.sweeps.report import write_results

  flags = parse_launcher_flags(launcher, launcher_flags, trials_in)
  if max_parallel < 1:
    raise ConfigError(f"--max_parallel must be at least 1, got {max_parallel}")
  if "://" in str(workdir):
    raise ConfigError(f"--workdir must be a local folder, got {workdir}. Only --trials_in may be in a bucket.")
  workdir = Path(workdir).absolute()
  plan, jobs = load_sweep(arguments, workdir, trials_in)
  slots = make_slots(max_parallel, launcher)
  to_compile = [job.name for job in jobs] if launcher == "local" else []
  trial_launcher = None if launcher == "slurm" else Launcher(launcher, flags, machine_name_prefix(workdir, trials_in))
  print_line(f"checking {len(jobs)} trials{', compiling each program once' if to_compile else ''}")
  if trial_launcher and trial_launcher.spec.is_remote:
    trial_launcher.rehearse(jobs[0])
  if dry_run:
    check_jobs(plan, jobs, to_compile, slots[0].environment)
    if trial_launcher:
      for number, job in enumerate(jobs):
        print_line(shlex.join(job.process_arguments(trial_launcher.prefix(job, number % max_parallel))))
    else:
      submit_trials(jobs, flags, workdir, max_parallel, dry_run)
    flops = sum(job.facts["flops"] * job.facts["steps"] for job in jobs)
    print_line(f"{count_trials(jobs)}, {flops:.3g} FLOPs")
    return True
  if trials_in is not None:
    with translate_storage_errors(trials_in):
      as_path(trials_in).exists()
  workdir.mkdir(parents=True, exist_ok=True)
  with file_lock(workdir / "sweep.lock") as is_free:
    if not is_free:
      raise ConfigError(f"{workdir}: another `llmjax sweep` is running there. Wait for it, or use another --workdir.")
    start = time.time()
    unfinished = {job.name for job in jobs if job.read_record().get("code") != 0}
    check_jobs(plan, jobs, [name for name in to_compile if name in unfinished], slots[0].environment)
    for job in jobs:
      job.load_state(retry)
    waiting = sum(job.state == WAITING for job in jobs)
    print_line(f"{count_trials(jobs)}, {waiting} to run; checked in {format_duration(time.time() - start)}")
    with LiveTable(plan, jobs, print_line) as table:
      try:
        if trial_launcher:
          ProcessPool(jobs, trial_launcher, slots, table.show).run()
        else:
          run_queue(jobs, flags, workdir, max_parallel, retry, table.show)
      finally:
        results = write_results(plan, jobs, workdir)
    print_line(results)
  check_results(plan, jobs, print_line)
  return all(job.state == FINISHED for job in jobs)


def parse_launcher_flags(launcher: str, launcher_flags: str, trials_in: str | None) -> list[str]:
  """Return the flags of a launcher's script as words.

  Raises:
    ConfigError: the launcher is unknown, its flags are malformed, or it needs --trials_in.
  """
  if launcher not in LAUNCHER_NAMES:
    raise ConfigError(f"--launcher={launcher}: {suggest_name(launcher, LAUNCHER_NAMES)}")
  is_remote = launcher in LAUNCHERS and LAUNCHERS[launcher].is_remote
  if is_remote and not (trials_in or "").startswith("gs://"):
    raise ConfigError(f"--launcher={launcher}: its machines do not see --workdir. Give --trials_in=gs://BUCKET/FOLDER.")
  try:
    flags = shlex.split(launcher_flags)
  except ValueError as error:
    raise ConfigError(f"--launcher_flags={launcher_flags!r}: {error}") from None
  if any(not flag.startswith("--") for flag in flags):
    raise ConfigError(f"--launcher_flags must be --FLAG or --FLAG=VALUE each, without a space, got {launcher_flags!r}")
  if launcher == "local" and flags:
    raise ConfigError(f"--launcher_flags={launcher_flags!r} needs --launcher=slurm, tpu_vm or gke")
  return flags


def count_trials(jobs: Sequence[Job]) -> str:
  return f"{len(jobs)} trials, {len({job.facts['program'] for job in jobs})} programs"


def check_results(plan: Sweep, jobs: Sequence[Job], print_line: Callable[[str], None]) -> None:
  """Print how many trials have failed.

  Raises:
    ConfigError: no finished trial has the sweep's metric.
  """
  from llmjax.sweeps.results import read_trial_curves

  # A bucket may be unreachable now: trials whose curves cannot be read do not count.
  measured = [curves for job in jobs if job.state == FINISHED and (curves := read_trial_curves(job))]
  if measured and not any(plan.metric in curves for curves in measured):
    hint = suggest_name(plan.metric, measured[0])
    raise ConfigError(
      f"Sweep.metric={plan.metric!r} was not measured; {hint} Fix it, and the same command resumes the sweep."
    )
  failed = [job for job in jobs if job.state == FAILED]
  if failed:
    example = f"such as {failed[0].name}: {failed[0].error}"
    print_line(f"{len(failed)} of {len(jobs)} failed, {example}; --retry runs them again")

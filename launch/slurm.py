#!/usr/bin/env python3
"""Submit runs of `llmjax` to SLURM. Needs only Python 3.9, git and SLURM's commands.

  submit   one run, in one process or several
  array    the trials of a sweep, one array task each
  queued   print the names of pending and running trials, one a line
  cancel   cancel them

A job that reaches its time limit or is preempted saves and is queued again. A job whose node fails is queued again. In
both cases the same command resumes from its workdir. A job that fails by itself or is cancelled ends.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import shipping
from arguments import LauncherParser, add_actions, add_shared_flags, check_command, parse_with_command, positive_int
from batch_script import Code, SlurmTrial, batch_script
from command_line import ROOT, OutcomeUnknown, find_llmjax, run_main, run_program

EXAMPLES = """\
The log of a job is WORKDIR/log.txt. Its script, commit and number are in the folder slurm of --workdir or --folder.

examples:
  python3 launch/slurm.py submit --workdir=/shared/a --nodes=2 --gpus_per_node=8 --time=24:00:00 -- \\
    train --config=gpt:size=gpt2_124m
  the same with --env=WANDB_API_KEY       passes a variable of this shell (with --ship also --setup=cuda,wandb)
  the same with --sbatch=--exclusive      any other flag of sbatch
  the same with --ship=/shared/code       runs this commit from there, so that this checkout can change
  the same with --dry_run                 prints every command and file, and runs nothing
  python3 launch/slurm.py array --commands=FILE.jsonl --folder=/shared/sweep --max_parallel=4 --gpus_per_node=1
  python3 launch/slurm.py queued --folder=/shared/sweep
  python3 launch/slurm.py cancel --folder=/shared/sweep"""

# States of a job that has not ended.
ACTIVE_STATES = frozenset(
  "PENDING CONFIGURING RUNNING SUSPENDED STOPPED COMPLETING REQUEUED RESIZING SIGNALING".split()
)


# Commands and files, which --dry_run prints.


def run_slurm(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
  return run_program(words, "Run this on a machine of the cluster", capture_output=True)


def run_or_print(words: Sequence[str], dry_run: bool, output: Path | None = None) -> None:
  """Run a command with its output in a file or on standard output, or print the command."""
  if dry_run:
    print(shlex.join(words) + (f" >{shlex.quote(str(output))}" if output else ""))
    return
  with open(output, "w") if output else open(1, "w", closefd=False) as out:
    code = run_program(words, "Run this on a machine of the cluster", stdout=out).returncode
  if code:
    raise OutcomeUnknown(
      f"`{shlex.join(words)}`: failed with exit code {code}, see above. Fix it and run the same command again"
    )


def write_or_print(path: Path, text: str, dry_run: bool) -> None:
  """Write a file, or print the commands that write it."""
  if dry_run:
    target = shlex.quote(str(path))
    print(f"mkdir -p {shlex.quote(str(path.parent))}\ncat >{target} <<'END_OF_FILE'\n{text}END_OF_FILE")
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text, encoding="utf-8")


# Jobs.


def submitted_jobs(folder: Path) -> dict[str, list[str]]:
  """Return {job: names of its array tasks in order}; `sbatch` itself wrote the number of the job."""
  jobs = {}
  for path in sorted((folder / "slurm").glob("*.job"), key=lambda path: int(path.stem)):
    job = read_job_number(path)
    if job:
      jobs[job] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["names"]
  return jobs


def read_job_number(path: Path) -> str:
  """Return the number that `sbatch --parsable` wrote; it is empty if sbatch failed."""
  return path.read_text(encoding="utf-8").strip().split(";")[0]


def queued_trials(folder: Path, dry_run: bool = False) -> dict[str, str]:
  """Return {name: job} of pending and running trials in the order of submission; empty with `dry_run`."""
  jobs = submitted_jobs(folder)
  if not jobs:
    return {}
  query = ["squeue", "--noheader", "--array", "--format=%F %K", f"--jobs={','.join(jobs)}"]
  if dry_run:
    print(shlex.join(query))
    return {}
  done = run_slurm(query)
  if done.returncode and "Invalid job id" not in done.stderr:  # SLURM has forgotten jobs that ended long ago
    raise OutcomeUnknown(f"squeue: does not report what is queued ({done.stderr.strip()}). Try again")
  tasks = {tuple(line.split()) for line in done.stdout.splitlines()}
  return {
    name: job
    for job, names in jobs.items()
    for index, name in enumerate(names)
    if (job, str(index)) in tasks or (job, "N/A") in tasks
  }


def show_job_command(*job: str) -> list[str]:
  return ["scontrol", "--oneliner", "show", "job", *job]


def wait_for_job(job: str, poll: float) -> int:
  """Wait until all tasks of a job have ended; return 0 if all completed, else the largest exit code, at least 1.

  `sbatch --wait` would print the number of the job only at the end.
  """
  tasks: dict[str, tuple[str, int]] = {}  # {task: (state, exit code)}
  while True:
    done = run_slurm(show_job_command(job))
    if done.returncode and "Invalid job id" not in done.stderr:
      raise OutcomeUnknown(f"scontrol: does not report how job {job} ended ({done.stderr.strip()}). See its log")
    matches = re.findall(r"\bJobId=(\d+)\b.*?\bJobState=(\w+).*?\bExitCode=(\d+):", done.stdout)
    tasks |= {task: (state, int(code)) for task, state, code in matches}
    if not any(state in ACTIVE_STATES for state, _ in tasks.values()):
      break
    time.sleep(poll)
  if tasks and all(state == "COMPLETED" for state, _ in tasks.values()):
    return 0
  return max([1, *(code for _, code in tasks.values())])


# Submission.


def ship_code(options: argparse.Namespace) -> Code:
  """Unpack this commit into a folder of --ship, unless it is there, and install it."""
  commit = shipping.commit_to_ship(ROOT, options.dirty)
  folder = Path(options.ship).absolute() / commit
  unpacked, archive = f"{folder}.new", f"{folder}.tar.gz"
  unpack = [
    ["mkdir", "-p", unpacked],
    shipping.archive_command(archive, options.dirty),
    ["tar", "-xzf", archive, "-C", unpacked],
    ["rm", archive],
    ["mv", unpacked, str(folder)],
  ]
  # Not inferred from this machine, which need not have the accelerator.
  extra = options.setup if options.setup is not None else "cuda" if options.gpus_per_node else ""
  install = ["bash", "-c", '. "$0/launch/setup.sh" && setup "$1"', str(folder), extra]
  for words in [*([] if folder.exists() else unpack), install]:
    run_or_print(words, options.dry_run)
  return Code(commit, folder, folder, str(folder / ".venv" / "bin" / "llmjax"))


def checkout_code(options: argparse.Namespace) -> Code:
  """Return this checkout, or the unpacked archive that this file is in."""
  path = ROOT / ".commit"
  commit = path.read_text().strip() if path.exists() else shipping.commit_to_ship(ROOT, dirty=True)
  return Code(commit, ROOT, Path.cwd(), find_llmjax(options.venv))


def check_trials(options: argparse.Namespace, trials: Sequence[SlurmTrial]) -> None:
  """Raise ValueError for flags with which the job would fail later."""
  gpus = (options.gpus_per_node or "").rpartition(":")[2]
  if gpus and options.processes_per_node not in (1, int(gpus)):
    raise ValueError(
      f"--processes_per_node: must be 1 (one process with all GPUs of its node) or {gpus} (one GPU each) with "
      f"--gpus_per_node={options.gpus_per_node}, got {options.processes_per_node}"
    )
  for trial in trials:
    if "--fresh" in trial.arguments:
      raise ValueError(
        f"{trial.name}: --fresh would start from scratch whenever the job is queued again. Use another --workdir, or "
        f"move {trial.workdir} away"
      )


def submit_trials(options: argparse.Namespace, trials: Sequence[SlurmTrial], folder: Path, is_array: bool) -> int:
  """Submit trials as one job; return the exit code."""
  check_trials(options, trials)
  secrets = shipping.secret_values([name for name in options.env if name != "ALL"])
  queued = queued_trials(folder, options.dry_run)
  cancel = f"`{sys.argv[0]} cancel --folder={folder}`"
  for trial in trials:
    if trial.name in queued:
      raise OutcomeUnknown(
        f"{trial.name}: is still in the queue as job {queued[trial.name]}. Wait for it, or cancel it with {cancel}"
      )
  code = ship_code(options) if options.ship else checkout_code(options)
  script = batch_script(options, trials, folder, code, is_array)
  for name, value in secrets.items():
    if value and value in script and re.search("KEY|TOKEN|SECRET|PASSWORD", name):
      raise ValueError(
        f"--env={name}: the command contains the value of {name}, where others can see it. Have llmjax read {name}"
      )
  path = folder / "slurm" / f"{len(list((folder / 'slurm').glob('*.json')))}.sh"
  description = {"commit": code.commit, "names": [trial.name for trial in trials]}
  job_path = path.with_suffix(".job")
  write_or_print(path, script, options.dry_run)
  write_or_print(path.with_suffix(".json"), json.dumps(description) + "\n", options.dry_run)
  run_or_print(["sbatch", "--parsable", str(path)], options.dry_run, job_path)
  if options.dry_run:
    if options.wait:
      number = f'"$(cut -d ";" -f 1 {shlex.quote(str(job_path))})"'
      print(f"# repeat until the job has ended\n{shlex.join(show_job_command())} {number}")
    return 0
  job = read_job_number(job_path)
  print(f"job {job}, {folder / 'slurm'}; cancel it with {cancel}", flush=True)
  return wait_for_job(job, options.poll) if options.wait else 0


def absolute_arguments(arguments: Sequence[str], workdir: Path) -> list[str]:
  """Return arguments of llmjax with absolute paths; add `workdir` to a `train` that has none."""
  words = []
  for word in arguments:
    flag, equal, path = word.partition("=")
    is_local = flag == "--workdir" and equal and "://" not in path
    words.append(f"--workdir={Path(path).absolute()}" if is_local else word)
  has_workdir = any(word.split("=")[0] == "--workdir" for word in words)
  return words if has_workdir or words[0] != "train" else [*words, f"--workdir={workdir}"]


def read_trials(path: str) -> list[SlurmTrial]:
  """Read the trials of an array from a JSONL file."""
  trials = []
  for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
    try:
      record = json.loads(line)
      workdir = Path(record["workdir"]).absolute()
      trials.append(SlurmTrial(record["name"], str(workdir), absolute_arguments(record["arguments"], workdir)))
    except (ValueError, KeyError, TypeError, IndexError):
      raise ValueError(
        f'{path}:{number}: must be {{"name": ..., "workdir": ..., "arguments": ["train", ...]}}, got {line}'
      ) from None
  for key in ("name", "workdir"):
    values = [getattr(trial, key) for trial in trials]
    repeated = [value for value in values if values.count(value) > 1]
    if repeated:
      raise ValueError(f"{path}: two trials have the {key} {repeated[0]}. Each needs its own")
  if not trials:
    raise ValueError(f"{path}: has no trials. Write one line for each")
  return trials


# Subcommands.


def submit_run(options: argparse.Namespace) -> int:
  workdir = Path(options.workdir).absolute()
  check_command(options.arguments)
  trial = SlurmTrial(workdir.name, str(workdir), absolute_arguments(options.arguments, workdir))
  return submit_trials(options, [trial], workdir, is_array=False)


def submit_array(options: argparse.Namespace) -> int:
  return submit_trials(options, read_trials(options.commands), Path(options.folder).absolute(), is_array=True)


def print_queued(options: argparse.Namespace) -> int:
  for name in queued_trials(Path(options.folder).absolute(), options.dry_run):
    print(name)
  return 0


def cancel_jobs(options: argparse.Namespace) -> int:
  folder = Path(options.folder).absolute()
  queued = queued_trials(folder, options.dry_run)
  submitted = submitted_jobs(folder)
  if not submitted:
    raise ValueError(f"--folder: no job was submitted from there, got {options.folder}")
  jobs = list(submitted) if options.dry_run else list(dict.fromkeys(queued.values()))
  if jobs:
    run_or_print(["scancel", *jobs], options.dry_run)
  return 0


# Command line.


def gpus_of_node(text: str) -> str:
  """Parse the value of --gpus_per_node."""
  if not re.fullmatch(r"([\w-]+:)?[1-9]\d*", text):
    raise argparse.ArgumentTypeError(f"must be a number, or TYPE:NUMBER such as a100:8, got {text}")
  return text


SLURM_ACTIONS = {
  "submit": (submit_run, "submit one run: flags, then -- and the arguments of llmjax"),
  "array": (submit_array, "submit the trials of a sweep as an array"),
  "queued": (print_queued, "print the names of pending and running trials, one a line"),
  "cancel": (cancel_jobs, "cancel pending and running jobs"),
}


def parse_slurm_flags(argv: Sequence[str]) -> argparse.Namespace:
  parser = LauncherParser(prog="slurm.py", description=__doc__, epilog=EXAMPLES)
  actions = add_actions(parser, SLURM_ACTIONS)
  actions["submit"].add_argument("--workdir", required=True, metavar="DIR", help="folder of the run on a shared disk")
  for name in ("array", "queued", "cancel"):
    about = "folder of the sweep on a shared disk" if name == "array" else "--folder of array, or a --workdir"
    actions[name].add_argument("--folder", required=True, metavar="DIR", help=about)
  add = actions["array"].add_argument
  add("--commands", required=True, metavar="FILE", help='lines {"name": ..., "workdir": ..., "arguments": [...]}')
  add("--max_parallel", type=positive_int, default=4, metavar="N", help="trials at a time (default: %(default)s)")
  for name in ("submit", "array"):
    add = actions[name].add_argument
    add_shared_flags(actions[name], "nodes", "venv", "dirty")
    add_shared_flags(actions[name], "name", required=False, help="name of the job (default: that of the folder)")
    add_shared_flags(actions[name], "env", help="variable of this shell to pass to the job; ALL passes all; repeatable")
    add_shared_flags(actions[name], "poll", default=5)
    add("--processes_per_node", type=positive_int, default=1, metavar="N", help="1, or the number of GPUs")
    add("--gpus_per_node", type=gpus_of_node, metavar="[TYPE:]N", help="GPUs of each node")
    add("--cpus_per_task", type=positive_int, metavar="N", help="CPUs of each process")
    for flag in ("time", "partition", "account", "qos", "constraint", "mem"):
      add(f"--{flag}", metavar=flag.upper(), help=f"sbatch's --{flag}")
    add("--sbatch", action="append", default=[], metavar="FLAG", help="any other flag of sbatch; repeatable")
    add("--ship", metavar="DIR", help="folder on a shared disk; install in DIR/COMMIT and run from there")
    add("--setup", metavar="EXTRA", help="what --ship installs: cuda, cuda,wandb, jax[cuda12] or '' (default: by GPUs)")
    add("--wait", action="store_true", help="wait until the job has ended, and return its exit code")
  return parse_with_command(parser, argv)


def main(argv: Sequence[str]) -> int:
  options = parse_slurm_flags(argv)
  return SLURM_ACTIONS[options.action][0](options)


if __name__ == "__main__":
  run_main(main, "submitted jobs stay in the queue")

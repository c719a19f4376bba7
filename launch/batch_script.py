"""Batch scripts of slurm.py: flags of sbatch, the trial of each array task, and requeueing."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class SlurmTrial(NamedTuple):
  """A run: the job of `submit`, or an array task of `array`."""

  name: str
  workdir: str
  arguments: list[str]  # of llmjax


class Code(NamedTuple):
  """The code that a job runs."""

  commit: str
  root: Path  # its folder
  chdir: Path  # working directory of the job
  llmjax: str  # path of the command


# Follows the lines of `batch_script`, which set `commit`, `root` (its folder), `workdir`, `llmjax`, `options` of srun,
# and `arguments` of llmjax.
BODY = r"""
mkdir -p "$workdir"
exec >>"$workdir/log.txt" 2>&1
# The number alone of an array's last task is the number of the whole array.
job="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
printf -- '-- job %s on %s, start %d\n' "$job" "$SLURM_JOB_NODELIST" "$((${SLURM_RESTART_COUNT:-0} + 1))"
# A checkout can have another commit by now; shipped code has no .git.
now="$(git --git-dir="$root/.git" rev-parse HEAD 2>/dev/null)" || now="${commit%%-*}"
if [ "$now" != "${commit%%-*}" ]; then
  printf -- '-- job %s: submitted at %s, runs %s\n' "$job" "$commit" "$now"
fi

# SLURM sends SIGTERM to all tasks before the time limit, at a preemption with a grace time and when a job is cancelled.
# The tasks save and end with 130. This shell has to outlive them.
trap : TERM
export PYTHONUNBUFFERED=1 # so that lines reach the log at once
code=0
srun "${options[@]}" "$llmjax" "${arguments[@]}" || code=$?
printf -- '-- job %s ended with %d after %d seconds\n' "$job" "$code" "$SECONDS"

# 143: the signal came before training started. A job that was cancelled or requeued by SLURM is not RUNNING any more.
if { [ "$code" = 130 ] || [ "$code" = 143 ]; } &&
  [ "$(squeue --noheader --format=%T --jobs="$job")" = RUNNING ]; then
  printf -- '-- job %s is queued again\n' "$job"
  scontrol requeue "$job"
fi
exit "$code"
"""


def sbatch_flags(options: argparse.Namespace, folder: Path, chdir: Path, num_tasks: int | None) -> list[str]:
  """Return the flags of sbatch.

  Args:
    options: Flags of slurm.py.
    folder: Folder whose subfolder `slurm` gets the logs of sbatch.
    chdir: Working directory of the job.
    num_tasks: Number of array tasks; None for a single job.
  """
  logs = str(folder / "slurm").replace("%", "%%")
  flags = {
    "job-name": options.name or folder.name,
    "chdir": chdir,
    "output": f"{logs}/{'%j' if num_tasks is None else '%A_%a'}.log",
    "nodes": options.nodes,
    "ntasks-per-node": options.processes_per_node,
    "gpus-per-node": options.gpus_per_node,
    "cpus-per-task": options.cpus_per_task,
    "mem": options.mem,
    "time": options.time,
    "partition": options.partition,
    "account": options.account,
    "qos": options.qos,
    "constraint": options.constraint,
    "array": None if num_tasks is None else f"0-{num_tasks - 1}%{options.max_parallel}",
    "export": ",".join(options.env) or "NONE",
    "signal": "TERM@120",
    "open-mode": "append",
  }
  texts = [f"--{name}={shlex.quote(str(value))}" for name, value in flags.items() if value is not None]
  return [*texts, "--requeue", *options.sbatch]


def batch_script(
  options: argparse.Namespace, trials: Sequence[SlurmTrial], folder: Path, code: Code, is_array: bool
) -> str:
  """Return the batch script; in an array, the number of the task selects its trial."""
  srun = ["--export=ALL", "--kill-on-bad-exit=1"]
  if options.cpus_per_task:
    srun.append(f"--cpus-per-task={options.cpus_per_task}")  # srun does not inherit it from sbatch
  if options.nodes * options.processes_per_node > 1:
    srun.append("--label")
  settings = [
    (f"workdir={shlex.quote(trial.workdir)}", f"arguments=({shlex.join(trial.arguments)})") for trial in trials
  ]
  if is_array:
    cases = [f"  {index})\n    {first}\n    {second}\n    ;;" for index, (first, second) in enumerate(settings)]
    selection = ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]
  else:
    selection = list(settings[0])
  head = [
    "#!/usr/bin/env bash",
    *(f"#SBATCH {flag}" for flag in sbatch_flags(options, folder, code.chdir, len(trials) if is_array else None)),
    "",
    "set -euo pipefail",
    "",
    f"commit={code.commit}",
    f"root={shlex.quote(str(code.root))}",
    f"llmjax={shlex.quote(code.llmjax)}",
    f"options=({shlex.join(srun)})",
    *selection,
  ]
  return "\n".join(head) + "\n" + BODY

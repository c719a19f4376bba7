#!/usr/bin/env python3
"""Submits runs of `llmjax` to SLURM. Needs nothing but Python 3.9 and SLURM's commands.

  submit   one run, in one process or several
  array    the trials of a sweep, an array task each
  queued   names of what is still pending or running, one a line
  cancel   ends what is

A job that is about to reach its time limit or is preempted saves and is queued again, one whose node died is queued
again, and the same command goes on from its workdir. A job that fails by itself or is cancelled ends.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import shipping
from command_line import Parser, Unsettled, positive, serve, split
from processes import find_llmjax

EXAMPLES = """\
What a job says is in WORKDIR/log.txt; its script, commit and number are in the folder slurm of --workdir or --folder.

examples:
  python3 launch/slurm.py submit --workdir=/shared/a --nodes=2 --gpus_per_node=8 --time=24:00:00 -- \\
    train --config=gpt:size=gpt2_124m
  the same with --env=WANDB_API_KEY       a variable of this shell, by name (with --ship also --setup=cuda,wandb)
  the same with --sbatch=--exclusive      any other flag of sbatch
  the same with --ship=/shared/code       runs this commit from there, whatever happens to this checkout
  the same with --dry_run                 prints every command and file, and does nothing
  python3 launch/slurm.py array --commands=FILE.jsonl --folder=/shared/sweep --max_parallel=4 --gpus_per_node=1
  python3 launch/slurm.py queued --folder=/shared/sweep
  python3 launch/slurm.py cancel --folder=/shared/sweep"""

# SLURM's words for a job that is not over.
ACTIVE = {
  "PENDING",
  "CONFIGURING",
  "RUNNING",
  "SUSPENDED",
  "STOPPED",
  "COMPLETING",
  "REQUEUED",
  "RESIZING",
  "SIGNALING",
}

# Behind what `script` writes: `commit`, `root` (its folder), `workdir`, `llmjax`, `options` of srun, and `arguments` of
# llmjax.
BODY = r"""
mkdir -p "$workdir"
exec >>"$workdir/log.txt" 2>&1
# Of an array's last task, the bare number names the whole array.
job="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
printf -- '-- job %s on %s, start %d\n' "$job" "$SLURM_JOB_NODELIST" "$((${SLURM_RESTART_COUNT:-0} + 1))"
# A checkout may have moved on; what is shipped has no .git.
now="$(git --git-dir="$root/.git" rev-parse HEAD 2>/dev/null)" || now="${commit%%-*}"
if [ "$now" != "${commit%%-*}" ]; then
  printf -- '-- job %s: submitted at %s, runs %s\n' "$job" "$commit" "$now"
fi

# Before the time limit, at a preemption with a grace time and when a job is cancelled, SLURM itself sends SIGTERM to
# all tasks: they save, and end with 130. This shell has to outlive them.
trap : TERM
export PYTHONUNBUFFERED=1 # lines come when they are said
code=0
srun "${options[@]}" "$llmjax" "${arguments[@]}" || code=$?
printf -- '-- job %s ended with %d after %d seconds\n' "$job" "$code" "$SECONDS"

# 143 had not yet begun to train. A job that is cancelled, or queued again by SLURM, is not RUNNING any more.
if { [ "$code" = 130 ] || [ "$code" = 143 ]; } &&
  [ "$(squeue --noheader --format=%T --jobs="$job")" = RUNNING ]; then
  printf -- '-- job %s is queued again\n' "$job"
  scontrol requeue "$job"
fi
exit "$code"
"""


def directives(options: argparse.Namespace, folder: Path, chdir: Path, count: int | None) -> list[str]:
  """Flags of sbatch; `count`: of an array's tasks, None for a single job."""
  folder_of_logs = str(folder / "slurm").replace("%", "%%")
  flags = {
    "job-name": options.name or folder.name,
    "chdir": chdir,
    "output": f"{folder_of_logs}/{'%j' if count is None else '%A_%a'}.log",
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
    "array": None if count is None else f"0-{count - 1}%{options.max_parallel}",
    "export": ",".join(options.env) or "NONE",
    "signal": "TERM@120",
    "open-mode": "append",
  }
  given = [f"--{name}={shlex.quote(str(value))}" for name, value in flags.items() if value is not None]
  return [*given, "--requeue", *options.sbatch]


def script(
  trials: Sequence[Mapping[str, Any]],
  flags: Sequence[str],
  srun: Sequence[str],
  llmjax: str,
  commit: str,
  root: Path,
  array: bool,
) -> str:
  """The batch script, which chooses the trial by the number of the array task."""
  choices = [
    (f"workdir={shlex.quote(trial['workdir'])}", f"arguments=({shlex.join(trial['arguments'])})") for trial in trials
  ]
  if array:
    cases = [f"  {index})\n    {first}\n    {second}\n    ;;" for index, (first, second) in enumerate(choices)]
    choice = ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]
  else:
    choice = list(choices[0])
  head = [
    "#!/usr/bin/env bash",
    *(f"#SBATCH {flag}" for flag in flags),
    "",
    "set -euo pipefail",
    "",
    f"commit={commit}",
    f"root={shlex.quote(str(root))}",
    f"llmjax={shlex.quote(llmjax)}",
    f"options=({shlex.join(srun)})",
    *choice,
  ]
  return "\n".join(head) + "\n" + BODY


def ask(words: Sequence[str], **how: Any) -> subprocess.CompletedProcess[str]:
  try:
    return subprocess.run(words, text=True, **how)
  except FileNotFoundError:
    raise Unsettled(f"{words[0]} was not found; run this on a machine of the cluster") from None


def call(words: Sequence[str], dry_run: bool, output: Path | None = None) -> None:
  """Runs a command, its output in a file or on standard output; prints it only where `dry_run`."""
  if dry_run:
    print(shlex.join(words) + (f" >{shlex.quote(str(output))}" if output else ""))
    return
  with open(output, "w") if output else open(1, "w", closefd=False) as out:
    code = ask(words, stdout=out).returncode
  if code:
    raise Unsettled(f"`{shlex.join(words)}` ended with exit code {code}, see above; mend it and run again")


def write(path: Path, text: str, dry_run: bool) -> None:
  if dry_run:
    place = shlex.quote(str(path))
    print(f"mkdir -p {shlex.quote(str(path.parent))}\ncat >{place} <<'END_OF_FILE'\n{text}END_OF_FILE")
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text, encoding="utf-8")


def recorded(folder: Path) -> dict[str, list[str]]:
  """{job: names of its array tasks in order} of what was submitted; `sbatch` itself wrote the job's number."""
  jobs = {}
  for path in sorted((folder / "slurm").glob("*.job"), key=lambda path: int(path.stem)):
    job = path.read_text(encoding="utf-8").strip().split(";")[0]
    if job:
      jobs[job] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["names"]
  return jobs


def looking(jobs: Sequence[str]) -> list[str]:
  return ["squeue", "--noheader", "--array", "--format=%F %K", f"--jobs={','.join(jobs)}"]


def queued(folder: Path, dry_run: bool = False) -> dict[str, str]:
  """{name: job} of what is pending or running, in the order in which it was submitted; empty where `dry_run`."""
  jobs = recorded(folder)
  if jobs and dry_run:
    print(shlex.join(looking(list(jobs))))
  if not jobs or dry_run:
    return {}
  done = ask(looking(list(jobs)), capture_output=True)
  if done.returncode and "Invalid job id" not in done.stderr:  # SLURM has forgotten what ended long ago
    raise Unsettled(f"squeue does not say what is queued ({done.stderr.strip()}); try again")
  there = {tuple(line.split()) for line in done.stdout.splitlines()}
  return {
    name: job
    for job, names in jobs.items()
    for index, name in enumerate(names)
    if (job, str(index)) in there or (job, "N/A") in there
  }


def ship(options: argparse.Namespace) -> tuple[str, Path]:
  """The commit, and the folder in which it is unpacked and installed."""
  commit = shipping.commit(shipping.ROOT, options.dirty)
  folder = Path(options.ship).absolute() / commit
  new, packed = f"{folder}.new", f"{folder}.tar.gz"
  dirty = ["--dirty"] if options.dirty else []
  unpacking = [
    ["mkdir", "-p", new],
    ["python3", str(shipping.ROOT / "launch" / "shipping.py"), f"--output={packed}", *dirty],
    ["tar", "-xzf", packed, "-C", new],
    ["rm", packed],
    ["mv", new, str(folder)],
  ]
  # The machine that submits need not have the accelerator.
  extra = options.setup if options.setup is not None else "cuda" if options.gpus_per_node else ""
  install = ["bash", "-c", '. "$0/launch/setup.sh" && setup "$1"', str(folder), extra]
  for words in [*([] if folder.exists() else unpacking), install]:
    call(words, options.dry_run)
  return commit, folder


def here() -> str:
  """The commit of this checkout, or of the archive that it was unpacked from."""
  path = shipping.ROOT / ".commit"
  return path.read_text().strip() if path.exists() else shipping.commit(shipping.ROOT, dirty=True)


def check(options: argparse.Namespace, trials: Sequence[Mapping[str, Any]]) -> None:
  """Refuses what could not go well."""
  gpus = (options.gpus_per_node or "").rpartition(":")[2]
  if gpus and options.processes_per_node not in (1, int(gpus)):
    raise ValueError(
      f"--processes_per_node={options.processes_per_node} must be 1, which has all GPUs of its node, or "
      f"--gpus_per_node={gpus}, which have one each"
    )
  for trial in trials:
    if "--fresh" in trial["arguments"]:
      raise ValueError(
        f"{trial['name']}: --fresh would start anew whenever the job is queued again; use another --workdir, or move "
        f"{trial['workdir']} away"
      )


def submit(options: argparse.Namespace, trials: Sequence[Mapping[str, Any]], folder: Path, array: bool) -> int:
  """Submits trials as one job; returns the exit code."""
  check(options, trials)
  values = shipping.secrets([name for name in options.env if name != "ALL"])
  busy = queued(folder, options.dry_run)
  for trial in trials:
    if trial["name"] in busy:
      raise Unsettled(
        f"{trial['name']} is still in the queue as job {busy[trial['name']]}; wait for it, or end it by "
        f"`{sys.argv[0]} cancel --folder={folder}`"
      )
  if options.ship:
    commit, chdir = ship(options)
    root, llmjax = chdir, str(chdir / ".venv" / "bin" / "llmjax")
  else:
    commit, root, chdir, llmjax = here(), shipping.ROOT, Path.cwd(), find_llmjax(options.venv)
  srun = ["--export=ALL", "--kill-on-bad-exit=1"]
  srun += [f"--cpus-per-task={options.cpus_per_task}"] if options.cpus_per_task else []  # which it does not take over
  srun += ["--label"] if options.nodes * options.processes_per_node > 1 else []
  flags = directives(options, folder, chdir, len(trials) if array else None)
  text = script(trials, flags, srun, llmjax, commit, root, array)
  for name, value in values.items():
    if value and value in text and re.search("KEY|TOKEN|SECRET|PASSWORD", name):
      raise ValueError(f"the value of {name} stands in the command, where others can see it; have llmjax read it there")
  place = folder / "slurm" / f"{len(list((folder / 'slurm').glob('*.json')))}.sh"
  about = {"commit": commit, "names": [trial["name"] for trial in trials]}
  write(place, text, options.dry_run)
  write(place.with_suffix(".json"), json.dumps(about) + "\n", options.dry_run)
  call(["sbatch", "--parsable", str(place)], options.dry_run, place.with_suffix(".job"))
  if options.dry_run:
    if options.wait:
      number = f'"$(cut -d ";" -f 1 {shlex.quote(str(place.with_suffix(".job")))})"'
      print(f"# again until it is over\n{shlex.join(showing())} {number}")
    return 0
  job = place.with_suffix(".job").read_text(encoding="utf-8").strip().split(";")[0]
  print(f"job {job}, {folder / 'slurm'}; end it by `{sys.argv[0]} cancel --folder={folder}`", flush=True)
  return wait(job, options.poll) if options.wait else 0


def showing(*job: str) -> list[str]:
  return ["scontrol", "--oneliner", "show", "job", *job]


def wait(job: str, poll: float) -> int:
  """Until all tasks of a job are over; returns 0 where all were completed, else the largest exit code, or 1.

  The job's own end is awaited rather than `sbatch --wait`, which says the job's number too late.
  """
  ended: dict[str, tuple[str, int]] = {}  # {task: its state, its exit code}
  while True:
    done = ask(showing(job), capture_output=True)
    if done.returncode and "Invalid job id" not in done.stderr:
      raise Unsettled(f"scontrol does not say what has become of job {job} ({done.stderr.strip()}); see its log")
    found = re.findall(r"\bJobId=(\d+)\b.*?\bJobState=(\w+).*?\bExitCode=(\d+):", done.stdout)
    ended |= {task: (state, int(code)) for task, state, code in found}
    if not any(state in ACTIVE for state, _ in ended.values()):
      break
    time.sleep(poll)
  if ended and all(state == "COMPLETED" for state, _ in ended.values()):
    return 0
  return max([1, *(code for _, code in ended.values())])


def placed(arguments: Sequence[str], workdir: Path) -> list[str]:
  """Arguments of llmjax that hold in any folder."""
  words = []
  for word in arguments:
    flag, equal, path = word.partition("=")
    local = flag == "--workdir" and equal and "://" not in path
    words.append(f"--workdir={Path(path).absolute()}" if local else word)
  named = any(word.split("=")[0] == "--workdir" for word in words)
  return words if named or words[0] != "train" else [*words, f"--workdir={workdir}"]


def run_submit(options: argparse.Namespace, command: Sequence[str]) -> int:
  workdir = Path(options.workdir).absolute()
  if not command:
    raise ValueError("nothing to run; put it behind --, such as `-- train --config=gpt:size=nano`")
  trial = {"name": workdir.name, "workdir": str(workdir), "arguments": placed(command, workdir)}
  return submit(options, [trial], workdir, array=False)


def run_array(options: argparse.Namespace, command: Sequence[str]) -> int:
  trials = []
  for number, line in enumerate(Path(options.commands).read_text(encoding="utf-8").splitlines(), 1):
    try:
      given = json.loads(line)
      workdir = Path(given["workdir"]).absolute()
      trials.append({"name": given["name"], "workdir": str(workdir), "arguments": placed(given["arguments"], workdir)})
    except (ValueError, KeyError, TypeError, IndexError):
      raise ValueError(
        f'{options.commands}:{number} must be {{"name": ..., "workdir": ..., "arguments": ["train", ...]}}'
      ) from None
  for key in ("name", "workdir"):
    seen = [trial[key] for trial in trials]
    twice = [value for value in seen if seen.count(value) > 1]
    if twice:
      raise ValueError(f"{options.commands}: two trials have the {key} {twice[0]}; each needs its own")
  if not trials:
    raise ValueError(f"{options.commands} has no trials; write a line for each")
  return submit(options, trials, Path(options.folder).absolute(), array=True)


def run_queued(options: argparse.Namespace, command: Sequence[str]) -> int:
  for name in queued(Path(options.folder).absolute(), options.dry_run):
    print(name)
  return 0


def run_cancel(options: argparse.Namespace, command: Sequence[str]) -> int:
  folder = Path(options.folder).absolute()
  there = queued(folder, options.dry_run)
  if not recorded(folder):
    raise ValueError(f"--folder={options.folder}: no job was submitted from there")
  jobs = list(recorded(folder)) if options.dry_run else list(dict.fromkeys(there.values()))
  if jobs:
    call(["scancel", *jobs], options.dry_run)
  return 0


def parser() -> Parser:
  made = Parser(prog="slurm.py", description=__doc__, epilog=EXAMPLES)
  commands = made.add_subparsers(dest="action", required=True, metavar="submit|array|queued|cancel")

  def add(function: Any, name: str, about: str) -> Parser:
    added: Parser = commands.add_parser(name, help=about, description=about)
    added.set_defaults(function=function)
    added.add_argument("--dry_run", action="store_true", help="print every command and file, and do nothing")
    return added

  one = add(run_submit, "submit", "Submits one run: flags, then -- and the arguments of llmjax.")
  one.add_argument("--workdir", required=True, metavar="DIR", help="of the run; seen by all nodes")
  many = add(run_array, "array", "Submits the trials of a sweep as an array.")
  many.add_argument(
    "--commands", required=True, metavar="FILE", help='lines {"name": ..., "workdir": ..., "arguments": [...]}'
  )
  many.add_argument("--folder", required=True, metavar="DIR", help="of the sweep; seen by all nodes")
  many.add_argument("--max_parallel", type=positive, default=4, metavar="N", help="trials at a time (default: 4)")
  for each in (one, many):
    each.add_argument("--nodes", type=positive, default=1, metavar="N", help="of a run (default: 1)")
    each.add_argument("--processes_per_node", type=positive, default=1, metavar="N", help="1, or one for each GPU")
    each.add_argument("--gpus_per_node", type=gpus, metavar="[TYPE:]N")
    each.add_argument("--cpus_per_task", type=positive, metavar="N", help="of each process")
    for name in ("time", "partition", "account", "qos", "constraint", "mem"):
      each.add_argument(f"--{name}", metavar=name.upper(), help=f"sbatch's --{name}")
    each.add_argument("--name", help="of the job (default: the folder's)")
    each.add_argument("--sbatch", action="append", default=[], metavar="FLAG", help="any other flag of sbatch")
    each.add_argument(
      "--env",
      action="append",
      default=[],
      metavar="NAME",
      help="a variable of this shell that the job gets besides those of a login; ALL is the whole environment",
    )
    each.add_argument(
      "--venv", metavar="DIR", help="whose llmjax runs (default: .venv beside this folder, or the PATH's)"
    )
    each.add_argument("--ship", metavar="DIR", help="a folder seen by all nodes; runs from DIR/COMMIT, installed there")
    each.add_argument("--dirty", action="store_true", help="ship uncommitted changes of tracked files")
    each.add_argument(
      "--setup",
      metavar="EXTRA",
      help="what --ship installs: cuda, cuda,wandb, jax[cuda12], or nothing more (default: cuda for GPUs)",
    )
    each.add_argument("--wait", action="store_true", help="until the job is over; the exit code is the job's")
    each.add_argument("--poll", type=float, default=5, metavar="SECONDS", help="between looks at it (default: 5)")
  for function, name, about in (
    (run_queued, "queued", "Prints the names of what is still pending or running, one a line."),
    (run_cancel, "cancel", "Cancels what is still pending or running."),
  ):
    add(function, name, about).add_argument(
      "--folder", required=True, metavar="DIR", help="that of array, or a workdir"
    )
  return made


def gpus(text: str) -> str:
  if not re.fullmatch(r"([\w-]+:)?[1-9]\d*", text):
    raise argparse.ArgumentTypeError(f"{text} must be a number, or TYPE:NUMBER such as a100:8")
  return text


def main(argv: Sequence[str]) -> int:
  own, command = split(argv)
  options = parser().parse_args(own)
  return int(options.function(options, command))


if __name__ == "__main__":
  serve(main, "what was submitted goes on")

#!/usr/bin/env python3
"""Run llmjax on Cloud TPU VMs: request them, install this commit on every worker, run, follow, delete.

The VMs are requested as a queued resource. If Google Cloud preempts them (spot), they are requested again and the run
resumes from its bucket. The VMs are deleted at the end, however the run ends, unless --keep or --existing is set. The
run survives a lost connection and the end of this script: the same command finds it again. Needs gcloud (logged in),
git, and Python 3.9; llmjax need not be installed here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import gcloud
import shipping
from arguments import LauncherParser, add_actions, add_shared_flags, check_command, check_name, parse_with_command
from command_line import MAX_TRIES, ROOT, OutcomeUnknown, pauses, print_status, run_main
from dry_run import tpu_vm_dry_run
from gcloud import VmsLost, error_line, on_all_workers, query_state, run_on_workers, worker_commands

EXAMPLES = """examples:
  python3 launch/tpu_vm.py run --name=a --zone=us-west4-a --type=v5litepod-16 --spot -- \\
    train --config=gpt:size=gpt2_124m --workdir=gs://BUCKET/a
  the same with --slices=2             several slices as one run (multislice)
  the same with --extra=wandb --env=WANDB_API_KEY     an extra of setup.py, and a variable of this shell
  the same with --dry_run              prints every command, and runs none
  python3 launch/tpu_vm.py run --name=mine --zone=us-west4-a --existing -- train ...     on an existing TPU VM
  python3 launch/tpu_vm.py logs --name=a --zone=us-west4-a --follow
  python3 launch/tpu_vm.py stop --name=a --zone=us-west4-a        the run saves and ends; the VMs stay
  python3 launch/tpu_vm.py delete --name=a --zone=us-west4-a

TPUs with several workers need the key in the ssh agent: ssh-add ~/.ssh/google_compute_engine"""

SAVE_TIMEOUT = 600.0  # seconds for a run to save after it was told to end


# Subcommands.


def run_on_vms(options: argparse.Namespace) -> int:
  """Request the VMs, install, run, follow and delete, again after a preemption; return the exit code of the run."""
  secrets = shipping.secret_values(options.env)
  keep = options.keep or options.existing
  interrupted = started = False
  with tempfile.TemporaryDirectory() as folder:
    archive = Path(folder) / "llmjax.tar.gz"
    commit = shipping.write_archive(ROOT, archive, options.dirty)
    print_status(f"commit {commit}")
    try:
      for _ in range(options.max_restarts + 1):
        try:
          acquire_vms(options)
          install_on_workers(options, archive, commit)
          start_on_workers(options, Path(folder), commit, secrets)
          started = True
          code = follow_run(options)
          if code is not None:
            print_status(f"{options.name}: the run has ended with exit code {code}")
            return code
          print_status(f"{options.name}: a worker has restarted and lost the run; starting it again")
        except VmsLost as lost:
          started = False
          state, reason = lost.args
          if state != "preempted" or options.existing:
            raise_permanent_failure(options, state, reason)
          print_status(f"{options.name}: preempted ({reason}); requesting it again")
      raise OutcomeUnknown(
        f"{options.name}: was lost {options.max_restarts + 1} times, with --max_restarts={options.max_restarts}. Run "
        "the same command to resume"
      )
    except (gcloud.VmsNotOurs, ValueError):  # there are no VMs of this run to delete
      keep = True
      raise
    except KeyboardInterrupt:
      interrupted = True
      print_status(f"{options.name} is {'left running' if keep else 'being deleted; Ctrl-C again leaves it as it is'}")
      raise
    finally:
      if not keep:
        release_vms(options, save_first=interrupted and started)


def print_vm_status(options: argparse.Namespace) -> int:
  state, reason = query_state(options)
  if state == "unknown":
    raise OutcomeUnknown(f"{options.name}: {reason}")
  print(f"{options.name}: {state} ({reason})")
  if state == "active":
    for host, worker_state in worker_states(options).items():
      print(f"{host}: {worker_state}")
  return 0


def print_run_log(options: argparse.Namespace) -> int:
  follow_log(options, visible=True, wait=options.follow)
  return 0


def stop_run(options: argparse.Namespace) -> int:
  save_and_end(options)
  print_status(f"{options.name}: the run was told to save, and has ended; the VMs stay until they are deleted")
  return 0


def delete_vms(options: argparse.Namespace) -> int:
  release_vms(options)
  return 0


# Steps of a run: request, install, start, follow, delete.


def acquire_vms(options: argparse.Namespace) -> None:
  """Request the VMs unless they exist, and wait until they are active."""
  state, reason = query_state(options)
  if state == "unknown":
    raise gcloud.VmsNotOurs(f"{options.name}: gcloud does not report whether it exists ({reason})")
  if options.existing and state != "active":
    raise_permanent_failure(options, state, reason)
  if state in ("preempted", "failed", "deleting"):
    print_status(f"{options.name}: deleting what is left of it ({reason})")
    release_vms(options)
    state = "absent"
  if state == "absent":
    request_vms(options)
  else:
    print_status(f"{options.name}: already exists")
  printed_reason = ""
  for pause in pauses(options.poll):
    state, reason = query_state(options)
    if state == "active":
      print_status(f"{options.name}: active")
      return
    if state not in ("waiting", "unknown"):
      raise VmsLost(state, reason)
    if reason != printed_reason:
      print_status(f"{options.name}: waiting ({reason})")
      printed_reason = reason
    time.sleep(pause)


def request_vms(options: argparse.Namespace) -> None:
  if not options.type:
    raise ValueError(f"--name={options.name}: does not exist, and requesting it needs --type, such as v5litepod-16")
  print_status(f"{options.name}: requesting {options.slices} x {options.type}")
  code, _, errors = gcloud.run_parallel([gcloud.create_request_command(options)])[0]
  if code and "ALREADY_EXISTS" not in errors:
    raise VmsLost("failed", error_line(errors))


def raise_permanent_failure(options: argparse.Namespace, state: str, reason: str) -> NoReturn:
  """Raise OutcomeUnknown for a failure that a retry does not fix."""
  quota = re.search(r"[Qq]uota (?:limit |metric )?'([^']+)'", reason)
  if quota or "RESOURCE_EXHAUSTED" in reason:
    raise OutcomeUnknown(
      f"{options.name}: the quota {quota[1] if quota else 'for TPUs'} is used up ({reason}). Delete unused queued "
      f"resources (gcloud compute tpus queued-resources list --zone={options.zone}), request more quota at "
      "https://console.cloud.google.com/iam-admin/quotas, or choose another --zone, --type or --spot"
    )
  if options.existing:
    raise OutcomeUnknown(f"{options.name}: is {state} ({reason}). --existing needs a READY TPU VM in {options.zone}")
  if state in ("absent", "deleting"):
    raise OutcomeUnknown(
      f"{options.name}: was deleted by someone else ({reason}). Run the same command to request it again"
    )
  raise OutcomeUnknown(
    f"{options.name}: {state} ({reason}). Fix it, or choose another --zone or --type, and run the same command again"
  )


def install_on_workers(options: argparse.Namespace, archive: Path, commit: str) -> None:
  """Install the commit and its extras on all workers, unless they are installed."""
  if any(code for code, _, _ in gcloud.run_parallel(on_all_workers(options, gcloud.ready_command(options, commit)))):
    print_status(f"{options.name}: installing {commit} on all workers (some minutes)")
    target = f"llmjax-{commit}.tar.gz"
    run_on_workers(options, gcloud.scp_commands(options, str(archive), target))
    run_on_workers(options, on_all_workers(options, gcloud.install_command(options, commit)))


def start_on_workers(options: argparse.Namespace, folder: Path, commit: str, secrets: dict[str, str]) -> None:
  """Start the run on all workers, except where it is already running."""
  coordinator = run_on_workers(options, [gcloud.address_command(options)])[0].strip() if options.slices > 1 else ""
  copies = []
  for index, node in enumerate(gcloud.node_names(options)):
    variables = {**secrets, **gcloud.slice_variables(options, coordinator, index)}
    path = folder / f"environment-{index}"
    path.touch(mode=0o600)  # scp keeps the mode
    path.write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items()))
    if variables:
      copies.append(gcloud.scp_command(options, node, str(path), ".llmjax-environment"))
  if copies:
    run_on_workers(options, copies)
  print_status(f"{options.name}: running llmjax {shlex.join(options.arguments)}")
  run_on_workers(options, on_all_workers(options, gcloud.start_command(options, commit)))


def follow_run(options: argparse.Namespace) -> int | None:
  """Print the log of worker 0 until the run ends on all workers; return its exit code, None if a worker lost it."""
  first_state = follow_log(options, visible=options.follow, wait=True)
  for pause in pauses(options.poll, MAX_TRIES):
    states = worker_states(options)
    if "running" not in states.values():
      break
    time.sleep(pause)
  else:
    print_status(f"{options.name}: worker 0 is {first_state} and others are still running; stopping them")
    run_on_workers(options, worker_commands(options, "stop"))
  if {"lost", "none"} & set(states.values()):
    return None
  codes = [int(state.partition(" ")[2] or 1) for state in [first_state, *states.values()]]
  code = next((code for code in codes if code), 0)
  if code:
    for output in run_on_workers(options, worker_commands(options, "errors")):
      print(output, file=sys.stderr, end="")
  return code


def follow_log(options: argparse.Namespace, visible: bool, wait: bool) -> str:
  """Read the log of worker 0 of the first slice, with `wait` until the run ends there; return the worker's state."""
  offset = 0
  while True:
    output = run_on_workers(options, [gcloud.run_log_command(options, offset)])[0]
    # gcloud may have connected twice, so that only the part after the last mark counts.
    head, _, text = output.rpartition(gcloud.STATE_MARK)[2].partition("\n")
    state, chunk = head.partition(" ")[2], os.fsencode(text)
    offset += len(chunk)
    if visible:
      sys.stdout.buffer.write(chunk)
      sys.stdout.flush()
    if len(chunk) == gcloud.LOG_CHUNK:
      continue
    if state != "running" or not wait:
      return state
    time.sleep(options.poll)


def worker_states(options: argparse.Namespace) -> dict[str, str]:
  """Return {host name: state} of all workers."""
  output = "".join(run_on_workers(options, worker_commands(options, "report")))
  return dict(re.findall(f"{gcloud.STATE_MARK}(\\S+) (.+)", output))


def release_vms(options: argparse.Namespace, save_first: bool = False) -> None:
  """Delete the VMs; with `save_first` after their run has saved and ended."""
  command = gcloud.delete_request_command(options)
  fix = f"and may cost money; delete it with: {shlex.join(command)}"
  try:
    if save_first:
      with contextlib.suppress(VmsLost, OutcomeUnknown):
        save_and_end(options)
    for pause in pauses(options.poll, MAX_TRIES):
      code, _, errors = gcloud.run_parallel([command])[0]
      if not code or "NOT_FOUND" in errors:
        print_status(f"{options.name}: deleted")
        return
      time.sleep(pause)
    print_status(f"{options.name} could not be deleted ({error_line(errors)}), {fix}")
  except KeyboardInterrupt:
    print_status(f"{options.name} is left as it is, {fix}")
    raise


def save_and_end(options: argparse.Namespace) -> None:
  """End the run as a preemption would, and wait until all workers have ended; at most SAVE_TIMEOUT seconds."""
  run_on_workers(options, worker_commands(options, "stop"))
  deadline = time.monotonic() + SAVE_TIMEOUT
  while "running" in worker_states(options).values():
    if time.monotonic() > deadline:
      raise OutcomeUnknown(f"{options.name}: was told to end, and is still running after {SAVE_TIMEOUT:g} seconds")
    time.sleep(options.poll)


# Command line.

TPU_VM_ACTIONS = {
  "run": (run_on_vms, "request VMs, install, run, follow, delete"),
  "status": (print_vm_status, "print the state of the VMs and their workers"),
  "logs": (print_run_log, "print the log of worker 0"),
  "stop": (stop_run, "have the run save and end, and wait for that; the VMs stay"),
  "delete": (delete_vms, "delete the queued resource and its VMs"),
}


def parse_tpu_vm_flags(argv: Sequence[str]) -> argparse.Namespace:
  parser = LauncherParser(prog="tpu_vm.py", description=__doc__, epilog=EXAMPLES)
  actions = add_actions(parser, TPU_VM_ACTIONS)
  for subparser in actions.values():
    add_shared_flags(subparser, "name", "slices")
    add_shared_flags(subparser, "poll", default=10)
    add = subparser.add_argument
    add("--zone", required=True, help="zone of Google Cloud, such as us-west4-a")
    add("--project", help="project of Google Cloud (default: that of gcloud's configuration)")
    add("--existing", action="store_true", help="NAME is an existing TPU VM, which is never deleted")
    add("--internal_ips", action="store_true", help="no external addresses; this machine is in the same network")
  add_shared_flags(actions["logs"], "follow")
  run = actions["run"]
  add_shared_flags(run, "follow", default=True)
  add_shared_flags(run, "no_follow", "service_account", "env", "extra", "max_restarts", "dirty")
  run.add_argument("--type", help="type of each slice, such as v5litepod-16, v5p-8, v6e-8, v4-8")
  run.add_argument("--runtime_version", help="runtime version of the VMs (default: by --type)")
  run.add_argument("--network", help="network of the VMs (default: default)")
  run.add_argument("--subnetwork", help="subnetwork of the VMs")
  run.add_argument("--keep", action="store_true", help="leave the VMs at the end, and the run after Ctrl-C")
  capacity = run.add_mutually_exclusive_group()
  add_shared_flags(capacity, "spot")
  capacity.add_argument("--reserved", action="store_true", help="capacity of the project's reservation")
  options = parse_with_command(parser, argv)
  check_name(options.name, 60)
  if options.action == "delete" and options.existing:
    raise ValueError("--existing: an existing TPU VM is not deleted. Omit --existing to delete a queued resource")
  if options.action == "run":
    check_tpu_vm_run(options)
  return options


def check_tpu_vm_run(options: argparse.Namespace) -> None:
  """Raise ValueError for flags with which the run would fail later."""
  temporary_disk = "" if options.keep or options.existing else "the VMs and their disks are deleted at the end"
  check_command(options.arguments, temporary_disk, "or use --keep")
  family, _, size = (options.type or "").rpartition("-")
  if options.type and not (size.isdigit() and (family in gcloud.RUNTIMES or options.runtime_version)):
    types = ", ".join(f"{name}-N" for name in gcloud.RUNTIMES)
    raise ValueError(f"--type: must be {types}, got {options.type}. Other types need --runtime_version too")


def main(argv: Sequence[str]) -> int:
  options = parse_tpu_vm_flags(argv)
  if options.dry_run:
    shipping.secret_values(getattr(options, "env", []))  # report missing variables
    print("\n".join(tpu_vm_dry_run(options)))
    return 0
  try:
    return TPU_VM_ACTIONS[options.action][0](options)
  except VmsLost as lost:
    raise OutcomeUnknown(f"{options.name} is {lost.args[0]} ({lost.args[1]}). `run` requests it again") from None


if __name__ == "__main__":
  run_main(main, "the same command resumes")

#!/usr/bin/env python3
"""Runs llmjax on Cloud TPU VMs: requests them, installs this commit on every worker, runs, follows, deletes.

A queued resource is requested, waited for, and used; where Google Cloud takes the VMs away (spot), they are requested
anew and the same command goes on from its bucket. The VMs are deleted at the end, however the run ends, unless --keep
or --existing says otherwise. A run survives a lost connection and the end of this script: the same command finds it
again. Needs gcloud (logged in), git, and Python 3.9; llmjax need not be installed here.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import gcloud
import shipping
from command_line import Parser, Unsettled, pauses, positive, serve, split
from gcloud import MARK, RUNTIMES, TRIES, Gone, Untouched, everywhere, last, look, nodes, remote, say, worker

EXAMPLES = """examples:
  python3 launch/tpu_vm.py run --name=a --zone=us-west4-a --type=v5litepod-16 --spot -- \\
    train --config=gpt:size=gpt2_124m --workdir=gs://BUCKET/a
  the same with --slices=2             several slices as one run (multislice)
  the same with --extra=wandb --env=WANDB_API_KEY     an extra of setup.py, and a variable of this shell, by name
  the same with --dry_run              prints every command, and runs none
  python3 launch/tpu_vm.py run --name=mine --zone=us-west4-a --existing -- train ...     on a TPU VM that is there
  python3 launch/tpu_vm.py logs --name=a --zone=us-west4-a --follow
  python3 launch/tpu_vm.py stop --name=a --zone=us-west4-a        the run saves and ends; the VMs stay
  python3 launch/tpu_vm.py delete --name=a --zone=us-west4-a

TPUs with several workers need the key in the agent: ssh-add ~/.ssh/google_compute_engine"""

MEGASCALE_PORT = 8081  # between slices; what Ray's TPU support uses
CHUNK = 1_000_000  # bytes of a log at once
SAVING = 600.0  # seconds that a run which is told to end may reasonably take to save

# The life of a run: requested, waiting, active, installed, running, ended; and again from the start if preempted.


def run(options: argparse.Namespace) -> int:
  secrets = shipping.secrets(options.env)
  keep = options.keep or options.existing
  interrupted = begun = False
  with tempfile.TemporaryDirectory() as folder:
    archive = Path(folder) / "llmjax.tar.gz"
    commit = shipping.archive(shipping.ROOT, archive, options.dirty)
    say(f"commit {commit}")
    try:
      for _ in range(options.max_restarts + 1):
        try:
          acquire(options)
          install(options, archive, commit)
          begin(options, Path(folder), commit, secrets)
          begun = True
          code = follow(options)
          if code is not None:
            say(f"{options.name}: the run has ended with exit code {code}")
            return code
          say(f"{options.name}: a worker has restarted and lost the run; starting it again")
        except Gone as gone:
          begun = False
          state, why = gone.args
          if state != "preempted" or options.existing:
            refuse(options, state, why)
          say(f"{options.name}: preempted ({why}); requesting it anew")
      raise Unsettled(
        f"{options.name} was lost {options.max_restarts + 1} times, and --max_restarts={options.max_restarts}; run the "
        "same command to go on"
      )
    except (Untouched, ValueError):  # what is there is not ours, or nothing is
      keep = True
      raise
    except KeyboardInterrupt:
      interrupted = True
      say(f"{options.name} is {'left running' if keep else 'being deleted; Ctrl-C again leaves it as it is'}")
      raise
    finally:
      if not keep:
        release(options, saving=interrupted and begun)


def acquire(options: argparse.Namespace) -> None:
  """Returns when the VMs are active: those that are there, or new ones."""
  state, why = look(options)
  if state == "unknown":
    raise Untouched(f"gcloud cannot tell whether {options.name} exists: {why}")
  if options.existing and state != "active":
    refuse(options, state, why)
  if state in ("preempted", "failed", "deleting"):
    say(f"{options.name}: deleting what is left of it ({why})")
    release(options)
    state = "absent"
  if state == "absent":
    request(options)
  else:
    say(f"{options.name} is there")
  said = ""
  for pause in pauses(options.poll):
    state, why = look(options)
    if state == "active":
      say(f"{options.name}: active")
      return
    if state not in ("waiting", "unknown"):
      raise Gone(state, why)
    if why != said:
      say(f"{options.name}: waiting ({why})")
      said = why
    time.sleep(pause)


def request(options: argparse.Namespace) -> None:
  if not options.type:
    raise ValueError(f"there is no {options.name}, and requesting it needs --type, such as --type=v5litepod-16")
  say(f"{options.name}: requesting {options.slices} x {options.type}")
  code, _, errors = gcloud.together([gcloud.create(options)])[0]
  if code and "ALREADY_EXISTS" not in errors:
    raise Gone("failed", last(errors))


def refuse(options: argparse.Namespace, state: str, why: str) -> NoReturn:
  """Says what trying again does not mend."""
  quota = re.search(r"[Qq]uota (?:limit |metric )?'([^']+)'", why)
  if quota or "RESOURCE_EXHAUSTED" in why:
    raise Unsettled(
      f"{options.name}: the quota {quota[1] if quota else 'for TPUs'} is used up ({why}); delete queued resources that "
      f"are left over (gcloud compute tpus queued-resources list --zone={options.zone}), ask for more at "
      "https://console.cloud.google.com/iam-admin/quotas, or choose another --zone, --type or --spot"
    )
  if options.existing:
    raise Unsettled(f"{options.name} is {state} ({why}); --existing needs a TPU VM in {options.zone} that is READY")
  if state in ("absent", "deleting"):
    raise Unsettled(f"{options.name} was deleted by someone else ({why}); run the same command to request it anew")
  raise Unsettled(f"{options.name} {state}: {why}; mend it, or choose another --zone or --type, and run again")


def install(options: argparse.Namespace, archive: Path, commit: str) -> None:
  """The commit and its extras on all workers; quick where they are there."""
  if any(code for code, _, _ in gcloud.together(everywhere(options, ready(options, commit)))):
    say(f"{options.name}: installing {commit} on all workers (some minutes)")
    remote(options, [gcloud.scp(options, node, str(archive), f"llmjax-{commit}.tar.gz") for node in nodes(options)])
    remote(options, everywhere(options, unpack(options, commit)))


def ready(options: argparse.Namespace, commit: str) -> str:
  return worker("ready", commit, extras(options), script=f"llmjax-{commit}/launch/tpu_worker.sh")


def extras(options: argparse.Namespace) -> str:
  """What pip installs; without `gcs` nothing can be saved in a bucket."""
  return ",".join(dict.fromkeys(["tpu", "gcs", *options.extra]))


def unpack(options: argparse.Namespace, commit: str) -> str:
  install = worker("install", commit, extras(options), script=f"llmjax-{commit}/launch/tpu_worker.sh")
  return f"mkdir -p llmjax-{commit} && tar -xzf llmjax-{commit}.tar.gz -C llmjax-{commit} && {install}"


def begin(options: argparse.Namespace, folder: Path, commit: str, secrets: dict[str, str]) -> None:
  """Starts the run on all workers, where it is not running already."""
  first = remote(options, [gcloud.address(options)])[0].strip() if options.slices > 1 else ""
  copies = []
  for index, node in enumerate(nodes(options)):
    variables = {**secrets, **slice_variables(options, first, index)}
    path = folder / f"environment-{index}"
    path.touch(mode=0o600)  # scp keeps the mode
    path.write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items()))
    if variables:
      copies.append(gcloud.scp(options, node, str(path), ".llmjax-environment"))
  if copies:
    remote(options, copies)
  say(f"{options.name}: running llmjax {shlex.join(options.arguments)}")
  remote(options, everywhere(options, start(options, commit)))


def start(options: argparse.Namespace, commit: str) -> str:
  """Equal runs have equal names: a run that is found under its name is followed, and not started twice."""
  name = hashlib.sha256(json.dumps([commit, options.arguments]).encode()).hexdigest()[:12]
  return worker("begin", name, commit, *options.arguments)


def slice_variables(options: argparse.Namespace, first: str, index: int) -> dict[str, str]:
  """Where the slices meet, and which this is.

  JAX (jax/_src/clusters/cloud_tpu_cluster.py) and libtpu take them from the environment, and else from the VM's
  metadata, which slices of one queued resource have, and existing VMs need not.
  """
  if options.slices == 1:
    return {}
  return {
    "MEGASCALE_COORDINATOR_ADDRESS": first,
    "MEGASCALE_PORT": str(MEGASCALE_PORT),
    "MEGASCALE_NUM_SLICES": str(options.slices),
    "MEGASCALE_SLICE_ID": str(index),
  }


def follow(options: argparse.Namespace) -> int | None:
  """Shows the log of worker 0 until the run ends on all workers; its exit code, None where a worker has lost it."""
  first = show(options, visible=options.follow, wait=True)
  for pause in itertools.islice(pauses(options.poll), TRIES):
    states = workers(options)
    if "running" not in states.values():
      break
    time.sleep(pause)
  else:
    say(f"{options.name}: worker 0 is {first}, and others go on; stopping them")
    remote(options, everywhere(options, worker("stop")))
  if {"lost", "none"} & set(states.values()):
    return None
  codes = [int(state.partition(" ")[2] or 1) for state in [first, *states.values()]]
  code = next((code for code in codes if code), 0)
  if code:
    for output in remote(options, everywhere(options, worker("errors"))):
      print(output, file=sys.stderr, end="")
  return code


def show(options: argparse.Namespace, visible: bool, wait: bool) -> str:
  """Prints the log of worker 0 of the first slice as it grows, or as it is; its state."""
  offset = 0
  while True:
    state, text = read(options, offset)
    offset += len(text)
    if visible:
      sys.stdout.buffer.write(text)
      sys.stdout.flush()
    if len(text) == CHUNK:
      continue
    if state != "running" or not wait:
      return state
    time.sleep(options.poll)


def read(options: argparse.Namespace, offset: int) -> tuple[str, bytes]:
  """The state of that worker, and at most CHUNK bytes that its log has behind the offset."""
  output = remote(options, [log(options, offset)])[0]
  head, _, text = output.rpartition(MARK)[2].partition("\n")  # behind the last: gcloud may have connected twice
  return head.partition(" ")[2], os.fsencode(text)


def log(options: argparse.Namespace, offset: int) -> list[str]:
  return gcloud.ssh(options, nodes(options)[0], "0", worker("log", str(offset), str(CHUNK)))


def workers(options: argparse.Namespace) -> dict[str, str]:
  """The state of each worker by its host's name."""
  output = "".join(remote(options, everywhere(options, worker("report"))))
  return dict(re.findall(f"{MARK}(\\S+) (.+)", output))


def release(options: argparse.Namespace, saving: bool = False) -> None:
  """Deletes the VMs; `saving`: after their run, which is told to end, has saved."""
  command = shlex.join(gcloud.delete(options))
  try:
    if saving:
      with contextlib.suppress(Gone, Unsettled):
        save(options)
    for pause in itertools.islice(pauses(options.poll), TRIES):
      code, _, errors = gcloud.together([gcloud.delete(options)])[0]
      if not code or "NOT_FOUND" in errors:
        say(f"{options.name}: deleted")
        return
      time.sleep(pause)
    say(f"{options.name} could not be deleted ({last(errors)}), and may cost money; delete it with: {command}")
  except KeyboardInterrupt:
    say(f"{options.name} is left as it is, and may cost money; delete it with: {command}")
    raise


def save(options: argparse.Namespace) -> None:
  """Ends the run as a preemption would, and waits until no worker runs any more; Unsettled after SAVING seconds."""
  remote(options, everywhere(options, worker("stop")))
  deadline = time.monotonic() + SAVING
  while "running" in workers(options).values():
    if time.monotonic() > deadline:
      raise Unsettled(f"{options.name}: the run was told to end, and still goes on after {SAVING:g} seconds")
    time.sleep(options.poll)


# The other subcommands.


def status(options: argparse.Namespace) -> int:
  state, why = look(options)
  if state == "unknown":
    raise Unsettled(f"{options.name}: {why}")
  print(f"{options.name}: {state} ({why})")
  if state == "active":
    for host, doing in workers(options).items():
      print(f"{host}: {doing}")
  return 0


def logs(options: argparse.Namespace) -> int:
  show(options, visible=True, wait=options.follow)
  return 0


def stop(options: argparse.Namespace) -> int:
  save(options)
  say(f"{options.name}: the run was told to save, and has ended; the VMs stay until they are deleted")
  return 0


def delete_all(options: argparse.Namespace) -> int:
  release(options)
  return 0


# What --dry_run prints.


def plan(options: argparse.Namespace) -> Iterator[str]:
  """Every command, for a shell; of a run, those where nothing goes wrong."""
  state = [] if options.existing else [gcloud.describe(options)]
  state += [gcloud.describe_node(options, node) for node in nodes(options)]
  if options.action == "status":
    yield from lines("what there is, and what its workers do", *state, *everywhere(options, worker("report")))
  elif options.action == "logs":
    yield from lines("again from where it ended", log(options, 0))
  elif options.action == "stop":
    yield from lines("SIGTERM on all workers", *everywhere(options, worker("stop")))
    yield from lines("until all workers have ended", *everywhere(options, worker("report")))
  elif options.action == "delete":
    yield from lines("with its VMs", gcloud.delete(options))
  else:
    commit = shipping.commit(shipping.ROOT, options.dirty)
    archive = f"/tmp/llmjax-{commit}.tar.gz"
    ship = ["python3", shipping.__file__, f"--output={archive}", *(["--dirty"] if options.dirty else [])]
    yield from lines("the code", ship)
    if not options.existing:
      create = [gcloud.create(options)] if options.type else []
      yield from lines("the VMs, unless they are there", gcloud.describe(options), *create)
    yield from lines("until all are ACTIVE and READY", *state)
    yield from lines("whether this commit is installed; else:", *everywhere(options, ready(options, commit)))
    yield from lines("", *(gcloud.scp(options, node, archive, Path(archive).name) for node in nodes(options)))
    yield from lines("", *everywhere(options, unpack(options, commit)))
    yield from variables_plan(options)
    yield from lines("the run, unless it is going on", *everywhere(options, start(options, commit)))
    yield from lines("its log, again from where it ended", log(options, 0))
    yield from lines("until all workers have ended", *everywhere(options, worker("report")))
    yield from lines("if it failed", *everywhere(options, worker("errors")))
    if not (options.keep or options.existing):
      yield from lines("after Ctrl-C", *everywhere(options, worker("stop")))
      yield from lines("at the end, however it came", gcloud.delete(options))


def lines(comment: str, *commands: Sequence[str]) -> Iterator[str]:
  if comment:
    yield f"# {comment}"
  yield from map(shlex.join, commands)


def variables_plan(options: argparse.Namespace) -> Iterator[str]:
  """Values stay names."""
  if options.slices > 1:
    yield f'ADDRESS="$({shlex.join(gcloud.address(options))})"'
  for index, node in enumerate(nodes(options)):
    values = {name: f'"${name}"' for name in options.env}
    values.update({name: value or '"$ADDRESS"' for name, value in slice_variables(options, "", index).items()})
    if values:
      path = f"/tmp/llmjax-environment-{index}"
      yield "# variables of the run, which are in no command line"
      yield f"(umask 077; printf '%s=%q\\n' {' '.join(f'{name} {value}' for name, value in values.items())} >{path})"
      yield shlex.join(gcloud.scp(options, node, path, ".llmjax-environment"))
      yield f"rm {path}"


# The command line.

ACTIONS = {
  "run": (run, "request VMs, install, run, follow, delete"),
  "status": (status, "what there is, and what its workers do"),
  "logs": (logs, "the log of worker 0"),
  "stop": (stop, "have the run save and end, and wait for that; the VMs stay"),
  "delete": (delete_all, "delete the queued resource and its VMs"),
}


def parse(words: Sequence[str]) -> argparse.Namespace:
  own, arguments = split(words)
  parser = Parser(prog="tpu_vm.py", description=__doc__, epilog=EXAMPLES)
  actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(ACTIONS))
  for name, (_, text) in ACTIONS.items():
    add = actions.add_parser(name, help=text, description=text, epilog=EXAMPLES).add_argument
    add("--name", required=True, help="of the queued resource and its node (several slices: NAME-0, NAME-1, ...)")
    add("--zone", required=True)
    add("--project", help="(the one that gcloud is set to)")
    add("--slices", type=positive, default=1, help="of one multislice run (1)")
    add("--existing", action="store_true", help="NAME is a TPU VM that is there; it is never deleted")
    add("--internal_ips", action="store_true", help="no external addresses; this machine is in the same network")
    add("--poll", type=float, default=10, help="seconds between two looks (10)")
    add("--dry_run", action="store_true", help="print every command, and run none")
    if name in ("run", "logs"):
      add("--follow", action="store_true", default=name == "run", help="show the log as it grows")
    if name == "run":
      add("--no_follow", dest="follow", action="store_false", help="wait without showing the log")
      add("--type", help="of each slice, such as v5litepod-16, v5p-8, v6e-8, v4-8")
      add("--runtime_version", help="(by the type)")
      capacity = actions.choices[name].add_mutually_exclusive_group()
      capacity.add_argument("--spot", action="store_true", help="cheaper, and may be taken away: the run then goes on")
      capacity.add_argument("--reserved", action="store_true", help="of the project's reservation")
      add("--network", help="(default)")
      add("--subnetwork")
      add("--service_account", help="e-mail address of what the VMs act as (Compute Engine's default)")
      add("--env", action="append", default=[], metavar="NAME", help="variable that the run gets too; repeatable")
      add(
        "--extra",
        type=shipping.extras,
        default=[],
        metavar="NAME[,NAME]",
        help="of setup.py, such as wandb, installed besides tpu,gcs",
      )
      add("--keep", action="store_true", help="leave the VMs at the end, and the run after Ctrl-C")
      add("--max_restarts", type=int, default=100, help="after preemptions (100)")
      add("--dirty", action="store_true", help="ship uncommitted changes of tracked files")
  options = parser.parse_args(own)
  options.arguments = arguments
  check(options)
  return options


def check(options: argparse.Namespace) -> None:
  """Refuses what would fail late."""
  if not re.fullmatch(r"[a-z]([a-z0-9-]{0,58}[a-z0-9])?", options.name):
    raise ValueError(
      f"--name={options.name} must be lower-case letters, digits and hyphens, from a letter to no hyphen"
    )
  if options.action == "delete" and options.existing:
    raise ValueError("delete --existing: an existing TPU VM is not deleted; leave --existing out for a queued resource")
  if options.action != "run":
    return
  if not options.arguments:
    raise ValueError("nothing to run; put llmjax's subcommand and flags behind --, such as -- train --config=gpt")
  family, _, size = (options.type or "").rpartition("-")
  if options.type and not (size.isdigit() and (family in RUNTIMES or options.runtime_version)):
    raise ValueError(
      f"--type={options.type} must be {', '.join(f'{name}-N' for name in RUNTIMES)}; others need --runtime_version too"
    )
  bucket = any(re.match(r"--workdir=gs://.", argument) for argument in options.arguments)
  if options.arguments[0] == "train" and not (bucket or options.keep or options.existing):
    raise ValueError(
      "train needs --workdir=gs://BUCKET/..., since the VMs and their disks are deleted at the end; or --keep them"
    )


def main(words: Sequence[str]) -> int:
  options = parse(words)
  if options.dry_run:
    shipping.secrets(getattr(options, "env", []))  # those that are missing are told
    print("\n".join(plan(options)))
    return 0
  try:
    return ACTIONS[options.action][0](options)
  except Gone as gone:
    raise Unsettled(f"{options.name} is {gone.args[0]} ({gone.args[1]}); run requests it anew") from None


if __name__ == "__main__":
  serve(main, "the same command goes on")

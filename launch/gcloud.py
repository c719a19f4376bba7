"""The gcloud commands of tpu_vm.py as lists of words, how they are run, and what their answers mean.

Functions take the flags of tpu_vm.py as `options`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

from command_line import Unsettled, pauses

# https://cloud.google.com/tpu/docs/runtimes: what JAX uses.
RUNTIMES = {
  "v2": "tpu-ubuntu2204-base",
  "v3": "tpu-ubuntu2204-base",
  "v4": "tpu-ubuntu2204-base",
  "v5litepod": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
}

# The states of a queued resource (google.cloud.tpu.v2.QueuedResourceState.State) and of a node (Node.State), as what
# they mean here. `look` adds "absent", where there is no such thing, and "unknown", where gcloud cannot say.
QUEUED = {
  "CREATING": "waiting",
  "ACCEPTED": "waiting",
  "WAITING_FOR_RESOURCES": "waiting",
  "PROVISIONING": "waiting",
  "ACTIVE": "active",
  "SUSPENDING": "preempted",
  "SUSPENDED": "preempted",
  "FAILED": "failed",
  "DELETING": "deleting",
}
NODE = {
  "CREATING": "waiting",
  "STARTING": "waiting",
  "RESTARTING": "waiting",
  "REIMAGING": "waiting",
  "REPAIRING": "waiting",
  "READY": "active",
  "STOPPING": "stopped",
  "STOPPED": "stopped",
  "PREEMPTED": "preempted",
  "TERMINATED": "preempted",
  "DELETING": "deleting",
}

TRIES = 20  # of a connection, before giving up
BROKEN, BUSY, MISSING = 65, 66, 127  # exit codes of tpu_worker.sh, or without it; ssh has 255, gcloud 1
MARK = "\036llmjax "  # before the state of a worker
NOISE = r"(SSH|SCP|Retrying): |Using (ssh|scp) batch size|#####|SSH key found|Failed to execute command on multiple"


class Gone(Exception):
  """The VMs are not active any more; `args` are what they are instead, and why."""


class Untouched(Unsettled):
  """What is there is not ours to delete."""


def gcloud(options: argparse.Namespace, *words: str) -> list[str]:
  project = [f"--project={options.project}"] if options.project else []
  return ["gcloud", "compute", "tpus", *words, f"--zone={options.zone}", *project, "--quiet"]


def create(options: argparse.Namespace) -> list[str]:
  several = options.slices > 1
  given = {
    "node-id": "" if several else options.name,
    "node-count": options.slices if several else "",
    "node-prefix": options.name if several else "",
    "accelerator-type": options.type,
    "runtime-version": options.runtime_version or RUNTIMES[options.type.rpartition("-")[0]],
    "network": options.network,
    "subnetwork": options.subnetwork,
    "service-account": options.service_account,
  }
  switches = {"spot": options.spot, "reserved": options.reserved, "internal-ips": options.internal_ips}
  flags = [f"--{key}={value}" for key, value in given.items() if value]
  flags += [f"--{key}" for key, value in switches.items() if value]
  return gcloud(options, "queued-resources", "create", options.name, *flags, "--format=json")


def describe(options: argparse.Namespace) -> list[str]:
  return gcloud(options, "queued-resources", "describe", options.name, "--format=json")


def delete(options: argparse.Namespace) -> list[str]:
  return gcloud(options, "queued-resources", "delete", options.name, "--force")


def describe_node(options: argparse.Namespace, node: str) -> list[str]:
  return gcloud(options, "tpu-vm", "describe", node, "--format=json")


def address(options: argparse.Namespace) -> list[str]:
  """Of worker 0 of the first slice."""
  return gcloud(options, "tpu-vm", "describe", nodes(options)[0], "--format=value(networkEndpoints[0].ipAddress)")


def ssh(options: argparse.Namespace, node: str, worker: str, command: str) -> list[str]:
  flags = ["--ssh-flag=-oConnectTimeout=30", "--ssh-flag=-oServerAliveInterval=15", *_internal(options)]
  return gcloud(options, "tpu-vm", "ssh", node, f"--worker={worker}", *flags, f"--command={command}")


def scp(options: argparse.Namespace, node: str, source: str, target: str) -> list[str]:
  return gcloud(options, "tpu-vm", "scp", source, f"{node}:{target}", "--worker=all", *_internal(options))


def _internal(options: argparse.Namespace) -> list[str]:
  return ["--internal-ip"] if options.internal_ips else []


def nodes(options: argparse.Namespace) -> list[str]:
  """The names of the slices: those that --node-prefix gives them."""
  return [options.name] if options.slices == 1 else [f"{options.name}-{index}" for index in range(options.slices)]


def everywhere(options: argparse.Namespace, command: str) -> list[list[str]]:
  """On all workers of all slices."""
  return [ssh(options, node, "all", command) for node in nodes(options)]


def worker(*words: str, script: str = ".llmjax/worker.sh") -> str:
  """A subcommand of tpu_worker.sh, for the worker's shell."""
  return shlex.join(["bash", script, *words])


def together(commands: Sequence[Sequence[str]]) -> list[tuple[int, str, str]]:
  """The exit code, output and errors of each, run at once."""
  running: list[subprocess.Popen[bytes]] = []
  pipe = subprocess.PIPE
  try:
    for command in commands:
      running.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe))
    texts = [[os.fsdecode(text) for text in process.communicate()] for process in running]
  except FileNotFoundError:
    raise Untouched(
      "gcloud was not found; install it from https://cloud.google.com/sdk/docs/install and run gcloud auth login"
    ) from None
  finally:
    for process in running:
      process.kill()
  return [(process.returncode, output, errors) for process, (output, errors) in zip(running, texts)]


def remote(options: argparse.Namespace, commands: Sequence[Sequence[str]]) -> list[str]:
  """The outputs of commands on the VMs; again where a connection fails, Gone where the VMs are not there."""
  for pause in itertools.islice(pauses(options.poll), TRIES):
    results = together(commands)
    failed = [(code, errors) for code, _, errors in results if code]
    if not failed:
      return [output for _, output, _ in results]
    for code, errors in failed:
      if code == BUSY:
        raise Untouched(f"{options.name}: {last(errors)}; wait, end that by tpu_vm.py stop, or use another --name")
      if code == BROKEN:
        print(errors, file=sys.stderr)
        raise Unsettled(f"{options.name}: the installation failed, see above; mend it and run again")
      if code == MISSING:
        raise Unsettled(f"{options.name}: nothing was run there yet, or its home was emptied; tpu_vm.py run does both")
    state, why = look(options)
    if state not in ("active", "unknown"):
      raise Gone(state, why)
    say(f"{options.name}: no connection ({last(failed[0][1])}); trying again")
    time.sleep(pause)
  raise Unsettled(
    f"{options.name}: no connection in {TRIES} tries; the network's firewall must allow ssh (--internal_ips: from "
    "within the network), and the agent have the key (ssh-add ~/.ssh/google_compute_engine)"
  )


def look(options: argparse.Namespace) -> tuple[str, str]:
  """The state of what was asked for, and what Google Cloud says about it."""
  if not options.existing:
    state, said = _look(describe(options), QUEUED)
    if state != "active":
      return state, said
  for node in nodes(options):
    state, said = _look(describe_node(options, node), NODE)
    if state != "active":
      break
  return state, said


def _look(command: Sequence[str], states: dict[str, str]) -> tuple[str, str]:
  code, output, errors = together([command])[0]
  if code:
    return ("absent" if "NOT_FOUND" in errors else "unknown"), last(errors)
  state = json.loads(output)["state"]
  details = state if isinstance(state, dict) else {"state": state}
  error = details.get("failedData", {}).get("error", {}).get("message", "")
  return states.get(details["state"], "waiting"), error or details["state"]


def last(text: str) -> str:
  """The line of gcloud's errors that says what is wrong."""
  lines = [line for line in text.splitlines() if line.strip() and not re.match(NOISE, line)]
  return next((line for line in reversed(lines) if line.startswith("ERROR: (")), lines[-1] if lines else "no message")


def say(text: str) -> None:
  print(f"tpu_vm.py: {text}", file=sys.stderr, flush=True)

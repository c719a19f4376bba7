"""gcloud commands of tpu_vm.py as lists of words, how they are run, and the states that gcloud reports.

Functions take the flags of tpu_vm.py as `options`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

from command_line import MAX_TRIES, OutcomeUnknown, pauses, print_status

# Runtime versions for JAX by type, from https://cloud.google.com/tpu/docs/runtimes.
RUNTIMES = {
  "v2": "tpu-ubuntu2204-base",
  "v3": "tpu-ubuntu2204-base",
  "v4": "tpu-ubuntu2204-base",
  "v5litepod": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
}

# Our states for those of queued resources (google.cloud.tpu.v2.QueuedResourceState.State) and of nodes (Node.State);
# all others are "waiting". `query_state` adds "absent" if there is no such resource, and "unknown" if gcloud fails.
STATES = {
  **dict.fromkeys(("ACTIVE", "READY"), "active"),
  **dict.fromkeys(("SUSPENDING", "SUSPENDED", "PREEMPTED", "TERMINATED"), "preempted"),
  **dict.fromkeys(("STOPPING", "STOPPED"), "stopped"),
  "FAILED": "failed",
  "DELETING": "deleting",
}

# Exit codes of tpu_worker.sh, and of a shell that does not find it. ssh has 255, gcloud 1.
INSTALLATION_FAILED, OTHER_RUN, NO_SCRIPT = 65, 66, 127
STATE_MARK = "\036llmjax "  # starts the line of a worker's state
LOG_CHUNK = 1_000_000  # bytes of a log in one query
MEGASCALE_PORT = 8081  # between slices; Ray's TPU support uses the same
NOISE = r"(SSH|SCP|Retrying): |Using (ssh|scp) batch size|#####|SSH key found|Failed to execute command on multiple"


class VmsLost(Exception):
  """The VMs are not active any more; `args` are their state and the reason."""


class VmsNotOurs(OutcomeUnknown):
  """The VMs may belong to another run, so they must not be deleted."""


# Commands.


def gcloud_command(options: argparse.Namespace, *words: str) -> list[str]:
  project = [f"--project={options.project}"] if options.project else []
  return ["gcloud", "compute", "tpus", *words, f"--zone={options.zone}", *project, "--quiet"]


def create_request_command(options: argparse.Namespace) -> list[str]:
  is_multislice = options.slices > 1
  values = {
    "node-id": "" if is_multislice else options.name,
    "node-count": options.slices if is_multislice else "",
    "node-prefix": options.name if is_multislice else "",
    "accelerator-type": options.type,
    "runtime-version": options.runtime_version or RUNTIMES[options.type.rpartition("-")[0]],
    "network": options.network,
    "subnetwork": options.subnetwork,
    "service-account": options.service_account,
  }
  switches = {"spot": options.spot, "reserved": options.reserved, "internal-ips": options.internal_ips}
  flags = [f"--{name}={value}" for name, value in values.items() if value]
  flags += [f"--{name}" for name, is_set in switches.items() if is_set]
  return gcloud_command(options, "queued-resources", "create", options.name, *flags, "--format=json")


def describe_request_command(options: argparse.Namespace) -> list[str]:
  return gcloud_command(options, "queued-resources", "describe", options.name, "--format=json")


def delete_request_command(options: argparse.Namespace) -> list[str]:
  return gcloud_command(options, "queued-resources", "delete", options.name, "--force")


def describe_commands(options: argparse.Namespace) -> list[list[str]]:
  """Return commands that print the states of the queued resource and of its nodes."""
  nodes = [gcloud_command(options, "tpu-vm", "describe", node, "--format=json") for node in node_names(options)]
  return nodes if options.existing else [describe_request_command(options), *nodes]


def address_command(options: argparse.Namespace) -> list[str]:
  """Print the address of worker 0 of the first slice."""
  field = "--format=value(networkEndpoints[0].ipAddress)"
  return gcloud_command(options, "tpu-vm", "describe", node_names(options)[0], field)


def ssh_command(options: argparse.Namespace, node: str, worker: str, command: str) -> list[str]:
  flags = ["--ssh-flag=-oConnectTimeout=30", "--ssh-flag=-oServerAliveInterval=15", *_internal_ip(options)]
  return gcloud_command(options, "tpu-vm", "ssh", node, f"--worker={worker}", *flags, f"--command={command}")


def scp_command(options: argparse.Namespace, node: str, source: str, target: str) -> list[str]:
  return gcloud_command(options, "tpu-vm", "scp", source, f"{node}:{target}", "--worker=all", *_internal_ip(options))


def _internal_ip(options: argparse.Namespace) -> list[str]:
  return ["--internal-ip"] if options.internal_ips else []


def node_names(options: argparse.Namespace) -> list[str]:
  """Return the names of the slices, which --node-prefix numbers."""
  return [options.name] if options.slices == 1 else [f"{options.name}-{index}" for index in range(options.slices)]


def on_all_workers(options: argparse.Namespace, command: str) -> list[list[str]]:
  """Return ssh commands for all workers, one for each slice."""
  return [ssh_command(options, node, "all", command) for node in node_names(options)]


def scp_commands(options: argparse.Namespace, source: str, target: str) -> list[list[str]]:
  """Return commands that copy a file to all workers, one for each slice."""
  return [scp_command(options, node, source, target) for node in node_names(options)]


# Commands for the shell of a worker.


def worker_command(*words: str, script: str = ".llmjax/worker.sh") -> str:
  """Return the call of a subcommand of tpu_worker.sh."""
  return shlex.join(["bash", script, *words])


def worker_commands(options: argparse.Namespace, action: str) -> list[list[str]]:
  """Return commands that call a subcommand of tpu_worker.sh on all workers."""
  return on_all_workers(options, worker_command(action))


def ready_command(options: argparse.Namespace, commit: str) -> str:
  """Succeed if the commit and its extras are installed."""
  return _commit_command(options, commit, "ready")


def install_command(options: argparse.Namespace, commit: str) -> str:
  unpack = f"mkdir -p llmjax-{commit} && tar -xzf llmjax-{commit}.tar.gz -C llmjax-{commit}"
  return f"{unpack} && {_commit_command(options, commit, 'install')}"


def _commit_command(options: argparse.Namespace, commit: str, action: str) -> str:
  extras = ",".join(dict.fromkeys(["tpu", "gcs", *options.extra]))  # without `gcs` a run cannot save in a bucket
  return worker_command(action, commit, extras, script=f"llmjax-{commit}/launch/tpu_worker.sh")


def start_command(options: argparse.Namespace, commit: str) -> str:
  """Start the run. Equal runs have equal ids: a worker does not start one again that it is running."""
  run_id = hashlib.sha256(json.dumps([commit, options.arguments]).encode()).hexdigest()[:12]
  return worker_command("begin", run_id, commit, *options.arguments)


def run_log_command(options: argparse.Namespace, offset: int) -> list[str]:
  """Print the state of worker 0 of the first slice, and at most LOG_CHUNK bytes of its log."""
  return ssh_command(options, node_names(options)[0], "0", worker_command("log", str(offset), str(LOG_CHUNK)))


def slice_variables(options: argparse.Namespace, coordinator: str, index: int) -> dict[str, str]:
  """Return the environment variables that connect a slice to the others.

  JAX (jax/_src/clusters/cloud_tpu_cluster.py) and libtpu otherwise read them from the VM's metadata, which existing VMs
  need not have.
  """
  if options.slices == 1:
    return {}
  return {
    "MEGASCALE_COORDINATOR_ADDRESS": coordinator,
    "MEGASCALE_PORT": str(MEGASCALE_PORT),
    "MEGASCALE_NUM_SLICES": str(options.slices),
    "MEGASCALE_SLICE_ID": str(index),
  }


# Running commands.


def run_parallel(commands: Sequence[Sequence[str]]) -> list[tuple[int, str, str]]:
  """Run commands at the same time; return the exit code, output and errors of each."""
  processes: list[subprocess.Popen[bytes]] = []
  pipe = subprocess.PIPE
  try:
    for command in commands:
      processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe))
    texts = [[os.fsdecode(text) for text in process.communicate()] for process in processes]
  except FileNotFoundError:
    raise VmsNotOurs(
      "gcloud: not found on the PATH. Install it from https://cloud.google.com/sdk/docs/install and run "
      "`gcloud auth login`"
    ) from None
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, output, errors) for process, (output, errors) in zip(processes, texts)]


def run_on_workers(options: argparse.Namespace, commands: Sequence[Sequence[str]]) -> list[str]:
  """Run ssh or scp commands at the same time, and again if a connection fails; return their outputs.

  Raises:
    VmsLost: The VMs are not active any more.
    OutcomeUnknown: A worker cannot do it, or there is no connection.
  """
  name = options.name
  for pause in pauses(options.poll, MAX_TRIES):
    results = run_parallel(commands)
    failed = [(code, errors) for code, _, errors in results if code]
    if not failed:
      return [output for _, output, _ in results]
    for code, errors in failed:
      if code == OTHER_RUN:
        raise VmsNotOurs(f"{name}: {error_line(errors)}. Wait, end it with `tpu_vm.py stop`, or use another --name")
      if code == INSTALLATION_FAILED:
        print(errors, file=sys.stderr)
        raise OutcomeUnknown(f"{name}: the installation failed, see above. Fix it and run the same command again")
      if code == NO_SCRIPT:
        raise OutcomeUnknown(f"{name}: nothing was run there yet, or its home was emptied. Use `tpu_vm.py run`")
    state, reason = query_state(options)
    if state not in ("active", "unknown"):
      raise VmsLost(state, reason)
    print_status(f"{name}: no connection ({error_line(failed[0][1])}); retrying")
    time.sleep(pause)
  raise OutcomeUnknown(
    f"{name}: no connection in {MAX_TRIES} tries. The network's firewall must allow ssh (with --internal_ips: from "
    "within the network), and the ssh agent must have the key (ssh-add ~/.ssh/google_compute_engine)"
  )


def query_state(options: argparse.Namespace) -> tuple[str, str]:
  """Return the state of the VMs, and Google Cloud's reason for it."""
  state, reason = "", ""
  for command in describe_commands(options):
    code, output, errors = run_parallel([command])[0]
    if code:
      return ("absent" if "NOT_FOUND" in errors else "unknown"), error_line(errors)
    details = json.loads(output)["state"]
    if not isinstance(details, dict):  # of a node
      details = {"state": details}
    error = details.get("failedData", {}).get("error", {}).get("message", "")
    state, reason = STATES.get(details["state"], "waiting"), error or details["state"]
    if state != "active":
      break
  return state, reason


def error_line(errors: str) -> str:
  """Return the line of gcloud's errors that contains the reason."""
  lines = [line for line in errors.splitlines() if line.strip() and not re.match(NOISE, line)]
  return next((line for line in reversed(lines) if line.startswith("ERROR: (")), lines[-1] if lines else "no message")

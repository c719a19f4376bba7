#!/usr/bin/env python3
"""Run llmjax on Google Kubernetes Engine as a JobSet: write its manifest, apply it, follow it.

Kubernetes restarts the run when a node fails or is preempted (spot), and the run resumes from its bucket. It does not
restart a run that fails with a user error (exit code 2). The run survives the end of this script: the same command
finds it again. Needs kubectl with a cluster that has JobSet, git and docker for `image`, and Python 3.9; llmjax need
not be installed here.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import kubectl
import shipping
from arguments import (
  LauncherParser,
  add_actions,
  add_shared_flags,
  check_command,
  check_name,
  parse_with_command,
  positive_int,
)
from command_line import MAX_TRIES, ROOT, OutcomeUnknown, pauses, print_status, run_main
from dry_run import gke_dry_run
from jobset import TPU_ACCELERATORS, Json, chips_and_machines, jobset_manifest, secret_name
from kubectl import run_kubectl, try_kubectl

EXAMPLES = """examples:
  python3 launch/gke.py image --tag=REGION-docker.pkg.dev/PROJECT/REPOSITORY/llmjax
  python3 launch/gke.py run --name=a --image=TAG --accelerator=tpu-v5-lite-podslice --topology=4x4 --spot -- \\
    train --config=gpt:size=gpt2_124m --workdir=gs://BUCKET/a
  the same with --slices=2             several slices as one run (multislice)
  the same with --env=WANDB_API_KEY    passes a variable of this shell through a Secret (image --extra=wandb)
  the same with --dry_run              prints the manifest and every command, and runs none
  python3 launch/gke.py run --name=b --image=TAG --accelerator=nvidia-h100-80gb --gpus=8 --nodes=2 -- train ...
  python3 launch/gke.py status|logs|delete --name=a"""


# Subcommands.


def run_jobset(options: argparse.Namespace) -> int:
  """Create the JobSet unless it exists, and follow it; return the exit code of the run."""
  secrets = {} if options.secret else shipping.secret_values(options.env)
  manifest = jobset_manifest(options)
  jobset = get_jobset(options)
  if jobset and final_state(jobset):
    print_status(f"{options.name}: replacing the ended run ({final_state(jobset)})")
    run_kubectl(kubectl.delete_object_command(options))
    jobset = None
  if jobset:
    if run_digest(jobset) != run_digest(manifest):
      raise OutcomeUnknown(f"{options.name}: is running something else. Run `gke.py delete` or use another --name")
    print_status(f"{options.name}: already exists")
    return follow_jobset(options)
  if secrets:
    run_kubectl(kubectl.delete_object_command(options, "secret"))
    lines = "".join(f"{name}={value}\n" for name, value in secrets.items())
    run_kubectl(kubectl.create_secret_command(options), lines)
  uid = run_kubectl(kubectl.create_jobset_command(options), json.dumps(manifest)).strip()
  print_status(f"{options.name}: created")
  if secrets:
    _, error = try_kubectl(kubectl.own_secret_command(options, uid))
    if error:
      print_status(f"the Secret {secret_name(options)} will outlive {options.name}: {error}")
  return follow_jobset(options)


def print_jobset_status(options: argparse.Namespace) -> int:
  jobset = get_jobset(options)
  if not jobset:
    print(f"{options.name}: absent")
    return 0
  pods = json.loads(run_kubectl(kubectl.get_pods_command(options)))["items"]
  print(f"{options.name}: {final_state(jobset) or current_state(jobset, first_pod(pods))}")
  for pod in sorted(pods, key=lambda pod: str(pod["metadata"]["name"])):
    print(f"{pod['metadata']['name']}: {pod_state(pod)}")
  return 0


def print_jobset_log(options: argparse.Namespace) -> int:
  pod = first_pod(json.loads(run_kubectl(kubectl.get_pods_command(options)))["items"])
  if pod is None:
    raise OutcomeUnknown(f"{options.name}: has no pods. `gke.py status` prints what exists")
  print_pod_log(options, pod["metadata"]["name"], {}, options.follow)
  return 0


def delete_jobset(options: argparse.Namespace) -> int:
  run_kubectl(kubectl.delete_object_command(options))
  if not options.secret:
    run_kubectl(kubectl.delete_object_command(options, "secret"))
  print_status(f"{options.name}: deleted; the run had two minutes to save")
  return 0


def build_image(options: argparse.Namespace) -> int:
  """Build the image of this commit and push it."""
  with tempfile.TemporaryDirectory() as folder:
    archive = Path(folder) / "llmjax.tar.gz"
    commit = shipping.write_archive(ROOT, archive, options.dirty)
    print_status(f"commit {commit}")
    for command in (kubectl.build_image_command(options, commit), kubectl.push_image_command(options)):
      with open(archive, "rb") as context:
        try:
          code = subprocess.run(command, stdin=context).returncode
        except FileNotFoundError:
          raise ValueError("docker: not found on the PATH. Install it and log in to the registry") from None
      if code:
        raise ValueError(f"{shlex.join(command)}: failed with exit code {code}, see above")
  return 0


# Following a run.


def get_jobset(options: argparse.Namespace) -> Json | None:
  output = run_kubectl(kubectl.get_jobset_command(options)).strip()
  return json.loads(output) if output else None


def run_digest(jobset: Json) -> str:
  """Return the digest of a run; an existing run with the same digest is followed and not created again."""
  return str(jobset["metadata"].get("annotations", {}).get("llmjax/run", ""))


def follow_jobset(options: argparse.Namespace) -> int:
  """Print the log of worker 0, also after restarts, until the run ends; return its exit code."""
  last_times: dict[str, str] = {}  # {pod: time of its last printed line}
  printed_state, waits = "", pauses(options.poll)
  while True:
    jobset, pods = query_jobset(options)
    pod, times_before = first_pod(pods), dict(last_times)
    if options.follow and pod and pod["status"]["phase"] in ("Running", "Succeeded", "Failed"):
      print_pod_log(options, pod["metadata"]["name"], last_times, follow=pod["status"]["phase"] == "Running")
    end = final_state(jobset)
    if end:
      code = exit_code_of_run(pods, end)
      print_status(f"{options.name}: the run has ended with exit code {code} ({end})")
      return code
    state = current_state(jobset, pod)
    if state != printed_state:
      printed_state, waits = state, pauses(options.poll)
      print_status(f"{options.name}: {state}")
    if last_times == times_before:
      time.sleep(next(waits))


def query_jobset(options: argparse.Namespace) -> tuple[Json, list[Json]]:
  """Return the JobSet and its pods; retry if there is no connection."""
  error = ""
  for pause in pauses(options.poll, MAX_TRIES):
    jobset, error = try_kubectl(kubectl.get_jobset_command(options))
    if not error and not jobset.strip():
      raise OutcomeUnknown(f"{options.name}: was deleted by someone else. Run the same command to create it again")
    if not error:
      pods, error = try_kubectl(kubectl.get_pods_command(options))
    if not error:
      return json.loads(jobset), json.loads(pods)["items"]
    time.sleep(pause)
  raise OutcomeUnknown(f"{error}. The run continues, and the same command finds it")


def print_pod_log(options: argparse.Namespace, pod: str, last_times: dict[str, str], follow: bool) -> None:
  """Print the lines of a pod's log after `last_times[pod]`, which is updated."""
  command = kubectl.pod_log_command(options, pod, last_times.get(pod, ""), follow)
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
    assert process.stdout
    for line in process.stdout:
      stamp, _, text = line.partition(b" ")
      line_time = stamp.decode(errors="replace")
      if line_time > last_times.get(pod, ""):
        sys.stdout.buffer.write(text)
        sys.stdout.flush()
        last_times[pod] = line_time


def first_pod(pods: Sequence[Json]) -> Json | None:
  """Return the newest pod of worker 0 of the first slice."""
  labels = ("jobset.sigs.k8s.io/job-index", "batch.kubernetes.io/job-completion-index")
  firsts = [pod for pod in pods if all(pod["metadata"]["labels"].get(label) == "0" for label in labels)]
  return max(firsts, key=lambda pod: str(pod["metadata"]["creationTimestamp"]), default=None)


def final_state(jobset: Json) -> str:
  """Return "Completed", "Failed: REASON", or an empty text before the end."""
  for condition in jobset.get("status", {}).get("conditions", []):
    if condition["type"] in ("Completed", "Failed") and condition["status"] == "True":
      reason = f": {condition.get('message', '')}" if condition["type"] == "Failed" else ""
      return f"{condition['type']}{reason}"
  return ""


def exit_code_of_run(pods: Sequence[Json], end: str) -> int:
  """Return the exit code of worker 0, or of another worker if only that failed."""
  if end == "Completed":
    return 0
  first = first_pod(pods)
  codes: list[int] = []
  for pod in sorted(pods, key=lambda pod: pod is not first):
    statuses = pod["status"].get("containerStatuses", [])
    codes += [status["state"].get("terminated", {}).get("exitCode", 0) for status in statuses]
  return next((code for code in codes if code), 1)


def current_state(jobset: Json, pod: Json | None) -> str:
  restarts = jobset.get("status", {}).get("restarts", 0)
  return (f"restart {restarts}: " if restarts else "") + (pod_state(pod) if pod else "pending")


def pod_state(pod: Json) -> str:
  """Return the phase of a pod and the reasons why it is waiting."""
  status = pod["status"]
  states = [container["state"] for container in status.get("containerStatuses", [])]
  reasons = [state["waiting"] for state in states if "waiting" in state]
  reasons += [
    condition
    for condition in status.get("conditions", [])
    if condition["type"] == "PodScheduled" and condition["status"] != "True"
  ]
  texts = [f"{reason.get('reason', '')} {reason.get('message', '')}".strip() for reason in reasons]
  return str(status["phase"]).lower() + (f" ({'; '.join(texts)})" if texts else "")


# Command line.

GKE_ACTIONS = {
  "run": (run_jobset, "apply the manifest, follow the log of worker 0, wait for the end"),
  "status": (print_jobset_status, "print the state of the run and its pods"),
  "logs": (print_jobset_log, "print the log of worker 0"),
  "delete": (delete_jobset, "have the run save and end, and delete it"),
  "image": (build_image, "build the image of this commit and push it"),
}


def parse_gke_flags(argv: Sequence[str]) -> argparse.Namespace:
  parser = LauncherParser(prog="gke.py", description=__doc__, epilog=EXAMPLES)
  actions = add_actions(parser, GKE_ACTIONS)
  for name in ("run", "status", "logs", "delete"):
    add = actions[name].add_argument
    add_shared_flags(actions[name], "name")
    add("--namespace", help="namespace (default: that of kubectl's context)")
    add("--context", help="context of kubectl (default: the current one)")
    add("--secret", default="", help="existing Secret with the variables of --env (default: one is created)")
  add_shared_flags(actions["logs"], "follow")
  add_shared_flags(actions["run"], "follow", default=True)
  add_shared_flags(actions["run"], "no_follow", "slices", "nodes", "spot", "service_account", "env", "max_restarts")
  add_shared_flags(actions["run"], "poll", default=5)
  add = actions["run"].add_argument
  add("--image", required=True, help="image that the subcommand `image` has pushed")
  add("--accelerator", required=True, help=f"{', '.join(TPU_ACCELERATORS)}, or a GPU, such as nvidia-h100-80gb")
  add("--topology", default="", help="topology of a TPU slice, such as 4x4")
  add("--chips_per_node", type=positive_int, metavar="N", help="1, 4 or 8 (default: 4, as in multi-host slices)")
  add("--gpus", type=positive_int, default=8, metavar="N", help="GPUs of each node (default: %(default)s)")
  add("--node_selector", action="append", default=[], metavar="KEY=VALUE", help="further selector; repeatable")
  add = actions["image"].add_argument
  add("--tag", required=True, help="name of the image: REGION-docker.pkg.dev/PROJECT/REPOSITORY/llmjax:NAME")
  add_shared_flags(actions["image"], "extra", help="extras of setup.py besides gcs, such as cuda (default: tpu), wandb")
  add_shared_flags(actions["image"], "dirty")
  options = parse_with_command(parser, argv)
  if options.action != "image":
    check_name(options.name, 40)
  if options.action == "run":
    check_gke_run(options)
  return options


def check_gke_run(options: argparse.Namespace) -> None:
  """Raise ValueError for flags with which the run would fail later."""
  check_command(options.arguments, temporary_disk="a container's disk is deleted with it")
  for selector in options.node_selector:
    if "=" not in selector:
      raise ValueError(f"--node_selector: must be KEY=VALUE, got {selector}")
  if options.accelerator.startswith("tpu"):
    if options.accelerator not in TPU_ACCELERATORS:
      raise ValueError(f"--accelerator: must be a GPU or {', '.join(TPU_ACCELERATORS)}, got {options.accelerator}")
    dimensions = TPU_ACCELERATORS[options.accelerator][1]
    if not re.fullmatch(r"x".join([r"[1-9]\d*"] * dimensions), options.topology):
      example = "x".join(["4"] * dimensions)
      raise ValueError(
        f"--topology: must be like {example}, in chips, with {options.accelerator}, got {options.topology!r}"
      )
    chips_and_machines(options)
  elif options.topology or options.slices > 1:
    raise ValueError(f"--topology and --slices: are for TPUs only, got --accelerator={options.accelerator}")


def main(argv: Sequence[str]) -> int:
  options = parse_gke_flags(argv)
  if options.dry_run:
    if options.action == "run" and not options.secret:
      shipping.secret_values(options.env)  # report missing variables
    print("\n".join(gke_dry_run(options)))
    return 0
  return GKE_ACTIONS[options.action][0](options)


if __name__ == "__main__":
  run_main(main, "the run continues in the cluster: the same command follows it, `gke.py delete` ends it")

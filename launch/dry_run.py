"""Commands that --dry_run of the cloud launchers prints: those of a run in which nothing fails, for a shell.

Functions take the flags of tpu_vm.py or gke.py as `options`.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import gcloud
import kubectl
import shipping
from command_line import ROOT
from gcloud import node_names, on_all_workers
from jobset import jobset_manifest


def tpu_vm_dry_run(options: argparse.Namespace) -> Iterator[str]:
  """Yield the commands of tpu_vm.py and comments."""
  queries = gcloud.describe_commands(options)
  reports, stops = gcloud.worker_commands(options, "report"), gcloud.worker_commands(options, "stop")
  if options.action == "status":
    yield from _commented("state of the VMs and their workers", *queries, *reports)
  elif options.action == "logs":
    yield from _commented("repeat from the end of the previous output", gcloud.run_log_command(options, 0))
  elif options.action == "stop":
    yield from _commented("SIGTERM on all workers", *stops)
    yield from _commented("repeat until all workers have ended", *reports)
  elif options.action == "delete":
    yield from _commented("with its VMs", gcloud.delete_request_command(options))
  else:
    commit = shipping.commit_to_ship(ROOT, options.dirty)
    archive = f"/tmp/llmjax-{commit}.tar.gz"
    yield from _commented("the code", shipping.archive_command(archive, options.dirty))
    if not options.existing:
      creation = [gcloud.create_request_command(options)] if options.type else []
      yield from _commented("the VMs, unless they exist", gcloud.describe_request_command(options), *creation)
    yield from _commented("repeat until all are ACTIVE and READY", *queries)
    ready = on_all_workers(options, gcloud.ready_command(options, commit))
    copies = gcloud.scp_commands(options, archive, Path(archive).name)
    install = on_all_workers(options, gcloud.install_command(options, commit))
    yield from _commented("check whether this commit is installed; if not, install it", *ready, *copies, *install)
    yield from _variables_dry_run(options)
    start = on_all_workers(options, gcloud.start_command(options, commit))
    yield from _commented("start the run, unless it is running", *start)
    yield from _commented("its log; repeat from the end of the previous output", gcloud.run_log_command(options, 0))
    yield from _commented("repeat until all workers have ended", *reports)
    yield from _commented("if the run failed", *gcloud.worker_commands(options, "errors"))
    if not (options.keep or options.existing):
      yield from _commented("after Ctrl-C", *stops)
      yield from _commented("at the end, however the run ended", gcloud.delete_request_command(options))


def _commented(comment: str, *commands: Sequence[str]) -> Iterator[str]:
  yield f"# {comment}"
  yield from map(shlex.join, commands)


def _variables_dry_run(options: argparse.Namespace) -> Iterator[str]:
  """Yield commands that copy the variables of the run; values of --env stay names."""
  if options.slices > 1:
    yield f'ADDRESS="$({shlex.join(gcloud.address_command(options))})"'
  for index, node in enumerate(node_names(options)):
    values = {name: f'"${name}"' for name in options.env}
    values.update({name: v or '"$ADDRESS"' for name, v in gcloud.slice_variables(options, "", index).items()})
    if values:
      path = f"/tmp/llmjax-environment-{index}"
      yield "# variables of the run, which no command line contains"
      yield f"(umask 077; printf '%s=%q\\n' {' '.join(f'{name} {value}' for name, value in values.items())} >{path})"
      yield shlex.join(gcloud.scp_command(options, node, path, ".llmjax-environment"))
      yield f"rm {path}"


def gke_dry_run(options: argparse.Namespace) -> Iterator[str]:
  """Yield the commands of gke.py and comments."""
  if options.action == "image":
    commit = shipping.commit_to_ship(ROOT, options.dirty)
    archive = f"/tmp/llmjax-{commit}.tar.gz"
    yield shlex.join(shipping.archive_command(archive, options.dirty))
    yield f"{shlex.join(kubectl.build_image_command(options, commit))} <{archive}"
    yield shlex.join(kubectl.push_image_command(options))
    return
  if options.action == "delete":
    yield shlex.join(kubectl.delete_object_command(options))
    if not options.secret:
      yield shlex.join(kubectl.delete_object_command(options, "secret"))
    return
  if options.action != "logs":
    yield shlex.join(kubectl.get_jobset_command(options))
  if options.action == "run":
    yield from _creation_dry_run(options)
    yield "# repeat until the run has ended"
  yield shlex.join(kubectl.get_pods_command(options))
  if options.action == "logs" or (options.action == "run" and options.follow):
    yield "# POD is the pod of worker 0"
    yield shlex.join(kubectl.pod_log_command(options, "POD", "", options.follow))


def _creation_dry_run(options: argparse.Namespace) -> Iterator[str]:
  manifest = json.dumps(jobset_manifest(options), indent=2)
  creation = f"{shlex.join(kubectl.create_jobset_command(options))} <<'MANIFEST'\n{manifest}\nMANIFEST"
  if not options.env or options.secret:
    yield creation
    return
  yield shlex.join(kubectl.delete_object_command(options, "secret"))
  values = " ".join(f'{name} "${name}"' for name in options.env)
  yield f"printf '%s=%s\\n' {values} | {shlex.join(kubectl.create_secret_command(options))}"
  yield f'OWNER="$({creation}\n)"'
  yield shlex.join(kubectl.own_secret_command(options, "OWNER")).replace("OWNER", "'\"$OWNER\"'")

"""kubectl and docker commands of gke.py as lists of words, and how they are run.

Functions take the flags of gke.py as `options`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from command_line import OutcomeUnknown, run_program
from jobset import JOBSET_VERSION, secret_name


def kubectl_command(options: argparse.Namespace, *words: str) -> list[str]:
  flags = {"namespace": options.namespace, "context": options.context}
  return ["kubectl", *words, *(f"--{name}={value}" for name, value in flags.items() if value)]


def create_jobset_command(options: argparse.Namespace) -> list[str]:
  """Create what standard input contains; print its uid."""
  return kubectl_command(options, "create", "--filename=-", "--output=jsonpath={.metadata.uid}")


def get_jobset_command(options: argparse.Namespace) -> list[str]:
  return kubectl_command(options, "get", "jobset", options.name, "--output=json", "--ignore-not-found")


def get_pods_command(options: argparse.Namespace) -> list[str]:
  selector = f"--selector=jobset.sigs.k8s.io/jobset-name={options.name}"
  return kubectl_command(options, "get", "pods", selector, "--output=json")


def pod_log_command(options: argparse.Namespace, pod: str, since: str, follow: bool) -> list[str]:
  flags = ["--timestamps", *(["--follow"] if follow else []), *([f"--since-time={since}"] if since else [])]
  return kubectl_command(options, "logs", pod, *flags)


def delete_object_command(options: argparse.Namespace, kind: str = "jobset") -> list[str]:
  name = options.name if kind == "jobset" else secret_name(options)
  return kubectl_command(options, "delete", kind, name, "--ignore-not-found", "--cascade=foreground")


def create_secret_command(options: argparse.Namespace) -> list[str]:
  return kubectl_command(options, "create", "secret", "generic", secret_name(options), "--from-env-file=/dev/stdin")


def own_secret_command(options: argparse.Namespace, uid: str) -> list[str]:
  """Have Kubernetes delete the Secret together with the JobSet of this uid."""
  owner = {"apiVersion": JOBSET_VERSION, "kind": "JobSet", "name": options.name, "uid": uid}
  patch = json.dumps({"metadata": {"ownerReferences": [owner]}})
  return kubectl_command(options, "patch", "secret", secret_name(options), "--type=merge", f"--patch={patch}")


def build_image_command(options: argparse.Namespace, commit: str) -> list[str]:
  """Build the image from an archive in standard input."""
  extras = options.extra if "cuda" in options.extra else dict.fromkeys(["tpu", *options.extra])
  arguments = [f"--build-arg=COMMIT={commit}", f"--build-arg=EXTRA={','.join(extras)}"]
  return ["docker", "build", "--file=launch/Dockerfile", *arguments, f"--tag={options.tag}", "-"]


def push_image_command(options: argparse.Namespace) -> list[str]:
  return ["docker", "push", options.tag]


def try_kubectl(words: Sequence[str], stdin: str = "") -> tuple[str, str]:
  """Return the output of a kubectl command, and its error message, which is empty if it succeeded."""
  done = run_program(words, "Install it and log in to the cluster", input=stdin, capture_output=True)
  return done.stdout, _explain(done.stderr) if done.returncode else ""


def run_kubectl(words: Sequence[str], stdin: str = "") -> str:
  """Return the output of a kubectl command; raise OutcomeUnknown if it fails."""
  output, error = try_kubectl(words, stdin)
  if error:
    raise OutcomeUnknown(error)
  return output


def _explain(errors: str) -> str:
  """Return the last line of kubectl's errors, and the fix if the cluster has no JobSet."""
  line = (errors.strip().splitlines() or ["no message"])[-1]
  if "resource type" in line and "jobset" in line:
    return f"the cluster has no JobSet ({line}). To install it: https://jobset.sigs.k8s.io/docs/installation"
  return f"kubectl: {line}"

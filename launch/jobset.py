"""JobSet manifest (jobset.x-k8s.io/v1alpha2) that gke.py applies: a Job for each slice, a Pod for each machine.

Functions take the flags of gke.py as `options`. The manifest is JSON, which kubectl accepts as YAML.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from typing import Any

Json = dict[str, Any]

# {cloud.google.com/gke-tpu-accelerator: (chips of a TPU VM in a slice of several hosts, dimensions of the topology)}.
# From https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus. v5e and v6e also have VMs of 1 and 8 chips,
# each of which is a slice of its own.
TPU_ACCELERATORS = {
  "tpu-v4-podslice": (4, 3),
  "tpu-v5-lite-podslice": (4, 2),
  "tpu-v5p-slice": (4, 3),
  "tpu-v6e-slice": (4, 2),
  "tpu7x": (4, 3),
}
JOBSET_VERSION = "jobset.x-k8s.io/v1alpha2"
COORDINATOR_PORT = 1234  # processes on GPUs connect to it
START_TIMEOUT = "--start_timeout=86400"  # nodes of a run can come, or come back, hours apart
MULTI_PROCESS_COMMANDS = ("train", "evaluate", "generate", "embed", "predict")  # these have --start_timeout


def jobset_manifest(options: argparse.Namespace) -> Json:
  """Return the JobSet; its failure policy needs JobSet 0.6."""
  is_tpu = options.accelerator in TPU_ACCELERATORS
  chips, machines = chips_and_machines(options) if is_tpu else (options.gpus, options.nodes)
  job = {
    "parallelism": machines,
    "completions": machines,
    "completionMode": "Indexed",
    "backoffLimit": 0,
    "podFailurePolicy": {
      "rules": [{"action": "FailJob", "onExitCodes": {"containerName": "llmjax", "operator": "In", "values": [2]}}]
    },
    "template": {"spec": _pod_spec(options, is_tpu, chips, machines)},
  }
  spec = {
    # With DNS names, JobSet creates the headless service that TPUs on GKE need.
    "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
    "ttlSecondsAfterFinished": 86400,  # logs stay for a day
    "failurePolicy": {
      "maxRestarts": options.max_restarts,
      "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    },
    "replicatedJobs": [{"name": "slice", "replicas": options.slices, "template": {"spec": job}}],
  }
  annotations = {"llmjax/run": hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:12]}
  if is_tpu:  # a slice is a node pool
    annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
  return {
    "apiVersion": JOBSET_VERSION,
    "kind": "JobSet",
    "metadata": {"name": options.name, "annotations": annotations},
    "spec": spec,
  }


def _pod_spec(options: argparse.Namespace, is_tpu: bool, chips: int, machines: int) -> Json:
  selector = {f"cloud.google.com/gke-{'tpu-' if is_tpu else ''}accelerator": options.accelerator}
  if is_tpu:
    selector["cloud.google.com/gke-tpu-topology"] = options.topology
  pod: Json = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": 120,  # the run saves a checkpoint after SIGTERM
    "nodeSelector": selector,
    "containers": [_container(options, is_tpu, chips, machines)],
  }
  if options.service_account:
    pod["serviceAccountName"] = options.service_account
  if options.spot:
    selector["cloud.google.com/gke-spot"] = "true"
    pod["tolerations"] = [{"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}]
  selector.update(item.split("=", 1) for item in options.node_selector)
  if not is_tpu:  # NCCL needs more shared memory than containers have by default
    pod["volumes"] = [{"name": "memory", "emptyDir": {"medium": "Memory"}}]
    pod["containers"][0]["volumeMounts"] = [{"name": "memory", "mountPath": "/dev/shm"}]
  return pod


def _container(options: argparse.Namespace, is_tpu: bool, chips: int, machines: int) -> Json:
  variables: list[Json] = [
    {"name": name, "valueFrom": {"secretKeyRef": {"name": secret_name(options), "key": name}}} for name in options.env
  ]
  if not is_tpu:  # on TPUs, GKE sets the variables that JAX reads
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    variables += [
      {"name": "LLMJAX_COORDINATOR", "value": f"{options.name}-slice-0-0.{options.name}:{COORDINATOR_PORT}"},
      {"name": "LLMJAX_NUM_PROCESSES", "value": str(machines)},
      {"name": "LLMJAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]
  arguments = list(options.arguments)
  if machines * options.slices > 1 and arguments[0] in MULTI_PROCESS_COMMANDS:
    arguments.insert(1, START_TIMEOUT)  # a --start_timeout of the user comes later and overrides it
  resources = {"google.com/tpu" if is_tpu else "nvidia.com/gpu": chips}
  return {
    "name": "llmjax",
    "image": options.image,
    "args": [argument.replace("$(", "$$(") for argument in arguments],  # Kubernetes would expand $(NAME)
    "env": variables,
    "resources": {"requests": resources, "limits": resources},
  }


def chips_and_machines(options: argparse.Namespace) -> tuple[int, int]:
  """Return the chips of each machine of a TPU slice, and the number of machines."""
  chips = math.prod(map(int, options.topology.split("x")))
  chips_per_machine = min(options.chips_per_node or TPU_ACCELERATORS[options.accelerator][0], chips)
  if chips % chips_per_machine:
    raise ValueError(
      f"--topology: must have a multiple of {chips_per_machine} chips, those of one machine, got {options.topology}, "
      f"which has {chips}"
    )
  return chips_per_machine, chips // chips_per_machine


def secret_name(options: argparse.Namespace) -> str:
  """Return the name of the Secret with the variables of --env."""
  return options.secret or f"{options.name}-environment"

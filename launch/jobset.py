"""What gke.py applies: a JobSet (jobset.x-k8s.io/v1alpha2) with a Job for each slice and a Pod for each machine.

Functions take the flags of gke.py as `options`, and their result is JSON, which kubectl takes as YAML.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from typing import Any

# Chips of a TPU VM on several hosts, and dimensions of the topology, by cloud.google.com/gke-tpu-accelerator: the
# tables of https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus. v5e and v6e also have VMs of 1 and 8
# chips, which are slices of their own.
TPUS = {
  "tpu-v4-podslice": (4, 3),
  "tpu-v5-lite-podslice": (4, 2),
  "tpu-v5p-slice": (4, 3),
  "tpu-v6e-slice": (4, 2),
  "tpu7x": (4, 3),
}
VERSION = "jobset.x-k8s.io/v1alpha2"
PORT = 1234  # where the processes on GPUs meet
PATIENT = "--start_timeout=86400"  # the nodes of a run can come, or come back, hours apart
TOGETHER = ("train", "evaluate", "generate", "embed", "predict")  # what several processes run, and what has that flag


def manifest(options: argparse.Namespace) -> dict[str, Any]:
  """The JobSet; its failure policy needs JobSet 0.6.

  With DNS names on, JobSet makes the headless service that TPUs on GKE need.
  """
  tpu = options.accelerator in TPUS
  chips, machines = (chips_and_machines(options)) if tpu else (options.gpus, options.nodes)
  selector = {f"cloud.google.com/gke-{'tpu-' if tpu else ''}accelerator": options.accelerator}
  if tpu:
    selector["cloud.google.com/gke-tpu-topology"] = options.topology
  pod: dict[str, Any] = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": 120,  # the run saves when it is told to end
    "nodeSelector": selector,
    "containers": [container(options, {"google.com/tpu" if tpu else "nvidia.com/gpu": chips}, machines)],
  }
  if options.service_account:
    pod["serviceAccountName"] = options.service_account
  if options.spot:
    selector["cloud.google.com/gke-spot"] = "true"
    pod["tolerations"] = [{"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}]
  selector.update(item.split("=", 1) for item in options.node_selector)
  if not tpu:  # NCCL's shared memory is larger than a container's own
    pod["volumes"] = [{"name": "memory", "emptyDir": {"medium": "Memory"}}]
    pod["containers"][0]["volumeMounts"] = [{"name": "memory", "mountPath": "/dev/shm"}]
  job = {
    "parallelism": machines,
    "completions": machines,
    "completionMode": "Indexed",
    "backoffLimit": 0,
    "podFailurePolicy": {
      "rules": [{"action": "FailJob", "onExitCodes": {"containerName": "llmjax", "operator": "In", "values": [2]}}]
    },
    "template": {"spec": pod},
  }
  spec = {
    "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
    "ttlSecondsAfterFinished": 86400,  # the logs stay for a day
    "failurePolicy": {
      "maxRestarts": options.max_restarts,
      "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    },
    "replicatedJobs": [{"name": "slice", "replicas": options.slices, "template": {"spec": job}}],
  }
  annotations = {"llmjax/run": hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:12]}
  if tpu:  # a slice is a node pool
    annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
  return {
    "apiVersion": VERSION,
    "kind": "JobSet",
    "metadata": {"name": options.name, "annotations": annotations},
    "spec": spec,
  }


def container(options: argparse.Namespace, resources: dict[str, int], machines: int) -> dict[str, Any]:
  variables = [
    {"name": name, "valueFrom": {"secretKeyRef": {"name": secret_name(options), "key": name}}} for name in options.env
  ]
  if "nvidia.com/gpu" in resources:  # on TPUs, GKE sets what JAX reads
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    variables += [
      {"name": "LLMJAX_COORDINATOR", "value": f"{options.name}-slice-0-0.{options.name}:{PORT}"},
      {"name": "LLMJAX_NUM_PROCESSES", "value": str(machines)},
      {"name": "LLMJAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]
  arguments = list(options.arguments)
  if machines * options.slices > 1 and arguments[0] in TOGETHER:
    arguments.insert(1, PATIENT)  # an own --start_timeout comes later, and counts
  return {
    "name": "llmjax",
    "image": options.image,
    "args": [argument.replace("$(", "$$(") for argument in arguments],  # which Kubernetes would expand
    "env": variables,
    "resources": {"requests": resources, "limits": resources},
  }


def chips_and_machines(options: argparse.Namespace) -> tuple[int, int]:
  """Of a slice."""
  chips = math.prod(map(int, options.topology.split("x")))
  each = min(options.chips_per_node or TPUS[options.accelerator][0], chips)
  if chips % each:
    raise ValueError(
      f"--topology={options.topology} has {chips} chips, which are no multiple of {each} on each machine"
    )
  return each, chips // each


def secret_name(options: argparse.Namespace) -> str:
  return options.secret or f"{options.name}-environment"

"""Which process of how many this is: from arguments, environment variables, or the cluster."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

from llmjax.config import ConfigError

ENVIRONMENT_VARIABLES = {
  "coordinator": "LLMJAX_COORDINATOR",
  "num_processes": "LLMJAX_NUM_PROCESSES",
  "process_id": "LLMJAX_PROCESS_ID",
}


class ProcessInfo(NamedTuple):
  """One process among several; the arguments of `jax.distributed.initialize`."""

  coordinator: str  # HOST:PORT of process 0
  num_processes: int
  process_id: int
  local_devices: list[int] | None = None  # devices of the machine that belong to this process, None: all


def explicit_process_info(*arguments: str | int | None) -> ProcessInfo | None:
  """Return what arguments (coordinator, num_processes, process_id) or environment variables give; None: nothing.

  Raises:
    ConfigError: some of the three are missing, or they contradict each other.
  """
  given = {
    name: os.environ.get(variable, "") if value is None else str(value)
    for (name, variable), value in zip(ENVIRONMENT_VARIABLES.items(), arguments, strict=True)
  }
  if not any(given.values()):
    return None
  for name in ("num_processes", "process_id"):
    if not re.fullmatch(r"\d*", given[name]):
      raise ConfigError(f"--{name}={given[name]} ({ENVIRONMENT_VARIABLES[name]}) must be a number, 0 or more")
  if given["num_processes"] == "1":
    return ProcessInfo("", 1, 0)
  missing = [f"--{name} (or {ENVIRONMENT_VARIABLES[name]})" for name, value in given.items() if not value]
  if missing:
    raise ConfigError(
      f"{' and '.join(missing)} is missing; each of several processes needs --coordinator=HOST:PORT of process 0, "
      "--num_processes=N, and its own --process_id from 0 to N - 1"
    )
  info = ProcessInfo(given["coordinator"], int(given["num_processes"]), int(given["process_id"]))
  if info.process_id >= info.num_processes:
    raise ConfigError(
      f"--process_id={info.process_id} must be less than --num_processes={info.num_processes}: processes count from 0"
    )
  if not re.fullmatch(r".+:\d+", info.coordinator):
    raise ConfigError(f"--coordinator={info.coordinator} must be HOST:PORT of process 0, such as 10.0.0.1:1234")
  return info


def detect_process_info(timeout: float) -> ProcessInfo | None:
  """Return what the cluster says, as JAX reads it; None: one process.

  `jax.distributed.initialize` would read the same. But there a process that waits for another in vain is aborted with a
  stack trace, so the processes have to be known before.
  """
  try:
    cluster = _detect_cluster()
    if cluster is None:
      return None
    # In a step within a larger job, SLURM_NTASKS, which JAX reads, may be that of the job.
    step_tasks = os.environ.get("SLURM_STEP_NUM_TASKS") if cluster.name == "slurm" else None
    count = int(step_tasks or cluster.get_process_count())
    if count == 1:
      return None
    port = os.environ.get("JAX_COORDINATOR_PORT")
    address = cluster.get_coordinator_address(timeout_secs=int(timeout), override_coordinator_port=port)
    return ProcessInfo(address, count, cluster.get_process_id(), _local_devices(cluster))
  except Exception as error:  # whatever variables, the metadata server or Kubernetes make JAX raise
    raise ConfigError(
      f"this machine seems to be one of several, but which one cannot be read ({type(error).__name__}: {error}); give "
      "--coordinator, --num_processes and --process_id, or --num_processes=1"
    ) from error


def _detect_cluster() -> Any:
  """Return JAX's class of the cluster that this process runs in, None if there is none."""
  from jax._src.clusters import ClusterEnv

  for cluster in ClusterEnv._cluster_types:
    # Outside an indexed job, Kubernetes knows of no other process, and asking it needs permissions.
    is_known = cluster.__name__ != "K8sCluster" or "JOB_COMPLETION_INDEX" in os.environ
    if is_known and not cluster.opt_in_only_method and cluster.is_env_present():
      return cluster
  return None


def _local_devices(cluster: Any) -> list[int] | None:
  """Return the device of a task that shares its node, as JAX does, or None (all) for a task that is alone on it."""
  from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

  local_id = cluster.get_local_process_id()
  is_alone = re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
  return None if local_id is None or is_alone or running_in_cloud_tpu_vm else [local_id]

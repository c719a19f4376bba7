"""Several processes as one run: start, comparison of what they run, barriers, and a common end.

With one process, everything here does nothing. JAX is imported inside functions, because the command line starts
without it.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from llmjax.config import Json, config_differences
from llmjax.config.values import flatten_config
from llmjax.distributed.cluster import ProcessInfo, detect_process_info, explicit_process_info
from llmjax.distributed.rendezvous import NOTICE_AFTER, ProcessGroupError, log_to_stderr, process_names, rendezvous

START_TIMEOUT = 300.0  # seconds to wait for all processes to start
PREFLIGHT_TIMEOUT = 1800.0  # seconds to wait for all to prepare their data; a process that fails or dies is noticed
HEARTBEAT_TIMEOUT = 30  # seconds of silence after which JAX considers a process dead

_process_info: ProcessInfo | None = None  # None: a single process, or one that did not call `join_processes`
_num_preflights = 0  # that have passed


def join_processes(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout: float = START_TIMEOUT,
  preemptible: bool = False,
) -> None:
  """Join the other processes, if there are any. To be called before JAX computes.

  Without the first three arguments, the environment variables of `cluster.ENVIRONMENT_VARIABLES` count, and without
  those what TPU VMs, SLURM, Open MPI and Kubernetes say; else there is one process.

  Args:
    coordinator: HOST:PORT of process 0.
    num_processes: number of processes.
    process_id: index of this process.
    timeout: seconds to wait for all processes.
    preemptible: let SIGTERM wait for `multihost_utils.reached_preemption_sync_point` rather than end the process.

  Raises:
    ConfigError: settings that are incomplete or contradict each other.
    ProcessGroupError: a process did not come, or is there twice.
    OSError: process 0 did not come, or has ended.
  """
  global _process_info
  info = explicit_process_info(coordinator, num_processes, process_id) or detect_process_info(timeout)
  if info is None or info.num_processes == 1:
    return
  _process_info = info
  rendezvous(info, timeout)
  import jax

  jax.config.update("jax_enable_preemption_service", preemptible)
  jax.distributed.initialize(
    *info, cluster_detection_method="deactivate", heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT, initialization_timeout=60
  )


def is_multi_process() -> bool:
  """Whether `join_processes` has found other processes."""
  return _process_info is not None


def is_primary_process() -> bool:
  """Whether this process writes files and prints for all."""
  return _process_info is None or _process_info.process_id == 0


# JAX's coordinator stores texts by key and waits for them. It has no public name.


def _coordinator() -> Any:
  from jax._src import distributed

  return distributed.global_state.client


def _put_value(key: str, text: str) -> None:
  _coordinator().key_value_set(f"llmjax/{key}", text)


def _get_value(key: str, timeout: float) -> str | None:
  """Return the value that a process has put, None if there is none after `timeout` seconds."""
  import jax

  try:
    value: str = _coordinator().blocking_key_value_get(f"llmjax/{key}", max(int(1000 * timeout), 1))
  except jax.errors.JaxRuntimeError as error:
    if "DEADLINE_EXCEEDED" not in str(error):
      raise
    return None
  return value


def preflight(fingerprint: Callable[[], Mapping[str, Json]], timeout: float = PREFLIGHT_TIMEOUT) -> None:
  """Check that `fingerprint` is equal on all processes. With one process it is not called.

  Args:
    fingerprint: returns {name: JSON value, or a tree of them}.
    timeout: seconds to wait for the others.

  Raises:
    ProcessGroupError: something differs, or a process did not come, or has ended with an error before.
  """
  global _num_preflights
  import jax

  if jax.process_count() == 1:
    return
  count, index, name = jax.process_count(), jax.process_index(), f"preflight/{_num_preflights}"
  _put_value(f"{name}/{index}", json.dumps({"fingerprint": fingerprint()}, default=str))
  if index == 0:
    failure, code = _compare_fingerprints(name, count, timeout)
    _put_value(f"{name}/all", json.dumps([failure, code]))
  else:
    verdict = _get_value(f"{name}/all", timeout + NOTICE_AFTER)
    late = f"process 0 did not come to the preflight within {timeout:g} s", 1
    failure, code = late if verdict is None else json.loads(verdict)
  if failure:
    raise ProcessGroupError(failure, code)
  _num_preflights += 1


def _compare_fingerprints(name: str, count: int, timeout: float) -> tuple[str, int]:
  """Return what is wrong with the fingerprints of all processes, empty if nothing is, and the exit code for it."""
  start, patience = time.monotonic(), min(NOTICE_AFTER, timeout)
  fingerprints = []
  for index in range(count):
    text = _get_value(f"{name}/{index}", max(start + patience - time.monotonic(), 0))
    if text is None and patience < timeout:
      patience = timeout
      log_to_stderr(f"waiting for process {index} of {count}")
      text = _get_value(f"{name}/{index}", max(start + patience - time.monotonic(), 0))
    if text is None:
      return f"process {index} of {count} did not come to the preflight within {timeout:g} s; see its output", 1
    message = json.loads(text)
    if "ended" in message:
      return f"process {index} has ended: {message['ended']}", message["code"]
    fingerprints.append(message["fingerprint"])
  return first_disagreement(fingerprints), 2


def first_disagreement(fingerprints: Sequence[Mapping[str, Json]]) -> str:
  """Return the first key in which processes differ, and which of them differ from the majority; empty if all agree."""
  first, *others = fingerprints
  keys = list(dict.fromkeys(key for other in others for key in config_differences(first, other)))
  if not keys:
    return ""
  values = [json.dumps(flatten_config(each).get(keys[0])) for each in fingerprints]
  usual = collections.Counter(values).most_common(1)[0][0]
  odd = [index for index, value in enumerate(values) if value != usual]
  more = f"; so do {', '.join(keys[1:4])}{', ...' if len(keys) > 4 else ''}" if len(keys) > 1 else ""
  return (
    f"{keys[0]} differs between processes: {_shorten(usual)} on {process_names([values.index(usual)])}, "
    f"{_shorten(values[odd[0]])} on {process_names(odd)}{more}; all must run the same"
  )


def _shorten(value: str, width: int = 60) -> str:
  return value if len(value) <= width else f"{value[: width - 3]}..."


def short_digest(value: object) -> str:
  """Return a short digest of the `repr` of a value."""
  return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def environment_fingerprint() -> dict[str, Json]:
  """Return what has to be equal on all processes whatever they run, besides package versions."""
  import jax

  code = [path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py"))]
  devices = jax.local_devices()
  return {
    "python": platform.python_version(),
    "llmjax": short_digest(code),
    "devices": {"count": len(devices), "kind": devices[0].device_kind},
  }


def gather_json(value: Json) -> list[Json]:
  """Return the JSON value of every process, on every process."""
  import jax
  import numpy as np
  from jax.experimental import multihost_utils

  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  longest = int(np.max(multihost_utils.process_allgather(np.asarray(len(data)))))
  padded = np.pad(data, (0, longest - len(data)), constant_values=ord(" "))
  return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


def barrier(name: str, timeout: float) -> bool:
  """Wait for all processes at a barrier of this name; return whether all came within `timeout` seconds."""
  import jax

  if jax.process_count() == 1:
    return True
  try:
    _coordinator().wait_at_barrier(f"llmjax/{name}", int(1000 * timeout))
  except jax.errors.JaxRuntimeError:
    return False
  return True


def exit_process(code: int, message: str) -> NoReturn:
  """Print why, and end this process of several at once: a regular exit would wait for the others, and they for it."""
  assert _process_info is not None
  process_id = _process_info.process_id
  if message:
    log_to_stderr(f"process {process_id}: {message}")
    name = f"preflight/{_num_preflights}"
    with contextlib.suppress(Exception):  # the coordinator may not exist
      if process_id:
        _put_value(f"{name}/{process_id}", json.dumps({"ended": message, "code": code}))
      else:
        _put_value(f"{name}/all", json.dumps([f"process 0 has ended: {message}", code]))
  sys.stdout.flush()
  sys.stderr.flush()
  if process_id == 0:
    time.sleep(1)  # the end of the coordinator would abort processes that are about to exit themselves
  os._exit(code)


def peer_failure_message(error: Exception) -> str:
  """Return the message for an error that only means that another process has ended; empty for any other error."""
  import jax

  peer_errors = r"gloo|connection (closed|reset)|heartbeat|UNAVAILABLE|another task died"
  if not isinstance(error, jax.errors.JaxRuntimeError) or not re.search(peer_errors, str(error), re.IGNORECASE):
    return ""
  return f"another process has ended, see its output for the reason ({str(error).splitlines()[0]})"

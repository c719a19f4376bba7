"""Several processes as one: how they find each other, whether they run the same, and how they end together.

Everything here does nothing where there is one process. JAX is imported inside functions, since the command line starts
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
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from llmjax.config import ConfigError, config_differences, flatten_config

START_TIMEOUT = 300.0  # seconds that processes wait for each other to start
PREFLIGHT_TIMEOUT = 1800.0  # and to prepare their data: one that fails says so, one that dies is found out by JAX
NOTICE_AFTER = 10.0  # seconds after which the one who waits says for whom
HEARTBEAT_TIMEOUT = 30  # seconds of silence after which JAX takes a process for dead
ENVIRONMENT_VARIABLES = {
  "coordinator": "LLMJAX_COORDINATOR",
  "num_processes": "LLMJAX_NUM_PROCESSES",
  "process_id": "LLMJAX_PROCESS_ID",
}


class ProcessGroupError(ConfigError):
  """The processes cannot go on together. All of them raise it, and process 0 alone says it.

  `code` is what they end with: 2 for what the user can mend, 1 where a process did not come or has gone, which is no
  mistake where machines are taken away and come back.
  """

  def __init__(self, said: str, code: int = 2):
    super().__init__(said)
    self.code = code


class ProcessInfo(NamedTuple):
  """One process among several."""

  coordinator: str  # HOST:PORT of process 0
  num_processes: int
  process_id: int
  local_devices: list[int] | None = None  # those of this process among the machine's; None is all


_process_info: ProcessInfo | None = None  # None is a single process, or one that did not call `start`
_preflights = 0  # that are over


def join_processes(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout: float = START_TIMEOUT,
  preemptible: bool = False,
) -> None:
  """Joins the other processes, if there are any; to be called before JAX computes.

  Args:
    coordinator, num_processes, process_id: HOST:PORT of process 0, how many there are, and which this is. Where None,
      they are the environment variables in ASKED, and where these are not set either, what TPU VMs, SLURM, Open MPI and
      Kubernetes say; one process if they say nothing.
    timeout: seconds to wait for all to come.
    preemptible: SIGTERM waits for `multihost_utils.reached_preemption_sync_point` rather than ending the process.
  Raises:
    ConfigError: settings that are incomplete, or contradict each other.
    Disagreement: a process did not come, or is there twice.
    OSError: process 0 did not come, or has gone.
  """
  global _process_info
  place = _explicit_process_info(coordinator, num_processes, process_id) or _detect_process_info(timeout)
  if place is None or place.num_processes == 1:
    return
  _process_info = place
  (_rendezvous_server if place.process_id == 0 else _rendezvous_client)(place, timeout)
  import jax

  jax.config.update("jax_enable_preemption_service", preemptible)
  jax.distributed.initialize(
    *place,
    cluster_detection_method="deactivate",
    heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
    initialization_timeout=60,
  )


def is_multi_process() -> bool:
  """Whether `start` has found other processes."""
  return _process_info is not None


def is_primary_process() -> bool:
  """Whether this is the process that writes and speaks for all."""
  return _process_info is None or _process_info.process_id == 0


def _explicit_process_info(*given: Any) -> ProcessInfo | None:
  """What arguments and environment variables ask for, None where they say nothing."""
  said = {
    name: os.environ.get(variable, "") if value is None else str(value)
    for (name, variable), value in zip(ENVIRONMENT_VARIABLES.items(), given, strict=True)
  }
  if not any(said.values()):
    return None
  for name in ("num_processes", "process_id"):
    if not re.fullmatch(r"\d*", said[name]):
      raise ConfigError(f"--{name}={said[name]} ({ENVIRONMENT_VARIABLES[name]}) must be a number, 0 or more")
  if said["num_processes"] == "1":
    return ProcessInfo("", 1, 0)
  missing = [f"--{name} (or {ENVIRONMENT_VARIABLES[name]})" for name, value in said.items() if not value]
  if missing:
    raise ConfigError(
      f"several processes are asked for without {' and '.join(missing)}; each needs --coordinator=HOST:PORT of "
      "process 0, --num_processes=N, and its own --process_id from 0 to N - 1"
    )
  place = ProcessInfo(said["coordinator"], int(said["num_processes"]), int(said["process_id"]))
  if place.process_id >= place.num_processes:
    raise ConfigError(
      f"--process_id={place.process_id} must be less than --num_processes={place.num_processes}: processes count from 0"
    )
  if not re.fullmatch(r".+:\d+", place.coordinator):
    raise ConfigError(f"--coordinator={place.coordinator} must be HOST:PORT of process 0, such as 10.0.0.1:1234")
  return place


def _detect_process_info(timeout: float) -> ProcessInfo | None:
  """What the machine says of itself, as JAX reads it; None for one process.

  `jax.distributed.initialize` would read the same, but a process that waits for another in vain is aborted there with a
  stack trace, and so the processes must be known before.
  """
  try:
    kind = _detect_cluster()
    # Of a step within a larger job SLURM_NTASKS, which JAX reads, may be the job's.
    step = os.environ.get("SLURM_STEP_NUM_TASKS") if kind and kind.name == "slurm" else None
    count = 1 if kind is None else int(step or kind.get_process_count())
    if count == 1:
      return None
    port = os.environ.get("JAX_COORDINATOR_PORT")
    address = kind.get_coordinator_address(timeout_secs=int(timeout), override_coordinator_port=port)
    return ProcessInfo(address, count, kind.get_process_id(), _local_devices(kind))
  except Exception as error:  # whatever variables, the metadata server or Kubernetes make JAX raise
    raise ConfigError(
      f"this machine seems to be one of several, and does not say which ({type(error).__name__}: {error}); give "
      "--coordinator, --num_processes and --process_id, or --num_processes=1"
    ) from error


def _detect_cluster() -> Any:
  """JAX's class for what starts processes here, None where nothing is known to."""
  from jax._src.clusters import ClusterEnv

  for kind in ClusterEnv._cluster_types:
    # Outside an indexed job, Kubernetes knows of no other process, and asking it needs rights.
    known = kind.__name__ != "K8sCluster" or "JOB_COMPLETION_INDEX" in os.environ
    if known and not kind.opt_in_only_method and kind.is_env_present():
      return kind
  return None


def _local_devices(kind: Any) -> list[int] | None:
  """Tasks that share a node have a device each, as JAX has it; a task that is alone on its node has all, None."""
  from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

  local = kind.get_local_process_id()
  alone = re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
  return None if local is None or alone or running_in_cloud_tpu_vm else [local]


# The roll is called on the coordinator's port before JAX takes it: there, a process that does not come ends the others
# by an abort that names nobody, and one that comes twice is not told from the first.


def _rendezvous_server(place: ProcessInfo, timeout: float) -> None:
  """Process 0 waits for all others, and tells them whether to go on."""
  known = {0: socket.gethostname()}  # {process: its host}
  came: list[socket.socket] = []
  begun, failure, code = time.monotonic(), "", 2
  deadline, patience = begun + timeout, begun + NOTICE_AFTER
  with contextlib.ExitStack() as stack:
    server = stack.enter_context(_listen(place.coordinator))
    while len(came) < place.num_processes - 1:
      server.settimeout(max(min(deadline, patience) - time.monotonic(), 0.01))
      try:
        connection = stack.enter_context(server.accept()[0])
        connection.settimeout(NOTICE_AFTER)
        index, count, host = json.loads(connection.makefile().readline())
      except TimeoutError:
        missing = _processes(sorted(set(range(place.num_processes)) - set(known)))
        if patience < deadline and not failure:
          patience = deadline
          _log(f"waiting at {place.coordinator} for {missing} of {place.num_processes}")
        elif time.monotonic() > deadline:
          if not failure:
            code = 1
            failure = (
              f"{missing} of {place.num_processes} did not come to {place.coordinator} within {timeout:g} s; start it "
              "with this --coordinator and --num_processes, and its own --process_id"
            )
          break
      except (OSError, ValueError, TypeError):  # a stranger
        continue
      else:
        came.append(connection)
        if count != place.num_processes:
          failure = (
            failure or f"--num_processes is {place.num_processes} on process 0, and {count} on process {index} ({host})"
          )
        elif index in known:
          failure = failure or (
            f"there are two processes {index}, on {known[index]} and on {host}; each needs its own --process_id"
          )
        known.setdefault(index, host)
        if failure:  # the others are on their way
          deadline = min(deadline, time.monotonic() + NOTICE_AFTER)
    for connection in came:
      with contextlib.suppress(OSError):
        connection.sendall(json.dumps([failure, code]).encode() + b"\n")
  if failure:
    raise ProcessGroupError(failure, code)


def _listen(address: str) -> socket.socket:
  port = int(address.rpartition(":")[2])
  try:
    if socket.has_dualstack_ipv6():
      return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))
  except (OSError, OverflowError) as error:
    raise ConfigError(
      f"--coordinator={address}: process 0 cannot listen on port {port} ({error}); choose one that is free"
    ) from error


def _rendezvous_client(place: ProcessInfo, timeout: float) -> None:
  """Every other process tells process 0 that it is there, and hears whether to go on."""
  host, _, port = place.coordinator.rpartition(":")
  begun, patience = time.monotonic(), NOTICE_AFTER
  while True:
    try:
      connection = socket.create_connection((host.strip("[]"), int(port)), timeout=NOTICE_AFTER)
      break
    except (OSError, OverflowError) as error:
      waited = time.monotonic() - begun
      if waited > timeout:
        raise TimeoutError(
          f"process 0 did not open {place.coordinator} within {timeout:g} s ({error}); start it, or mend --coordinator"
        ) from error
      if waited > patience:
        patience = timeout
        _log(f"process {place.process_id} is waiting for process 0 at {place.coordinator}")
      time.sleep(0.2)
  answer = ""
  with connection, contextlib.suppress(OSError):
    connection.settimeout(timeout + NOTICE_AFTER)
    connection.sendall(json.dumps([place.process_id, place.num_processes, socket.gethostname()]).encode() + b"\n")
    answer = connection.makefile(errors="replace").readline()
  try:
    failure, code = json.loads(answer)
  except (ValueError, TypeError):
    raise ConnectionError(
      f"process 0 has ended, or what answers at {place.coordinator} is another program; choose another port"
    ) from None
  if failure:
    raise ProcessGroupError(failure, code)


def _processes(numbers: Sequence[int]) -> str:
  return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _log(text: str) -> None:
  print(f"llmjax: {text}", file=sys.stderr, flush=True)


# JAX's coordinator keeps texts by name, and waits for one as long as it is told to; it has no public name.


def _coordinator() -> Any:
  from jax._src import distributed

  return distributed.global_state.client


def _put_value(key: str, text: str) -> None:
  _coordinator().key_value_set(f"llmjax/{key}", text)


def _get_value(key: str, timeout: float) -> str | None:
  """None where nobody has written it in time."""
  import jax

  try:
    return _coordinator().blocking_key_value_get(f"llmjax/{key}", max(int(1000 * timeout), 1))
  except jax.errors.JaxRuntimeError as error:
    if "DEADLINE_EXCEEDED" not in str(error):
      raise
    return None


def preflight(facts: Callable[[], Mapping[str, Any]], timeout: float = PREFLIGHT_TIMEOUT) -> None:
  """Makes sure that `facts` are the same on all processes; with one process they are not even asked for.

  Args:
    facts: gives {name: value that JSON has, or a tree of such}.
    timeout: seconds to wait for the others.
  Raises:
    Disagreement: something differs, or a process did not come, or has ended with an error before.
  """
  global _preflights
  import jax

  if jax.process_count() == 1:
    return
  count, index, name = jax.process_count(), jax.process_index(), f"preflight/{_preflights}"
  _put_value(f"{name}/{index}", json.dumps({"facts": facts()}, default=str))
  if index == 0:
    failure, code = _compare(name, count, timeout)
    _put_value(f"{name}/all", json.dumps([failure, code]))
  else:
    heard = _get_value(f"{name}/all", timeout + NOTICE_AFTER)
    late = f"process 0 did not come to the preflight within {timeout:g} s", 1
    failure, code = late if heard is None else json.loads(heard)
  if failure:
    raise ProcessGroupError(failure, code)
  _preflights += 1


def _compare(name: str, count: int, timeout: float) -> tuple[str, int]:
  """What is wrong with the facts of all processes, empty where nothing is, and the exit code for it."""
  begun, patience = time.monotonic(), min(NOTICE_AFTER, timeout)
  facts = []
  for index in range(count):
    text = _get_value(f"{name}/{index}", max(begun + patience - time.monotonic(), 0))
    if text is None and patience < timeout:
      patience = timeout
      _log(f"waiting for process {index} of {count}")
      text = _get_value(f"{name}/{index}", max(begun + patience - time.monotonic(), 0))
    if text is None:
      return f"process {index} of {count} did not come to the preflight within {timeout:g} s; see its output", 1
    said = json.loads(text)
    if "ended" in said:
      return f"process {index} has ended: {said['ended']}", said["code"]
    facts.append(said["facts"])
  return first_disagreement(facts), 2


def first_disagreement(facts: Sequence[Mapping[str, Any]]) -> str:
  """The first thing in which processes differ, and which of them differ from most; empty where they agree."""
  keys = list(dict.fromkeys(key for other in facts[1:] for key in config_differences(facts[0], other)))
  if not keys:
    return ""
  values = [json.dumps(flatten_config(each).get(keys[0])) for each in facts]
  usual = collections.Counter(values).most_common(1)[0][0]
  odd = [index for index, value in enumerate(values) if value != usual]
  more = f"; so do {', '.join(keys[1:4])}{', ...' if len(keys) > 4 else ''}" if len(keys) > 1 else ""
  return (
    f"{keys[0]} differs between processes: {_short(usual)} on {_processes([values.index(usual)])}, "
    f"{_short(values[odd[0]])} on {_processes(odd)}{more}; all must run the same"
  )


def _short(value: str, width: int = 60) -> str:
  return value if len(value) <= width else f"{value[: width - 3]}..."


def short_digest(value: Any) -> str:
  """A short name of what has one `repr`."""
  return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def environment_fingerprint() -> dict[str, Any]:
  """What has to be the same on all processes whatever they run, besides package versions."""
  import jax

  code = [path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py"))]
  devices = jax.local_devices()
  return {
    "python": platform.python_version(),
    "llmjax": short_digest(code),
    "devices": {"count": len(devices), "kind": devices[0].device_kind},
  }


def barrier(name: str, timeout: float) -> bool:
  """Whether all processes come to this place in time."""
  import jax

  if jax.process_count() == 1:
    return True
  try:
    _coordinator().wait_at_barrier(f"llmjax/{name}", int(1000 * timeout))
  except jax.errors.JaxRuntimeError:
    return False
  return True


def exit_process(code: int, said: str) -> NoReturn:
  """Says why and ends this process of several at once: an orderly exit would wait for the others, and they for it."""
  assert _process_info is not None
  if said:
    _log(f"process {_process_info.process_id}: {said}")
    with contextlib.suppress(Exception):  # the coordinator may not be there
      if _process_info.process_id:
        _put_value(f"preflight/{_preflights}/{_process_info.process_id}", json.dumps({"ended": said, "code": code}))
      else:
        _put_value(f"preflight/{_preflights}/all", json.dumps([f"process 0 has ended: {said}", code]))
  sys.stdout.flush()
  sys.stderr.flush()
  if _process_info.process_id == 0:
    time.sleep(1)  # the end of the coordinator would abort those who are about to leave by themselves
  os._exit(code)


def peer_failure_message(error: Exception) -> str:
  """What to say where an error only means that another process has gone; empty where it means something else."""
  import jax

  gone = r"gloo|connection (closed|reset)|heartbeat|UNAVAILABLE|another task died"
  if not isinstance(error, jax.errors.JaxRuntimeError) or not re.search(gone, str(error), re.IGNORECASE):
    return ""
  return f"another process has gone, and its output says why ({str(error).splitlines()[0]})"

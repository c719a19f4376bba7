"""The rendezvous of processes on the coordinator's port, before JAX uses it.

In JAX's own rendezvous, a process that does not come ends the others with an abort that names nobody. One that comes
twice is not noticed.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from collections.abc import Sequence

from llmjax.config import ConfigError
from llmjax.distributed.cluster import ProcessInfo

NOTICE_AFTER = 10.0  # seconds after which a process that waits prints for whom


class ProcessGroupError(ConfigError):
  """The processes cannot run together. All of them raise it; only process 0 prints it.

  Attributes:
    code: exit code: 2 for a user error, 1 if a peer is missing (for example preempted).
  """

  def __init__(self, message: str, code: int = 2):
    super().__init__(message)
    self.code = code


def rendezvous(info: ProcessInfo, timeout: float) -> None:
  """Wait for all processes; raise ProcessGroupError in each of them if one is missing, doubled or contradicts 0."""
  (_rendezvous_server if info.process_id == 0 else _rendezvous_client)(info, timeout)


def _rendezvous_server(info: ProcessInfo, timeout: float) -> None:
  """Process 0: wait for all others, and answer each of them whether to continue."""
  hosts = {0: socket.gethostname()}  # {process: its host}
  connections: list[socket.socket] = []
  start, failure, code = time.monotonic(), "", 2
  deadline, notice_at = start + timeout, start + NOTICE_AFTER
  with contextlib.ExitStack() as stack:
    server = stack.enter_context(_listen(info.coordinator))
    while len(connections) < info.num_processes - 1:
      server.settimeout(max(min(deadline, notice_at) - time.monotonic(), 0.01))
      try:
        connection = stack.enter_context(server.accept()[0])
        connection.settimeout(NOTICE_AFTER)
        index, count, host = json.loads(connection.makefile().readline())
      except TimeoutError:
        missing = process_names(sorted(set(range(info.num_processes)) - set(hosts)))
        if notice_at < deadline and not failure:
          notice_at = deadline
          log_to_stderr(f"waiting at {info.coordinator} for {missing} of {info.num_processes}")
        elif time.monotonic() > deadline:
          if not failure:
            code = 1
            failure = (
              f"{missing} of {info.num_processes} did not come to {info.coordinator} within {timeout:g} s; start it "
              "with this --coordinator and --num_processes, and its own --process_id"
            )
          break
      except (OSError, ValueError, TypeError):  # not one of our processes
        continue
      else:
        connections.append(connection)
        failure = failure or _refusal(info, hosts, index, count, host)
        hosts.setdefault(index, host)
        if failure:  # the others are on their way
          deadline = min(deadline, time.monotonic() + NOTICE_AFTER)
    for connection in connections:
      with contextlib.suppress(OSError):
        connection.sendall(json.dumps([failure, code]).encode() + b"\n")
  if failure:
    raise ProcessGroupError(failure, code)


def _refusal(info: ProcessInfo, hosts: dict[int, str], index: int, count: int, host: str) -> str:
  """Return why a process that came cannot take part, empty if it can."""
  if count != info.num_processes:
    return f"--num_processes is {info.num_processes} on process 0, and {count} on process {index} ({host})"
  if index in hosts:
    return f"there are two processes {index}, on {hosts[index]} and on {host}; each needs its own --process_id"
  return ""


def _listen(address: str) -> socket.socket:
  port = int(address.rpartition(":")[2])
  try:
    if socket.has_dualstack_ipv6():
      return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))
  except (OSError, OverflowError) as error:
    raise ConfigError(
      f"--coordinator={address}: process 0 cannot listen on port {port} ({error}); choose a free port"
    ) from error


def _rendezvous_client(info: ProcessInfo, timeout: float) -> None:
  """Every other process: report to process 0, and wait for its answer."""
  host, _, port = info.coordinator.rpartition(":")
  start, notice_after = time.monotonic(), NOTICE_AFTER
  while True:
    try:
      connection = socket.create_connection((host.strip("[]"), int(port)), timeout=NOTICE_AFTER)
      break
    except (OSError, OverflowError) as error:
      waited = time.monotonic() - start
      if waited > timeout:
        raise TimeoutError(
          f"process 0 did not open {info.coordinator} within {timeout:g} s ({error}); start it, or fix --coordinator"
        ) from error
      if waited > notice_after:
        notice_after = timeout
        log_to_stderr(f"process {info.process_id} is waiting for process 0 at {info.coordinator}")
      time.sleep(0.2)
  answer = ""
  with connection, contextlib.suppress(OSError):
    connection.settimeout(timeout + NOTICE_AFTER)
    connection.sendall(json.dumps([info.process_id, info.num_processes, socket.gethostname()]).encode() + b"\n")
    answer = connection.makefile(errors="replace").readline()
  try:
    failure, code = json.loads(answer)
  except (ValueError, TypeError):
    raise ConnectionError(
      f"process 0 has ended, or another program answers at {info.coordinator}; choose another port"
    ) from None
  if failure:
    raise ProcessGroupError(failure, code)


def process_names(indices: Sequence[int]) -> str:
  """Return "process 1" or "processes 1, 2"."""
  return f"process{'es' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"


def log_to_stderr(text: str) -> None:
  print(f"llmjax: {text}", file=sys.stderr, flush=True)

#!/usr/bin/env python3
"""Run `llmjax` in several connected processes on this machine. Needs only Python 3.9."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from arguments import LauncherParser, add_shared_flags, check_command, parse_with_command, positive_int
from command_line import find_llmjax, run_main

EXIT_TIMEOUT = 10.0  # seconds for the other processes to end by themselves after one has failed
EPILOG = """\
Process 0 has this terminal; lines of the others start with [1], [2], ... Ctrl-C and SIGTERM go to all of them: training
saves after the same step, and the same command resumes. When one fails, all end, with its exit code.

examples:
  # two processes on the CPU, with two simulated devices each
  python3 launch/processes.py --processes=2 --devices=2 -- train --config=gpt:size=nano
  # four processes with one GPU each
  python3 launch/processes.py --processes=4 --gpus -- train --config=gpt:size=gpt2_124m
"""


def find_free_port() -> int:
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    return int(server.getsockname()[1])


def process_environments(count: int, devices: int | None, gpus: bool, base: Mapping[str, str]) -> list[dict[str, str]]:
  """Return the variables that each process has in addition to `base`.

  Args:
    count: Number of processes.
    devices: Simulated CPU devices of each, None for real devices.
    gpus: Give each process one of the GPUs that `base` makes visible.
    base: Environment of the launcher.
  """
  coordinator = f"127.0.0.1:{find_free_port()}"
  environments = [
    {"LLMJAX_COORDINATOR": coordinator, "LLMJAX_NUM_PROCESSES": str(count), "LLMJAX_PROCESS_ID": str(index)}
    for index in range(count)
  ]
  if devices:
    # JAX_NUM_CPU_DEVICES overrides a number of devices in XLA_FLAGS.
    environments = [e | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)} for e in environments]
  if gpus:
    visible = base.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    if len(visible) < count:
      raise ValueError(
        f"--processes={count} --gpus: needs one GPU each, and CUDA_VISIBLE_DEVICES={','.join(visible)} shows "
        f"{len(visible)}. Start fewer processes or make more GPUs visible"
      )
    environments = [e | {"CUDA_VISIBLE_DEVICES": gpu} for e, gpu in zip(environments, visible)]
  return environments


def start_process(command: Sequence[str], variables: Mapping[str, str], index: int) -> subprocess.Popen[str]:
  """Start a process in its own session, so that it receives a Ctrl-C only once, from the launcher."""
  pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
  return subprocess.Popen(
    command,
    env={**os.environ, **variables, **({"PYTHONUNBUFFERED": "1"} if index else {})},
    stdin=subprocess.DEVNULL,
    start_new_session=True,
    **(pipes if index else {}),
  )


def print_prefixed(lines: IO[str], index: int) -> None:
  for line in lines:
    print(f"[{index}] {line}", end="", flush=True)


def wait_for_processes(processes: Sequence[subprocess.Popen[str]]) -> int:
  """Wait until all have ended; return the exit code of the first that failed, 0 if none did."""
  code, deadline = 0, float("inf")
  while any(process.poll() is None for process in processes):
    failed = [process.returncode for process in processes if process.poll()]
    if failed and not code:
      code, deadline = failed[0], time.monotonic() + EXIT_TIMEOUT
    if time.monotonic() > deadline:
      for process in processes:
        process.kill()
    time.sleep(0.05)
  code = code or next((process.returncode for process in processes if process.returncode), 0)
  return code if code >= 0 else 128 - code


def run_processes(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
  """Run the command in each environment and forward signals; return the exit code for all."""
  processes: list[subprocess.Popen[str]] = []

  def forward(number: int, _: object) -> None:
    for process in processes:
      if process.poll() is None:
        process.send_signal(number)

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, forward)
  readers = []
  try:
    for index, variables in enumerate(environments):
      processes.append(start_process(command, variables, index))
      if index:
        readers.append(threading.Thread(target=print_prefixed, args=(processes[-1].stdout, index), daemon=True))
        readers[-1].start()
    return wait_for_processes(processes)
  finally:
    for process in processes:
      process.kill()
    for reader in readers:
      reader.join(1)


def make_processes_parser() -> LauncherParser:
  parser = LauncherParser(
    prog="processes.py",
    usage="python3 launch/processes.py --processes=N [--devices=N | --gpus] -- COMMAND ...",
    description=__doc__,
    epilog=EPILOG,
  )
  parser.add_argument("--processes", type=positive_int, required=True, metavar="N", help="number of processes")
  devices = parser.add_mutually_exclusive_group()
  devices.add_argument("--devices", type=positive_int, metavar="N", help="simulated CPU devices of each process")
  devices.add_argument("--gpus", action="store_true", help="one GPU each, in the order of CUDA_VISIBLE_DEVICES")
  add_shared_flags(parser, "venv", "dry_run")
  return parser


def main(argv: Sequence[str]) -> int:
  options = parse_with_command(make_processes_parser(), argv)
  check_command(options.arguments)
  environments = process_environments(options.processes, options.devices, options.gpus, os.environ)
  words = [find_llmjax(options.venv), *options.arguments]
  if not options.dry_run:
    return run_processes(words, environments)
  for variables in environments:
    print(*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(words), "&")
  print("wait")
  return 0


if __name__ == "__main__":
  run_main(main, "nothing was started")

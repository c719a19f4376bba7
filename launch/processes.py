#!/usr/bin/env python3
"""Runs `llmjax` in several processes on this machine, as one. Needs nothing but Python 3.9."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from command_line import Parser, positive, serve, split

PATIENCE = 10.0  # seconds in which the others may say why they end too, once one has failed
EPILOG = """\
Process 0 has this terminal; lines of the others begin with [1], [2], ... Ctrl-C and SIGTERM go to all of them: a
training saves after the same step, and the same command goes on. When one fails, all end, with its exit code.

examples:
  # two processes on the CPU, with two simulated devices in each
  python3 launch/processes.py --processes=2 --devices=2 -- train --config=gpt:size=nano
  # four processes with a GPU each
  python3 launch/processes.py --processes=4 --gpus -- train --config=gpt:size=gpt2_124m
"""


def find_llmjax(venv: str | None = None) -> str:
  """The path of `llmjax`: that of `venv`, or that of the .venv beside this folder, or the PATH's."""
  root = Path(__file__).resolve().parent.parent
  place = Path(venv or root / ".venv").absolute() / "bin" / "llmjax"
  found = str(place) if place.exists() else None if venv else shutil.which("llmjax")
  if found is None:
    raise ValueError(
      f"no llmjax at {place}{'' if venv else ' and none on the PATH'}; `bash launch/setup.sh` makes .venv"
    )
  return found


def free_port() -> int:
  with socket.socket() as opened:
    opened.bind(("127.0.0.1", 0))
    return int(opened.getsockname()[1])


def environments(count: int, devices: int | None, gpus: bool, given: Mapping[str, str]) -> list[dict[str, str]]:
  """What each process has beyond the environment `given`."""
  coordinator = f"127.0.0.1:{free_port()}"
  own = [
    {"LLMJAX_COORDINATOR": coordinator, "LLMJAX_NUM_PROCESSES": str(count), "LLMJAX_PROCESS_ID": str(index)}
    for index in range(count)
  ]
  if devices:
    # A number in XLA_FLAGS would be ignored beside this one.
    own = [each | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)} for each in own]
  if gpus:
    visible = given.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    if len(visible) < count:
      raise ValueError(
        f"--processes={count} --gpus needs a GPU for each, and CUDA_VISIBLE_DEVICES={','.join(visible)} shows "
        f"{len(visible)}; start fewer, or show more"
      )
    own = [each | {"CUDA_VISIBLE_DEVICES": gpu} for each, gpu in zip(own, visible)]
  return own


def start(command: Sequence[str], environment: Mapping[str, str], index: int) -> subprocess.Popen[str]:
  """One process, in a session of its own: a Ctrl-C then comes once, from here."""
  piped: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
  return subprocess.Popen(
    command,
    env={**os.environ, **environment, **({"PYTHONUNBUFFERED": "1"} if index else {})},
    stdin=subprocess.DEVNULL,
    start_new_session=True,
    **(piped if index else {}),
  )


def pass_on(lines: IO[str], index: int) -> None:
  for line in lines:
    print(f"[{index}] {line}", end="", flush=True)


def follow(processes: Sequence[subprocess.Popen[str]]) -> int:
  """Waits for all; returns the exit code of the first that failed, 0 where none did."""
  code, deadline = 0, float("inf")
  while any(process.poll() is None for process in processes):
    failed = [process.returncode for process in processes if process.poll()]
    if failed and not code:
      code, deadline = failed[0], time.monotonic() + PATIENCE
    if time.monotonic() > deadline:
      for process in processes:
        process.kill()
    time.sleep(0.05)
  code = code or next((process.returncode for process in processes if process.returncode), 0)
  return code if code >= 0 else 128 - code


def run(command: Sequence[str], own: Sequence[Mapping[str, str]]) -> int:
  """Runs the command once in each environment, and passes signals on; returns the exit code for all."""
  processes: list[subprocess.Popen[str]] = []

  def forward(number: int, _: object) -> None:
    for process in processes:
      if process.poll() is None:
        process.send_signal(number)

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, forward)
  readers = []
  try:
    for index, environment in enumerate(own):
      processes.append(start(command, environment, index))
      if index:
        readers.append(threading.Thread(target=pass_on, args=(processes[-1].stdout, index), daemon=True))
        readers[-1].start()
    return follow(processes)
  finally:
    for process in processes:
      process.kill()
    for reader in readers:
      reader.join(1)


def parser() -> Parser:
  made = Parser(
    prog="processes.py",
    usage="python3 launch/processes.py --processes=N [--devices=N | --gpus] -- COMMAND ...",
    description=__doc__,
    epilog=EPILOG,
  )
  made.add_argument("--processes", type=positive, required=True, metavar="N", help="how many")
  kind = made.add_mutually_exclusive_group()
  kind.add_argument("--devices", type=positive, metavar="N", help="simulated CPU devices in each")
  kind.add_argument("--gpus", action="store_true", help="a GPU for each, in the order of CUDA_VISIBLE_DEVICES")
  made.add_argument(
    "--venv", metavar="DIR", help="whose llmjax is run (default: .venv beside this folder, or the PATH's)"
  )
  made.add_argument("--dry_run", action="store_true", help="print the commands and run nothing")
  return made


def main(argv: Sequence[str]) -> int:
  own, command = split(argv)
  arguments = parser().parse_args(own)
  if not command:
    raise ValueError("nothing to run; put it behind --, such as `-- train --config=gpt:size=nano`")
  each = environments(arguments.processes, arguments.devices, arguments.gpus, os.environ)
  words = [find_llmjax(arguments.venv), *command]
  if not arguments.dry_run:
    return run(words, each)
  for environment in each:
    print(*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(words), "&")
  print("wait")
  return 0


if __name__ == "__main__":
  serve(main, "nothing was started")

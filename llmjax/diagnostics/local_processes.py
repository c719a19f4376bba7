"""Measurement of a run by several processes on this machine, which share simulated devices."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from llmjax.config import ConfigError, ConfigLike
from llmjax.diagnostics.measurement import PARTS, FlatArrays, Measurement, measure_run
from llmjax.diagnostics.shrink import shrink_config
from llmjax.distributed import sharding


def measure_processes(flags: Sequence[str], count: int, mesh: str, num_devices: int) -> list[Measurement]:
  """Start processes that measure a run together, and return the measurement of each.

  Args:
    flags: flags of the command line that configure the run.
    count: number of processes.
    mesh: such as "data=2,tensor=4".
    num_devices: number of simulated devices of all processes together.

  Raises:
    ConfigError: a process failed, with the last line of each output.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    coordinator = f"127.0.0.1:{free.getsockname()[1]}"
  command = [sys.executable, "-m", "llmjax", "verify", *flags, f"--devices={num_devices // count}", f"--meshes={mesh}"]
  running: list[subprocess.Popen[bytes]] = []
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    try:
      for index in range(count):
        environment = os.environ | {
          "JAX_PLATFORMS": "cpu",
          "LLMJAX_COORDINATOR": coordinator,
          "LLMJAX_NUM_PROCESSES": str(count),
          "LLMJAX_PROCESS_ID": str(index),
        }
        with open(folder / f"{index}.log", "wb") as log:
          worker = [*command, f"--worker={folder}"]
          running.append(subprocess.Popen(worker, env=environment, stdout=log, stderr=subprocess.STDOUT))
      codes = [process.wait() for process in running]
    finally:
      for process in running:
        process.kill()
    if any(codes):
      logs = [(folder / f"{index}.log").read_text(errors="replace").strip() for index in range(count)]
      last_lines = [f"process {index} of {count}: {log.splitlines()[-1]}" for index, log in enumerate(logs) if log]
      raise ConfigError("; ".join(last_lines) or f"processes ended with exit codes {codes} and without output")
    return [load_measurement(folder, index) for index in range(count)]


def write_measurement(config: ConfigLike, mesh: str, folder: str | Path) -> None:
  """Measure a run in one of the processes of `measure_processes`, and write the result to INDEX.json and INDEX.npz."""
  measurement = measure_run(shrink_config(config, jax.device_count()), sharding.parse_mesh(mesh))
  index = jax.process_index()
  arrays = {f"{part}:{name}": array for part, leaves in measurement.parts.items() for name, array in leaves.items()}
  other = {"rows": measurement.rows, "collectives": measurement.collectives}
  (Path(folder) / f"{index}.json").write_text(json.dumps(other), encoding="utf-8")
  np.savez(Path(folder) / f"{index}.npz", **arrays)  # type: ignore[arg-type]  # names could be those of its keywords


def load_measurement(folder: Path, index: int) -> Measurement:
  """Return the measurement that the process `index` has written."""
  parts: dict[str, FlatArrays] = {part: {} for part in PARTS}
  with np.load(folder / f"{index}.npz") as file:
    for key in file.files:
      part, name = key.split(":", 1)
      parts[part][name] = file[key]
  return Measurement(parts, **json.loads((folder / f"{index}.json").read_text(encoding="utf-8")))

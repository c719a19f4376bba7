"""Slots of the trials that run at a time, and the commands of the launchers that run trials on other machines."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from llmjax.config import ConfigError, config_roots
from llmjax.sweeps.job import Job

T = TypeVar("T")


class LauncherSpec(NamedTuple):
  """A launcher of single trials.

  Words of commands may contain {sweep}, {slot} and {trial}, which name machines.
  """

  interrupt_note: str  # state of running trials after Ctrl-C
  command: Sequence[str] = ()  # prefix of `train`; () runs it on this machine
  is_remote: bool = False  # trials run on machines without this one's disk
  cleanup: Sequence[Sequence[str]] = ()  # commands that delete the machines of a slot; a run that is still there saves


LAUNCHERS = {
  "local": LauncherSpec("running trials have saved"),
  "tpu_vm": LauncherSpec(
    "running trials have saved, and their machines are deleted",
    command=("launch/tpu_vm.py", "run", "--name={sweep}-{slot}", "--keep"),
    is_remote=True,
    cleanup=[("launch/tpu_vm.py", action, "--name={sweep}-{slot}") for action in ("stop", "delete")],
  ),
  "gke": LauncherSpec(
    "running trials continue in the cluster",
    command=("launch/gke.py", "run", "--name={sweep}-{trial}"),
    is_remote=True,
  ),
}
CLEANUP_FLAGS = r"--(zone|project|slices|internal_ips)\b"  # flags of a launcher that its cleanup commands take too


class Launcher:
  """A launcher with its flags, for the trials of one sweep.

  Args:
    name: key of LAUNCHERS.
    flags: flags of the launcher's script.
    sweep: prefix of the names of machines, see `machine_name_prefix`.
  """

  def __init__(self, name: str, flags: Sequence[str], sweep: str) -> None:
    self.name, self.spec = name, LAUNCHERS[name]
    self._flags, self._sweep = flags, sweep

  def prefix(self, job: Job, slot: int) -> list[str]:
    """Return the words before the arguments of `llmjax` in the command of a trial."""
    trial = hashlib.sha256(job.command.encode()).hexdigest()[:8]
    return self._script_command(self.spec.command, self._flags, slot, trial) if self.spec.command else []

  def delete_machines(self, slot: int) -> None:
    """Run the cleanup commands of a slot; signals to this process do not reach them."""
    flags = [flag for flag in self._flags if re.match(CLEANUP_FLAGS, flag)]
    for words in self.spec.cleanup:
      subprocess.run(self._script_command(words, flags, slot), check=False, start_new_session=True)

  def rehearse(self, job: Job) -> None:
    """Run the launcher with --dry_run.

    Raises:
      ConfigError: it refuses, for example because of a wrong flag, or of changes that are not committed.
    """
    prefix = self.prefix(job, slot=0)
    words = job.process_arguments([*prefix, "--dry_run"])
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
      reason = done.stderr.strip().split("\n")[-1] or f"{prefix[1]} ended with exit code {done.returncode}"
      raise ConfigError(f"no trial was started: {reason}")

  def _script_command(self, words: Sequence[str], flags: Sequence[str], slot: int, trial: str = "") -> list[str]:
    script, *more = words
    parts = {"sweep": self._sweep, "slot": str(slot), "trial": trial}
    return [sys.executable, str(find_launch_script(script)), *(word.format(**parts) for word in more), *flags]


def find_launch_script(script: str) -> Path:
  """Return the path of a script in launch/.

  Raises:
    ConfigError: the package was installed without a clone of the repository.
  """
  path = next((root / script for root in config_roots() if (root / script).is_file()), None)
  if path is None:
    raise ConfigError(f"{script} does not exist here. Run the sweep in a clone of llmjax, or use --launcher=local.")
  return path


def machine_name_prefix(workdir: Path, trials_in: str | None) -> str:
  """Return the prefix of the names of a sweep's machines: unique to the sweep, short, lower case, as clouds need it."""
  digest = hashlib.sha256(f"{workdir} {trials_in}".encode()).hexdigest()[:6]
  plain = re.sub(r"[^a-z0-9]+", "-", workdir.name.lower()).strip("-")[:20].strip("-")
  return "-".join(filter(None, ["s", plain, digest]))


class Slot(NamedTuple):
  """A share of this machine, or the machines of a launcher, which one trial after the other uses."""

  number: int
  cores: set[int] | None = None  # None: all
  environment: Mapping[str, str] = {}


def make_slots(count: int, launcher: str) -> list[Slot]:
  """Divide this machine's GPUs, or its cores if it has none, among `count` trials.

  Raises:
    ConfigError: there are more trials than accelerators.
  """
  if launcher != "local" or count == 1:
    return [Slot(number) for number in range(count)]
  visible = os.environ.get("CUDA_VISIBLE_DEVICES")
  is_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or visible == ""
  gpus = [] if is_cpu else sorted(path.name for path in Path("/proc/driver/nvidia/gpus").glob("*"))
  devices = [str(i) for i in range(len(gpus))] if visible is None else [d for d in visible.split(",") if d]
  has_tpus = not is_cpu and any(list(Path("/dev").glob(name)) for name in ("accel[0-9]*", "vfio/[0-9]*"))
  if (gpus and len(devices) < count) or (has_tpus and not gpus):
    most = len(devices) if gpus else 1
    raise ConfigError(f"--max_parallel: the accelerators of this machine can run {most} trials at a time, got {count}")
  if gpus:
    return [
      Slot(i, environment={"CUDA_VISIBLE_DEVICES": ",".join(share)}) for i, share in enumerate(_shares(devices, count))
    ]
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  return [Slot(i, set(share) or None) for i, share in enumerate(_shares(cores, count))]


def _shares(items: Sequence[T], count: int) -> Iterator[Sequence[T]]:
  size = len(items) // count
  return (items[i * size : (i + 1) * size] for i in range(count))

"""launch/slurm.py with SLURM itself, on a cluster of one node.

It needs root, and Debian's packages slurm-wlm and munge:

  LLMJAX_SLURM_TEST=install python -m pytest -q tests/launch/slurm_cluster_test.py --tier=full  # installs both
"""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from llmjax.telemetry import curves
from tests.support.fake_slurm import run_queued, run_slurm_script
from tests.support.launchers import ROOT
from tests.support.slurm_cluster import WAIT, SlurmCluster, skip_reason, wait_for

pytestmark = pytest.mark.full("clusters")

VENV = Path(sys.prefix)


@pytest.fixture
def cluster(monkeypatch):
  reason = skip_reason()
  if reason:
    pytest.skip(reason)
  folder = Path(tempfile.mkdtemp(prefix="llmjax_slurm_"))
  folder.chmod(0o755)  # munge's clients go through it
  monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
  made = SlurmCluster(folder)
  try:
    made.start_all()
    yield made
  except BaseException:
    for log in sorted(folder.glob("*.log")):
      print(f"-- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
    raise
  finally:
    made.stop_all()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def settings(tmp_path, monkeypatch):
  """Flags that pass the tests' settings of JAX to jobs."""
  variables = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "2",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "LLMJAX_CACHE": str(tmp_path / "cache"),
  }
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  return [f"--venv={VENV}", *(f"--env={name}" for name in variables)]


def train(home, steps, *more):
  return [
    *("train", f"--config=gpt:text={home / 't.txt'},debug", f"--config.total_steps={steps}", "--config.batch_size=8"),
    *("--config.evals={}", "--config.checkpoint.best=none", "--config.log.tensorboard=false", *more),
  ]


def read_log(workdir):
  return (workdir / "log.txt").read_text() if (workdir / "log.txt").exists() else ""


def start_numbers(workdir):
  return re.findall(r"^-- job .*, start (\d+)$", read_log(workdir), re.MULTILINE)


def has_logged(workdir):
  return (workdir / curves.METRICS_FILE).exists() and "train/loss" in (workdir / curves.METRICS_FILE).read_text()


def resumed_step(workdir, total):
  """Return the step at which a run that is now finished resumed."""
  [step] = re.findall(rf"resuming .* at ([\d,]+)/{total:,}", read_log(workdir))
  assert f"is finished at {total:,} steps" in read_log(workdir)
  return int(step.replace(",", ""))


def loss_curve(workdir):
  return curves.read_curves(workdir)["train/loss"]


def test_real_slurm_requeues_and_runs_resume(cluster, settings, tmp_path):
  """A sweep with a trial that fails, one that is cancelled and one that is interrupted; then two processes whose
  node dies."""
  home = tmp_path / "a b"
  home.mkdir()
  (tmp_path / "t.txt").write_text("\n".join(f"{i}: the quick brown fox jumps over {i * 37 % 101}." for i in range(300)))
  total = 300
  flags = train(tmp_path, total, "--config.log.every=5", "--config.checkpoint.every=none")
  sweep = {
    "wrong": [*flags, "--config.optim.learning=1"],
    "cancelled": train(tmp_path, 10**6, "--config.checkpoint.every=none"),
    "interrupted": flags,  # the last, whose number is that of the array
  }
  (home / "trials.jsonl").write_text(
    "".join(json.dumps({"name": n, "workdir": str(home / n), "arguments": a}) + "\n" for n, a in sweep.items())
  )
  words = ["array", f"--commands={home / 'trials.jsonl'}", f"--folder={home}", "--max_parallel=3"]
  _, err, code = run_slurm_script(*words, *settings)
  assert code == 0, err
  assert run_queued(tmp_path, "a b")[0].split() == list(sweep)
  [number] = [path.read_text().strip() for path in (home / "slurm").glob("*.job")]
  wait_for(lambda: has_logged(home / "interrupted"))
  cluster.query("scancel", "--signal=TERM", f"{number}_2")  # as at the end of the time limit: only the tasks get it
  wait_for(lambda: has_logged(home / "cancelled"))
  assert "cancelled" in run_queued(tmp_path, "a b")[0].split()
  cluster.query("scancel", f"{number}_1")

  # Meanwhile, one process computes the expected result of two.
  alone = train(tmp_path, 12, "--config.log.every=1", "--config.checkpoint.every=4")
  alone += ["--config.mesh.data=4", "--config.mesh.fsdp=1"]
  subprocess.run(
    [str(VENV / "bin" / "llmjax"), *alone, f"--workdir={home / 'one'}"],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"},
    stdout=subprocess.DEVNULL,
    check=True,
  )
  wait_for(lambda: not run_queued(tmp_path, "a b")[0])
  assert 0 < resumed_step(home / "interrupted", total) < total and start_numbers(home / "interrupted") == ["1", "2"]
  assert "is queued again" in read_log(home / "interrupted")
  assert start_numbers(home / "wrong") == start_numbers(home / "cancelled") == ["1"]
  assert "is queued again" not in read_log(home / "wrong") and "learning" in read_log(home / "wrong")
  assert "interrupted at" in read_log(home / "cancelled") and "is queued again" not in read_log(home / "cancelled")
  steps = list(loss_curve(home / "interrupted")[0])
  assert steps == sorted(set(steps)) and steps[-1] == total

  command = [sys.executable, str(ROOT / "launch/slurm.py"), "submit", f"--workdir={home / 'two'}", *settings]
  waiting = subprocess.Popen([*command, "--processes_per_node=2", "--wait", "--poll=1", "--", *alone])
  try:
    wait_for(lambda: list((home / "two" / "checkpoints").glob("4/*")) or waiting.poll() is not None)
    cluster.kill_node()
    # SLURM itself notices after SlurmdTimeout, here 300 seconds.
    cluster.query("scontrol", "update", "NodeName=localhost", "State=DOWN", "Reason=power")
    cluster.start_node()
    assert waiting.wait(WAIT) == 0, read_log(home / "two")
  finally:
    waiting.kill()
  assert start_numbers(home / "two") == ["1", "2"] and resumed_step(home / "two", 12) in (4, 8)
  np.testing.assert_array_equal(loss_curve(home / "two")[0], loss_curve(home / "one")[0])
  np.testing.assert_allclose(loss_curve(home / "two")[1], loss_curve(home / "one")[1], rtol=1e-5)


SWEEP = """
from configs import gpt
from llmjax.sweeps.trials import Sweep, vary

def get_config(arg=None):
  config = gpt.get_config("text={text},debug")
  config.total_steps, config.batch_size = 300, 8
  config.evals = {{}}
  config.checkpoint.update({{"best": None, "every": None}})
  config.log.update({{"every": 5, "tensorboard": False}})
  return config

def get_sweep():
  return Sweep(vary("optim.lr", [1e-3, 3e-3]), metric="train/loss", x="optim.lr")
"""


def test_real_slurm_runs_a_sweep(cluster, settings, tmp_path):
  """Two trials, one of them interrupted: both finish, and the same command has nothing left to run."""
  (tmp_path / "t.txt").write_text("\n".join(f"{i}: the quick brown fox jumps over {i * 37 % 101}." for i in range(300)))
  (tmp_path / "rates.py").write_text(SWEEP.format(text=tmp_path / "t.txt"))
  home = tmp_path / "a sweep"
  command = [VENV / "bin" / "llmjax", "sweep", f"--config={tmp_path / 'rates.py'}", f"--workdir={home}"]
  command += ["--launcher=slurm", "--max_parallel=2", f"--launcher_flags={shlex.join(settings)}"]
  trials = [home / "lr=0.001", home / "lr=0.003"]
  sweep = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  try:
    wait_for(lambda: has_logged(trials[0]) or sweep.poll() is not None)
    [number] = [path.read_text().strip() for path in (home / "slurm").glob("*.job")]
    cluster.query("scancel", "--signal=TERM", f"{number}_0")
    output, _ = sweep.communicate(timeout=WAIT)
  finally:
    sweep.kill()
  assert sweep.returncode == 0, output + read_log(trials[0])
  assert 0 < resumed_step(trials[0], 300) < 300 and [start_numbers(trial) for trial in trials] == [["1", "2"], ["1"]]
  rows = list(csv.DictReader(open(home / "results.csv")))
  assert [(row["state"], row["step"]) for row in rows] == [("finished", "300")] * 2
  assert all(float(row["seconds"]) > 1 for row in rows)
  again = subprocess.run(command, capture_output=True, text=True)
  assert again.returncode == 0 and "0 to run" in again.stdout
  assert len(list((home / "slurm").glob("*.job"))) == 1

"""Sweeps: what cannot run is refused before anything starts; nothing is lost, run twice or compiled twice."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from llmjax import cli
from llmjax.config import ConfigError, load_config, to_dict
from llmjax.program import make_model
from llmjax.sweeps import command as sweeps
from llmjax.trials import COSTS, Sweep

ROOT = Path(__file__).parent.parent

SWEEP = """
from configs import char
from llmjax.trials import Sweep, product, vary

def get_config(arg=None):
  config = char.get_config("debug,text={text}")
  config.batch_size, config.total_steps = 8, 40
  config.checkpoint.every = 4
  config.log.every = 1
  config.log.tensorboard = False
  del config.evals.heldout
  del config.evals.sample
  config.evals.nap = dict(name="nap:Nap", every=2, at=())
  return config

def get_sweep():
  trials = product(vary("model.d_model", [16, 32]), vary("optim.lr", [1e-3, 1e-2]), {more})
  return Sweep(trials, metric="train/loss", x="optim.lr", lines=("model.d_model",))
"""
NAP = """
import os, time
class Nap:
  def __init__(self, program):
    pass
  def __call__(self, params):
    time.sleep(float(os.environ.get("NAP", 0)))
    return {}
"""


@pytest.fixture
def command(home, monkeypatch):
  """A function that starts `llmjax sweep` on small models."""
  text = home / "my.txt"
  text.write_text("".join(f"line {i}: the quick brown fox jumps over {i * 37 % 101} lazy dogs.\n" for i in range(400)))
  (home / "nap.py").write_text(NAP)
  env = {**os.environ, "PYTHONPATH": f"{home}:{ROOT}", "JAX_COMPILATION_CACHE_DIR": str(home / "jax"), "NAP": "0.3"}
  env |= {"JAX_LOG_COMPILES": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

  def start(workdir, *flags, more="[{}]", nap="0.3"):
    (home / "sweep.py").write_text(textwrap.dedent(SWEEP.format(text=text, more=more)))
    flags = ("--config=sweep.py", f"--workdir={workdir}", "--max_parallel=2", *flags)
    return subprocess.Popen(
      [sys.executable, "-m", "llmjax", "sweep", *flags],
      **{"cwd": home, "env": env | {"NAP": nap}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    )

  return start


def losses(folder):
  """{step: loss} of a trial; every step is there once."""
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  steps = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
  assert len(dict(steps)) == len(steps)
  return dict(steps)


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_with_nothing_lost_and_nothing_run_twice(command, home):
  plain = command("plain", nap="0")
  _, error = plain.communicate(timeout=400)
  assert plain.returncode == 0, error
  logs = {path.parent.name: path.read_text() for path in home.glob("plain/*/log.txt")}
  assert len(logs) == 4
  # Of four trials two are of each program: looking at them compiled both, and all trials took them from there.
  assert len(re.findall(r"Finished XLA compilation of jit\(train_step\)", error)) == 2
  hits = [len(re.findall("cache hit for 'jit_train_step'", log)) for log in logs.values()]
  assert hits == [1] * 4
  assert len(list((home / "jax").glob("jit_train_step-*-cache"))) == 2

  victim = command("killed")
  deadline = time.time() + 200
  while len(list(home.glob("killed/*/checkpoints/8"))) < 2:
    assert time.time() < deadline and victim.poll() is None
    time.sleep(0.1)
  victim.kill()
  trial = min(home.glob("killed/*/checkpoints"), key=str).parent
  holders = subprocess.run(["pgrep", "-f", f"workdir={trial}"], capture_output=True, text=True).stdout.split()
  os.kill(int(holders[0]), signal.SIGKILL)  # one trial dies as well, the other goes on alone
  again = command("killed", nap="0")
  said, error = again.communicate(timeout=400)
  assert again.returncode == 0, error
  for name in logs:
    assert losses(home / "killed" / name) == losses(home / "plain" / name)
  assert "resuming" in (trial / "log.txt").read_text()
  began = sum(len(re.findall(r"^training ", path.read_text(), re.M)) for path in home.glob("killed/*/log.txt"))
  assert began == 4  # from scratch, each once

  third = command("killed", nap="0")
  said, _ = third.communicate(timeout=200)
  assert third.returncode == 0 and "0 to run" in said


def test_what_cannot_run_is_refused_before_anything_starts(command, home):
  wrong = {"model.num_heads": 3, "optim.lrr": 3, "schedule.warmup": 100, "model.d_ff": 2**30, "log.wandb": "p"}
  process = command("refused", more="[{}, " + ", ".join(str({key: wrong[key]}) for key in wrong) + "]")
  _, error = process.communicate(timeout=200)
  last = error.strip().split("\n")[-1]
  assert process.returncode == 2 and last.count("d_model=16,lr=0.001") == len(wrong), error[-2000:]
  for words in ("pip install wandb", "num_heads=3", "did you mean `optim.lr", "schedule.warmup=100", "does not fit"):
    assert words in last
  assert not list(home.glob("refused/*/"))


def test_devices_and_kernels_that_are_not_here_are_stood_for(command, home):
  process = command("there", "--launcher=slurm", "--dry_run", more='[{"model.attention": "splash", "mesh.data": 4}]')
  said, error = process.communicate(timeout=200)
  assert process.returncode == 0, error[-2000:]
  assert "4 trials, 2 programs" in said
  assert "#SBATCH --array=0-3%2" in said and "--config.model.attention=splash" in said
  assert not (home / "there").exists()


@pytest.mark.parametrize(
  "plan, said",
  [
    ({"metric": "eval/heldot/loss"}, "is none of the run's measurements: eval/heldout/..., eval/nap/..."),
    ({"metric": "eval/heldout/loss", "best_is": "most"}, "would take the worst for the best"),
    ({"metric": "train/loss"}, ""),
    ({"metric": "eval/nap/x", "best_is": "most"}, ""),
  ],
)
def test_a_metric_that_cannot_decide_is_told_first(plan, said):
  assert said in sweeps.misjudged(Sweep([{}], **plan), ["heldout", "nap"])
  assert bool(said) == bool(sweeps.misjudged(Sweep([{}], **plan), ["heldout", "nap"]))


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--launcher=slrum"], "slurm"),
    (["--max_parallel=0"], "at least 1"),
    (["--launcher=tpu_vm"], "--trials_in=gs://"),
    (["--launcher=gke", "--trials_in=/tmp/x"], "--trials_in=gs://"),
    (["--launcher_flags=--zone 'z"], "No closing quotation"),
    (["--launcher_flags=--zone z"], "--FLAG=VALUE each"),
    (["--config.model.d_mdel=3"], "no key of this config"),
    (
      ["--launcher=tpu_vm", "--trials_in=gs://b/x", "--launcher_flags=--zon=z"],
      "nothing has been started: tpu_vm.py: ",
    ),
    (["--launcher=gke", "--trials_in=gs://b/x"], "nothing has been started: gke.py: "),
  ],
)
def test_flags_are_checked(flags, words, home, capsys, monkeypatch):
  monkeypatch.chdir(home)
  (home / "sweep.py").write_text(SWEEP.format(text="x.txt", more="[{}]"))
  code = cli.main(["sweep", "--config=sweep.py", "--workdir=w", *flags])
  assert code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/*/sweep.py")), ids=lambda path: path.parent.name)
def test_trials_of_experiments_are_configs(path, tmp_path):
  plan, jobs = sweeps.load([f"--config={path}"], tmp_path)
  assert len(jobs) > 1 and len({job.folder for job in jobs}) == len(jobs)
  for job in jobs:
    config = load_config(job.arguments[1:-1])
    make_model(to_dict(config.model), 256, config.seq_len)
  assert any(plan.x == key for job in jobs for key in job.trial) or plan.x in COSTS


def test_a_file_without_a_sweep_is_told(home, tmp_path):
  (tmp_path / "x.py").write_text("def get_sweep():\n  return []\n")
  with pytest.raises(ConfigError, match=r"must return an llmjax.trials.Sweep, not list"):
    sweeps.load([f"--config={tmp_path / 'x.py'}"], tmp_path)


def test_a_column_that_no_trial_has_is_told(home, tmp_path):
  text = (
    "from llmjax.trials import *\ndef get_sweep():\n  return Sweep(vary('optim.lr', [1]), x='optim.learnin_rate')\n"
  )
  (tmp_path / "x.py").write_text(text)
  with pytest.raises(ConfigError, match="did you mean `optim"):
    sweeps.load([f"--config={tmp_path / 'x.py'}"], tmp_path)

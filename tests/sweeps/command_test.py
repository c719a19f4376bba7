"""The command `sweep`: invalid trials are refused before any starts; nothing is lost, repeated or compiled twice."""

import contextlib
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from llmjax.cli.main import main
from llmjax.config import ConfigError, load_config, to_dict
from llmjax.sweeps import preflight, process_pool, trial_checks
from llmjax.sweeps.command import load_sweep
from llmjax.sweeps.trials import COST_COLUMNS, Sweep
from llmjax.training.components import make_model

ROOT = Path(__file__).parents[2]

SWEEP = """
from configs import char
from llmjax.sweeps.trials import Sweep, product, vary

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
  trials = product(vary("model.d_model", {widths}), vary("optim.lr", [1e-3, 1e-2]), {more})
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
def files(home, monkeypatch):
  """A function that writes `sweep.py`, with `more` trials as a product with the others, in the current folder."""
  monkeypatch.chdir(home)
  monkeypatch.syspath_prepend(home)
  text = home / "my.txt"
  text.write_text("".join(f"line {i}: the quick brown fox jumps over {i * 37 % 101} lazy dogs.\n" for i in range(400)))
  (home / "nap.py").write_text(NAP)
  return lambda more="[{}]", widths=(16, 32): (home / "sweep.py").write_text(
    SWEEP.format(text=text, more=more, widths=widths)
  )


class FinishedProcess:
  """A trial that has run in the process of the tests."""

  def __init__(self, words, stdout, **_):
    assert words[:3] == [sys.executable, "-m", "llmjax"]
    self.pid, (out, err) = os.getpid(), (io.StringIO(), io.StringIO())
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      self.returncode = main(words[3:])
    stdout.write((out.getvalue() + err.getvalue()).encode())
    stdout.flush()

  def poll(self):
    return self.returncode


@pytest.fixture
def in_process(monkeypatch):
  """Check and run trials in the process of the tests."""

  def run(words, **_):
    assert words[:3] == [sys.executable, "-m", "llmjax"]
    return SimpleNamespace(returncode=main(words[3:]))

  class Jax:
    """JAX whose number of devices is fixed, since the process of the tests already uses them."""

    config = SimpleNamespace(update=lambda name, value: None)
    __getattr__ = staticmethod(lambda name: getattr(jax, name))

  monkeypatch.setattr(trial_checks, "jax", Jax())
  monkeypatch.setattr(preflight, "subprocess", SimpleNamespace(run=run))
  fake = SimpleNamespace(Popen=FinishedProcess, DEVNULL=None, STDOUT=None)
  monkeypatch.setattr(process_pool, "subprocess", fake)
  monkeypatch.setattr(process_pool.os, "sched_setaffinity", lambda pid, cores: None)


@pytest.mark.slow
def test_sweep_trains_each_trial_once_and_reports(files, in_process, home, capsys):
  """The same command with more steps resumes every trial."""
  files(widths=[16])
  command = ["sweep", "--config=sweep.py", "--workdir=w"]
  assert main([*command, "--config.total_steps=4"]) == 0
  rows = list(csv.DictReader(open("w/results.csv")))
  assert [(row["state"], row["step"]) for row in rows] == [("finished", "4")] * 2
  assert main([*command, "--config.total_steps=4"]) == 0
  assert "0 to run" in capsys.readouterr().out
  assert main([*command, "--config.total_steps=6"]) == 0
  for name in ("lr=0.001", "lr=0.01"):
    folder = home / "w" / f"d_model=16,{name}"
    assert list(read_losses(folder)) == [1, 2, 3, 4, 5, 6]
    assert (folder / "log.txt").read_text().count("resuming") == 1


def read_losses(folder):
  """Return {step: loss} of a trial, and check that no step is logged twice."""
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  steps = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
  assert len(dict(steps)) == len(steps)
  return dict(steps)


@pytest.mark.slow
def test_invalid_trials_are_refused_before_any_starts(files, in_process, home, capsys):
  wrong = {"model.num_heads": 3, "optim.lrr": 3, "schedule.warmup": 100, "model.d_ff": 2**30, "log.wandb": "p"}
  files(f"[{{}}, {', '.join(str({key: value}) for key, value in wrong.items())}]")
  code = main(["sweep", "--config=sweep.py", "--workdir=refused"])
  message = capsys.readouterr().err.strip().split("\n")[-1]
  assert code == 2 and message.count("d_model=16,lr=0.001") == len(wrong)
  for words in ("pip install wandb", "num_heads=3", "did you mean `optim.lr", "schedule.warmup=100", "does not fit"):
    assert words in message
  assert not list(home.glob("refused/*/"))


@pytest.mark.slow
def test_dry_run_plans_for_absent_devices_and_kernels(files, home):
  """The process that checks the trials simulates the devices, which this one could not."""
  files('[{"model.attention": "splash", "mesh.data": 4}]')
  flags = ["--config=sweep.py", "--workdir=there", "--launcher=slurm", "--max_parallel=2", "--dry_run"]
  command = [sys.executable, "-m", "llmjax", "sweep", *flags]
  done = subprocess.run(command, env={**os.environ, "PYTHONPATH": f"{home}:{ROOT}"}, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  assert "4 trials, 2 programs" in done.stdout
  assert "#SBATCH --array=0-3%2" in done.stdout and "--config.model.attention=splash" in done.stdout
  assert not (home / "there").exists()


@pytest.mark.full("clusters")
def test_killed_sweep_resumes_without_lost_or_repeated_trials(files, home):
  cache = {"JAX_COMPILATION_CACHE_DIR": str(home / "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  variables = {**os.environ, "PYTHONPATH": f"{home}:{ROOT}", "JAX_LOG_COMPILES": "1", **cache}
  files()

  def start(workdir, nap="0"):
    flags = ["--config=sweep.py", f"--workdir={workdir}", "--max_parallel=2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "llmjax", "sweep", *flags], env=variables | {"NAP": nap}, **pipes)

  plain = start("plain")
  _, error = plain.communicate(timeout=400)
  assert plain.returncode == 0, error
  logs = {path.parent.name: path.read_text() for path in home.glob("plain/*/log.txt")}
  assert len(logs) == 4
  # Two trials share each program: checking them has compiled both programs, and all trials load them.
  assert len(re.findall(r"Finished XLA compilation of jit\(train_step\)", error)) == 2
  hits = [len(re.findall("cache hit for 'jit_train_step'", log)) for log in logs.values()]
  assert hits == [1] * 4
  assert len(list((home / "jax").glob("jit_train_step-*-cache"))) == 2

  victim = start("killed", nap="0.3")
  deadline = time.time() + 200
  while len(list(home.glob("killed/*/checkpoints/8"))) < 2:
    assert time.time() < deadline and victim.poll() is None
    time.sleep(0.1)
  victim.kill()
  trial = min(home.glob("killed/*/checkpoints"), key=str).parent
  holders = subprocess.run(["pgrep", "-f", f"workdir={trial}"], capture_output=True, text=True).stdout.split()
  os.kill(int(holders[0]), signal.SIGKILL)  # one trial dies as well, the other continues without the sweep
  again = start("killed")
  _, error = again.communicate(timeout=400)
  assert again.returncode == 0, error
  for name in logs:
    assert read_losses(home / "killed" / name) == read_losses(home / "plain" / name)
  assert "resuming" in (trial / "log.txt").read_text()
  starts = sum(len(re.findall(r"^training ", path.read_text(), re.M)) for path in home.glob("killed/*/log.txt"))
  assert starts == 4  # each trial started from scratch once

  third = start("killed")
  output, _ = third.communicate(timeout=200)
  assert third.returncode == 0 and "0 to run" in output


@pytest.mark.parametrize(
  "plan, message",
  [
    ({"metric": "eval/heldot/loss"}, "metrics are eval/heldout/..., eval/nap/..."),
    ({"metric": "eval/heldout/loss", "mode": "max"}, "would select the worst value"),
    ({"metric": "train/loss"}, ""),
    ({"metric": "eval/nap/x", "mode": "max"}, ""),
  ],
)
def test_metric_that_trials_do_not_measure_is_refused(plan, message):
  error = preflight.metric_error(Sweep([{}], **plan), ["heldout", "nap"])
  assert message in error and bool(message) == bool(error)


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--launcher=slrum"], "slurm"),
    (["--max_parallel=0"], "at least 1"),
    (["--launcher=tpu_vm"], "--trials_in=gs://"),
    (["--launcher=gke", "--trials_in=/tmp/x"], "--trials_in=gs://"),
    (["--launcher_flags=--zone 'z"], "No closing quotation"),
    (["--launcher_flags=--zone z"], "--FLAG=VALUE each"),
    (["--config.model.d_mdel=3"], "did you mean `model.d_model`"),
    (
      ["--launcher=tpu_vm", "--trials_in=gs://b/x", "--launcher_flags=--zon=z"],
      "no trial was started: tpu_vm.py: ",
    ),
    (["--launcher=gke", "--trials_in=gs://b/x"], "no trial was started: gke.py: "),
  ],
)
def test_wrong_flags_are_refused(flags, words, home, capsys, monkeypatch):
  monkeypatch.chdir(home)
  (home / "sweep.py").write_text(SWEEP.format(text="x.txt", more="[{}]", widths=[16]))
  code = main(["sweep", "--config=sweep.py", "--workdir=w", *flags])
  assert code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/*/sweep.py")), ids=lambda path: path.parent.name)
def test_trials_of_experiments_are_valid_configs(path, tmp_path):
  plan, jobs = load_sweep([f"--config={path}"], tmp_path)
  assert len(jobs) > 1 and len({job.folder for job in jobs}) == len(jobs)
  for job in jobs:
    config = load_config(job.arguments[1:-1])
    make_model(to_dict(config.model), 256, config.seq_len)
  assert any(plan.x == key for job in jobs for key in job.trial) or plan.x in COST_COLUMNS


def test_file_without_a_sweep_is_refused(home, tmp_path):
  (tmp_path / "x.py").write_text("def get_sweep():\n  return []\n")
  with pytest.raises(ConfigError, match=r"must return an llmjax.sweeps.trials.Sweep, got list"):
    load_sweep([f"--config={tmp_path / 'x.py'}"], tmp_path)


def test_column_that_no_trial_has_is_refused(home, tmp_path):
  text = (
    "from llmjax.sweeps.trials import *\n"
    "def get_sweep():\n  return Sweep(vary('optim.lr', [1]), x='optim.learnin_rate')\n"
  )
  (tmp_path / "x.py").write_text(text)
  with pytest.raises(ConfigError, match="did you mean `optim"):
    load_sweep([f"--config={tmp_path / 'x.py'}"], tmp_path)

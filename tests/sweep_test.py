"""Sweeps: what cannot run is refused before anything starts; nothing is lost, run twice or compiled twice."""

import csv
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from pyarrow import parquet

from llmjax import cli, sweep, sweep_report
from llmjax.config import ConfigError, load_config, to_dict
from llmjax.program import make_model
from llmjax.trials import Sweep, vary

ROOT = Path(__file__).parent.parent

# Stands for `llmjax train`: notes that it ran, and ends as its trial is called.
TRIAL = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir=")).removeprefix("--workdir="))
attempts = folder / "attempts"
attempts.write_text(attempts.read_text() + "x" if attempts.exists() else "x")
kind, first = folder.name.partition("=")[2], attempts.read_text() == "x"
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
time.sleep(20 if kind == "waits" and first else 0.3)
if kind == "fails":
  sys.exit("llmjax: optim.lr is too high")
if kind == "dies" or (kind == "dies_once" and first):
  os.kill(os.getpid(), 9)
line = json.dumps({"step": 5, "eval/heldout/loss": len(kind), "train/loss": 1.0})
(folder / "metrics.jsonl").write_text(line + "\\n")
"""
FACTS = {"parameters": 10, "steps": 5, "tokens": 8, "flops": 100.0, "program": "p", "config": "c"}


@pytest.fixture
def started(tmp_path, monkeypatch):
  """A function that runs trials of these kinds and returns their jobs."""
  script = tmp_path / "trial.py"
  script.write_text(TRIAL)
  monkeypatch.setitem(sweep.LAUNCHERS, "fake", ["trial.py"])
  monkeypatch.setitem(sweep.LEFT, "fake", "what ran has saved")
  monkeypatch.setattr(sweep, "launch_script", lambda name: script)

  def start(*kinds, max_parallel=2, seen=lambda jobs: None, flags=(), retry=False, **facts):
    jobs = []
    for kind in kinds:
      name = f"kind={kind}"
      folder = tmp_path / "sweep" / name
      jobs.append(sweep.Job(name, {"kind": kind}, ["train", f"--workdir={folder}"], folder, FACTS | facts))
      sweep.look(jobs[-1], retry)
    sweep.run(jobs, "fake", flags, "sweep", [sweep.Slot(i) for i in range(max_parallel)], seen)
    return {job.name.partition("=")[2]: job for job in jobs}

  return start


def attempts(job):
  return len((job.folder / "attempts").read_text())


def test_trials_run_side_by_side_and_each_ends_as_it_must(started):
  most = []
  jobs = started(
    "a", "fails", "dies_once", "dies", seen=lambda jobs: most.append(sum(j.state == "running" for j in jobs))
  )
  assert {kind: job.state for kind, job in jobs.items()} == {
    **{"a": "finished", "fails": "failed", "dies_once": "finished", "dies": "failed"}
  }
  assert {kind: attempts(job) for kind, job in jobs.items()} == {"a": 1, "fails": 1, "dies_once": 2, "dies": 3}
  assert jobs["fails"].error == "llmjax: optim.lr is too high" and max(most) == 2


def test_machines_of_a_slot_are_ended_when_its_trials_are_over(started, monkeypatch, tmp_path):
  script = tmp_path / "end.py"
  script.write_text("import sys; open(sys.argv[0] + '.log', 'a').write(' '.join(sys.argv[1:]) + '\\n')")
  monkeypatch.setitem(sweep.ENDING, "fake", [["end.py", word, "--name={sweep}-{slot}"] for word in ("stop", "delete")])
  monkeypatch.setattr(sweep, "launch_script", lambda name: tmp_path / name)
  started("a", "fails", "b", flags=["--zone=z", "--type=t"])
  words = [f"{word} --name=s-sweep-{slot} --zone=z\n" for slot in (0, 1) for word in ("stop", "delete")]
  assert script.with_name("end.py.log").read_text() == "".join(words)


def test_a_second_call_runs_what_is_not_finished(started):
  started("a", "fails")
  jobs = started("a", "fails", "b")
  assert [attempts(job) for job in jobs.values()] == [1, 1, 1] and jobs["fails"].state == "failed"
  assert attempts(started("fails", retry=True)["fails"]) == 2
  (jobs["b"].folder / sweep.TRIAL).write_text("")  # a power cut
  assert attempts(started("b")["b"]) == 2


def test_a_trial_with_another_config_is_refused_and_one_with_more_steps_goes_on(started):
  started("a")
  assert attempts(started("a", steps=9)["a"]) == 2
  for facts in ({"steps": 9, "config": "d"}, {"steps": 5}):
    with pytest.raises(ConfigError, match="another config, or with more steps"):
      started("a", **facts)


def test_an_interrupt_lets_trials_save_and_the_next_call_goes_on(started):
  timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
  timer.start()
  with pytest.raises(KeyboardInterrupt, match="same command goes on"):
    started("waits", "a", "b", "c", max_parallel=1)
  jobs = started("waits", "a", "b", "c")
  assert {kind: attempts(job) for kind, job in jobs.items()} == {"waits": 2, "a": 1, "b": 1, "c": 1}
  assert all(job.state == "finished" for job in jobs.values())


def test_a_trial_that_goes_on_without_its_sweep_is_waited_for_and_keeps_its_slot(started, tmp_path):
  started("fails")  # its record says so, but it is running again
  folder = tmp_path / "sweep" / "kind=fails"
  (folder / sweep.LOCK).write_text("1")
  lock = open(folder / sweep.LOCK, "a")
  fcntl.flock(lock, fcntl.LOCK_EX)
  orphan = subprocess.Popen(["sleep", "1.5"], pass_fds=[lock.fileno()])
  lock.close()
  began = time.time()
  states = []
  jobs = started("fails", "a", "b", seen=lambda jobs: states.append([job.state for job in jobs]))
  assert orphan.poll() == 0 and time.time() - began > 1.2
  assert states[0] == ["running", "running", "waiting"] and attempts(jobs["fails"]) == 2
  assert (jobs["a"].folder / sweep.LOCK).read_text() == "0"


def test_accelerators_are_shared_out(monkeypatch):
  monkeypatch.setattr(sweep.Path, "glob", lambda path, _: map(Path, "abcd") if "nvidia" in str(path) else iter(()))
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in sweep.slots(2, "local")] == ["0,1", "2,3"]
  with pytest.raises(ConfigError, match="serve 4 trials"):
    sweep.slots(5, "local")
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
  assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in sweep.slots(2, "local")] == ["3", "5"]
  assert sweep.slots(2, "slurm") == [sweep.Slot(0), sweep.Slot(1)]


def test_results_as_tables_a_figure_and_a_page(started, tmp_path):
  plan = Sweep(vary("kind", ["a", "bb", "fails"]), x="kind")
  jobs = started("a", "bb", "fails")
  said = sweep_report.write_results(plan, list(jobs.values()), tmp_path)
  assert said.split("\n")[1].split() == ["1", "kind=a"] and "llmjax train --workdir" in said
  rows = list(csv.DictReader(open(tmp_path / "results.csv")))
  assert [row["eval/heldout/loss"] for row in rows] == ["1.0", "2.0", ""]
  assert rows[0]["flops"] == "500.0" and rows[2]["error"] == "llmjax: optim.lr is too high"
  table = parquet.read_table(tmp_path / "results.parquet")
  assert table.column("eval/heldout/loss").to_pylist() == [1.0, 2.0, None] and table.num_rows == 3
  page = (tmp_path / "sweep.html").read_text()
  assert all(job.command in page for job in jobs.values()) and "<script" not in page
  assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def rows_of(plan, *values):
  return [{"size": size, "flops": flops, plan.metric: value, "state": state} for size, flops, value, state in values]


def test_seeds_are_averaged_failures_are_no_numbers_and_a_front_has_no_point_that_another_beats():
  plan = Sweep([{}], x="flops", lines=("size",), best_is="least")
  rows = rows_of(
    plan,
    *[(1, 10, 4.0, "finished"), (1, 10, 2.0, "finished"), (1, 20, 2.5, "finished"), (2, 20, 2.0, "finished")],
    *[(2, 40, 2.2, "finished"), (2, 80, float("nan"), "finished"), (2, 90, 1.0, "failed"), (2, 95, 1.0, "running")],
    *[(1, 99, 1.0, "finished"), (1, 99, 1.0, "failed")],
  )
  groups = sweep_report.points(plan, rows)
  assert groups == {
    "size 1": [(10, 3.0, 2.0, 4.0), (20, 2.5, 2.5, 2.5)],
    "size 2": [(20, 2.0, 2.0, 2.0), (40, 2.2, 2.2, 2.2)],
  }
  assert sweep_report.failures(plan, rows) == [("size 2", 80), ("size 2", 90), ("size 1", 99)]
  assert sweep_report.frontier(plan, groups) == [(10, 3.0), (20, 2.0)]


def test_the_best_is_the_best_mean_of_seeds_not_the_luckiest():
  plan = Sweep([{}])
  jobs = [sweep.Job("", {"lr": lr, "seed": seed}, [], Path()) for lr in (1, 2) for seed in (0, 1)]
  rows = rows_of(
    plan, (0, 0, 1.0, "finished"), (0, 0, 5.0, "finished"), (0, 0, 2.0, "finished"), (0, 0, 2.2, "finished")
  )
  assert [entry[:2] for entry in sweep_report.ranked(plan, jobs, rows)] == [(2.1, 2), (3.0, 2)]
  rows[3]["state"] = "failed"
  assert [entry[:2] for entry in sweep_report.ranked(plan, jobs, rows)] == [(3.0, 2)]


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
  wrong = {"model.num_heads": 3, "optim.lrr": 3, "schedule.warmup": 100, "model.d_ff": 2**30}
  process = command("refused", more="[{}, " + ", ".join(f"{{{key!r}: {wrong[key]}}}" for key in wrong) + "]")
  _, error = process.communicate(timeout=200)
  last = error.strip().split("\n")[-1]
  assert process.returncode == 2 and last.count("d_model=16,lr=0.001") == len(wrong), error[-2000:]
  for words in ("num_heads=3", "did you mean `optim.lr", "schedule.warmup=100", "does not fit"):
    assert words in last
  assert not list(home.glob("refused/*/"))


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
  assert said in sweep.misjudged(Sweep([{}], **plan), ["heldout", "nap"])
  assert bool(said) == bool(sweep.misjudged(Sweep([{}], **plan), ["heldout", "nap"]))


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
  plan, jobs = sweep.load([f"--config={path}"], tmp_path)
  assert len(jobs) > 1 and len({job.folder for job in jobs}) == len(jobs)
  for job in jobs:
    config = load_config(job.arguments[1:-1])
    make_model(to_dict(config.model), 256, config.seq_len)
  assert any(plan.x == key for job in jobs for key in job.trial) or plan.x in sweep_report.COSTS


def test_a_file_without_a_sweep_is_told(home, tmp_path):
  (tmp_path / "x.py").write_text("def get_sweep():\n  return []\n")
  with pytest.raises(ConfigError, match=r"must return an llmjax.trials.Sweep, not list"):
    sweep.load([f"--config={tmp_path / 'x.py'}"], tmp_path)


def test_a_column_that_no_trial_has_is_told(home, tmp_path):
  text = (
    "from llmjax.trials import *\ndef get_sweep():\n  return Sweep(vary('optim.lr', [1]), x='optim.learnin_rate')\n"
  )
  (tmp_path / "x.py").write_text(text)
  with pytest.raises(ConfigError, match="did you mean `optim"):
    sweep.load([f"--config={tmp_path / 'x.py'}"], tmp_path)

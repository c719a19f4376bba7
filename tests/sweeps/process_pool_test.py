"""Parallel trials of a sweep: how each ends, and that interruptions lose and repeat nothing."""

import fcntl
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from llmjax.config import ConfigError
from llmjax.sweeps import launchers
from llmjax.sweeps.job import LOCK_FILE, RECORD_FILE, Job
from llmjax.sweeps.launchers import Launcher, LauncherSpec, Slot, machine_name_prefix, make_slots
from llmjax.sweeps.process_pool import ProcessPool, pair_with_slots

# In place of `llmjax train`: record the attempt, then end as the name of the trial demands.
TRIAL = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir=")).removeprefix("--workdir="))
attempts = folder / "attempts"
attempts.write_text(attempts.read_text() + "x" if attempts.exists() else "x")
kind, first = folder.name.partition("=")[2], attempts.read_text() == "x"
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
time.sleep(20 if kind == "waits" and first else 0.3)
if kind == "unsure" and first:
  sys.exit(75)
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
  (tmp_path / "trial.py").write_text(TRIAL)
  monkeypatch.setattr(launchers, "find_launch_script", lambda name: tmp_path / name)

  def start(*kinds, max_parallel=2, seen=lambda jobs: None, flags=(), cleanup=(), retry=False, **facts):
    spec = LauncherSpec("running trials have saved", command=("trial.py",), cleanup=cleanup)
    monkeypatch.setitem(launchers.LAUNCHERS, "fake", spec)
    jobs = []
    for kind in kinds:
      name = f"kind={kind}"
      folder = tmp_path / "sweep" / name
      jobs.append(Job(name, {"kind": kind}, ["train", f"--workdir={folder}"], folder, FACTS | facts))
      jobs[-1].load_state(retry)
    ProcessPool(jobs, Launcher("fake", flags, "sweep"), [Slot(i) for i in range(max_parallel)], seen).run()
    return {job.name.partition("=")[2]: job for job in jobs}

  return start


def attempts(job):
  return len((job.folder / "attempts").read_text())


def test_pool_runs_trials_in_parallel_and_records_their_ends(started):
  running = []
  jobs = started(
    "a", "fails", "dies_once", "dies", seen=lambda jobs: running.append(sum(j.state == "running" for j in jobs))
  )
  assert {kind: job.state for kind, job in jobs.items()} == {
    **{"a": "finished", "fails": "failed", "dies_once": "finished", "dies": "failed"}
  }
  assert {kind: attempts(job) for kind, job in jobs.items()} == {"a": 1, "fails": 1, "dies_once": 2, "dies": 3}
  assert jobs["fails"].error == "llmjax: optim.lr is too high" and max(running) == 2


def test_machines_of_a_slot_are_deleted_after_its_trials(started, tmp_path):
  script = tmp_path / "end.py"
  script.write_text("import sys; open(sys.argv[0] + '.log', 'a').write(' '.join(sys.argv[1:]) + '\\n')")
  cleanup = [("end.py", word, "--name={sweep}-{slot}") for word in ("stop", "delete")]
  started("a", "fails", "b", flags=["--zone=z", "--type=t"], cleanup=cleanup)
  words = [f"{word} --name=sweep-{slot} --zone=z\n" for slot in (0, 1) for word in ("stop", "delete")]
  assert script.with_name("end.py.log").read_text() == "".join(words)


def test_unknown_exit_closes_the_slot_and_resumes_later(started):
  with pytest.raises(ConfigError, match="nothing is lost"):
    started("a", "unsure", "b", max_parallel=1)
  jobs = started("a", "unsure", "b")
  assert {kind: attempts(job) for kind, job in jobs.items()} == {"a": 1, "unsure": 2, "b": 1}
  assert all(job.state == "finished" for job in jobs.values())


def test_trials_of_unknown_exit_are_paired_with_their_slots(tmp_path):
  def job(name, slot, **state):
    made = Job(name, {}, [], tmp_path / name, **state)
    made.folder.mkdir()
    (made.folder / LOCK_FILE).write_text(str(slot))
    return made

  jobs = [job("new", 0), job("b", 1, exit_unknown=True), job("c", 4, exit_unknown=True)]
  jobs += [job("ended", 0, state="finished"), job("d", 0)]
  slots = [Slot(0), Slot(1), Slot(2)]

  def paired(busy, sticky):
    return [(slot.number, job.name) for slot, job in pair_with_slots(jobs, slots, busy, sticky)]

  assert paired((), True) == [(1, "b"), (4, "c"), (0, "new"), (2, "d")]
  assert paired((1, 2), True) == [(4, "c"), (0, "new")]  # b waits
  assert paired((), False) == [(0, "new"), (1, "b"), (2, "c")]


def test_machines_left_by_an_earlier_call_are_deleted(started, tmp_path):
  jobs = started("a", "b")
  jobs["b"].write_record(None)  # a crash: how it ended is not recorded
  (jobs["b"].folder / LOCK_FILE).write_text("3")
  (tmp_path / "end.py").write_text("import sys; open(sys.argv[0] + '.log', 'a').write(sys.argv[1])")
  started("a", "b", max_parallel=1, cleanup=[("end.py", "{slot}")])
  assert (tmp_path / "end.py.log").read_text() == "3" and attempts(jobs["b"]) == 2


def test_machine_names_are_unique_to_a_sweep():
  first, other, third = (
    machine_name_prefix(Path(path), trials_in)
    for path, trials_in in (("/a/runs/Width 2", None), ("/b/runs/Width 2", None), ("/a/runs/Width 2", "gs://b"))
  )
  assert len({first, other, third}) == 3 and first.startswith("s-width-2-")
  assert len(machine_name_prefix(Path("/" + "long" * 30), None)) <= 29


def test_second_call_runs_only_unfinished_trials(started):
  started("a", "fails")
  jobs = started("a", "fails", "b")
  assert [attempts(job) for job in jobs.values()] == [1, 1, 1] and jobs["fails"].state == "failed"
  assert attempts(started("fails", retry=True)["fails"]) == 2
  (jobs["b"].folder / RECORD_FILE).write_text("")  # a power cut
  assert attempts(started("b")["b"]) == 2


def test_changed_config_is_refused_unless_only_steps_are_added(started):
  jobs = started("a")
  jobs["a"].write_record(None)  # a crash in the middle
  with pytest.raises(ConfigError, match="another config"):
    started("a", config="d")
  started("a")
  assert attempts(started("a", steps=9)["a"]) == 3
  for facts in ({"steps": 9, "config": "d"}, {"steps": 5}):
    with pytest.raises(ConfigError, match="another config, or with more steps"):
      started("a", **facts)


def test_interrupted_pool_lets_trials_save_and_resumes(started):
  timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
  timer.start()
  with pytest.raises(KeyboardInterrupt, match="same command resumes"):
    started("waits", "a", "b", "c", max_parallel=1)
  jobs = started("waits", "a", "b", "c")
  assert {kind: attempts(job) for kind, job in jobs.items()} == {"waits": 2, "a": 1, "b": 1, "c": 1}
  assert all(job.state == "finished" for job in jobs.values())


def test_orphaned_trial_keeps_its_slot_until_it_ends(started, tmp_path):
  started("fails")  # recorded as failed, but running again
  folder = tmp_path / "sweep" / "kind=fails"
  (folder / LOCK_FILE).write_text("1")
  lock = open(folder / LOCK_FILE, "a")
  fcntl.flock(lock, fcntl.LOCK_EX)
  orphan = subprocess.Popen(["sleep", "1.5"], pass_fds=[lock.fileno()])
  lock.close()
  began = time.time()
  states = []
  jobs = started("fails", "a", "b", seen=lambda jobs: states.append([job.state for job in jobs]))
  assert orphan.poll() == 0 and time.time() - began > 1.2
  assert states[0] == ["running", "running", "waiting"] and attempts(jobs["fails"]) == 2
  assert (jobs["a"].folder / LOCK_FILE).read_text() == "0"


def test_slots_share_the_visible_accelerators(monkeypatch):
  monkeypatch.setattr(launchers.Path, "glob", lambda path, _: map(Path, "abcd") if "nvidia" in str(path) else iter(()))
  for name in ("CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS"):
    monkeypatch.delenv(name, raising=False)
  assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in make_slots(2, "local")] == ["0,1", "2,3"]
  with pytest.raises(ConfigError, match="run 4 trials at a time"):
    make_slots(5, "local")
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
  assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in make_slots(2, "local")] == ["3", "5"]
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert len(make_slots(5, "local")) == 5
  assert make_slots(2, "tpu_vm") == [Slot(0), Slot(1)]

"""Trials of a sweep in a queue: each is submitted once and recorded, also if it ends between two queries or calls.

A script stands for launch/slurm.py: a queued trial runs at the second query.
"""

import json

import pytest

from llmjax.config import ConfigError
from llmjax.sweeps import slurm_queue
from llmjax.sweeps.job import RECORD_FILE, Job

SCRIPT = """
import json, pathlib, sys
here = pathlib.Path(__file__).parent
queue, submitted, troubles = (here / name for name in ("queue", "submitted", "troubles"))
lines = queue.read_text().split("\\n")[:-1] if queue.exists() else []
trouble = troubles.read_text() if troubles.exists() else ""
troubles.write_text(trouble[1:])
if trouble[:1] == "x":
  sys.exit("slurm.py: squeue does not answer")
if sys.argv[1] == "array":
  commands = next(a.partition("=")[2] for a in sys.argv if a.startswith("--commands="))
  new = [json.loads(line)["name"] for line in open(commands)]
  with open(submitted, "a") as file:
    file.write(",".join(new) + " " + sys.argv[-1] + "\\n")
  lines += [f"{name} 1" for name in new]
else:
  remaining = []
  for name, polls in map(str.split, lines):
    folder = here / "sweep" / name
    folder.mkdir(parents=True, exist_ok=True)
    if polls == "0":
      with open(folder / "log.txt", "a") as log:
        log.write("-- job 1 on n, start 1\\nlog line\\n-- job 1 ended with 0 after 7 seconds\\n")
      if not name.startswith("fails"):
        (folder / "done").write_text(" ")
    else:
      remaining.append(f"{name} 0")
      print(name)
  lines = remaining
queue.write_text("".join(line + "\\n" for line in lines))
"""
FACTS = {"steps": 5, "config": "c"}


@pytest.fixture
def queue(tmp_path, monkeypatch):
  """A function that follows trials to their end; `troubles` has an x for each call of the script that fails."""
  (tmp_path / "slurm.py").write_text(SCRIPT)
  monkeypatch.setattr(slurm_queue, "find_launch_script", lambda name: tmp_path / "slurm.py")
  monkeypatch.setattr(slurm_queue, "is_trial_finished", lambda job: (job.folder / "done").exists())
  monkeypatch.setattr(slurm_queue, "POLL_SECONDS", 0.01)

  def follow(*names, retry=False, troubles="", flags=(), **facts):
    (tmp_path / "troubles").write_text(troubles)
    folder = tmp_path / "sweep"
    jobs = {name: Job(name, {}, ["train", f"--workdir={folder / name}"], folder / name) for name in names}
    for job in jobs.values():
      job.facts = FACTS | facts
      job.load_state(retry)
    slurm_queue.run_queue(list(jobs.values()), flags, folder, 2, retry, lambda jobs: None)
    return {name: (job.state, job.seconds) for name, job in jobs.items()}

  follow.folder = tmp_path
  follow.submitted = lambda: [line.split()[0] for line in (tmp_path / "submitted").read_text().splitlines()]
  return follow


def test_queue_submits_trials_once_and_records_their_ends(queue):
  ended = {"a": ("finished", 7.0), "fails": ("failed", 7.0)}
  assert queue("a", "fails") == ended and queue.submitted() == ["a,fails"]
  assert queue("a", "fails") == ended and queue.submitted() == ["a,fails"]
  record = json.loads((queue.folder / "sweep" / "fails" / RECORD_FILE).read_text())
  assert record["error"] == "left the queue before its end: log line"
  queue("a", "fails", "b", retry=True)
  assert queue.submitted() == ["a,fails", "fails,b"]


def test_refused_trial_is_submitted_by_the_next_call(queue):
  with pytest.raises(ConfigError, match="could not submit"):
    queue("a", troubles=".x")  # a query, then sbatch
  assert queue("a")["a"][0] == "finished" and queue.submitted() == ["a"]


def test_finished_trial_with_more_steps_is_submitted_again(queue):
  queue("a")
  assert queue("a", steps=9)["a"][0] == "finished" and queue.submitted() == ["a", "a"]


def test_unreachable_queue_is_polled_again(queue, monkeypatch):
  assert queue("a", troubles="..xxx")["a"][0] == "finished"
  monkeypatch.setattr(slurm_queue, "MAX_FAILED_POLLS", 3)
  with pytest.raises(ConfigError, match="squeue does not answer"):
    queue("b", troubles="..xxxxx")
  assert queue("b")["b"][0] == "finished" and queue.submitted() == ["a", "b"]


def test_next_call_records_trials_that_ended_meanwhile(queue, monkeypatch):
  def interrupted(seconds):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(slurm_queue.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt, match="The same command follows them"):
      queue("a", "fails")
  slurm_queue.queued_trials(queue.folder / "sweep")
  assert {name: state for name, (state, _) in queue("a", "fails").items()} == {"a": "finished", "fails": "failed"}
  assert queue.submitted() == ["a,fails"]

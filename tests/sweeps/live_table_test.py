"""The table of trials that run: its rows, and how rarely it reads metrics."""

import io
import json
import math
import os
import time

import pytest
from rich.console import Console

from llmjax.sweeps import live_table, results
from llmjax.sweeps.trials import Sweep, vary
from tests.support.sweep_runs import METRIC, log_metrics

NAN = math.nan


@pytest.fixture
def live(monkeypatch):
  """A function that returns the table of jobs on a terminal of 100 columns, and a function that draws it as text."""

  def make(plan, jobs):
    table = live_table.LiveTable(plan, jobs, print)

    def drawn():
      table.console = Console(force_terminal=True, color_system=None, width=100, height=30, file=io.StringIO())
      table.drawn_at = 0.0
      with table:
        table.show(jobs)
      return table.console.file.getvalue()

    return table, drawn

  return make


def test_live_table_shows_running_and_ended_trials(ended, live):
  plan = Sweep(vary("kind", ["a", "[/b]", "c", "d", "e"]), x="kind", metric="eval/[red]/loss")
  jobs = ended(plan.trials, [1.25, NAN, None, None, 3.0], plan.metric)
  for job, state in zip(jobs, ("finished", "failed", "waiting", "running", "running")):
    job.state, job.error = state, job.error if state == "failed" else ""
  jobs[1].name, jobs[1].error = "kind=[/b]", "llmjax: [loss] is nan"
  jobs[4].started, jobs[4].seconds = time.time() - 100, 0.0
  log_metrics(jobs[4], {"step": 4, "time": 0.0, plan.metric: "NaN"})
  _, drawn = live(plan, jobs)
  lines = {line.split()[0]: line.split() for line in drawn().splitlines() if "kind=" in line}
  assert lines["kind=a"] == ["kind=a", "finished", "5/5", "1.25", "1:00"]
  assert " ".join(lines["kind=[/b]"]) == "kind=[/b] failed 2/5 llmjax: [loss] is nan 1:00"
  assert lines["kind=d"] == ["kind=d", "running", "0/5", "1:00"]  # of a queue, which does not report when it began
  assert lines["kind=e"][:4] == ["kind=e", "running", "4/5", "nan"] and lines["kind=e"][4] in ("1:40", "1:41")
  assert "kind=c" not in lines and "1 finished, 2 running, 1 waiting, 1 failed" in drawn()
  assert "eval/[red]/loss" in drawn()
  for job in jobs:
    job.state = "waiting"
  assert "5 waiting" in drawn()


def test_live_table_parses_only_new_lines_unless_rewritten(ended, live, monkeypatch):
  plan = Sweep([{}])
  (job,) = ended(plan.trials, [1.0])
  table, _ = live(plan, [job])
  parsed = []
  monkeypatch.setattr(live_table.json, "loads", lambda line, loads=json.loads: (parsed.append(line), loads(line))[1])
  assert table.latest_values(job) == {METRIC: (5, 1.0), "train/loss": (5, 2.0)}
  log_metrics(job, {"step": 6, "time": 0.0, "train/loss": 3}, mode="a")
  with open(f"{job.workdir}/metrics.jsonl", "a") as file:
    file.write('no record\n{"step": 7, "train/')
  assert table.latest_values(job) == {METRIC: (5, 1.0), "train/loss": (6, 3.0)} and len(parsed) == 3
  with open(f"{job.workdir}/metrics.jsonl", "a") as file:
    file.write('loss": 4}\n')
  assert (
    table.latest_values(job)["train/loss"] == (7, 4.0) == table.latest_values(job)["train/loss"] and len(parsed) == 4
  )
  with open(f"{job.workdir}/new", "w") as file:
    # The first line is longer than the part that was read.
    file.write(json.dumps({"step": 1, "time": 0.0, "train/loss": 9.0}) + 500 * " " + "\n")
    file.write(json.dumps({"step": 2, "time": 0.0, "train/loss": 8.0}) + "\n")
  os.replace(f"{job.workdir}/new", f"{job.workdir}/metrics.jsonl")
  assert table.latest_values(job) == {"train/loss": (2, 8.0)}


def test_live_table_fetches_a_finished_run_in_a_bucket_once(ended, live, monkeypatch):
  plan = Sweep([{}])
  (job,) = ended(plan.trials, [1.0])
  table, _ = live(plan, [job])
  asked, job.arguments, job.state = [], ["train", "--workdir=gs://bucket/a"], "running"
  monkeypatch.setattr(results, "read_curves", lambda workdir: asked.append(workdir) or {METRIC: ([len(asked)], [1.0])})
  assert [table.latest_values(job)[METRIC][0] for _ in range(2)] == [1, 2]
  job.state = "finished"
  assert [table.latest_values(job)[METRIC][0] for _ in range(2)] == [3, 3]

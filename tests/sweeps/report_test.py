"""The report of a sweep: averages of seeds, failed trials, and a report for any outcome."""

import csv
import io
import json
import math
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
from pyarrow import parquet
from rich.console import Console

from llmjax.storage import buckets
from llmjax.sweeps import results
from llmjax.sweeps import table as tables
from llmjax.sweeps.figure import caption, figure
from llmjax.sweeps.report import write_results
from llmjax.sweeps.results import frontier, grouped, points, ranked
from llmjax.sweeps.trials import Sweep, names, product, seeds, vary

METRIC = "eval/heldout/loss"
FACTS = {"parameters": 10, "steps": 5, "tokens": 8, "flops": 100.0}
NAN = math.nan
LR = "optim.lr"


def log(job, *records, how="w"):
  os.makedirs(job.workdir, exist_ok=True)
  with open(f"{job.workdir}/metrics.jsonl", how) as file:
    file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def ended(tmp_path):
  """A function that makes the jobs of trials from the metric of each.

  None is a trial that failed before it logged, NaN one that failed after two steps.
  """

  def make(trials, values, metric=METRIC):
    jobs = []
    for name, trial, value in zip(names(trials), trials, values):
      job = SimpleNamespace(name=name, trial=trial, facts=FACTS, state="finished", error="", seconds=60.0, started=0.0)
      job.workdir, job.command = str(tmp_path / name), f"llmjax train --workdir={tmp_path / name}"
      if value is None or math.isnan(value):
        job.state, job.error = "failed", f"llmjax: {LR} is too high"
      if value is not None:
        log(job, {"step": 2 if math.isnan(value) else 5, "time": 0.0, metric: str(value), "train/loss": value + 1})
      jobs.append(job)
    return jobs

  return make


def groups_of(plan, jobs):
  return grouped(plan, jobs, [results.make_result_row(job, results.curves_of(job)) for job in jobs])


def test_write_results_makes_tables_figure_and_page(ended, tmp_path):
  plan = Sweep(vary("kind", ["a", "bb", "fails"]), x="kind")
  jobs = ended(plan.trials, [1.0, 2.0, None])
  message = write_results(plan, jobs, tmp_path)
  assert message.split("\n")[1].split() == ["1", "kind=a"] and "llmjax train --workdir" in message
  rows = list(csv.DictReader(open(tmp_path / "results.csv")))
  assert [row[METRIC] for row in rows] == ["1.0", "2.0", ""]
  assert rows[0]["flops"] == "500.0" and rows[2]["error"] == "llmjax: optim.lr is too high"
  table = parquet.read_table(tmp_path / "results.parquet")
  assert table.column(METRIC).to_pylist() == [1.0, 2.0, None] and table.num_rows == 3
  page = (tmp_path / "sweep.html").read_text()
  assert all(job.command in page for job in jobs) and "<script" not in page
  assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_are_averaged_and_failed_groups_omitted(ended):
  plan = Sweep(product(vary("size", [1, 2, 3]), seeds(2)), x="size")
  groups = groups_of(plan, ended(plan.trials, [4.0, 2.0, 1.0, NAN, 0.5, 5.0]))
  assert points(plan, groups) == {"": [(1, 3.0, 2.0, 4.0, 1), (3, 2.75, 0.5, 5.0, 1)]}
  assert [group.first["size"] for group in groups if group.failed] == [2]
  assert [group.mean for group in ranked(plan, groups)] == [2.75, 3.0]


def test_group_with_an_early_failed_seed_has_no_point(ended):
  plan = Sweep(product(vary("size", [1, 2]), seeds(3)), lines=("size",))
  groups = groups_of(plan, ended(plan.trials, [1.0, 1.1, NAN, 2.0, None, 2.1]))
  assert points(plan, groups) == {} and [group.x for group in groups] == [400.0, 500.0]  # FLOPs
  jobs = ended(plan.trials, [1.0, 1.2, 1.4, 2.0, 2.1, NAN])
  for seconds, job in enumerate(jobs):
    job.seconds = float(seconds)
  along_time = Sweep(plan.trials, x="seconds")
  groups = groups_of(along_time, jobs)
  assert points(along_time, groups)[""] == [pytest.approx((1.5, 1.2, 1.0, 1.4, 1))] and groups[1].failed


def test_points_with_equal_x_show_the_best_setting_and_its_spread(ended):
  plan = Sweep(product(vary(LR, [1, 2, 3]), seeds(2)), x="parameters", metric="eval/x/accuracy", mode="max")
  groups = groups_of(plan, ended(plan.trials, [0.5, 0.7, 0.9, 0.1, NAN, 1.0], plan.metric))
  assert points(plan, groups) == {"": [(10, 0.6, 0.5, 0.7, 2)]}
  assert "the best of 2 settings" in caption(plan, groups) and "failed" in caption(plan, groups)


def test_x_may_be_the_seed(ended):
  plan = Sweep(seeds(3), x="seed")
  groups = groups_of(plan, ended(plan.trials, [1.0, 2.0, 3.0]))
  assert [point.x for point in points(plan, groups)[""]] == [0, 1, 2]


def test_frontier_omits_points_worse_than_a_cheaper_one(ended):
  plan = Sweep(vary("size", [1, 2, 3, 4]), x="size", mode="max")
  lines = points(plan, groups_of(plan, ended(plan.trials, [1.0, 0.5, 2.0, 2.0])))
  assert frontier(plan, lines) == [(1, 1.0), (3, 2.0)]


def test_x_may_be_a_metric_numpy_numbers_or_names(ended):
  plan = Sweep(vary("size", np.array([2, 4])), x="train/loss")
  groups = groups_of(plan, ended(plan.trials, [1.0, NAN]))
  assert [point[:2] for point in points(plan, groups)[""]] == [(2.0, 1.0)] and groups[1].x is None
  assert "not drawn: 1 without train/loss" in caption(plan, groups)
  plan = Sweep([{"size": "nano"}, {"size": "large"}, {LR: 1}, *vary("size", np.array([8, 4]))], x="size")
  groups = groups_of(plan, ended(plan.trials, [1.0] * 5))
  assert [point.x for point in points(plan, groups)[""]] == [4, 8, "nano", "large", "unset"]


RATES = vary(LR, [0.001, 0.002, 0.004])


@pytest.mark.parametrize(
  "plan, values",
  [
    (Sweep(RATES, x="parameters"), [1.0, 2.0, NAN]),  # one x for all, and one of them failed
    (Sweep(RATES), [1.0, 2.0, None]),  # without FLOPs there is no x
    (Sweep(RATES), [1.0, NAN, NAN]),
    (Sweep(RATES, x="seconds", lines=(LR,)), [1.0, NAN, None]),  # lines without a point
    (Sweep(RATES, x="eval/other/loss"), [1.0, 2.0, 3.0]),  # measured by none
    (Sweep([{}], x=METRIC), [0.0]),
    (Sweep(vary(":text", ["$a <b> & " + "c" * 90, "$a [/b]", None]), x=":text", lines=(":text",)), [1.0, 1e30, NAN]),
    (Sweep(RATES, x=LR), [NAN, None, NAN]),
  ],
)
def test_report_is_written_for_any_outcome_of_trials(plan, values, ended, tmp_path):
  message = write_results(plan, ended(plan.trials, values), tmp_path)
  assert (tmp_path / "results.csv").exists()
  best = any(value is not None and math.isfinite(value) for value in values)
  assert best == (tmp_path / "sweep.html").exists() == ("least is best" in message) != ("no trial has come" in message)
  assert (tmp_path / "sweep.png").exists() == (best and plan.x != "eval/other/loss")


def test_failed_trial_without_cost_keeps_the_log_axis(ended):
  plan = Sweep(product(vary("size", [1, 2]), vary(LR, [1, 2])), lines=(LR,))
  jobs = ended(plan.trials, [1.0, 2.0, 3.0, None])
  jobs[2].facts = {**FACTS, "flops": 10_000.0}
  groups = groups_of(plan, jobs)
  assert groups[3].x is None
  with pytest.MonkeyPatch.context() as patch:
    scales = []
    patch.setattr("matplotlib.axes.Axes.set_xscale", lambda axes, scale: scales.append(scale))
    figure(plan, groups, "t", "svg")
  assert scales == ["log"]


def test_unreachable_bucket_is_reported_as_unread_curves(ended, tmp_path, monkeypatch):
  plan = Sweep(vary("kind", ["a", "b"]), x="kind")
  jobs = ended(plan.trials, [1.0, 2.0])
  jobs[1].workdir = "gs://bucket/b"

  def broken(workdir):
    if buckets.in_bucket(workdir):
      raise RuntimeError("connection reset")
    return read_curves(workdir)

  read_curves = results.read_curves
  monkeypatch.setattr(results, "read_curves", broken)
  assert results.curves_of(jobs[1]) == {}
  message = write_results(plan, jobs, tmp_path)
  assert "curves cannot be read: kind=b" in message and "kind=a" in message


@pytest.fixture
def live(monkeypatch):
  """A function that returns the table of jobs on a terminal of 100 columns, and a function that draws it as text."""

  def make(plan, jobs):
    table = tables.Table(plan, jobs, print)

    def drawn():
      table.console = Console(force_terminal=True, color_system=None, width=100, height=30, file=io.StringIO())
      table.drawn = 0.0
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
  log(jobs[4], {"step": 4, "time": 0.0, plan.metric: "NaN"})
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
  monkeypatch.setattr(tables.json, "loads", lambda line, loads=json.loads: (parsed.append(line), loads(line))[1])
  assert table._newest(job) == {METRIC: (5, 1.0), "train/loss": (5, 2.0)}
  log(job, {"step": 6, "time": 0.0, "train/loss": 3}, how="a")
  with open(f"{job.workdir}/metrics.jsonl", "a") as file:
    file.write('no record\n{"step": 7, "train/')
  assert table._newest(job) == {METRIC: (5, 1.0), "train/loss": (6, 3.0)} and len(parsed) == 3
  with open(f"{job.workdir}/metrics.jsonl", "a") as file:
    file.write('loss": 4}\n')
  assert table._newest(job)["train/loss"] == (7, 4.0) == table._newest(job)["train/loss"] and len(parsed) == 4
  with open(f"{job.workdir}/new", "w") as file:
    # The first line is longer than the part that was read.
    file.write(json.dumps({"step": 1, "time": 0.0, "train/loss": 9.0}) + 500 * " " + "\n")
    file.write(json.dumps({"step": 2, "time": 0.0, "train/loss": 8.0}) + "\n")
  os.replace(f"{job.workdir}/new", f"{job.workdir}/metrics.jsonl")
  assert table._newest(job) == {"train/loss": (2, 8.0)}


def test_live_table_fetches_a_finished_run_in_a_bucket_once(ended, live, monkeypatch):
  plan = Sweep([{}])
  (job,) = ended(plan.trials, [1.0])
  table, _ = live(plan, [job])
  asked, job.workdir, job.state = [], "gs://bucket/a", "running"
  monkeypatch.setattr(results, "read_curves", lambda workdir: asked.append(workdir) or {METRIC: ([len(asked)], [1.0])})
  assert [table._newest(job)[METRIC][0] for _ in range(2)] == [1, 2]
  job.state = "finished"
  assert [table._newest(job)[METRIC][0] for _ in range(2)] == [3, 3]

"""Files of a sweep's report: tables, figure and page, for any outcome of the trials."""

import csv
import math

import pytest
from pyarrow import parquet

from llmjax.storage import buckets
from llmjax.sweeps import results
from llmjax.sweeps.report import write_results
from llmjax.sweeps.results import read_trial_curves
from llmjax.sweeps.trials import Sweep, vary
from tests.support.sweep_runs import METRIC

NAN = math.nan
LR = "optim.lr"


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
  assert best == (tmp_path / "sweep.html").exists() == ("min is best" in message) != ("no trial is finished" in message)
  assert (tmp_path / "sweep.png").exists() == (best and plan.x != "eval/other/loss")


def test_unreachable_bucket_is_reported_as_unread_curves(ended, tmp_path, monkeypatch):
  plan = Sweep(vary("kind", ["a", "b"]), x="kind")
  jobs = ended(plan.trials, [1.0, 2.0])
  jobs[1].arguments = ["train", "--workdir=gs://bucket/b"]

  def broken(workdir):
    if buckets.in_bucket(workdir):
      raise RuntimeError("connection reset")
    return read_curves(workdir)

  read_curves = results.read_curves
  monkeypatch.setattr(results, "read_curves", broken)
  assert read_trial_curves(jobs[1]) == {}
  message = write_results(plan, jobs, tmp_path)
  assert "curves cannot be read: kind=b" in message and "kind=a" in message

"""Fixtures of sweeps: trials that have ended."""

import math

import pytest

from llmjax.sweeps.job import FAILED, FINISHED, Job
from llmjax.sweeps.trials import trial_names
from tests.support.sweep_runs import FACTS, METRIC, log_metrics


@pytest.fixture
def ended(tmp_path):
  """A function that makes the jobs of trials from the metric of each.

  None is a trial that failed before it logged, NaN one that failed after two steps.
  """

  def make(trials, values, metric=METRIC):
    jobs = []
    for name, trial, value in zip(trial_names(trials), trials, values):
      has_failed = value is None or math.isnan(value)
      job = Job(name, trial, ["train", f"--workdir={tmp_path / name}"], tmp_path / name, FACTS)
      job.state, job.error = (FAILED, "llmjax: optim.lr is too high") if has_failed else (FINISHED, "")
      job.seconds = 60.0
      if value is not None:
        log_metrics(job, {"step": 2 if has_failed else 5, "time": 0.0, metric: str(value), "train/loss": value + 1})
      jobs.append(job)
    return jobs

  return make

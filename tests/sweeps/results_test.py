"""Numbers of a sweep: averages of seeds, failed trials, points of the figure, the Pareto front."""

import math

import numpy as np
import pytest

from llmjax.sweeps.figure import draw_metric_figure, figure_caption
from llmjax.sweeps.results import (
  group_seeds,
  line_points,
  make_result_row,
  pareto_front,
  rank_groups,
  read_trial_curves,
)
from llmjax.sweeps.trials import Sweep, product, seeds, vary
from tests.support.sweep_runs import FACTS

NAN = math.nan
LR = "optim.lr"


def groups_of(plan, jobs):
  return group_seeds(plan, jobs, [make_result_row(job, read_trial_curves(job)) for job in jobs])


def test_seeds_are_averaged_and_failed_groups_omitted(ended):
  plan = Sweep(product(vary("size", [1, 2, 3]), seeds(2)), x="size")
  groups = groups_of(plan, ended(plan.trials, [4.0, 2.0, 1.0, NAN, 0.5, 5.0]))
  assert line_points(plan, groups) == {"": [(1, 3.0, 2.0, 4.0, 1), (3, 2.75, 0.5, 5.0, 1)]}
  assert [group.first_row["size"] for group in groups if group.has_failed] == [2]
  assert [group.mean for group in rank_groups(plan, groups)] == [2.75, 3.0]


def test_group_with_an_early_failed_seed_has_no_point(ended):
  plan = Sweep(product(vary("size", [1, 2]), seeds(3)), lines=("size",))
  groups = groups_of(plan, ended(plan.trials, [1.0, 1.1, NAN, 2.0, None, 2.1]))
  assert line_points(plan, groups) == {} and [group.x for group in groups] == [400.0, 500.0]  # FLOPs
  jobs = ended(plan.trials, [1.0, 1.2, 1.4, 2.0, 2.1, NAN])
  for seconds, job in enumerate(jobs):
    job.seconds = float(seconds)
  along_time = Sweep(plan.trials, x="seconds")
  groups = groups_of(along_time, jobs)
  assert line_points(along_time, groups)[""] == [pytest.approx((1.5, 1.2, 1.0, 1.4, 1))] and groups[1].has_failed


def test_points_with_equal_x_show_the_best_setting_and_its_spread(ended):
  plan = Sweep(product(vary(LR, [1, 2, 3]), seeds(2)), x="parameters", metric="eval/x/accuracy", mode="max")
  groups = groups_of(plan, ended(plan.trials, [0.5, 0.7, 0.9, 0.1, NAN, 1.0], plan.metric))
  assert line_points(plan, groups) == {"": [(10, 0.6, 0.5, 0.7, 2)]}
  assert "the best of 2 settings" in figure_caption(plan, groups) and "failed" in figure_caption(plan, groups)


def test_x_may_be_the_seed(ended):
  plan = Sweep(seeds(3), x="seed")
  groups = groups_of(plan, ended(plan.trials, [1.0, 2.0, 3.0]))
  assert [point.x for point in line_points(plan, groups)[""]] == [0, 1, 2]


def test_pareto_front_omits_points_worse_than_a_cheaper_one(ended):
  plan = Sweep(vary("size", [1, 2, 3, 4]), x="size", mode="max")
  lines = line_points(plan, groups_of(plan, ended(plan.trials, [1.0, 0.5, 2.0, 2.0])))
  assert pareto_front(plan, lines) == [(1, 1.0), (3, 2.0)]


def test_x_may_be_a_metric_numpy_numbers_or_names(ended):
  plan = Sweep(vary("size", np.array([2, 4])), x="train/loss")
  groups = groups_of(plan, ended(plan.trials, [1.0, NAN]))
  assert [point[:2] for point in line_points(plan, groups)[""]] == [(2.0, 1.0)] and groups[1].x is None
  assert "not drawn: 1 without train/loss" in figure_caption(plan, groups)
  plan = Sweep([{"size": "nano"}, {"size": "large"}, {LR: 1}, *vary("size", np.array([8, 4]))], x="size")
  groups = groups_of(plan, ended(plan.trials, [1.0] * 5))
  assert [point.x for point in line_points(plan, groups)[""]] == [4, 8, "nano", "large", "unset"]


def test_failed_trial_without_cost_keeps_the_log_axis(ended):
  plan = Sweep(product(vary("size", [1, 2]), vary(LR, [1, 2])), lines=(LR,))
  jobs = ended(plan.trials, [1.0, 2.0, 3.0, None])
  jobs[2].facts = {**FACTS, "flops": 10_000.0}
  groups = groups_of(plan, jobs)
  assert groups[3].x is None
  with pytest.MonkeyPatch.context() as patch:
    scales = []
    patch.setattr("matplotlib.axes.Axes.set_xscale", lambda axes, scale: scales.append(scale))
    draw_metric_figure(plan, groups, "t", "svg")
  assert scales == ["log"]

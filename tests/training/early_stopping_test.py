"""Early stopping, also of interrupted runs, and the checkpoint named `best`."""

import contextlib
import io
import itertools
import json
from pathlib import Path

import pytest

from llmjax.checkpoints.sources.run import locate_checkpoint, open_checkpoint
from llmjax.config import ConfigError, load_config
from llmjax.evaluation import evaluators
from llmjax.training import loop, step_metrics
from llmjax.training.early_stopping import EarlyStopping, check_metric


def test_patience_counts_evaluations_without_improvement():
  stopper = EarlyStopping("eval/x/f1", "max", 2)
  values = [0.1, 0.3, 0.3, 0.2, 0.4]
  assert [stopper.update({"eval/x/f1": v}) for v in values] == [False, False, False, True, False]
  assert stopper.state == {"metric": "eval/x/f1", "mode": "max", "best": 0.4, "failures": 0}
  assert not stopper.update({"eval/y/f1": 9.0}) and stopper.failures == 0  # not the metric's evaluation
  assert not stopper.update({"eval/x/f1": float("nan")}) and stopper.failures == 1


def test_state_is_restored_for_the_same_metric_only():
  stopper = EarlyStopping("eval/x/f1", "max", 2)
  stopper.update({"eval/x/f1": 0.4})
  stopper.update({"eval/x/f1": 0.3})
  restored = EarlyStopping("eval/x/f1", "max", 2)
  restored.restore(json.loads(json.dumps(stopper.state)))
  assert restored == stopper
  other = EarlyStopping("eval/x/loss", "min", 2)
  other.restore(stopper.state)
  assert other.best is None and other.failures == 0


def test_metric_that_was_not_measured_is_refused_with_a_suggestion():
  with pytest.raises(ConfigError, match=r"'eval/x/f1' was not measured; did you mean `eval/x/f1_macro`"):
    EarlyStopping("eval/x/f1", "max", 2).update({"eval/x/f1_macro": 1.0})


def test_without_metric_nothing_stops():
  assert not EarlyStopping(None, "min", 1).update({"eval/x/f1": 1.0})


def test_patience_below_one_is_refused():
  with pytest.raises(ConfigError, match="patience=0 must be at least 1"):
    EarlyStopping("a", "min", 0)


@pytest.mark.parametrize(
  ("metric", "mode"),
  [
    *((f"heldout/{name}", "min") for name in ("loss", "perplexity", "bits_per_byte", "sft_loss", "mlm/loss")),
    *(
      (f"answers/{name}", "max")
      for name in ("f1", "f1_macro", "f1/loss", "no_answer_accuracy", "exact_match", "rougeLsum")
    ),
  ],
)
@pytest.mark.parametrize("key", ["checkpoint.best", "early_stopping.metric"])
def test_wrong_mode_of_a_known_metric_is_refused(metric, mode, key):
  evals, [other] = {"heldout": 0, "answers": 0}, {"min", "max"} - {mode}
  check_metric(f"eval/{metric}", mode, evals, key, "key.of_mode")
  with pytest.raises(ConfigError, match=f"would select the worst value; set key.of_mode={mode!r}"):
    check_metric(f"eval/{metric}", other, evals, key, "key.of_mode")
  check_metric("eval/answers/alignment", mode, evals, key, "key.of_mode")
  check_metric(None, other, evals, key, "key.of_mode")


def likelihood(program, **settings):
  """An evaluator with a metric that increases and whose better direction llmjax does not know."""
  measure = evaluators.heldout_loss(program, **settings)
  return lambda params: {"loss": (loss := measure(params)["loss"]), "likelihood": -loss}


TEXT = "".join(f"{i}: the quick brown fox jumps over {i * 37 % 101} lazy dogs.\n" for i in range(400))
# The loss falls, so that the likelihood, whose minimum counts as the best, never improves: the run stops at step 4.
FLAGS = [
  *("--config=char:text=t.txt,debug", "--config.total_steps=9", "--config.batch_size=8", "--config.evals.sample.at=()"),
  *("--config.evals.heldout.every=1", f"--config.evals.heldout.name={__name__}:likelihood"),
  *("--config.early_stopping.metric=eval/heldout/likelihood", "--config.early_stopping.patience=3"),
  *("--config.checkpoint.best=eval/heldout/loss", "--config.checkpoint.every=1", "--config.log.tensorboard=false"),
]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """The folder of a run `whole` that has stopped early, its last metrics and what it printed."""
  folder = tmp_path_factory.mktemp("stopped")
  (folder / "t.txt").write_text(TEXT)
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
    patch.setenv("LLMJAX_CACHE", str(folder / "cache"))
    patch.chdir(folder)
    last = loop.run(load_config(FLAGS), "whole")
  return folder, last, output.getvalue()


@pytest.fixture
def expected(stopped, monkeypatch):
  """Change to the folder of the stopped run; return its last metrics."""
  folder, last, _ = stopped
  monkeypatch.setenv("LLMJAX_CACHE", str(folder / "cache"))
  monkeypatch.chdir(folder)
  return last


def test_run_stops_after_evaluations_without_improvement(stopped):
  _, _, output = stopped
  assert "has not improved on" in output and "is finished at 4 steps" in output


def test_stopped_run_is_not_continued(expected, capsys):
  assert loop.run(load_config(FLAGS), "whole") == pytest.approx(expected)
  assert "is finished at 4 steps" in capsys.readouterr().out


def test_killed_run_stops_early_at_the_same_step(expected, capsys, monkeypatch):
  add = step_metrics.StepMetrics.add

  def add_and_fail(self, step, *args):
    add(self, step, *args)
    if step == 3:
      raise RuntimeError("lost")

  with monkeypatch.context() as patch:
    patch.setattr(step_metrics.StepMetrics, "add", add_and_fail)
    with pytest.raises(RuntimeError, match="lost"):
      loop.run(load_config(FLAGS), "lost")
  assert loop.run(load_config(FLAGS), "lost") == expected
  assert "is finished at 4 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_interrupted_run_stops_early_at_the_same_step(expected, capsys, monkeypatch):
  calls = itertools.count(1)
  with monkeypatch.context() as patch:
    patch.setattr(loop, "catch_interruption", lambda: contextlib.nullcontext(lambda step: next(calls) == 3))
    with pytest.raises(KeyboardInterrupt):
      loop.run(load_config(FLAGS), "interrupted")
  assert loop.run(load_config(FLAGS), "interrupted") == expected
  assert "is finished at 4 steps" in capsys.readouterr().out


def test_best_checkpoint_is_the_one_with_the_minimal_loss(expected):
  best = Path("whole/checkpoints/best").absolute()
  assert locate_checkpoint(best) == (best.parents[1], 4)
  checkpoints, step, manifest = open_checkpoint(best)
  checkpoints.close()
  assert step == 4 and manifest["metrics"]["eval/heldout/loss"] == expected["eval/heldout/loss"]


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--config.early_stopping.metric=heldout/loss", r"early_stopping.metric='heldout/loss' is not measured"),
    ("--config.early_stopping.mode=most", r"early_stopping.mode='most' must be 'min' or 'max'"),
    ("--config.checkpoint.best_mode=most", r"checkpoint.best_mode='most' must be 'min' or 'max'"),
  ],
)
def test_unknown_metric_is_refused_before_the_first_step(expected, flag, message):
  with pytest.raises(ConfigError, match=message):
    loop.run(load_config([*FLAGS, flag]), "refused")
  assert not Path("refused").exists()

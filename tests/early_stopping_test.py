"""A run stops when a metric no longer becomes better, also one that was interrupted; the best checkpoint has a name."""

import contextlib
import itertools
import json

import pytest

from llmjax import evaluate, train
from llmjax.config import ConfigError, load_config
from llmjax.early_stopping import EarlyStopping, check_metric
from llmjax.pretrained import locate, open_checkpoint


def test_patience_counts_evaluations_that_did_not_beat_the_best():
  stopper = EarlyStopping("eval/x/f1", "most", 2)
  values = [0.1, 0.3, 0.3, 0.2, 0.4]
  assert [stopper.update({"eval/x/f1": v}) for v in values] == [False, False, False, True, False]
  assert stopper.state == {"metric": "eval/x/f1", "best_is": "most", "best": 0.4, "failures": 0}
  assert not stopper.update({"eval/y/f1": 9.0}) and stopper.failures == 0  # another evaluation
  assert not stopper.update({"eval/x/f1": float("nan")}) and stopper.failures == 1
  again = EarlyStopping("eval/x/f1", "most", 2)
  again.restore(json.loads(json.dumps(stopper.state)))
  assert again == stopper
  other = EarlyStopping("eval/x/loss", "least", 2)
  other.restore(stopper.state)
  assert other.best is None and other.failures == 0
  with pytest.raises(ConfigError, match=r"'eval/x/f1' was not measured; did you mean `eval/x/f1_macro`"):
    stopper.update({"eval/x/f1_macro": 1.0})
  assert not EarlyStopping(None, "least", 1).update({"eval/x/f1": 1.0})
  with pytest.raises(ConfigError, match="patience=0 must be at least 1"):
    EarlyStopping("a", "least", 0)


@pytest.mark.parametrize(
  ("metric", "direction"),
  [
    *((f"heldout/{name}", "least") for name in ("loss", "perplexity", "bits_per_byte", "sft_loss", "mlm/loss")),
    *(
      (f"answers/{name}", "most")
      for name in ("f1", "f1_macro", "f1/loss", "no_answer_accuracy", "exact_match", "rougeLsum")
    ),
  ],
)
@pytest.mark.parametrize("key", ["checkpoint.best", "early_stopping.metric"])
def test_the_worst_is_not_taken_for_the_best(metric, direction, key):
  evals, [other] = {"heldout": 0, "answers": 0}, {"least", "most"} - {direction}
  check_metric(f"eval/{metric}", direction, evals, key)
  way_out = f"would take the worst for the best; set {key.partition('.')[0]}.best_is={direction!r}"
  with pytest.raises(ConfigError, match=way_out):
    check_metric(f"eval/{metric}", other, evals, key)
  check_metric("eval/answers/alignment", direction, evals, key)
  check_metric(None, other, evals, key)


def likelihood(program, **settings):
  """An evaluator with a number that rises, of which nothing is known."""
  measure = evaluate.loss(program, **settings)
  return lambda params: {"loss": (loss := measure(params)["loss"]), "likelihood": -loss}


FLAGS = [
  *("--config=gpt:debug", "--config.total_steps=9", "--config.evals.heldout.every=1", "--config.batch_size=8"),
  *("--config.early_stopping.metric=eval/heldout/likelihood", f"--config.evals.heldout.name={__name__}:likelihood"),
  *("--config.early_stopping.patience=3", "--config.checkpoint.best=eval/heldout/loss", "--config.checkpoint.every=1"),
]


def test_a_run_stops_early_and_an_interrupted_one_at_the_same_step(home, capsys, monkeypatch):
  config = load_config(FLAGS)
  first = train.run(config, home / "whole")
  said = capsys.readouterr().out
  assert "has not been better than" in said and "is finished at 4 steps" in said
  assert train.run(config, home / "whole") == pytest.approx(first)
  assert "is finished at 4 steps" in capsys.readouterr().out

  step = train.Meter.add

  def interrupt(self, done, metrics, due):
    step(self, done, metrics, due)
    if done == 3:
      raise RuntimeError("lost")

  monkeypatch.setattr(train.Meter, "add", interrupt)
  with pytest.raises(RuntimeError, match="lost"):
    train.run(config, home / "lost")
  monkeypatch.setattr(train.Meter, "add", step)
  assert train.run(config, home / "lost") == first
  assert "is finished at 4 steps" in capsys.readouterr().out

  calls = itertools.count(1)

  @contextlib.contextmanager
  def signal():
    yield lambda done: next(calls) == 3

  interruption = train.interruption
  monkeypatch.setattr(train, "interruption", signal)
  with pytest.raises(KeyboardInterrupt):
    train.run(config, home / "signalled")
  monkeypatch.setattr(train, "interruption", interruption)
  assert train.run(config, home / "signalled") == first
  assert "is finished at 4 steps" in capsys.readouterr().out

  assert locate(home / "lost" / "checkpoints" / "best") == (home / "lost", 4)  # the least loss
  checkpoints, found, manifest = open_checkpoint(home / "lost" / "checkpoints" / "best")
  checkpoints.close()
  assert found == 4 and manifest["metrics"]["eval/heldout/loss"] == first["eval/heldout/loss"]


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--config.early_stopping.metric=heldout/loss", r"early_stopping.metric='heldout/loss' is none"),
    ("--config.early_stopping.best_is=max", r"early_stopping.best_is='max' must be 'least' or 'most'"),
    ("--config.checkpoint.best_is=max", r"checkpoint.best_is='max' must be 'least' or 'most'"),
  ],
)
def test_a_metric_that_is_none_is_told_before_the_first_step(home, flag, message):
  config = load_config([*FLAGS, flag])
  with pytest.raises(ConfigError, match=message):
    train.run(config, home / "run")

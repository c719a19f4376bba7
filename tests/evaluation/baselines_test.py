"""Unigram baseline against counts of labels; evals of the shipped configs."""

import math

import numpy as np
import pytest

from configs import base
from llmjax.config import ConfigError, to_dict
from llmjax.evaluation.baselines import unigram_baseline
from llmjax.evaluation.splits import held_out_batches
from llmjax.training.components import open_source
from llmjax.training.evals import EvaluationSchedule
from tests.support.contrastive_run import make_tiny_program

SUM = {
  "name": "weighted_sum",
  "principal": "mlm",
  "parts": {"a": {"name": "contrastive", "weight": 1.0}, "mlm": {"name": "masked_lm", "weight": 1.0}},
}


@pytest.mark.parametrize(
  "objective, model, term",
  [
    ({"name": "masked_lm"}, {}, "mlm"),
    ({"name": "causal_lm"}, {"encoder_layers": 0, "decoder_layers": 1}, "nll"),
    ({"name": "span_corruption"}, {"decoder_layers": 1}, "nll"),
    (SUM, {}, "mlm"),
  ],
  ids=["masked", "causal", "spans", "sum"],
)
def test_unigram_baseline_equals_a_constant_guess(folder, objective, model, term):
  program = make_tiny_program(objective, model)

  def labels(split):
    batches = held_out_batches(program, open_source(program.config, split), 8, None)
    batches = [batch.extras["mlm"] if objective is SUM else batch for batch in batches]
    return [int(x) for b in batches for x, weight in zip(b.labels[term].flat, b.weights[term].flat) if weight]

  seen, held = labels("[:50%]"), labels("[50%:]")
  nll = [-math.log((seen.count(token) + 1) / (len(seen) + program.tokenizer.vocab_size)) for token in held]
  most_frequent = max(range(program.tokenizer.vocab_size), key=seen.count)
  assert unigram_baseline(program)(None) == {
    "baseline/unigram_loss": pytest.approx(np.mean(nll)),
    "baseline/unigram_accuracy": pytest.approx(held.count(most_frequent) / len(held)),
  }


def test_unigram_baseline_of_a_contrastive_objective_raises(folder):
  with pytest.raises(ConfigError, match="predicts tokens"):
    unigram_baseline(make_tiny_program({"name": "contrastive"}, {"dropout": 0.1}))


@pytest.mark.parametrize(
  "add_evals, objective, model, names",
  [
    (base.retrieval_evals, None, {}, {"heldout", "retrieval"}),
    (base.token_evals, {"name": "masked_lm"}, {}, {"heldout", "unigram"}),
    (base.token_evals, {"name": "span_corruption"}, {"decoder_layers": 1}, {"heldout", "unigram"}),
  ],
  ids=["retrieval", "masked", "spans"],
)
def test_evals_of_shipped_configs_build(folder, add_evals, objective, model, names):
  config = base.get_config()
  add_evals(config)
  config.evals.heldout.max_batches = 3
  assert "unigram" not in config.evals or config.evals.unigram.max_batches == 3
  program = make_tiny_program(objective, model)
  program.config["evals"].update(to_dict(config.evals))
  assert {each.name for each in EvaluationSchedule(program).evaluations} == names

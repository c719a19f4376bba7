"""Baselines: metrics of methods without a trained model on the same held-out data. They ignore the parameters."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float

from llmjax.config import ConfigError
from llmjax.data.sources.base import Source, subsample_bytes
from llmjax.evaluation.splits import labelled_records, make_split_batches
from llmjax.inference.predict import check_task
from llmjax.metrics.baselines import compressor_baselines
from llmjax.objectives.seq2seq import Seq2Seq
from llmjax.objectives.weighted_sum import WeightedSum
from llmjax.training.components import open_source
from llmjax.training.evals import Evaluator
from llmjax.training.program import Program
from llmjax.types import Objective

TOKEN_TERMS = ("nll", "mlm")  # terms of an objective that are averages over tokens
UNIGRAM_BYTES = 1 << 22  # of the training text, in which frequencies of tokens are counted

# The first sentence ends before a space after a full stop, at a line end, or after a full-width full stop.
SENTENCE_END = re.compile(r"(?<=[.!?])\s|(?<=[。！？])|\n")


def constant_evaluator(measure: Callable[[], dict[str, float]]) -> Evaluator:
  """Return an evaluator that measures once, at the first evaluation."""
  measure = functools.cache(measure)
  return lambda params: measure()


def compressor_evaluator(program: Program, split: str | None = None) -> Evaluator:
  """Measure the bits per byte of general compressors on the held-out text, see `compressor_baselines`.

  Args:
    program: its config names the corpus and the training split.
    split: held-out split of config.data.corpus. None: config.data.eval.
  """
  data = program.config["data"]

  def texts(name: str) -> Iterator[str]:
    source = open_source(program.config, name)
    return (source[i]["text"] for i in range(len(source)))

  def measure() -> dict[str, float]:
    scores = compressor_baselines(texts(data["train"]), texts(split or data["eval"]))
    return {f"baseline/{name}": value for name, value in scores.items()}

  return constant_evaluator(measure)


def token_term(objective: Objective) -> tuple[str | None, str | None]:
  """Return where an objective predicts tokens.

  Returns:
    The view of the batch, None for the batch itself; and the term of the labels, None if it predicts no tokens.
  """
  component, view = objective, None
  if isinstance(objective, WeightedSum):
    view, component = objective.principal, objective.parts[objective.principal]
  return view, next((term for term in TOKEN_TERMS if term in component.coefficients), None)


def unigram_baseline(
  program: Program, split: str | None = None, batch_size: int | None = None, max_batches: int | None = None
) -> Evaluator:
  """Measure a constant prediction on the labels of `heldout_loss`, whose arguments are the same.

  "unigram_loss" is the negative log-likelihood (nats) under the frequencies of labels in the training split, with 1
  added to each count. "unigram_accuracy" is the accuracy of always predicting the most frequent label.
  """
  config = program.config
  view, term = token_term(program.objective)
  if term is None:
    raise ConfigError("evals.*.name='unigram' needs an objective that predicts tokens; remove the entry")
  size = config["batch_size"] if batch_size is None else batch_size
  heldout = open_source(config, split or config["data"]["eval"])
  training = open_source(config, config["data"]["train"])

  def count_labels(source: Source, max_batches: int | None) -> Float[np.ndarray, " V"]:
    total = np.zeros(program.tokenizer.vocab_size)
    for batch in make_split_batches(program, source, size, range(size), max_batches=max_batches):
      viewed = batch if view is None else batch.extras[view]
      total += np.bincount(viewed.labels[term].reshape(-1), viewed.weights[term].reshape(-1), len(total))
    return total

  def measure() -> dict[str, float]:
    seen = count_labels(subsample_bytes(training, UNIGRAM_BYTES), None) + 1
    held_out = count_labels(heldout, max_batches)
    return {
      "baseline/unigram_loss": -float(held_out @ np.log(seen / seen.sum()) / held_out.sum()),
      "baseline/unigram_accuracy": float(held_out[np.argmax(seen)] / held_out.sum()),
    }

  return constant_evaluator(measure)


def lead_baseline(program: Program, split: str | None = None, limit: int | None = None) -> Evaluator:
  """Measure the first sentence of each text as its summary; arguments are those of `task_answers`."""
  task = check_task(program.objective)
  if not isinstance(task, Seq2Seq):
    raise ConfigError("evals.*.name='lead' needs objective.name='seq2seq'; remove the entry")
  read_records = labelled_records(program, task, split, limit)

  def measure() -> dict[str, float]:
    records = read_records()
    summaries = [{task.target: SENTENCE_END.split(record[task.source].strip())[0]} for record in records]
    return {f"baseline/lead_{name}": value for name, value in task.compute_metrics(records, summaries).items()}

  return constant_evaluator(measure)

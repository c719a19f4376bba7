"""Evaluations of a run: the registry of evaluators, and when each of config.evals is due."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TypeAlias

from llmjax.config import ConfigError, build
from llmjax.training.program import Program
from llmjax.trees import Params

Evaluator: TypeAlias = Callable[[Params], Mapping[str, float | str]]  # all parameters -> {metric: number or text}

EVALUATORS = {
  "loss": "llmjax.evaluation.evaluators:heldout_loss",
  "answers": "llmjax.evaluation.evaluators:task_answers",
  "lead": "llmjax.evaluation.baselines:lead_baseline",
  "sample": "llmjax.evaluation.evaluators:sample_text",
  "baselines": "llmjax.evaluation.baselines:compressor_evaluator",
  "unigram": "llmjax.evaluation.baselines:unigram_baseline",
  "retrieval": "llmjax.evaluation.retrieval:pair_retrieval",
  "similarity": "llmjax.evaluation.similarity:similarity_correlation",
}

# Keys of an entry of config.evals that say when it is due; the others are the evaluator's.
SCHEDULE_KEYS = ("every", "at")


def metric_name(entry: str, metric: str) -> str:
  """Return the name under which a metric is logged: `eval/<entry>/<metric>`; baselines keep their own names."""
  return metric if metric.startswith("baseline/") else f"eval/{entry}/{metric}"


def interval_steps(program: Program, *keys: str) -> int:
  """Return the `every` of a part of the config in steps; None is longer than the run."""
  key = ".".join((*keys, "every"))
  value = functools.reduce(lambda part, name: part[name], keys, program.config)["every"]
  steps = program.steps(value, key)
  if steps == 0:
    raise ConfigError(f"{key}={value!r} must be at least one step; none is never")
  return program.total_steps + 1 if steps is None else steps


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """An entry of config.evals."""

  name: str
  evaluator: Evaluator
  every: int  # steps
  at: frozenset[int]  # further steps

  def is_due(self, step: int) -> bool:
    return step in self.at or (step > 0 and step % self.every == 0)


class EvaluationSchedule:
  """All entries of config.evals; each is due at the end of the run too."""

  def __init__(self, program: Program) -> None:
    """Build the evaluators; raises ConfigError for an entry that cannot work."""
    self.evaluations = [self._build(program, name) for name in program.config["evals"]]

  @staticmethod
  def _build(program: Program, name: str) -> Evaluation:
    entry = program.config["evals"][name]
    spec = {key: value for key, value in entry.items() if key not in SCHEDULE_KEYS}
    evaluator = build(spec, EVALUATORS, f"evals.{name}", program=program)
    at = {program.steps(value, f"evals.{name}.at") for value in entry["at"]} | {program.total_steps}
    return Evaluation(
      name, evaluator, interval_steps(program, "evals", name), frozenset(s for s in at if s is not None)
    )

  def due(self, step: int) -> list[Evaluation]:
    """Return the evaluations that are due after `step` steps."""
    return [evaluation for evaluation in self.evaluations if evaluation.is_due(step)]

  def not_due(self, step: int) -> list[Evaluation]:
    return [evaluation for evaluation in self.evaluations if not evaluation.is_due(step)]

  def is_any_due(self, step: int) -> bool:
    return bool(self.due(step))

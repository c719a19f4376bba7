"""The registry of evaluators, and the names under which their metrics are logged."""

from __future__ import annotations

EVALUATORS = {
  "loss": "llmjax.evaluation.evaluators:heldout_loss",
  "answers": "llmjax.evaluation.evaluators:task_answers",
  "lead": "llmjax.evaluation.evaluators:lead_baseline",
  "sample": "llmjax.evaluation.evaluators:sample_text",
  "baselines": "llmjax.evaluation.evaluators:baselines",
  "unigram": "llmjax.evaluation.evaluators:unigram_baseline",
  "retrieval": "llmjax.evaluation.retrieval:retrieval",
  "similarity": "llmjax.evaluation.retrieval:similarity",
}


# Keys of an evals entry that say when, and are read by the train loop.
SCHEDULE_KEYS = ("every", "at")


def metric_name(entry: str, what: str) -> str:
  """What a number of an evals entry is called in the curves; baselines, which no model changes, go by their own."""
  return what if what.startswith("baseline/") else f"eval/{entry}/{what}"

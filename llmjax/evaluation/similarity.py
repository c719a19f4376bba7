"""Semantic textual similarity: correlation of cosines with human scores."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from llmjax.config import ConfigError, suggest_name
from llmjax.data.sources.registry import files_source
from llmjax.data.sources.tables import record_fields
from llmjax.evaluation.retrieval import embed_on_mesh
from llmjax.inference.embeddings import contrastive_objective, tokenize_texts
from llmjax.training.evals import Evaluator
from llmjax.training.program import Program
from llmjax.trees import Params


def similarity_correlation(
  program: Program, files: str, batch_tokens: int, text_a: str = "text_a", text_b: str = "text_b", score: str = "score"
) -> Evaluator:
  """Evaluate Spearman's correlation of the cosines of pairs of texts with human scores.

  The pooling is that of the objective, or the mean over tokens if it does not train embeddings.

  Args:
    program: the program that is evaluated.
    files: JSONL, CSV, TSV or Parquet.
    batch_tokens: maximum of rows times length of a batch.
    text_a: field of the first text.
    text_b: field of the second text.
    score: field of the score.
  """
  from scipy import stats

  objective = contrastive_objective(program.objective)
  pooling = "mean" if objective is None else objective.pooling
  texts, scores = read_scored_pairs(files, text_a, text_b, score)
  rows = tokenize_texts(program.tokenizer, texts, program.config["seq_len"])

  def evaluate(params: Params) -> dict[str, float]:
    a, b = np.split(embed_on_mesh(program, params, rows, pooling, batch_tokens), 2)
    return {"spearman": float(stats.spearmanr(np.sum(a * b, axis=1), scores).statistic)}

  return evaluate


def read_scored_pairs(files: str, text_a: str, text_b: str, score: str) -> tuple[list[str], Float[np.ndarray, " n"]]:
  """Return the n first and then the n second texts of pairs, and their scores; see `similarity_correlation`."""
  known = record_fields(files)
  for key, field in (("text_a", text_a), ("text_b", text_b), ("score", score)):
    if field not in known:
      raise ConfigError(f"{files} has no field {field!r} (evals.*.{key}); {suggest_name(field, known)}")
  first, second, scores = [], [], []
  # The column that a source reads as "text" hides a field of that name.
  column = "text" if text_b == "text" else text_a
  for number, record in enumerate(files_source("all", files, column, (text_a, text_b, score)), 1):
    try:
      first.append(str(record[text_a]))
      second.append(str(record[text_b]))
      scores.append(float(record[score]))
    except (KeyError, TypeError, ValueError) as error:
      raise ConfigError(f"{files}: record {number} is not a pair of texts with a number in {score!r}") from error
  if not np.all(np.isfinite(scores)) or len(set(scores)) < 2:
    raise ConfigError(f"{files}: the field {score!r} must hold finite numbers that differ, to correlate with cosines")
  return first + second, np.array(scores)

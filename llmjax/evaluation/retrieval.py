"""Evaluators of embeddings: whether what belongs together is found, and whether what is alike lies near."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llmjax.config import ConfigError, suggest_name
from llmjax.data.sources.base import Source
from llmjax.data.sources.registry import files_source
from llmjax.data.sources.tables import record_fields
from llmjax.inference.embeddings import contrastive_part, embed_tokens, tokenize
from llmjax.objectives.contrastive import Contrastive
from llmjax.training.components import open_source
from llmjax.training.program import Program

BLOCK = 1024  # rows of a matrix of scores that are in memory at a time
TIE = 1e-6  # scores that differ by less are equal: rounding depends on batch and mesh

Evaluator = Callable[[Any], dict[str, float]]


class Pairs(NamedTuple):
  """Entry i of each belongs together."""

  anchors: list[np.ndarray]  # framed tokens
  positives: list[np.ndarray]
  queries: list[str]  # the same as text, uncut
  documents: list[str]


def retrieval(
  program: Program, batch_tokens: int, split: str | None = None, limit: int | None = None, bm25: bool = False
) -> Evaluator:
  """Each anchor of a split looks for its own positive among those of the whole split, whatever the batch size.

  Gives what `ranking`, `alignment` and `uniformity` say, and with `bm25` the ranking by words alone as baselines.

  Args:
    batch_tokens: see `embeddings.embed`.
    split: of config.data.corpus; None is config.data.eval.
    limit: the first so many pairs only.
  """
  objective = contrastive_part(program.objective)
  if objective is None or objective.positive is None:
    raise ConfigError(
      "evals.*.name='retrieval' needs pairs, which only a contrastive objective has whose objective.positive names a "
      "field; set that, or take this entry away (--config.evals.retrieval=none)"
    )
  if bm25:
    _import_bm25s()
  source = open_source(program.config, split or program.config["data"]["eval"])
  found: list[Pairs] = []  # made once, at the first use
  baselines: dict[str, float] = {}

  def evaluate(params: Any) -> dict[str, float]:
    if not found:
      found.append(read_pairs(program, objective, source, limit))
      if bm25:
        by_words = ranking(ranks(bm25_scores(found[0].queries, found[0].documents)))
        baselines.update({f"baseline/bm25_{name}": value for name, value in by_words.items()})
    rows = found[0].anchors + found[0].positives
    vectors = _embed(program, params, rows, objective.pooling, batch_tokens)
    queries, documents = np.split(vectors, 2)
    spread = (uniformity(queries) + uniformity(documents)) / 2
    near = {"alignment": alignment(queries, documents), "uniformity": spread}
    return ranking(ranks(cosines(queries, documents))) | near | baselines

  return evaluate


def read_pairs(program: Program, objective: Contrastive, source: Source, limit: int | None) -> Pairs:
  """The pairs that the objective learns from."""
  rng = np.random.default_rng(0)  # this objective draws nothing
  pairs = Pairs([], [], [], [])
  for record in source:
    if limit is not None and len(pairs.anchors) == limit:
      break
    features = objective.features({**record, "ids": program.tokenizer.document(record["text"])}, rng, source)
    if features is not None:
      pairs.anchors.append(features["inputs"])
      pairs.positives.append(features["extras"]["positive"]["inputs"])
      pairs.queries.append(record[objective.anchor])
      pairs.documents.append(record[str(objective.positive)])
  if len(pairs.anchors) < 2:
    raise ConfigError(f"evals.*: {len(pairs.anchors)} pairs are too few to look for one among others; give at least 2")
  return pairs


def cosines(queries: np.ndarray, documents: np.ndarray) -> Iterator[np.ndarray]:
  """Rows of queries [n D] times documents [n D], a block at a time."""
  for start in range(0, len(queries), BLOCK):
    yield from queries[start : start + BLOCK] @ documents.T


def ranks(scores: Iterator[np.ndarray]) -> np.ndarray:
  """Int[n]: the place of document i for query i, by rows of scores [n]; 1 is the best.

  A tie counts against the query: where all documents score the same, its own is the last of them.
  """
  return np.array([np.count_nonzero(row >= row[i] - TIE) for i, row in enumerate(scores)])


def ranking(places: np.ndarray) -> dict[str, float]:
  """The share of queries whose document is the first, or among ten; the mean of 1 / place (MRR)."""
  return {
    "recall_at_1": float(np.mean(places <= 1)),
    "recall_at_10": float(np.mean(places <= 10)),
    "mrr": float(np.mean(1 / places)),
  }


def alignment(queries: np.ndarray, documents: np.ndarray) -> float:
  """The mean squared distance of a pair, 0 is the best (Wang and Isola 2020, https://arxiv.org/abs/2005.10242)."""
  return float(np.mean(np.sum(np.square(queries - documents), axis=1)))


def uniformity(vectors: np.ndarray) -> float:
  """log of the mean over pairs of exp(-2 squared distance), less is better, -4 about the best (Wang and Isola 2020)."""
  count = len(vectors)
  total = math.fsum(float(np.sum(np.exp(4 * row - 4), dtype=np.float64)) for row in cosines(vectors, vectors))
  own = float(np.sum(np.exp(4 * np.sum(np.square(vectors), axis=1, dtype=np.float64) - 4)))
  return math.log((total - own) / (count * (count - 1)))


# BM25


def words(text: str) -> list[str]:
  """Words in lower case, identifiers taken apart: `readHTTPLines` and `read_http_lines` are read, http, lines."""
  text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text)
  return re.findall(r"[^\W_]+", text.lower())


def bm25_scores(queries: Sequence[str], documents: Sequence[str]) -> Iterator[np.ndarray]:
  """Rows [n] of what `bm25s` gives, each query's for all documents (Lucene's BM25; k1 = 1.5, b = 0.75)."""
  index = _import_bm25s().BM25(method="lucene", k1=1.5, b=0.75)
  index.index([words(text) or [""] for text in documents], show_progress=False)
  for query in queries:
    known = index.get_tokens_ids(words(query))
    yield index.get_scores_from_ids(known) if known else np.zeros(len(documents), np.float32)


def _import_bm25s() -> Any:
  try:
    import bm25s
  except ImportError as error:
    raise ConfigError(
      "evals.*.bm25=True needs the package bm25s: pip install 'llmjax[eval]', or set it False"
    ) from error
  logging.getLogger("bm25s").setLevel(logging.WARNING)  # it narrates
  return bm25s


# similarity


def similarity(
  program: Program, files: str, batch_tokens: int, text_a: str = "text_a", text_b: str = "text_b", score: str = "score"
) -> Evaluator:
  """Spearman's correlation of cosines with scores that people gave, on a file of pairs.

  Vectors are made as the objective makes them; the mean over tokens where it makes none.

  Args:
    files: JSONL, CSV, TSV or Parquet.
    batch_tokens: see `embeddings.embed`.
    text_a, text_b, score: the fields of a record.
  """
  from scipy import stats

  objective = contrastive_part(program.objective)
  pooling = "mean" if objective is None else objective.pooling
  texts, scores = read_scored(files, text_a, text_b, score)
  rows = tokenize(program.tokenizer, texts, program.config["seq_len"])

  def evaluate(params: Any) -> dict[str, float]:
    a, b = np.split(_embed(program, params, rows, pooling, batch_tokens), 2)
    return {"spearman": float(stats.spearmanr(np.sum(a * b, axis=1), scores).statistic)}

  return evaluate


def read_scored(files: str, text_a: str, text_b: str, score: str) -> tuple[list[str], np.ndarray]:
  """The n first and then the n second texts of a file's pairs, and their scores Float64[n]."""
  known = record_fields(files)
  for key, field in (("text_a", text_a), ("text_b", text_b), ("score", score)):
    if field not in known:
      raise ConfigError(f"{files} has no field {field!r} (evals.*.{key}); {suggest_name(field, known)}")
  first, second, scores = [], [], []
  column = "text" if text_b == "text" else text_a  # what a source calls "text" hides a field of this name
  for number, record in enumerate(files_source("all", files, column, (text_a, text_b, score)), 1):
    try:
      first.append(str(record[text_a]))
      second.append(str(record[text_b]))
      scores.append(float(record[score]))
    except (KeyError, TypeError, ValueError) as error:
      raise ConfigError(f"{files}: record {number} is no pair of texts with a number as its {score!r}") from error
  if not np.all(np.isfinite(scores)) or len(set(scores)) < 2:
    raise ConfigError(f"{files}: the field {score!r} must hold numbers that differ, for cosines to agree with them")
  return first + second, np.array(scores)


def _embed(program: Program, params: Any, rows: Sequence[np.ndarray], pooling: str, batch_tokens: int) -> np.ndarray:
  """Vectors of framed texts, on the program's mesh."""
  return embed_tokens(
    program.model, params, rows, pooling=pooling, batch_tokens=batch_tokens, mesh=program.mesh, rules=program.rules
  )

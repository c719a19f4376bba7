"""Retrieval of pairs by the cosine of their embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from llmjax.config import ConfigError
from llmjax.data.sources.base import Source
from llmjax.evaluation.bm25 import bm25_scores, import_bm25s
from llmjax.examples import Window
from llmjax.inference.batches import BatchSettings
from llmjax.inference.embeddings import contrastive_objective, embed_tokens
from llmjax.objectives.contrastive import Contrastive
from llmjax.training.components import open_source
from llmjax.training.evals import Evaluator
from llmjax.training.program import Program
from llmjax.trees import Params

BLOCK_ROWS = 1024  # rows of the matrix of scores that are in memory at a time
TIE = 1e-6  # scores that differ by less are equal, because rounding depends on batch and mesh


class Pairs(NamedTuple):
  """n pairs of texts; entries i of all lists belong together."""

  anchors: list[np.ndarray]  # token ids, with bos and eos
  positives: list[np.ndarray]
  queries: list[str]  # texts of the anchors, not truncated
  documents: list[str]


def pair_retrieval(
  program: Program, batch_tokens: int, split: str | None = None, limit: int | None = None, bm25: bool = False
) -> Evaluator:
  """Rank the positives of a whole split for each anchor, whatever the batch size.

  Metrics are those of `ranking_metrics`, `alignment` and `uniformity`. With `bm25` the ranking by BM25 is a baseline.

  Args:
    program: a program with a contrastive objective, or with one as a component.
    batch_tokens: maximum of rows times length of a batch.
    split: split of config.data.corpus. None: config.data.eval.
    limit: use only the first pairs. None: all.
    bm25: also evaluate BM25.
  """
  objective = contrastive_objective(program.objective)
  if objective is None or objective.positive is None:
    raise ConfigError(
      "evals.*.name='retrieval' needs pairs: a contrastive objective whose objective.positive names a field; set that, "
      "or remove this entry (--config.evals.retrieval=none)"
    )
  if bm25:
    import_bm25s()
  source = open_source(program.config, split or program.config["data"]["eval"])
  pairs_read: list[Pairs] = []  # filled at the first evaluation
  baselines: dict[str, float] = {}

  def evaluate(params: Params) -> dict[str, float]:
    if not pairs_read:
      pairs_read.append(read_pairs(program, objective, source, limit))
    [pairs] = pairs_read
    if bm25 and not baselines:
      bm25_metrics = ranking_metrics(rank_own_documents(bm25_scores(pairs.queries, pairs.documents)))
      baselines.update({f"baseline/bm25_{name}": value for name, value in bm25_metrics.items()})
    vectors = embed_on_mesh(program, params, pairs.anchors + pairs.positives, objective.pooling, batch_tokens)
    queries, documents = np.split(vectors, 2)
    return {
      **ranking_metrics(rank_own_documents(iterate_cosines(queries, documents))),
      "alignment": alignment(queries, documents),
      "uniformity": (uniformity(queries) + uniformity(documents)) / 2,
      **baselines,
    }

  return evaluate


def read_pairs(program: Program, objective: Contrastive, source: Source, limit: int | None) -> Pairs:
  """Return the pairs that the objective is trained on, at most `limit`. Raises ConfigError if there are less than 2."""
  rng = np.random.default_rng(0)  # the objective does not use it
  pairs = Pairs([], [], [], [])
  for record in source:
    if limit is not None and len(pairs.anchors) == limit:
      break
    example = objective.make_example(Window(record, program.tokenizer.document(record["text"])), rng, source)
    if example is not None:
      anchor, positive = example.inputs, example.extras["positive"].inputs
      assert anchor is not None and positive is not None
      pairs.anchors.append(anchor.ids)
      pairs.positives.append(positive.ids)
      pairs.queries.append(record[objective.anchor])
      pairs.documents.append(record[str(objective.positive)])
  if len(pairs.anchors) < 2:
    raise ConfigError(
      f"evals.*: retrieval needs at least 2 pairs, got {len(pairs.anchors)}; set another split or limit"
    )
  return pairs


def embed_on_mesh(
  program: Program, params: Params, rows: Sequence[np.ndarray], pooling: str, batch_tokens: int
) -> Float[np.ndarray, "n D"]:
  """Return the embeddings of n texts (token ids), computed on the program's mesh."""
  return embed_tokens(program.model, params, rows, pooling, BatchSettings(batch_tokens, program.mesh, program.rules))


def iterate_cosines(
  queries: Float[np.ndarray, "n D"], documents: Float[np.ndarray, "n D"]
) -> Iterator[Float[np.ndarray, " n"]]:
  """Yield the products of each query with all documents; computed in blocks of rows."""
  for start in range(0, len(queries), BLOCK_ROWS):
    yield from queries[start : start + BLOCK_ROWS] @ documents.T


def rank_own_documents(scores: Iterable[Float[np.ndarray, " n"]]) -> Int[np.ndarray, " n"]:
  """Return the rank of document i for query i, from 1.

  A tie counts against the query: if all documents have the same score, the rank is n.

  Args:
    scores: for each query the scores of all documents.
  """
  return np.array([np.count_nonzero(row >= row[i] - TIE) for i, row in enumerate(scores)])


def ranking_metrics(ranks: Int[np.ndarray, " n"]) -> dict[str, float]:
  """Return the shares of queries with rank 1 and with rank at most 10, and the mean reciprocal rank (MRR)."""
  return {
    "recall_at_1": float(np.mean(ranks <= 1)),
    "recall_at_10": float(np.mean(ranks <= 10)),
    "mrr": float(np.mean(1 / ranks)),
  }


def alignment(queries: Float[np.ndarray, "n D"], documents: Float[np.ndarray, "n D"]) -> float:
  """Return the mean squared distance of a pair; 0 is best (Wang and Isola 2020, https://arxiv.org/abs/2005.10242)."""
  return float(np.mean(np.sum(np.square(queries - documents), axis=1)))


def uniformity(vectors: Float[np.ndarray, "n D"]) -> float:
  """Return the log of the mean over pairs of exp(-2 squared distance), of unit vectors (Wang and Isola 2020).

  Lower is better, and about -4 is best.
  """
  count = len(vectors)
  total = math.fsum(float(np.sum(np.exp(4 * row - 4), dtype=np.float64)) for row in iterate_cosines(vectors, vectors))
  own = float(np.sum(np.exp(4 * np.sum(np.square(vectors), axis=1, dtype=np.float64) - 4)))
  return math.log((total - own) / (count * (count - 1)))

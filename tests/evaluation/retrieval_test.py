"""Retrieval of pairs against direct computation."""

import functools
import math

import jax
import numpy as np
import pytest

import llmjax
from llmjax.config import ConfigError
from llmjax.evaluation import retrieval
from llmjax.evaluation.retrieval import (
  alignment,
  iterate_cosines,
  pair_retrieval,
  rank_own_documents,
  ranking_metrics,
  uniformity,
)
from tests.support.contrastive_run import PAIRS, make_tiny_program


def test_rank_with_ties_counts_them_against_the_query(monkeypatch):
  monkeypatch.setattr(retrieval, "BLOCK_ROWS", 3)
  rng = np.random.default_rng(0)
  queries, documents = rng.integers(-1, 2, (2, 20, 3)).astype(np.float32)  # small integers: many ties
  ranks = rank_own_documents(iterate_cosines(queries, documents))
  scores = [[sum(map(float.__mul__, map(float, q), map(float, d))) for d in documents] for q in queries]
  expected = [1 + sum(row[j] >= row[i] for j in range(20) if j != i) for i, row in enumerate(scores)]
  np.testing.assert_array_equal(ranks, expected)


def test_rank_with_equal_scores_is_the_last():
  assert rank_own_documents(iter(np.ones((5, 5)))).tolist() == [5] * 5


def test_ranking_metrics_equal_values_by_hand():
  assert ranking_metrics(np.array([1, 2, 10, 11])) == {
    "recall_at_1": 0.25,
    "recall_at_10": 0.75,
    "mrr": pytest.approx((1 + 1 / 2 + 1 / 10 + 1 / 11) / 4),
  }


def unit_vectors():
  vectors = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_uniformity_equals_the_mean_over_pairs(monkeypatch):
  monkeypatch.setattr(retrieval, "BLOCK_ROWS", 4)
  vectors = unit_vectors()
  each = [math.exp(-2 * np.sum((x - y) ** 2)) for i, x in enumerate(vectors) for y in vectors[:i]]
  assert uniformity(vectors) == pytest.approx(math.log(np.mean(each)), abs=1e-6)


def test_uniformity_of_equal_vectors_is_0():
  assert uniformity(np.repeat(unit_vectors()[:1], 9, axis=0)) == pytest.approx(0, abs=1e-6)


def test_alignment_equals_the_mean_over_pairs():
  vectors = unit_vectors()
  distance = np.mean([np.sum((x - y) ** 2) for x, y in zip(vectors, vectors[::-1])])
  assert alignment(vectors, vectors[::-1]) == pytest.approx(distance, abs=1e-6)


def test_retrieval_on_a_mesh_equals_one_device(folder):
  one, mesh = make_tiny_program(devices=jax.devices()[:1]), make_tiny_program()
  params = one.init().params
  metrics = pair_retrieval(one, batch_tokens=64)(params)
  assert pair_retrieval(mesh, batch_tokens=512)(mesh.init(params).params) == pytest.approx(metrics, abs=1e-5)


def test_retrieval_equals_ranks_of_embedded_pairs(folder):
  program = make_tiny_program(devices=jax.devices()[:1])
  params = program.init().params
  metrics = pair_retrieval(program, batch_tokens=64, bm25=True)(params)
  pairs = PAIRS[15:]  # tiny.py holds out the second half
  embed = functools.partial(llmjax.embed, program.model, params, program.tokenizer, pooling="cls")
  scores = embed([p["title"] for p in pairs]) @ embed([p["text"] for p in pairs]).T
  ranks = [1 + sum(s >= row[i] - 1e-6 for s in np.delete(row, i)) for i, row in enumerate(scores)]
  assert metrics["mrr"] == pytest.approx(np.mean(1 / np.array(ranks)))
  assert metrics["alignment"] == pytest.approx(2 - 2 * np.mean(np.diag(scores)), abs=1e-5)
  assert metrics["uniformity"] < 0
  assert metrics["baseline/bm25_recall_at_1"] == 1  # the number is in both


def test_retrieval_with_a_limit_uses_only_the_first_pairs(folder):
  program = make_tiny_program(devices=jax.devices()[:1])
  metrics = pair_retrieval(program, batch_tokens=64, limit=2)(program.init().params)
  assert metrics["recall_at_10"] == 1 and "baseline/bm25_mrr" not in metrics


@pytest.mark.parametrize("objective", [{"name": "contrastive"}, {"name": "masked_lm"}])
def test_retrieval_without_pairs_raises_one_line(folder, objective):
  with pytest.raises(ConfigError, match=r"^[^\n]*needs pairs[^\n]*objective\.positive[^\n]*$"):
    pair_retrieval(make_tiny_program(objective, {"dropout": 0.1}), batch_tokens=64)

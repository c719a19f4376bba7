"""Contrastive learning: the loss against its formula, poolings, and views of a record."""

import dataclasses

import jax
import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.models.transformer import Transformer
from llmjax.objectives.contrastive import Contrastive, info_nce, pool_embeddings
from llmjax.training.step import ModelForward
from llmjax.types import Batch, Outputs, Tokens
from tests.support.cases import BERT, CASES, TOKENIZER, parameters
from tests.support.examples import Lookup, example_of


@pytest.mark.parametrize("negative", [None, "other"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_contrastive_loss_equals_its_formula(symmetric, negative):
  """-log exp(z_i . z_j / t) / sum_k exp(z_i . z_k / t) in float64; padding rows are neither anchors nor candidates."""
  rng = np.random.default_rng(0)
  table, ids = rng.normal(size=(18, 5)), np.arange(18).reshape(3, 6, 1)
  real = np.array([1, 1, 1, 0, 1, 1])

  def batch(view):
    inputs = jax.tree.map(np.int32, Tokens(ids[view], np.zeros((6, 1)), real[:, None]))
    return Batch(inputs=inputs, rows=np.arange(6))

  extras = {"positive": batch(1)} | ({} if negative is None else {"negative": batch(2)})
  objective = Contrastive(TOKENIZER, 8, "text", "title", negative, symmetric=symmetric, temperature=0.3)
  whole = dataclasses.replace(batch(0), extras=extras)
  loss = jax.jit(lambda table, batch: objective.loss(Lookup(table), batch, {}))
  sums, metrics = loss(table.astype(np.float32), whole)

  z = table / np.linalg.norm(table, axis=1, keepdims=True)
  rows = [i for i in range(6) if real[i]]
  total = right = 0.0
  for i in rows:
    candidates = [6 + k for k in rows] + ([] if negative is None else [12 + k for k in rows])
    positive = np.exp(z[i] @ z[6 + i] / 0.3)
    forward = -np.log(positive / sum(np.exp(z[i] @ z[k] / 0.3) for k in candidates))
    backward = -np.log(positive / sum(np.exp(z[6 + i] @ z[k] / 0.3) for k in rows))
    total += (forward + backward) / 2 if symmetric else forward
    right += all(z[i] @ z[6 + i] >= z[i] @ z[k] for k in candidates)
  np.testing.assert_allclose(sums["contrastive"], total, rtol=1e-5)
  assert float(objective.weights(whole)["contrastive"]) == len(rows) == float(metrics["loss"][1])
  assert float(metrics["accuracy"][0]) == right
  alignment = sum(np.sum((z[i] - z[6 + i]) ** 2) for i in rows)
  np.testing.assert_allclose(metrics["alignment"][0], alignment, rtol=1e-5)


def test_contrastive_views_of_one_text_differ_only_by_dropout():
  objective = CASES["bert weighted_sum"].objective.parts["views"]
  params, _ = parameters(BERT)
  batch = Batch.from_tokens(np.random.default_rng(0).integers(97, 123, (3, 8)))

  def distances(rate):
    model = Transformer(dataclasses.replace(BERT, dropout=rate))
    embed = jax.jit(
      lambda params, key: objective.embed_views(ModelForward(model, params), [batch, batch], {"dropout": key})
    )
    a, b = np.asarray(embed(params, jax.random.key(0)))
    return np.sum(np.square(a - b), axis=1)

  assert (distances(0.0) < 1e-10).all()
  with_dropout = distances(0.2)
  assert ((with_dropout > 1e-3) & (with_dropout < 4)).all()


def test_pool_selects_the_tokens_of_each_mode():
  hidden = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
  tokens = Tokens.from_ids(np.zeros((3, 4)), np.array([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]))
  out = Outputs(hidden=hidden, pooled=hidden[:, 0])
  want = {
    "cls": [hidden[0, 1], hidden[1, 0]],
    "last": [hidden[0, 3], hidden[1, 1]],
    "mean": [hidden[0, 1:].mean(0), hidden[1, :2].mean(0)],
    "pooler": [hidden[0, 0], hidden[1, 0]],
  }
  for pooling, rows in want.items():
    got = np.asarray(jax.jit(lambda out, pooling=pooling: pool_embeddings(out, tokens, pooling))(out))
    np.testing.assert_allclose(got[:2], np.stack([r / np.linalg.norm(r) for r in rows]), atol=1e-6)
    assert not got[2].any()


def test_info_nce_counts_ties_as_right_and_ignores_padding_rows():
  z = np.eye(3, dtype=np.float32)
  nll, right = jax.device_get(jax.jit(lambda z, real: info_nce(z, z, real, 1.0))(z, np.array([True, True, False])))
  np.testing.assert_allclose(nll[:2], np.log(1 + np.exp(-1)), rtol=1e-6)
  assert right[:2].all()


def test_contrastive_pairs_are_framed_and_cut_and_empty_ones_skipped():
  objective = Contrastive(TOKENIZER, 6, "title", "text")
  ids = TOKENIZER.document("body")
  example = example_of(objective, ids, 0, title="a title too long")
  assert TOKENIZER.show(example.inputs.ids) == "<s>a ti</s>"
  assert TOKENIZER.show(example.extras["positive"].inputs.ids) == "<s>body</s>"
  assert example_of(objective, ids, 0, title="") is None
  with pytest.raises(ConfigError, match=r"objective\.anchor: must be a field .*'title'.*text"):
    example_of(objective, ids, 0)


def test_contrastive_rejects_fields_that_are_not_text():
  objective = Contrastive(TOKENIZER, 8, "title", "text")
  assert example_of(objective, TOKENIZER.document("body"), 0, title=None) is None
  with pytest.raises(ConfigError, match=r"objective\.anchor: the field 'title' must be text, got 7"):
    example_of(objective, TOKENIZER.document("body"), 0, title=7)

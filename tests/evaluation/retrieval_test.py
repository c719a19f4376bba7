"""Evaluators of embeddings and their baselines equal direct computation."""

import functools
import json
import math
import sys

import jax
import numpy as np
import pytest
from scipy import stats

import llmjax
from configs import base
from llmjax.cli.main import main
from llmjax.config import ConfigError, build, load_config, to_dict
from llmjax.evaluation import evaluators, retrieval
from llmjax.training import components, evals, program
from llmjax.training.evals import EvaluationSchedule
from tests.inference.embeddings_test import CONFIG

PAIRS = [{"title": f"how to get {i} or {i * 37 % 11}", "text": f"def getItem_{i}(): return {i}"} for i in range(30)]


@pytest.fixture
def folder(home, monkeypatch):
  monkeypatch.chdir(home)
  (home / "tiny.py").write_text(CONFIG)
  (home / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
  return home


def make(objective=None, model=None, devices=None):
  """The program of a tiny config, with another objective or model keys where given."""
  config = to_dict(load_config(["--config=tiny.py"]))
  config["objective"] = objective or config["objective"]
  config["model"] |= model or {}
  config["data"]["tokenizer"] |= {"mask": True, "sentinels": 9}
  return program.make_program(config, devices=devices)


def evaluator(built, **spec):
  return build(spec, evals.EVALUATORS, "evals.x", program=built)


# numbers


def test_rank_with_ties_counts_them_against_the_query(monkeypatch):
  monkeypatch.setattr(retrieval, "BLOCK", 3)
  rng = np.random.default_rng(0)
  queries, documents = rng.integers(-1, 2, (2, 20, 3)).astype(np.float32)  # small integers: many ties
  places = retrieval.ranks(retrieval.cosines(queries, documents))
  scores = [[sum(map(float.__mul__, map(float, q), map(float, d))) for d in documents] for q in queries]
  expected = [1 + sum(row[j] >= row[i] for j in range(20) if j != i) for i, row in enumerate(scores)]
  np.testing.assert_array_equal(places, expected)
  assert retrieval.ranks(iter(np.ones((5, 5)))).tolist() == [5] * 5  # a model that says the same of all finds nothing
  assert retrieval.ranking(np.array([1, 2, 10, 11])) == {
    "recall_at_1": 0.25,
    "recall_at_10": 0.75,
    "mrr": pytest.approx((1 + 1 / 2 + 1 / 10 + 1 / 11) / 4),
  }


def test_alignment_and_uniformity_equal_means_over_pairs(monkeypatch):
  monkeypatch.setattr(retrieval, "BLOCK", 4)
  vectors = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
  vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
  each = [math.exp(-2 * np.sum((x - y) ** 2)) for i, x in enumerate(vectors) for y in vectors[:i]]
  assert retrieval.uniformity(vectors) == pytest.approx(math.log(np.mean(each)), abs=1e-6)
  assert retrieval.uniformity(np.repeat(vectors[:1], 9, axis=0)) == pytest.approx(0, abs=1e-6)
  distance = np.mean([np.sum((x - y) ** 2) for x, y in zip(vectors, vectors[::-1])])
  assert retrieval.alignment(vectors, vectors[::-1]) == pytest.approx(distance, abs=1e-6)


def test_bm25_tokens_split_identifiers():
  text = "def readHTTPLines(self, max_len=10): utf8 Straße"
  assert retrieval.words(text) == ["def", "read", "http", "lines", "self", "max", "len", "10", "utf8", "straße"]


def test_bm25_equals_its_formula():
  documents = ["def readLines(path)", "write lines to a path, lines and lines", "close", "", "Path path"]
  queries = ["read the lines", "lines lines path", "unheard", "", "close"]
  split = [retrieval.words(d) for d in documents]
  # A document without words counts as one of one word, which no query has.
  mean = sum(max(len(d), 1) for d in split) / len(split)

  def score(query, document):
    total = 0.0
    for word in retrieval.words(query):
      having = sum(word in other for other in split)
      idf = math.log(1 + (len(split) - having + 0.5) / (having + 0.5))
      count = document.count(word)
      total += having and idf * count / (count + 1.5 * (0.25 + 0.75 * max(len(document), 1) / mean))
    return total

  expected = [[score(query, document) for document in split] for query in queries]
  np.testing.assert_allclose(list(retrieval.bm25_scores(queries, documents)), expected, rtol=1e-5)


# evaluators


def test_retrieval_on_a_mesh_equals_one_device(folder):
  one, all_ = make(devices=jax.devices()[:1]), make()
  params = one.init().params
  found = evaluator(one, name="retrieval", batch_tokens=64, bm25=True)(params)
  assert evaluator(all_, name="retrieval", batch_tokens=512, bm25=True)(all_.init(params).params) == pytest.approx(
    found, abs=1e-5
  )
  pairs = PAIRS[15:]  # tiny.py holds out the second half
  embed = functools.partial(llmjax.embed, one.model, params, one.tokenizer, pooling="cls")
  scores = embed([p["title"] for p in pairs]) @ embed([p["text"] for p in pairs]).T
  places = [1 + sum(s >= row[i] - 1e-6 for s in np.delete(row, i)) for i, row in enumerate(scores)]
  assert found["mrr"] == pytest.approx(np.mean(1 / np.array(places)))
  assert found["baseline/bm25_recall_at_1"] == 1  # the number is in both
  assert found["alignment"] == pytest.approx(2 - 2 * np.mean(np.diag(scores)), abs=1e-5) and found["uniformity"] < 0
  few = evaluator(one, name="retrieval", batch_tokens=64, limit=2)(params)
  assert few["recall_at_10"] == 1 and few.keys().isdisjoint({"baseline/bm25_mrr"})


@pytest.mark.parametrize(
  "objective, spec, words",
  [
    ({"name": "contrastive"}, {"name": "retrieval", "batch_tokens": 64}, ["needs pairs", "objective.positive"]),
    ({"name": "masked_lm"}, {"name": "retrieval", "batch_tokens": 64}, ["needs pairs"]),
    ({"name": "contrastive"}, {"name": "unigram"}, ["predicts tokens"]),
    (None, {"name": "retrieval", "batch_tokens": 64, "bm25": True}, ["pip install 'llmjax[eval]'"]),
    (None, {"name": "similarity", "files": "pairs.jsonl", "batch_tokens": 64}, ["'text_a'", "pairs.jsonl"]),
    (None, {"name": "similarity", "files": "same.jsonl", "batch_tokens": 64}, ["'score'", "differ"]),
    (None, {"name": "similarity", "files": "odd.jsonl", "batch_tokens": 64}, ["record 2", "'score'"]),
  ],
)
def test_evaluator_of_an_unfit_objective_is_one_line(folder, monkeypatch, objective, spec, words):
  monkeypatch.setitem(sys.modules, "bm25s", None)
  pair = {"text_a": "a", "text_b": "b", "score": 1}
  (folder / "same.jsonl").write_text(json.dumps(pair) + "\n" + json.dumps(pair))
  (folder / "odd.jsonl").write_text(json.dumps(pair) + "\n" + json.dumps(pair | {"score": "high"}))
  with pytest.raises(ConfigError) as error:
    evaluator(make(objective, {"dropout": 0.1}), **spec)
  assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_similarity_equals_the_correlation_of_cosines(folder):
  built = make()
  params = built.init().params
  texts = [pair["text"] for pair in PAIRS]
  vectors = llmjax.embed(built.model, params, built.tokenizer, texts, pooling="cls", max_len=32)
  cosines = np.sum(vectors[1:] * vectors[:-1], axis=1)
  scores = np.round(np.random.default_rng(0).normal(size=29), 1)
  rows = [f"{b}\t{a}\t{score}\n" for a, b, score in zip(texts, texts[1:], scores)]
  (folder / "pairs.tsv").write_text("b\ttext\tgold\n" + "".join(rows))
  spec = {"files": "pairs.tsv", "batch_tokens": 999, "text_a": "b", "text_b": "text", "score": "gold"}
  found = evaluator(built, name="similarity", **spec)(params)
  assert found == {"spearman": pytest.approx(stats.spearmanr(cosines, scores).statistic, abs=0.01)}


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
  built = make(objective, model)

  def labels(split):
    batches = evaluators.held_out_batches(built, components.open_source(built.config, split), 8, None)
    batches = [batch.extras["mlm"] if objective is SUM else batch for batch in batches]
    return [int(x) for b in batches for x, weight in zip(b.labels[term].flat, b.weights[term].flat) if weight]

  seen, held = labels("[:50%]"), labels("[50%:]")
  nll = [-math.log((seen.count(token) + 1) / (len(seen) + built.tokenizer.vocab_size)) for token in held]
  likeliest = max(range(built.tokenizer.vocab_size), key=seen.count)
  assert evaluator(built, name="unigram")(None) == {
    "baseline/unigram_loss": pytest.approx(np.mean(nll)),
    "baseline/unigram_accuracy": pytest.approx(held.count(likeliest) / len(held)),
  }


def test_shared_evals_build_with_a_unigram_baseline(folder):
  for add, objective, model, names in (
    (base.retrieval_evals, None, {}, {"heldout", "retrieval"}),
    (base.token_evals, {"name": "masked_lm"}, {}, {"heldout", "unigram"}),
    (base.token_evals, {"name": "span_corruption"}, {"decoder_layers": 1}, {"heldout", "unigram"}),
  ):
    config = base.get_config()
    add(config)
    config.evals.heldout.max_batches = 3
    assert "unigram" not in config.evals or config.evals.unigram.max_batches == 3
    built = make(objective, model)
    built.config["evals"].update(to_dict(config.evals))
    assert {each.name for each in EvaluationSchedule(built).evaluations} == names


# the command


def test_evaluate_command_with_data_measures_the_file(folder, capsys):
  def run(*arguments):
    code = main(list(arguments))
    said = capsys.readouterr()
    return code, {line.split()[0]: line.split()[1] for line in said.out.splitlines() if "/" in line}, said.err

  assert run("train", "--config=tiny.py", "--workdir=x")[0] == 0
  code, found, _ = run("evaluate", "--model=x", "--data=pairs.jsonl")
  assert code == 0 and {"data/loss", "data/accuracy", "retrieval/mrr", "retrieval/uniformity"} <= found.keys()
  (folder / "pairs.csv").write_text("text,title\n" + "".join(f"{p['text']},{p['title']}\n" for p in PAIRS))
  assert run("evaluate", "--model=x", "--data=pairs.csv")[1] == found
  (folder / "scored.csv").write_text("text_a,text_b,score\n" + "".join(f"a{i},b,{i}\n" for i in range(9)))
  assert run("evaluate", "--model=x", "--data=scored.csv")[1].keys() == {"similarity/spearman"}
  (folder / "plain.txt").write_text("a\nb\n")
  code, found, said = run("evaluate", "--model=x", "--data=plain.txt")
  assert code == 2 and not found and said.count("\n") == 1
  assert all(word in said for word in ("plain.txt", "fields text;", "title, text", "score"))

  [manifest] = (folder / "x" / "checkpoints" / "2" / "manifest").rglob("metadata")
  content = json.loads(manifest.read_text())
  strange = {"a": {"weight": 1.0, "name": "os:abort"}}
  content["config"]["objective"] = {"name": "weighted_sum", "principal": "a", "parts": strange}
  manifest.write_text(json.dumps(content))
  for command in (["evaluate", "--data=pairs.jsonl"], ["embed", "--input=plain.txt", "--output=v.npy"]):
    code, _, said = run(*command, "--model=x")
    assert code == 2 and "'os:abort'" in said and "--trust" in said

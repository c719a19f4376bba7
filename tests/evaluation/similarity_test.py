"""Correlation of cosines with scores against direct computation."""

import json

import numpy as np
import pytest
from scipy import stats

import llmjax
from llmjax.config import ConfigError
from llmjax.evaluation.similarity import similarity_correlation
from tests.support.contrastive_run import PAIRS, make_tiny_program


def test_similarity_equals_the_correlation_of_cosines(folder):
  program = make_tiny_program()
  params = program.init().params
  texts = [pair["text"] for pair in PAIRS]
  vectors = llmjax.embed(program.model, params, program.tokenizer, texts, pooling="cls", max_len=32)
  cosines = np.sum(vectors[1:] * vectors[:-1], axis=1)
  scores = np.round(np.random.default_rng(0).normal(size=29), 1)
  rows = [f"{b}\t{a}\t{score}\n" for a, b, score in zip(texts, texts[1:], scores)]
  (folder / "pairs.tsv").write_text("b\ttext\tgold\n" + "".join(rows))
  spec = {"files": "pairs.tsv", "batch_tokens": 999, "text_a": "b", "text_b": "text", "score": "gold"}
  metrics = similarity_correlation(program, **spec)(params)
  assert metrics == {"spearman": pytest.approx(stats.spearmanr(cosines, scores).statistic, abs=0.01)}


PAIR = {"text_a": "a", "text_b": "b", "score": 1}


@pytest.mark.parametrize(
  "records, words",
  [
    pytest.param([{"text": "a"}], ["scored.jsonl", "'text_a'"], id="no field"),
    pytest.param([PAIR, PAIR], ["'score'", "differ"], id="equal scores"),
    pytest.param([PAIR, PAIR | {"score": "high"}], ["record 2", "'score'"], id="no number"),
  ],
)
def test_similarity_of_bad_records_raises_one_line(folder, records, words):
  (folder / "scored.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  with pytest.raises(ConfigError) as error:
    similarity_correlation(make_tiny_program(), files="scored.jsonl", batch_tokens=64)
  assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value

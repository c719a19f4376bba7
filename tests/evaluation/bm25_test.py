"""BM25 against its formula."""

import math
import sys

import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.evaluation.bm25 import bm25_scores, bm25_words
from llmjax.evaluation.retrieval import pair_retrieval
from tests.support.contrastive_run import make_tiny_program


def test_bm25_words_splits_identifiers():
  text = "def readHTTPLines(self, max_len=10): utf8 Straße"
  assert bm25_words(text) == ["def", "read", "http", "lines", "self", "max", "len", "10", "utf8", "straße"]


def test_bm25_scores_equal_the_formula():
  documents = ["def readLines(path)", "write lines to a path, lines and lines", "close", "", "Path path"]
  queries = ["read the lines", "lines lines path", "unheard", "", "close"]
  split = [bm25_words(d) for d in documents]
  # A document without words counts as one of one word, which no query has.
  mean = sum(max(len(d), 1) for d in split) / len(split)

  def score(query, document):
    total = 0.0
    for word in bm25_words(query):
      having = sum(word in other for other in split)
      idf = math.log(1 + (len(split) - having + 0.5) / (having + 0.5))
      count = document.count(word)
      total += having and idf * count / (count + 1.5 * (0.25 + 0.75 * max(len(document), 1) / mean))
    return total

  expected = [[score(query, document) for document in split] for query in queries]
  np.testing.assert_allclose(list(bm25_scores(queries, documents)), expected, rtol=1e-5)


def test_bm25_without_its_library_raises_with_the_extra(folder, monkeypatch):
  monkeypatch.setitem(sys.modules, "bm25s", None)
  with pytest.raises(ConfigError, match=r"pip install 'llmjax\[eval\]'"):
    pair_retrieval(make_tiny_program(), batch_tokens=64, bm25=True)

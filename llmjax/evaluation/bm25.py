"""BM25, a retrieval baseline that compares words, computed by bm25s."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np
from jaxtyping import Float

from llmjax.config import ConfigError


def bm25_words(text: str) -> list[str]:
  """Return the words of a text in lower case. Identifiers are split: `readHTTPLines` gives read, http, lines."""
  text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text)
  return re.findall(r"[^\W_]+", text.lower())


def bm25_scores(queries: Sequence[str], documents: Sequence[str]) -> Iterator[Float[np.ndarray, " n"]]:
  """Yield the scores of all n documents for each query (Lucene's variant of BM25, k1 = 1.5, b = 0.75)."""
  index = import_bm25s().BM25(method="lucene", k1=1.5, b=0.75)
  index.index([bm25_words(text) or [""] for text in documents], show_progress=False)
  for query in queries:
    known = index.get_tokens_ids(bm25_words(query))
    yield index.get_scores_from_ids(known) if known else np.zeros(len(documents), np.float32)


def import_bm25s() -> ModuleType:
  """Import bm25s. Raises ConfigError if it is not installed."""
  try:
    import bm25s
  except ImportError as error:
    raise ConfigError(
      "evals.*.bm25=True needs the package bm25s: pip install 'llmjax[eval]', or set it to False"
    ) from error
  logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs each step
  module: ModuleType = bm25s
  return module

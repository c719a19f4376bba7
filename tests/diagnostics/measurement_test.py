"""Batches and counts of a measurement."""

import numpy as np

from llmjax.diagnostics.measurement import count_collectives, with_uneven_weights
from llmjax.types import Batch


def test_with_uneven_weights_changes_weights_of_rows():
  labels = {"class": np.zeros(8, np.int32)}
  batch = Batch(inputs=None, labels=labels, weights={"class": np.ones(8, np.float32)}, rows=np.arange(8))
  assert with_uneven_weights(batch).weights["class"].tolist() == [1, 2, 3, 4, 1, 2, 3, 4]


def test_with_uneven_weights_shortens_rows_of_token_weights():
  labels = {"nll": np.zeros((4, 16), np.int32)}
  batch = Batch(inputs=None, labels=labels, weights={"nll": np.ones((4, 16), np.float32)}, rows=np.arange(4))
  assert with_uneven_weights(batch).weights["nll"].sum(axis=1).tolist() == [16, 14, 12, 10]


def test_count_collectives_counts_started_ones_too():
  hlo = "%a = f32[] all-reduce(f32[] %b)\n%c = f32[2] all-gather-start(f32[1] %d)\n%e = f32[] all-reduce(f32[] %a)"
  assert count_collectives(hlo) == {"all-reduce": 2, "all-gather": 1}

"""Batches of texts of similar length."""

import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.inference.batches import BatchSettings, plan_batches


@pytest.mark.parametrize("num_shards, batch_tokens", [(1, 512), (8, 4096), (8, 1), (3, 1000)])
def test_plan_batches_contains_each_text_once_in_few_shapes(num_shards, batch_tokens):
  lengths = np.random.default_rng(0).integers(1, 101, 500)
  shapes, seen = set(), []
  for indices, num_rows, length in plan_batches(lengths, 100, batch_tokens, num_shards):
    assert len(indices) <= num_rows and num_rows % num_shards == 0 and lengths[indices].max() <= length <= 100
    assert num_rows * length <= batch_tokens or num_rows == num_shards
    shapes.add((num_rows, length))
    seen += indices.tolist()
  assert sorted(seen) == list(range(500)) and len(shapes) <= 5


def test_plan_batches_of_few_texts_makes_a_small_batch():
  [(indices, num_rows, _)] = plan_batches(np.full(3, 5), 100, 10**6, 2)
  assert len(indices) == 3 and num_rows == 4


def test_batch_settings_without_tokens_raises():
  with pytest.raises(ConfigError, match="batch_tokens=0 must be at least 1"):
    BatchSettings(batch_tokens=0)

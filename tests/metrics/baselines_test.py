"""Baselines on texts whose cost is known."""

import random

import pytest

from llmjax.config import ConfigError
from llmjax.metrics.baselines import compressor_baselines


def noise(seed, size):
  return "".join(map(chr, random.Random(seed).choices(range(128), k=size)))  # 7 bits each, a byte each


def test_constant_text_costs_nothing():
  assert all(value < 0.02 for value in compressor_baselines(["a" * 1000], ["a" * 50_000]).values())


def test_noise_costs_its_entropy():
  for name, value in compressor_baselines([noise(0, 10_000)], [noise(1, 50_000)]).items():
    assert (6.99 < value <= 7) if name == "unigram" else (7 < value < 8.1), name


def test_priming_finds_repeats_within_max_train_bytes():
  seen = noise(0, 20_000)
  values = compressor_baselines([seen, noise(1, 200_000)], [seen])
  assert values["lzma_primed"] < 0.05 < 7 < values["lzma"]
  # The repeated text is before the part of the training text that is used.
  assert compressor_baselines([seen, noise(1, 200_000)], [seen], max_train_bytes=200_000)["lzma_primed"] > 7


def test_unigram_counts_bytes():
  assert compressor_baselines([], ["é" * 1000])["unigram"] == pytest.approx(1.0)
  assert compressor_baselines([], ["a", "a"])["unigram"] == pytest.approx(0.9183, abs=1e-4)  # "a\na"


def test_empty_heldout_text_is_refused():
  with pytest.raises(ConfigError, match="no held-out text"):
    compressor_baselines(["text"], [])

"""Compressor baselines on texts of known entropy."""

import random

import pytest

from llmjax.config import ConfigError
from llmjax.metrics.baselines import compressor_baselines


def noise(seed, size):
  """Return random characters of 7 bits, each of which is a byte."""
  return "".join(map(chr, random.Random(seed).choices(range(128), k=size)))


def test_baselines_of_constant_text_are_almost_0():
  assert all(value < 0.02 for value in compressor_baselines(["a" * 1000], ["a" * 50_000]).values())


def test_baselines_of_noise_are_its_entropy():
  for name, value in compressor_baselines([noise(0, 10_000)], [noise(1, 50_000)]).items():
    assert (6.99 < value <= 7) if name == "unigram" else (7 < value < 8.1), name


def test_lzma_primed_finds_repeats_within_max_train_bytes():
  seen = noise(0, 20_000)
  values = compressor_baselines([seen, noise(1, 200_000)], [seen])
  assert values["lzma_primed"] < 0.05 < 7 < values["lzma"]
  # The repeated text is before the part of the training text that is used.
  assert compressor_baselines([seen, noise(1, 200_000)], [seen], max_train_bytes=200_000)["lzma_primed"] > 7


def test_unigram_baseline_is_the_entropy_of_bytes():
  assert compressor_baselines([], ["é" * 1000])["unigram"] == pytest.approx(1.0)
  assert compressor_baselines([], ["a", "a"])["unigram"] == pytest.approx(0.9183, abs=1e-4)  # "a\na"


def test_baselines_of_empty_heldout_text_raise():
  with pytest.raises(ConfigError, match="no held-out text"):
    compressor_baselines(["text"], [])

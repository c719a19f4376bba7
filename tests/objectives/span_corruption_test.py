"""Span corruption: lengths of T5, and corrupted texts that can be restored."""

import numpy as np
import pytest

from llmjax.data.tokenizers.registry import make_tokenizer
from llmjax.examples import RowLengths
from llmjax.objectives.span_corruption import SpanCorruption
from tests.support.examples import example_of, letters

T5_TOKENIZER = make_tokenizer({"name": "bytes", "sentinels": 100})


def test_span_corruption_row_lengths_equal_t5():
  """568 tokens of text become 512 of input and 114 of targets (Raffel et al. 2020, t5.data.preprocessors)."""
  objective = SpanCorruption(T5_TOKENIZER)
  assert objective.text_length(512) == 568
  assert objective.row_lengths(512) == RowLengths(512, 114)
  for seed in range(20):
    example = example_of(objective, letters(568, seed), seed)
    assert len(example.inputs) == 512 and len(example.targets) == len(example.labels["nll"]) == 114


@pytest.mark.parametrize("density, mean", [(0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.3, 1.0), (0.9, 2.0)])
def test_span_corruption_fits_and_is_invertible_for_any_length(density, mean):
  objective = SpanCorruption(T5_TOKENIZER, noise_density=density, mean_span=mean)
  sizes = objective.row_lengths(64)
  sentinels = T5_TOKENIZER.sentinels
  for length in range(2, objective.text_length(64) + 1):
    text = letters(length, length)
    example = example_of(objective, text, length)
    inputs, labels = example.inputs.ids, example.labels["nll"]
    assert len(inputs) <= sizes.inputs and len(labels) <= sizes.targets
    assert inputs[-1] == labels[-1] == T5_TOKENIZER.eos_id
    assert example.targets.ids[0] == T5_TOKENIZER.pad_id
    np.testing.assert_array_equal(example.targets.ids[1:], labels[:-1])
    spans, current = {}, None
    for token in labels[:-1].tolist():
      if token in sentinels:
        current = spans.setdefault(token, [])
      else:
        current.append(token)
    assert list(spans) == list(sentinels[: len(spans)]) and all(spans.values())
    restored = [x for token in inputs[:-1].tolist() for x in spans.get(token, [token])]
    assert restored == text.tolist()


def test_span_lengths_follow_the_distribution_of_random_splits():
  objective, length, count = SpanCorruption(T5_TOKENIZER), 100, 1000  # 15 tokens in 5 spans
  hidden, lengths = np.zeros(length), []
  for seed in range(count):
    cuts = objective.draw_cuts(85, 15, 5, np.random.default_rng(seed))
    spans = np.split(np.arange(length), cuts)[1::2]
    lengths += map(len, spans)
    hidden[np.concatenate(spans)] += 1
  assert hidden.sum() == 15 * count and np.mean(lengths) == 3.0
  # P(span of k tokens) = C(13 - k + 1, 3) / C(14, 4): all splits of 15 into 5 are equally likely
  for k in range(1, 8):
    share = np.prod([(15 - k - 1 - i) / (3 - i) for i in range(3)]) / 1001
    assert abs(np.mean(np.array(lengths) == k) - share) < 5 * np.sqrt(share * (1 - share) / len(lengths))
  assert hidden[0] == 0 and hidden[-1] == count  # T5's convention: the first span is kept, the last one is noise

"""Checks that all task metrics share."""

import sys

import pytest

from llmjax.config import ConfigError
from llmjax.metrics import labels, spans, texts

METRICS = {
  "classification": lambda t, p: labels.classification_metrics(t, p, ["a"]),
  "multi_label": lambda t, p: labels.multi_label_metrics(t, p, ["a"]),
  "regression": labels.regression_metrics,
  "clustering": labels.clustering_metrics,
  "spans": spans.span_metrics,
  "answers": texts.answer_metrics,
  "summaries": texts.summary_metrics,
  "translations": texts.translation_metrics,
}


@pytest.mark.parametrize("name", METRICS)
def test_metric_without_examples_raises(name):
  with pytest.raises(ConfigError, match=f"{name}: there are no examples to score"):
    METRICS[name]([], [])


@pytest.mark.parametrize("name", METRICS)
def test_metric_of_too_few_predictions_raises(name):
  with pytest.raises(ConfigError, match=f"{name}: got 1 predictions for 2 truths"):
    METRICS[name]([["a"], ["a"]], [["a"]])


def test_missing_library_raises_with_the_name_of_its_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "sacrebleu", None)
  with pytest.raises(ConfigError, match=r"needs the package sacrebleu: pip install 'llmjax\[eval\]'"):
    texts.translation_metrics(["a"], ["a"])

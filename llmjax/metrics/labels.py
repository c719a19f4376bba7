"""Metrics of predicted labels, numbers and clusters, computed by scikit-learn and SciPy.

Each function takes truths and predictions, entry i of each for example i, and returns {name: score}. Scores are in
[0, 1] and higher is better, unless the docstring says otherwise. 0 / 0 counts as 0, so a score is NaN only if a
prediction is. All functions raise ConfigError if the numbers of truths and predictions differ or are 0, or if a library
is missing.
"""

from __future__ import annotations

import functools
import math
import numbers
import warnings
from collections.abc import Collection, Hashable, Sequence

import numpy as np

from llmjax.config import ConfigError
from llmjax.metrics.examples import as_floats, check_examples, check_true_label, import_library, index_labels

UNKNOWN = -1  # index of a predicted text that is not a label


def classification_metrics(
  truths: Sequence[str], predictions: Sequence[str], labels: Sequence[str]
) -> dict[str, float]:
  """Score predictions of one label per example.

  - "accuracy": share of right predictions.
  - "f1_macro": mean F1 of the labels that occur in truths or predictions.
  - "f1": F1 of the second of two labels, as in GLUE's MRPC and QQP (Wang et al. 2019,
    https://arxiv.org/abs/1804.07461); only if there are two.
  - "matthews": correlation coefficient in [-1, 1], as in GLUE's CoLA. With more than two labels it is the one of
    Gorodkin (2004, https://doi.org/10.1016/j.compbiolchem.2004.09.006).

  Args:
    truths: the right labels.
    predictions: a text that is not a label, which a language model may write, is wrong. "matthews" treats all such
      texts as one label.
    labels: all labels.

  Raises:
    ConfigError: a truth is not a label, or a label is given twice.
  """
  check_examples("classification", truths, predictions)
  index = index_labels("classification", labels)
  for i, truth in enumerate(truths):
    check_true_label("classification", i, truth, index)
  metrics = import_library("sklearn.metrics")
  true, predicted = ([index.get(label, UNKNOWN) for label in side] for side in (truths, predictions))
  f1 = functools.partial(metrics.f1_score, true, predicted, average="macro", zero_division=0)
  with warnings.catch_warnings(action="ignore"):  # scikit-learn warns of many labels for few examples
    scores = {
      "accuracy": metrics.accuracy_score(true, predicted),
      "f1_macro": f1(labels=sorted({*true, *predicted} - {UNKNOWN})),
      "matthews": metrics.matthews_corrcoef(true, predicted),
    }
    if len(labels) == 2:
      scores["f1"] = f1(labels=[1])
  return as_floats(scores)


def multi_label_metrics(
  truths: Sequence[Collection[str]], predictions: Sequence[Collection[str]], labels: Sequence[str]
) -> dict[str, float]:
  """Score predictions of any number of labels per example, which may be none.

  - "f1_micro": F1 over all pairs of an example and a label.
  - "f1_macro": mean F1 of the labels that occur in truths or predictions.
  - "exact_match": share of examples with all of their labels and no other.

  Args:
    truths: the right labels of each example.
    predictions: a text that is not a label is wrong, and does not count in the mean of "f1_macro".
    labels: all labels.

  Raises:
    ConfigError: a truth is not a label, a label is given twice, or a truth is a string.
  """
  check_examples("multi_label", truths, predictions, list_of="labels")
  index = index_labels("multi_label", labels)
  for i, truth in enumerate(truths):
    for label in truth:
      check_true_label("multi_label", i, label, index)
  names = [*labels, *sorted({label for row in predictions for label in row} - set(labels))]
  true, predicted = (np.array([[name in row for name in names] for row in side], int) for side in (truths, predictions))
  f1 = functools.partial(import_library("sklearn.metrics").f1_score, zero_division=0)  # of the ones
  occurring = np.flatnonzero(true.any(axis=0) | predicted.any(axis=0))
  by_label = [f1(true[:, k], predicted[:, k]) for k in occurring if k < len(labels)]
  return as_floats(
    {
      "f1_micro": f1(true.ravel(), predicted.ravel()),
      "f1_macro": np.mean(by_label) if by_label else 0.0,
      "exact_match": np.mean(np.all(true == predicted, axis=1)),
    }
  )


def regression_metrics(truths: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
  """Score predictions of one number per example: "pearson" and "spearman" in [-1, 1], and the mean squared error "mse".

  "mse" is in squared units, and lower is better. A correlation with constant numbers is 0. Scores are NaN if a
  prediction is not finite.

  Raises:
    ConfigError: a truth is not a finite number.
  """
  check_examples("regression", truths, predictions)
  for i, truth in enumerate(truths):
    if not (isinstance(truth, numbers.Real) and math.isfinite(truth)):
      raise ConfigError(f"regression: truth {i} must be a finite number, got {truth!r}. Fix it or drop the example.")
  stats = import_library("scipy.stats")
  true, predicted = np.array(truths, np.float64), np.array(predictions, np.float64)
  if not np.isfinite(predicted).all():
    return dict.fromkeys(("pearson", "spearman", "mse"), float("nan"))
  is_constant = not (np.ptp(true) and np.ptp(predicted))
  with warnings.catch_warnings(action="ignore"):  # SciPy warns of nearly constant numbers
    return as_floats(
      {
        "pearson": 0.0 if is_constant else stats.pearsonr(true, predicted).statistic,
        "spearman": 0.0 if is_constant else stats.spearmanr(true, predicted).statistic,
        "mse": np.mean(np.square(true - predicted)),
      }
    )


def clustering_metrics(truths: Sequence[Hashable], clusters: Sequence[Hashable]) -> dict[str, float]:
  """Score a partition of the examples. The names of the clusters do not matter.

  - "nmi": mutual information divided by the arithmetic mean of both entropies.
  - "ari": adjusted Rand index (Hubert and Arabie 1985, https://doi.org/10.1007/BF01908075), the share of pairs of
    examples on which both partitions agree, corrected for chance. 0 is chance, and -0.5 the minimum.

  Args:
    truths: the class of each example.
    clusters: the cluster of each example.
  """
  check_examples("clustering", truths, clusters)
  metrics = import_library("sklearn.metrics")
  ids = [list(map({name: i for i, name in enumerate(dict.fromkeys(side))}.get, side)) for side in (truths, clusters)]
  with warnings.catch_warnings(action="ignore"):  # scikit-learn warns of many clusters of few examples
    return as_floats({"nmi": metrics.normalized_mutual_info_score(*ids), "ari": metrics.adjusted_rand_score(*ids)})

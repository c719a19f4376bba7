"""Metrics of labels, numbers and clusters against their formulas."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from sklearn import metrics as sklearn

from llmjax.config import ConfigError
from llmjax.metrics.labels import classification_metrics, clustering_metrics, multi_label_metrics, regression_metrics

pytestmark = pytest.mark.filterwarnings("error")


def f1(truths, predictions, name):
  """Return the F1 of a label by the formula, of sets or lists of labels."""
  hits = sum(name in t and name in p for t, p in zip(truths, predictions))
  return 2 * hits / max(sum(name in t for t in truths) + sum(name in p for p in predictions), 1)


def random_labels(labels):
  rng = np.random.default_rng(0)
  return rng.choice(labels, 40).tolist(), rng.choice(labels, 40).tolist()


@pytest.mark.parametrize("labels", [["no", "yes"], ["a", "b", "c", "never"]])
def test_classification_metrics_equal_the_formulas(labels):
  truths, predictions = random_labels(labels[:3])
  scores = classification_metrics(truths, predictions, labels)
  assert scores["accuracy"] == np.mean([t == p for t, p in zip(truths, predictions)])
  each = [f1([[t] for t in truths], [[p] for p in predictions], label) for label in labels[:3]]
  assert scores["f1_macro"] == pytest.approx(np.mean(each))  # "never" does not occur
  one_hot = [np.array([[x == label for label in labels] for x in side], float) for side in (truths, predictions)]
  x, y = (side - side.mean(axis=0) for side in one_hot)
  assert scores["matthews"] == pytest.approx(np.sum(x * y) / math.sqrt(np.sum(x * x) * np.sum(y * y)))
  assert scores.get("f1") == (pytest.approx(each[1]) if len(labels) == 2 else None)


def test_matthews_of_two_labels_equals_the_formula_of_counts():
  truths, predictions = random_labels(["no", "yes"])
  tp, tn, fp, fn = (
    sum((t, p) == pair for t, p in zip(truths, predictions))
    for pair in (("yes", "yes"), ("no", "no"), ("no", "yes"), ("yes", "no"))
  )
  matthews = (tp * tn - fp * fn) / math.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
  assert classification_metrics(truths, predictions, ["no", "yes"])["matthews"] == pytest.approx(matthews)


def test_classification_metrics_count_an_unknown_prediction_as_wrong():
  scores = classification_metrics(["no", "yes"], ["no", "yes, indeed"], ["no", "yes"])
  assert (scores["accuracy"], scores["f1"], scores["f1_macro"]) == (0.5, 0.0, 0.5)


def test_multi_label_metrics_count_an_unknown_prediction_as_wrong():
  scores = multi_label_metrics([["joy"]], [["joy", "bliss"]], ["joy", "fear"])
  assert scores == {"f1_micro": pytest.approx(2 / 3), "f1_macro": 1.0, "exact_match": 0.0}


@pytest.mark.parametrize("labels", [["a", "b", "c", "never"], ["a"]])
def test_multi_label_metrics_equal_the_formulas(labels):
  rng = np.random.default_rng(0)
  occurring = labels[:3]
  truths, predictions = ([set(rng.choice(occurring, rng.integers(4))) for _ in range(30)] for _ in range(2))
  scores = multi_label_metrics(truths, [list(p) for p in predictions], labels)
  hits = sum(len(t & p) for t, p in zip(truths, predictions))
  assert scores["f1_micro"] == pytest.approx(2 * hits / sum(len(t) + len(p) for t, p in zip(truths, predictions)))
  assert scores["f1_macro"] == pytest.approx(np.mean([f1(truths, predictions, label) for label in occurring]))
  assert scores["exact_match"] == np.mean([t == p for t, p in zip(truths, predictions)])


def test_regression_metrics_with_ties_equal_the_formulas():
  rng = np.random.default_rng(0)
  x, y = rng.integers(0, 5, (2, 30)).astype(float)

  def pearson(x, y):
    x, y = x - np.mean(x), y - np.mean(y)
    return np.sum(x * y) / math.sqrt(np.sum(x * x) * np.sum(y * y))

  def ranks(x):
    return np.array([np.sum(x < value) + (np.sum(x == value) + 1) / 2 for value in x])

  assert regression_metrics(x.tolist(), y.tolist()) == {
    "pearson": pytest.approx(pearson(x, y)),
    "spearman": pytest.approx(pearson(ranks(x), ranks(y))),
    "mse": pytest.approx(np.mean((x - y) ** 2)),
  }


@pytest.mark.parametrize("truths, predictions", [([0.1] * 3, [1, 2, 3]), ([1, 2, 3], [0.1] * 3), ([1], [2])])
def test_regression_metrics_of_constant_numbers_have_correlation_0(truths, predictions):
  scores = regression_metrics(truths, predictions)
  assert (scores["pearson"], scores["spearman"]) == (0, 0) and scores["mse"] > 0


def test_clustering_metrics_equal_counts_of_pairs():
  rng = np.random.default_rng(0)
  truths, clusters = rng.integers(0, 3, 25).tolist(), rng.integers(0, 4, 25).tolist()
  pairs = Counter((truths[i] == truths[j], clusters[i] == clusters[j]) for i, j in itertools.combinations(range(25), 2))
  a, b, c, d = (pairs[key] for key in ((True, True), (True, False), (False, True), (False, False)))

  def entropy(side):
    shares = np.array(list(Counter(side).values())) / len(side)
    return -np.sum(shares * np.log(shares))

  mutual = entropy(truths) + entropy(clusters) - entropy(list(zip(truths, clusters)))
  assert clustering_metrics(truths, clusters) == {
    "ari": pytest.approx(2 * (a * d - b * c) / ((a + b) * (b + d) + (a + c) * (c + d))),
    "nmi": pytest.approx(2 * mutual / (entropy(truths) + entropy(clusters))),
  }


def test_clustering_metrics_accept_names_of_any_type():
  names = ["news", "sport", None, 0, "news"]
  assert clustering_metrics(names, names) == {"nmi": 1.0, "ari": 1.0}


def test_many_labels_for_few_examples_give_no_warning():
  labels = [str(i) for i in range(50)]
  scores = classification_metrics(labels[:30], labels[:30], labels)
  assert scores["f1_macro"] == sklearn.f1_score(range(30), range(30), average="macro") == 1


def test_many_clusters_of_few_examples_give_no_warning():
  labels = [str(i) for i in range(50)]
  assert clustering_metrics(labels, labels)["nmi"] == pytest.approx(1)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: classification_metrics(["yess"], ["yes"], ["no", "yes"]), "truth 0 has 'yess'.*mean `yes`"),
    (lambda: classification_metrics(["a"], ["a"], ["a", "a"]), "'a' is given twice"),
    (lambda: multi_label_metrics([[], ["c"]], [[], []], ["a"]), "truth 1 has 'c'.*known: a"),
    (lambda: multi_label_metrics(["joy"], [["joy"]], ["joy"]), r"Write \['joy'\]"),
    (lambda: regression_metrics([1, float("nan")], [1, 2]), "truth 1 must be a finite number, got nan"),
    (lambda: regression_metrics(["1"], [1]), "truth 0 must be a finite number, got '1'"),
  ],
)
def test_wrong_truths_raise_one_line(call, message):
  with pytest.raises(ConfigError, match=message) as error:
    call()
  assert "\n" not in str(error.value)

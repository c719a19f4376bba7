"""Metrics of spans against an enumeration of all spans."""

import itertools

import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.metrics.spans import TAG_PREFIXES, span_metrics

pytestmark = pytest.mark.filterwarnings("error")


def enumerate_spans(tags):
  """Return {(start, stop, type)}, where a span also begins at I if no span of its type is open."""
  spans = set()
  for i, j in itertools.combinations(range(len(tags) + 1), 2):
    kind = tags[i][2:]
    begins = tags[i][0] == "B" or (tags[i][0] == "I" and (i == 0 or tags[i - 1][2:] != kind))
    ends = j == len(tags) or tags[j] != f"I-{kind}"
    if begins and ends and all(tag == f"I-{kind}" for tag in tags[i + 1 : j]):
      spans.add((i, j, kind))
  return spans


def test_span_metrics_of_ill_formed_tags_equal_an_enumeration():
  rng = np.random.default_rng(0)
  tags = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
  truths, predictions = ([rng.choice(tags, n).tolist() for n in range(40)] for _ in range(2))
  scores = span_metrics([tuple(t) for t in truths], predictions)

  def enumerated_scores(kinds):
    true, predicted = (
      {(n, *span) for n, row in enumerate(side) for span in enumerate_spans(row) if span[2] in kinds}
      for side in (truths, predictions)
    )
    hits = len(true & predicted)
    return hits / len(predicted), hits / len(true), 2 * hits / (len(predicted) + len(true))

  assert (scores["precision"], scores["recall"], scores["f1"]) == pytest.approx(enumerated_scores(("PER", "LOC")))
  assert scores["f1/PER"] == pytest.approx(enumerated_scores(("PER",))[2])
  assert scores["f1/LOC"] == pytest.approx(enumerated_scores(("LOC",))[2])
  flat = [t == p for row in zip(truths, predictions) for t, p in zip(*row)]
  assert scores["accuracy"] == pytest.approx(np.mean(flat))


TRUTH = {
  "iob1": ["I-X", "I-X", "B-X", "O", "I-Y", "I-X"],
  "iob2": ["B-X", "I-X", "B-X", "O", "B-Y", "B-X"],
  "iobes": ["B-X", "E-X", "S-X", "O", "S-Y", "S-X"],
  "bilou": ["B-X", "L-X", "U-X", "O", "U-Y", "U-X"],
}
PREDICTION = {
  "iob1": ["I-X", "B-X", "I-X", "O", "I-Y", "O"],
  "iob2": ["B-X", "B-X", "I-X", "O", "B-Y", "O"],
  "iobes": ["S-X", "B-X", "E-X", "O", "S-Y", "O"],
  "bilou": ["U-X", "B-X", "L-X", "O", "U-Y", "O"],
}


@pytest.mark.parametrize("scheme", sorted(TAG_PREFIXES))
def test_span_metrics_of_the_same_spans_are_equal_in_every_scheme(scheme):
  scores = span_metrics([TRUTH[scheme]], [PREDICTION[scheme]], scheme)
  assert (scores["precision"], scores["recall"]) == (pytest.approx(1 / 3), 1 / 4)
  assert (scores["f1/X"], scores["f1/Y"]) == (0, 1)


@pytest.mark.parametrize(
  "truth, prediction", [(["B-X", "L-X", "I-X"], ["B-X", "L-X", "U-X"]), (["U-X", "I-X"], ["U-X", "B-X"])]
)
def test_span_in_bilou_ends_at_l_and_u_whatever_follows(truth, prediction):
  assert span_metrics([truth], [prediction], "bilou")["f1"] == 1


def test_span_metrics_without_spans_give_no_warning():
  assert span_metrics([["O"]], [["O"]]) == {"precision": 0, "recall": 0, "f1": 0, "accuracy": 1}


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: span_metrics([["O"]], [["O", "O"]]), "got 2 predicted tags for the 1 tags of truth 0"),
    (lambda: span_metrics([["O"]], [["S-PER"]]), "prediction 0 has the tag 'S-PER'.*B-TYPE, I-TYPE"),
    (lambda: span_metrics([["O"]], [["O"]], "iob"), "scheme='iob' is unknown; did you mean"),
    (lambda: span_metrics([[]], [[]]), "no tokens"),
  ],
)
def test_wrong_tags_raise_one_line(call, message):
  with pytest.raises(ConfigError, match=message) as error:
    call()
  assert "\n" not in str(error.value)

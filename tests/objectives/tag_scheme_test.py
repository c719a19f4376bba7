"""Tag schemes against regular expressions for whole sentences, and spans against sentences made from them."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.objectives import crf, tag_scheme

LABELS = {
  "iob2": ["O", "B-X", "I-X", "B-Y", "I-Y"],
  "bioes": ["O", "B-X", "I-X", "E-X", "S-X", "B-Y", "I-Y", "E-Y", "S-Y"],
}
# One letter per tag: the prefix, in lower case for the type Y.
LEGAL = {"iob2": re.compile("(O|BI*|bi*)*"), "bioes": re.compile("(O|S|s|BI*E|bi*e)*")}


def legal(tags, scheme):
  letters = "".join(tag[0].lower() if tag.endswith("Y") else tag[0] for tag in tags)
  return LEGAL[scheme].fullmatch(letters) is not None


@pytest.mark.parametrize("scheme", LABELS)
def test_violation_and_allowed_equal_regular_expressions(scheme):
  labels = LABELS[scheme]
  start, matrix, end = tag_scheme.allowed_transitions(labels, scheme)
  for length in range(5):
    for path in itertools.product(range(len(labels)), repeat=length):
      tags = [labels[i] for i in path]
      violation = tag_scheme.first_violation(tags, scheme)
      assert (violation is None) == legal(tags, scheme), tags
      if length:
        assert legal(tags, scheme) == (start[path[0]] and matrix[path[:-1], path[1:]].all() and end[path[-1]]), tags
      if violation and violation[2] is not None:  # the tags before the first violation can become a legal sentence
        before, so_far = tags[: violation[0]], tags[: violation[0] + 1]
        assert any(legal([*before, *rest], scheme) for rest in ([], ["E-X"], ["E-Y"])), tags
        assert not any(legal([*so_far, *rest], scheme) for rest in ([], ["E-X"], ["E-Y"])), tags


def test_violation_returns_position_and_both_tags():
  for tags, scheme, want in (
    (["O", "I-X"], "iob2", (1, "O", "I-X")),
    (["I-X", "I-Y"], "iob2", (0, None, "I-X")),
    (["B-X", "I-Y"], "iob2", (1, "B-X", "I-Y")),
    (["O", "B-X"], "bioes", (1, "B-X", None)),
    (["B-X", "O"], "bioes", (1, "B-X", "O")),
    (["O", "NN"], "iob2", (1, "O", "NN")),
    ([], "bioes", None),
    (["NN", "I-X"], "none", None),
  ):
    assert tag_scheme.first_violation(tags, scheme) == want


@pytest.mark.parametrize("scheme", LABELS)
def test_constrained_viterbi_paths_are_always_legal(scheme):
  """10^4 rows of two sentences, with transitions that favour illegal paths."""
  labels, rng = LABELS[scheme], np.random.default_rng(0)
  rows, length = 10_000, 8
  scores = jnp.asarray(rng.normal(size=(rows, length, len(labels))) * 10, jnp.float32)
  mask = rng.random((rows, length)) < 0.8
  segments = np.sort(rng.integers(1, 3, size=(rows, length)), axis=1)
  start, matrix, end = tag_scheme.allowed_transitions(labels, scheme)
  favour_illegal = crf.Transitions(*(jnp.where(jnp.asarray(x), 0.0, 30.0) for x in (start, matrix, end)))
  decode = jax.jit(crf.viterbi)
  wrong = {}
  for name, transitions in (
    ("free", favour_illegal),
    ("constrained", crf.add_transitions(favour_illegal, tag_scheme.transition_constraints(labels, scheme))),
  ):
    tags = np.array(labels)[np.asarray(decode(scores, transitions, jnp.asarray(mask), jnp.asarray(segments))[0])]
    sentences = (tags[row, mask[row] & (segments[row] == s)] for row in range(rows) for s in (1, 2))
    wrong[name] = sum(not legal(sentence, scheme) for sentence in sentences)
  assert wrong["constrained"] == 0 and wrong["free"] > rows


def tags_of(spans, length, scheme):
  """The tags of spans, by the definition of each scheme."""
  tags = ["O"] * length
  for start, stop, kind in sorted(spans):
    inside = ["I"] * (stop - start)
    if scheme == "iob1":
      inside[0] = "B" if start and tags[start - 1].endswith(kind) else "I"
    elif scheme == "iob2":
      inside[0] = "B"
    else:
      inside = ["B", *inside[1:-1], "E"] if len(inside) > 1 else ["S"]
    tags[start:stop] = [f"{prefix}-{kind}" for prefix in inside]
  return tags


def test_spans_are_inverted_for_every_scheme():
  rng = np.random.default_rng(0)
  for _ in range(300):
    length = int(rng.integers(1, 12))
    cuts = np.unique([0, length, *rng.integers(0, length, 4)]).tolist()
    spans = [(a, b, str(rng.choice(["X", "Y-Z"]))) for a, b in itertools.pairwise(cuts) if rng.random() < 0.6]
    iob1, iob2, bioes = (tags_of(spans, length, scheme) for scheme in ("iob1", "iob2", "bioes"))
    assert tag_scheme.extract_spans(iob2, "iob2") == tag_scheme.extract_spans(bioes, "bioes") == spans
    assert tag_scheme.extract_spans(iob1, "iob2") == spans  # like conlleval
    assert tag_scheme.iob1_to_iob2(iob1) == tag_scheme.iob1_to_iob2(iob2) == iob2
    assert tag_scheme.first_violation(iob2, "iob2") is None and tag_scheme.first_violation(bioes, "bioes") is None


def test_spans_of_illegal_tags_equal_conlleval():
  for tags, scheme, want in (
    ("I-X I-X O I-Y", "iob2", [(0, 2, "X"), (3, 4, "Y")]),
    ("B-X I-Y I-Y B-Y", "iob2", [(0, 1, "X"), (1, 3, "Y"), (3, 4, "Y")]),
    ("B-X O B-X", "bioes", [(0, 1, "X"), (2, 3, "X")]),
    ("E-X I-X E-X", "bioes", [(0, 1, "X"), (1, 3, "X")]),
    ("S-X I-X B-X E-Y", "bioes", [(0, 1, "X"), (1, 2, "X"), (2, 3, "X"), (3, 4, "Y")]),
    ("NN B-X E-X VB", "none", [(1, 3, "X")]),
    ("B-X E-X I-X", "iob2", [(0, 1, "X"), (2, 3, "X")]),
    ("", "iob2", []),
  ):
    assert tag_scheme.extract_spans(tags.split(), scheme) == want, tags


def test_infer_tag_scheme_finds_the_scheme_from_labels():
  for labels, want in (
    (["O", "B-X", "I-X", "B-Y"], "iob2"),
    (["O", "I-X"], "iob2"),
    (["O"], "iob2"),
    (["O", "B-X", "E-X", "S-Y"], "bioes"),
    (["S-X", "NN"], "none"),
    (["NN", "VB"], "none"),
  ):
    assert tag_scheme.infer_tag_scheme(labels) == want


@pytest.mark.parametrize(
  "labels, scheme, words",
  [
    (["O", "B-X"], "iob", "objective.scheme: is not a known value, got 'iob'; did you mean `iob2`?"),
    (["O", "B-X"], "bio", "objective.scheme: is not a known value, got 'bio'; here it is called `iob2`"),
    (["O", "B-X"], "iob1", "objective.scheme: is not a known value, got 'iob1'; convert its tags to iob2"),
    (
      ["O", "B-PER", "BPER"],
      "iob2",
      "objective.scheme='iob2', got 'BPER'; did you mean `B-PER`",
    ),
    (["O", "B-X", "E-X"], "iob2", "got 'E-X'; objective.scheme='bioes' accepts all labels as they are"),
    (["NN", "VB"], "bioes", "objective.scheme='none' accepts all labels as they are"),
    (["O", "B-"], "iob2", "must be O or one of B-TYPE, I-TYPE for objective.scheme='iob2', got 'B-'"),
  ],
)
def test_constraints_reject_labels_outside_the_scheme(labels, scheme, words):
  with pytest.raises(ConfigError, match=re.escape(words)) as error:
    tag_scheme.transition_constraints(labels, scheme)
  assert "\n" not in str(error.value)


def test_allowed_without_scheme_is_all_true():
  start, matrix, end = tag_scheme.allowed_transitions(["NN", "I-X", "VB"], "none")
  assert start.all() and matrix.shape == (3, 3) and matrix.all() and end.all()

"""Packing of examples into rows: no token is lost, segments are separate, streams stay aligned."""

import numpy as np
import pytest

from llmjax.data import packing
from llmjax.examples import Example, RowLengths, TokenSequence

ROW = RowLengths(8)


def make_example(values):
  """Return an example of a decoder, whose labels follow from its tokens."""
  values = np.asarray(values)
  weights = np.full(len(values), 0.5)
  return Example(TokenSequence(values), labels={"nll": values + 1}, weights={"nll": weights})


def make_pair(inputs, targets):
  """Return an example of an encoder-decoder, with a second view."""
  targets = np.asarray(targets)
  return Example(
    TokenSequence(inputs),
    TokenSequence(targets),
    labels={"nll": targets + 1},
    weights={"nll": np.ones(len(targets))},
    extras={"view": Example(TokenSequence([9, 9], token_types=[0, 1]))},
  )


def test_row_has_segments_positions_and_padding():
  row = packing.pack_row([make_example([5, 6, 7]), make_example([8, 9])], make_example([]), ROW)
  assert row.inputs.ids.tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
  assert row.labels["nll"].tolist() == [6, 7, 8, 9, 10, 0, 0, 0]
  assert row.weights["nll"].tolist() == [0.5] * 5 + [0] * 3
  assert row.inputs.positions.tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
  assert row.inputs.segments.tolist() == [1, 1, 1, 2, 2, 0, 0, 0]


def test_row_of_two_streams_has_matching_segments():
  row_lengths = RowLengths(6, 5, {"view": RowLengths(4)})
  row = packing.pack_row([make_pair([1, 2, 3], [4]), make_pair([5], [6, 7])], make_pair([], []), row_lengths)
  assert row.inputs.ids.tolist() == [1, 2, 3, 5, 0, 0] and row.inputs.segments.tolist() == [1, 1, 1, 2, 0, 0]
  assert row.targets.ids.tolist() == [4, 6, 7, 0, 0] and row.targets.segments.tolist() == [1, 2, 2, 0, 0]
  assert row.labels["nll"].tolist() == [5, 7, 8, 0, 0]  # aligned with the targets
  batch = packing.stack_rows([row], [3])
  view = batch.extras["view"]
  assert view.inputs.token_types.tolist() == [[0, 1, 0, 1]] and view.inputs.segments.tolist() == [[1, 1, 2, 2]]
  assert batch.rows.tolist() == view.rows.tolist() == [3] and view.labels == {}


def test_cut_example_has_every_token_once_for_any_room():
  whole, rng = make_example(range(100)), np.random.default_rng(0)
  offset, parts = 0, []
  while offset < 100:
    part, offset = packing.cut_example(whole, offset, int(rng.integers(1, 9)))
    parts.append(part)
  for field in (lambda e: e.inputs.ids, lambda e: e.labels["nll"], lambda e: e.weights["nll"]):
    np.testing.assert_array_equal(np.concatenate([field(part) for part in parts]), field(whole))


def test_best_fit_keeps_examples_whole_and_rows_full():
  rng = np.random.default_rng(0)
  row_lengths = RowLengths(20, 10)
  lengths = zip(rng.integers(1, 20, 60), rng.integers(1, 10, 60))
  examples = [Example(TokenSequence(np.full(n, i)), TokenSequence(np.full(m, i))) for i, (n, m) in enumerate(lengths)]
  rows = packing.best_fit(examples, row_lengths)
  assert sorted(int(example.inputs.ids[0]) for row in rows for example in row) == list(range(60))
  totals = [np.sum([packing.stream_lengths(example, row_lengths) for example in row], axis=0) for row in rows]
  assert all((total <= (20, 10)).all() for total in totals)
  for i, total in enumerate(totals):  # otherwise the first example of the later row would be in the earlier one
    for row in rows[i + 1 :]:
      assert (total + packing.stream_lengths(row[0], row_lengths) > (20, 10)).any()


def test_batch_stacks_rows():
  rows = [packing.pack_row(examples, make_example([]), ROW) for examples in ([make_example([1, 2])], [])]
  batch = packing.stack_rows(rows, [3, 7])
  assert batch.inputs.ids.shape == batch.labels["nll"].shape == (2, 8)
  assert batch.rows.tolist() == [3, 7] and batch.targets is None
  assert batch.weights["nll"].dtype == np.float32 and batch.inputs.ids.dtype == np.int32
  assert batch.weights["nll"][1].sum() == 0 and batch.inputs.segments[1].sum() == 0


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Example(TokenSequence([1, 2]), labels={"nll": [1]}), r"labels\['nll'\]: must have shape \(2,\)"),
    (lambda: Example(TokenSequence([1, 2]), TokenSequence([1]), {"nll": [1, 2]}), r"must have shape \(1,\)"),
    (lambda: Example(TokenSequence([1]), weights={"nll": [[1]]}), r"weights\['nll'\]: .*got \(1, 1\)"),
    (lambda: TokenSequence([[1]]), "ids: must be one-dimensional"),
    (lambda: TokenSequence([1, 2], prefix=[1]), "prefix: must be one-dimensional and as long as ids"),
  ],
)
def test_example_rejects_arrays_that_are_not_aligned(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize(
  ("row_lengths", "message"),
  [
    (RowLengths(8, 8), "targets: the objective's row_lengths has this stream, and its example does not"),
    (RowLengths(), "inputs: the objective's example has this stream, and its row_lengths does not"),
    (RowLengths(8, extras={"view": RowLengths(8)}), r"extras: must be .* \['view'\], got \[\]"),
  ],
)
def test_stream_lengths_rejects_an_example_of_other_streams(row_lengths, message):
  with pytest.raises(ValueError, match=message):
    packing.stream_lengths(make_example([1, 2]), row_lengths)


def test_best_fit_rejects_an_example_longer_than_a_row():
  with pytest.raises(ValueError, match="9 tokens of inputs for rows of 8"):
    packing.best_fit([make_example(range(9))], ROW)


def test_min_rows_is_that_of_the_fullest_stream():
  examples = [make_pair([1, 2, 3], [4]), make_pair([5], [6, 7])]
  assert packing.min_rows(examples, RowLengths(8, 2, {"view": RowLengths(8)})) == 1.5

import itertools

import numpy as np
import pytest

from llmjax.data import packing


def piece(values):
  values = np.asarray(values)
  return packing.flatten(
    {"inputs": values, "labels": {"nll": values + 1}, "weights": {"nll": np.full(len(values), 0.5)}}
  )


def test_a_row_holds_pieces_apart_and_pads():
  row = packing.make_row([piece([5, 6, 7]), piece([8, 9])], piece([]), 8)
  assert row["inputs"].tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
  assert row["labels/nll"].tolist() == [6, 7, 8, 9, 10, 0, 0, 0]
  assert row["weights/nll"].tolist() == [0.5] * 5 + [0] * 3
  assert row["positions"].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
  assert row["segments"].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]


def test_split_gives_every_token_once_whatever_the_room():
  whole, rng = piece(range(100)), np.random.default_rng(0)
  offset, parts = 0, []
  while offset < 100:
    part, offset = packing.split(whole, offset, int(rng.integers(1, 9)))
    parts.append(part)
  for name in whole:
    np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), whole[name])


def test_next_fit_keeps_pieces_whole_and_in_order():
  rng = np.random.default_rng(0)
  pieces = [piece(np.arange(i, i + n)) for i, n in enumerate(rng.integers(1, 9, 50))]
  rows = packing.next_fit(pieces, 8)
  assert [p for row in rows for p in row] == pieces
  lengths = [[packing.length(p) for p in row] for row in rows]
  assert all(sum(row) <= 8 for row in lengths)
  assert all(sum(row) + following[0] > 8 for row, following in itertools.pairwise(lengths))


def test_a_batch_stacks_rows():
  rows = [packing.make_row([piece([1, 2])], piece([]), 4), packing.make_row([], piece([]), 4)]
  batch = packing.make_batch(rows, [3, 7])
  assert batch.inputs.ids.shape == batch.labels["nll"].shape == (2, 4)
  assert batch.rows.tolist() == [3, 7]
  assert batch.weights["nll"].dtype == np.float32 and batch.inputs.ids.dtype == np.int32
  assert batch.weights["nll"][1].sum() == 0 and batch.inputs.segments[1].sum() == 0


@pytest.mark.parametrize(
  "features",
  [
    {"inputs": [1, 2], "labels": {"nll": [1]}, "weights": {"nll": [1, 1]}},
    {"inputs": [[1]], "labels": {}, "weights": {}},
    {"inputs": [1], "targets": {"x": [1]}},
  ],
)
def test_a_wrong_objective_is_told(features):
  with pytest.raises(ValueError, match="objective"):
    packing.flatten(features)


def test_a_piece_that_is_too_long_is_told():
  with pytest.raises(ValueError, match="9 tokens for rows of 8"):
    packing.next_fit([piece(range(9))], 8)

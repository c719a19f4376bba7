"""Packing of pieces into rows: no token is lost, segments are separate, streams stay aligned."""

import numpy as np
import pytest

from llmjax.data import packing

ONE = {"inputs": 8}


def piece(values):
  values = np.asarray(values)
  return packing.flatten_features(
    {"inputs": values, "labels": {"nll": values + 1}, "weights": {"nll": np.full(len(values), 0.5)}}
  )


def pair(inputs, targets):
  """Return a piece of an encoder-decoder, with a view of the same example."""
  targets = np.asarray(targets)
  view = {"inputs": {"ids": [9, 9], "token_types": [0, 1]}}
  return packing.flatten_features(
    {
      "inputs": inputs,
      "targets": targets,
      "labels": {"nll": targets + 1},
      "weights": {"nll": np.ones(len(targets))},
      "extras": {"view": view},
    }
  )


def test_row_has_segments_positions_and_padding():
  row = packing.pack_row([piece([5, 6, 7]), piece([8, 9])], piece([]), ONE)
  assert row["inputs/ids"].tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
  assert row["labels/nll"].tolist() == [6, 7, 8, 9, 10, 0, 0, 0]
  assert row["weights/nll"].tolist() == [0.5] * 5 + [0] * 3
  assert row["inputs/positions"].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
  assert row["inputs/segments"].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]


def test_row_of_two_streams_has_matching_segments():
  sizes = {"inputs": 6, "targets": 5, "extras/view/inputs": 4}
  row = packing.pack_row([pair([1, 2, 3], [4]), pair([5], [6, 7])], pair([], []), sizes)
  assert row["inputs/ids"].tolist() == [1, 2, 3, 5, 0, 0] and row["inputs/segments"].tolist() == [1, 1, 1, 2, 0, 0]
  assert row["targets/ids"].tolist() == [4, 6, 7, 0, 0] and row["targets/segments"].tolist() == [1, 2, 2, 0, 0]
  assert row["labels/nll"].tolist() == [5, 7, 8, 0, 0]  # aligned with the targets
  batch = packing.stack_rows([row], [3])
  view = batch.extras["view"]
  assert view.inputs.token_types.tolist() == [[0, 1, 0, 1]] and view.inputs.segments.tolist() == [[1, 1, 2, 2]]
  assert batch.rows.tolist() == view.rows.tolist() == [3] and view.labels == {}


def test_split_has_every_token_once_for_any_room():
  whole, rng = piece(range(100)), np.random.default_rng(0)
  offset, parts = 0, []
  while offset < 100:
    part, offset = packing.split_pieces(whole, offset, int(rng.integers(1, 9)))
    parts.append(part)
  for name in whole:
    np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), whole[name])


def test_best_fit_keeps_pieces_whole_and_rows_full():
  rng = np.random.default_rng(0)
  sizes = {"inputs": 20, "targets": 10}
  lengths = zip(rng.integers(1, 20, 60), rng.integers(1, 10, 60))
  pieces = [
    packing.flatten_features({"inputs": np.full(n, i), "targets": np.full(m, i)}) for i, (n, m) in enumerate(lengths)
  ]
  rows = packing.best_fit(pieces, sizes)
  assert sorted(int(p["inputs/ids"][0]) for row in rows for p in row) == list(range(60))
  totals = [{s: sum(packing.lengths(p)[s] for p in row) for s in sizes} for row in rows]
  assert all(total[s] <= sizes[s] for total in totals for s in sizes)
  for i, total in enumerate(totals):  # otherwise the first piece of the later row would be in the earlier one
    for row in rows[i + 1 :]:
      first = packing.lengths(row[0])
      assert any(total[s] + first[s] > sizes[s] for s in sizes)


def test_batch_stacks_rows():
  rows = [packing.pack_row([piece([1, 2])], piece([]), ONE), packing.pack_row([], piece([]), ONE)]
  batch = packing.stack_rows(rows, [3, 7])
  assert batch.inputs.ids.shape == batch.labels["nll"].shape == (2, 8)
  assert batch.rows.tolist() == [3, 7] and batch.targets is None
  assert batch.weights["nll"].dtype == np.float32 and batch.inputs.ids.dtype == np.int32
  assert batch.weights["nll"][1].sum() == 0 and batch.inputs.segments[1].sum() == 0


@pytest.mark.parametrize(
  "features",
  [
    {"inputs": [1, 2], "labels": {"nll": [1]}, "weights": {"nll": [1, 1]}},
    {"inputs": [1, 2], "targets": [1], "labels": {"nll": [1, 2]}},
    {"inputs": [[1]], "labels": {}, "weights": {}},
    {"inputs": [1], "target": [2]},
    {"inputs": {"ids": [1], "types": [0]}},
  ],
)
def test_features_of_a_wrong_objective_are_refused(features):
  with pytest.raises(ValueError, match="objective"):
    packing.flatten_features(features)


def test_piece_longer_than_a_row_is_refused():
  with pytest.raises(ValueError, match="9 tokens of inputs for rows of 8"):
    packing.best_fit([piece(range(9))], ONE)

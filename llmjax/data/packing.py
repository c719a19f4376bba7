"""Features of documents to rows of one length: pure functions on NumPy arrays.

A *piece* is a flat dict of aligned arrays [n], {"inputs": ..., "labels/nll": ..., "weights/nll": ...}; a *row* is the
same with [L], and "positions" and "segments". Every piece is a segment of its own: positions begin at 0 in it, and no
other piece of the row sees it. Segment 0 is padding, with weight 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llmjax.types import Batch, Features, Tokens

Piece = dict[str, np.ndarray]

GROUPS = ("labels", "weights")


def flatten(features: Features) -> Piece:
  """{"inputs": [n], "labels": {term: [n]}, "weights": {term: [n]}} -> a piece.

  Raises ValueError for an unknown entry or arrays of different length: the objective is wrong.
  """
  piece = {"inputs": np.asarray(features["inputs"], np.int32)}
  for group, terms in features.items():
    if group == "inputs":
      continue
    if group not in GROUPS:
      raise ValueError(f"the objective's features have an entry {group!r}; packing knows inputs, labels and weights")
    dtype = np.float32 if group == "weights" else np.int32
    piece |= {f"{group}/{term}": np.asarray(values, dtype) for term, values in terms.items()}
  lengths = {name: values.shape for name, values in piece.items()}
  if len(set(lengths.values())) > 1 or piece["inputs"].ndim != 1:
    raise ValueError(f"the objective's features must be aligned one-dimensional arrays, not {lengths}")
  return piece


def length(piece: Piece) -> int:
  return len(piece["inputs"])


def split(piece: Piece, offset: int, room: int) -> tuple[Piece, int]:
  """What of `piece` from `offset` on fits in `room`, and the offset after it."""
  stop = min(offset + room, length(piece))
  return {name: values[offset:stop] for name, values in piece.items()}, stop


def next_fit(pieces: Iterable[Piece], seq_len: int) -> list[list[Piece]]:
  """Whole pieces, in order, into rows: one goes into the last row if it fits there, else into a new one."""
  rows: list[list[Piece]] = []
  room = 0
  for piece in pieces:
    if length(piece) > seq_len:
      raise ValueError(f"the objective's window gave {length(piece)} tokens for rows of {seq_len}")
    if length(piece) > room:
      rows.append([])
      room = seq_len
    rows[-1].append(piece)
    room -= length(piece)
  return rows


def make_row(pieces: Sequence[Piece], names: Iterable[str], seq_len: int) -> Piece:
  """Pieces one after the other, padded to `seq_len`; `names` are the arrays of a piece, for a row without any."""
  row = {
    name: np.zeros(seq_len, np.float32 if name.startswith("weights/") else np.int32)
    for name in (*names, "positions", "segments")
  }
  start = 0
  for segment, piece in enumerate(pieces, 1):
    stop = start + length(piece)
    for name, values in piece.items():
      row[name][start:stop] = values
    row["positions"][start:stop] = np.arange(stop - start)
    row["segments"][start:stop] = segment
    start = stop
  return row


def make_batch(rows: Sequence[Piece], numbers: Sequence[int]) -> Batch:
  """Rows [L] to a batch [B L]; `numbers` are their places in the global batch."""
  stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  groups: dict[str, Mapping[str, Any]] = {
    group: {name.partition("/")[2]: a for name, a in stacked.items() if name.startswith(group + "/")}
    for group in GROUPS
  }
  tokens = Tokens(ids=stacked["inputs"], positions=stacked["positions"], segments=stacked["segments"])
  return Batch(inputs=tokens, labels=groups["labels"], weights=groups["weights"], rows=np.array(numbers, np.int32))

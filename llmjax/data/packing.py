"""Features of examples to rows of fixed length: pure functions on NumPy arrays.

A *piece* is an example as a flat dict of arrays, {"inputs/ids": [n], "labels/nll": [n], ...}. Those of one *stream*
(`inputs`, `targets`, and those of each of its `extras`) have one length; labels and weights belong to what is
predicted, `targets` where there are any, else `inputs`. A *row* is the same with [L] for the stream's row length L, and
each stream's positions and segments. Every piece is a segment of its own, with the same number in all streams:
positions begin at 0 in it, and no other piece of the row sees it. Segment 0 is padding, with weight 0. Arrays below
"row" are of no stream: they label the only piece of a row as a whole, in whatever shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from llmjax.types import Batch, Features, Tokens

Piece = dict[str, np.ndarray]
Sizes = Mapping[str, int]  # {stream: its length in a row}

STREAMS = ("inputs", "targets")
MAX_OPEN_BINS = 64  # rows that are looked at for room: the search stays linear
PARTS = ("ids", "token_types", "prefix")  # of a stream; positions and segments are the packer's


def flatten_features(features: Features, prefix: str = "") -> Piece:
  """What `Objective.features` gives -> a piece.

  Raises ValueError for an unknown entry or arrays of different length: the objective is wrong.
  """
  piece: Piece = {}
  for group, value in features.items():
    if group == "extras":
      for name, inner in value.items():
        piece |= flatten_features(inner, f"{prefix}extras/{name}/")
    elif group in STREAMS:
      parts = value if isinstance(value, Mapping) else {"ids": value}
      if "ids" not in parts or not set(parts) <= set(PARTS):
        raise ValueError(f"the objective's features have {group} {sorted(parts)}; packing knows {', '.join(PARTS)}")
      piece |= {f"{prefix}{group}/{name}": np.asarray(x, np.int32) for name, x in parts.items()}
    elif group in ("labels", "weights"):
      dtype = np.float32 if group == "weights" else np.int32
      piece |= {f"{prefix}{group}/{term}": np.asarray(x, dtype) for term, x in value.items()}
    elif group == "row":
      for kind, terms in value.items():
        for term, x in terms.items():
          floating = np.issubdtype(np.asarray(x).dtype, np.floating)
          piece[f"{prefix}row/{kind}/{term}"] = np.asarray(x, np.float32 if floating else np.int32)
    else:
      known = ", ".join((*STREAMS, "labels", "weights", "extras", "row"))
      raise ValueError(f"the objective's features have an entry {group!r}; packing knows {known}")
  lengths(piece)
  return piece


def stream_of(name: str, names: Iterable[str]) -> str | None:
  """The stream that an array of a piece with these `names` belongs to; None where it labels the whole row."""
  prefix = re.match(r"(extras/[^/]+/)*", name)
  assert prefix is not None
  group = name[prefix.end() :].split("/")[0]
  if group == "row":
    return None
  if group not in STREAMS:
    group = "targets" if f"{prefix[0]}targets/ids" in names else "inputs"
  return prefix[0] + group


def lengths(piece: Piece) -> dict[str, int]:
  """{stream: tokens}; ValueError where the arrays of a stream do not have one length."""
  found: dict[str, int] = {}
  for name, values in piece.items():
    stream = stream_of(name, piece)
    if stream is None:
      continue
    if values.ndim != 1 or found.setdefault(stream, len(values)) != len(values):
      shapes = {n: v.shape for n, v in piece.items() if stream_of(n, piece) == stream}
      raise ValueError(f"the objective's features must be aligned one-dimensional arrays, not {shapes}")
  return found


def split_pieces(piece: Piece, offset: int, room: int) -> tuple[Piece, int]:
  """What of a piece of one stream fits in `room` from `offset` on, and the offset after it."""
  [length] = lengths(piece).values()
  stop = min(offset + room, length)
  return {name: values[offset:stop] for name, values in piece.items()}, stop


def best_fit(pieces: Iterable[Piece], sizes: Sizes) -> list[list[Piece]]:
  """Whole pieces, in order, into rows: one goes into the fullest row that has room for it in every stream, else into a
  new one.

  Raises ValueError for a piece that no row can hold: the objective is wrong.
  """
  rows: list[list[Piece]] = []
  rooms: list[dict[str, int]] = []  # what is left of each row
  for piece in pieces:
    needed = lengths(piece)
    for stream, length in needed.items():
      if length > sizes[stream]:
        raise ValueError(f"the objective gave {length} tokens of {stream} for rows of {sizes[stream]}")
    recent = range(max(0, len(rooms) - MAX_OPEN_BINS), len(rooms))
    fitting = [i for i in recent if all(rooms[i][s] >= n for s, n in needed.items())]
    best = min(fitting, key=lambda i: sum(rooms[i].values()), default=len(rows))
    if best == len(rows):
      rows.append([])
      rooms.append(dict(sizes))
    rows[best].append(piece)
    rooms[best] = {s: room - needed[s] for s, room in rooms[best].items()}
  return rows


def fill_of(pieces: Iterable[Piece], sizes: Sizes) -> float:
  """How many rows the pieces fill at least, in their most crowded stream."""
  total = dict.fromkeys(sizes, 0)
  for piece in pieces:
    for stream, length in lengths(piece).items():
      total[stream] += length
  return max(total[stream] / size for stream, size in sizes.items())


def pack_row(pieces: Sequence[Piece], example: Piece, sizes: Sizes) -> Piece:
  """Pieces one after the other, padded; `example` is any piece, and tells a row without any what it lacks."""
  row: Piece = {}
  for name in sorted(example):
    stream = stream_of(name, example)
    if stream is None:
      row[name] = pieces[0][name] if pieces else np.zeros_like(example[name])
      continue
    dtype = np.float32 if "weights" in name.split("/") else np.int32
    parts = [np.asarray(piece[name], dtype) for piece in pieces]
    size = sizes[stream]
    row[name] = np.concatenate([*parts, np.zeros(size - sum(map(len, parts)), dtype)])
  each = [lengths(piece) for piece in pieces]
  for stream, size in sizes.items():
    counts = [length[stream] for length in each]
    rest = size - sum(counts)
    row[f"{stream}/positions"] = np.concatenate([*map(np.arange, counts), np.zeros(rest)]).astype(np.int32)
    row[f"{stream}/segments"] = np.repeat([*range(1, len(counts) + 1), 0], [*counts, rest]).astype(np.int32)
  return row


def stack_rows(rows: Sequence[Piece], numbers: Sequence[int]) -> Batch:
  """Rows [L] to a batch [B L]; `numbers` are their places in the global batch."""
  stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  return _nest(stacked, np.array(numbers, np.int32))


def _nest(arrays: Mapping[str, np.ndarray], numbers: np.ndarray) -> Batch:
  groups: dict[str, dict[str, np.ndarray]] = {}
  for name, values in arrays.items():
    group, _, rest = name.partition("/")
    groups.setdefault(group, {})[rest] = values
  for name, values in groups.get("row", {}).items():
    kind, _, term = name.partition("/")
    groups.setdefault(kind, {})[term] = values
  extras: dict[str, dict[str, np.ndarray]] = {}
  for name, values in groups.get("extras", {}).items():
    view, _, rest = name.partition("/")
    extras.setdefault(view, {})[rest] = values
  return Batch(
    inputs=Tokens(**groups["inputs"]) if "inputs" in groups else None,
    targets=Tokens(**groups["targets"]) if "targets" in groups else None,
    labels=groups.get("labels", {}),
    weights=groups.get("weights", {}),
    rows=numbers,
    extras={view: _nest(inner, numbers) for view, inner in extras.items()},
  )

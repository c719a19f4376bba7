"""Packing: examples of any length to rows of fixed length. Pure functions on NumPy arrays.

Each example becomes a segment of a row, with the same number in all streams: `inputs`, `targets`, and the streams of
each of its `extras`. Positions restart at 0 in each segment, and attention does not cross segments. Segment 0 is
padding, with weight 0.

A packed row is a `Batch` without the batch axis: leaves are [L], and row labels have any shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from llmjax.examples import Example, RowLengths, TokenSequence
from llmjax.types import Batch, Tokens

MAX_OPEN_BINS = 64  # rows that best-fit considers: the search stays linear in the number of examples


def stream_lengths(example: Example, row_lengths: RowLengths) -> tuple[int, ...]:
  """Return the number of tokens of an example in each stream, in the order of `RowLengths.streams`.

  Raises:
    ValueError: the example does not have the streams that the row has.
  """
  lengths: tuple[int, ...] = ()
  for name, stream, length in (
    ("inputs", example.inputs, row_lengths.inputs),
    ("targets", example.targets, row_lengths.targets),
  ):
    if (stream is None) != (length is None):
      has, lacks = ("row_lengths", "example") if stream is None else ("example", "row_lengths")
      raise ValueError(f"{name}: the objective's {has} has this stream, and its {lacks} does not")
    if stream is not None:
      lengths += (len(stream),)
  if example.extras.keys() != row_lengths.extras.keys():
    raise ValueError(
      f"extras: must be those of the objective's row_lengths {sorted(row_lengths.extras)}, got {sorted(example.extras)}"
    )
  for view, inner in row_lengths.extras.items():
    lengths += stream_lengths(example.extras[view], inner)
  return lengths


def cut_example(example: Example, offset: int, room: int) -> tuple[Example, int]:
  """Cut the next part out of an example that has one stream.

  Args:
    example: an example that has `inputs` only.
    offset: first token of the part.
    room: maximum number of tokens of the part.

  Returns:
    The part, and the offset after it.
  """
  assert example.inputs is not None
  stop = min(offset + room, len(example.inputs))
  labels = {term: values[offset:stop] for term, values in example.labels.items()}
  weights = {term: values[offset:stop] for term, values in example.weights.items()}
  return Example(example.inputs[offset:stop], labels=labels, weights=weights), stop


def best_fit(examples: Iterable[Example], row_lengths: RowLengths) -> list[list[Example]]:
  """Distribute whole examples over rows.

  Each example goes into the fullest row that has room for it in every stream, else into a new row (best-fit packing).

  Raises:
    ValueError: an example is longer than a row.
  """
  streams = row_lengths.streams()
  rows: list[list[Example]] = []
  rooms: list[tuple[int, ...]] = []  # free tokens of each row, by stream
  for example in examples:
    lengths = stream_lengths(example, row_lengths)
    for length, (stream, row_length) in zip(lengths, streams, strict=True):
      if length > row_length:
        raise ValueError(f"the objective gave {length} tokens of {stream} for rows of {row_length}")
    open_bins = range(max(0, len(rows) - MAX_OPEN_BINS), len(rows))
    fitting = [i for i in open_bins if all(room >= length for room, length in zip(rooms[i], lengths, strict=True))]
    best = min(fitting, key=lambda i: sum(rooms[i]), default=len(rows))
    if best == len(rows):
      rows.append([])
      rooms.append(tuple(length for _, length in streams))
    rows[best].append(example)
    rooms[best] = tuple(room - length for room, length in zip(rooms[best], lengths, strict=True))
  return rows


def min_rows(examples: Iterable[Example], row_lengths: RowLengths) -> float:
  """Return a lower bound, not rounded, of the number of rows that examples fill: that of their fullest stream."""
  row = [length for _, length in row_lengths.streams()]
  totals = [0] * len(row)
  for example in examples:
    totals = [total + length for total, length in zip(totals, stream_lengths(example, row_lengths), strict=True)]
  return max(total / length for total, length in zip(totals, row, strict=True))


def pack_row(examples: Sequence[Example], template: Example, row_lengths: RowLengths) -> Batch:
  """Concatenate examples and pad them to a row.

  Args:
    examples: examples that fit into a row; with row labels at most one.
    template: any example of the objective; its terms, streams and shapes are those of a row without examples.
    row_lengths: the length of each stream.

  Returns:
    A row with leaves [L].
  """
  length = row_lengths.inputs if row_lengths.targets is None else row_lengths.targets
  length = 0 if length is None else length
  labels = {term: _pad([each.labels[term] for each in examples], length, np.int32) for term in template.labels}
  weights = {term: _pad([each.weights[term] for each in examples], length, np.float32) for term in template.weights}
  for term, values in template.row_labels.items():
    labels[term] = examples[0].row_labels[term] if examples else np.zeros_like(values)
  for term, values in template.row_weights.items():
    weights[term] = examples[0].row_weights[term] if examples else np.zeros_like(values)
  return Batch(
    inputs=_pack_tokens([each.inputs for each in examples], template.inputs, row_lengths.inputs),
    targets=_pack_tokens([each.targets for each in examples], template.targets, row_lengths.targets),
    labels=labels,
    weights=weights,
    extras={
      view: pack_row([each.extras[view] for each in examples], template.extras[view], inner)
      for view, inner in row_lengths.extras.items()
    },
  )


def _pack_tokens(
  sequences: Sequence[TokenSequence | None], template: TokenSequence | None, length: int | None
) -> Tokens | None:
  """Concatenate and pad one stream; None if examples do not have it."""
  if template is None or length is None:
    return None
  parts = [sequence for sequence in sequences if sequence is not None]
  positions, segments = np.zeros(length, np.int32), np.zeros(length, np.int32)
  start = 0
  for number, part in enumerate(parts, 1):
    stop = start + len(part)
    positions[start:stop] = np.arange(len(part))
    segments[start:stop] = number
    start = stop

  def pad_field(name: str) -> np.ndarray | None:
    if getattr(template, name) is None:
      return None
    return _pad([getattr(part, name) for part in parts], length, np.int32)

  return Tokens(
    ids=pad_field("ids"),
    positions=positions,
    segments=segments,
    prefix=pad_field("prefix"),
    token_types=pad_field("token_types"),
  )


def _pad(arrays: Sequence[np.ndarray], length: int, dtype: type[np.generic]) -> np.ndarray:
  """Concatenate arrays and pad them with zeros to [length]."""
  padded = np.zeros(length, dtype)
  start = 0
  for values in arrays:
    padded[start : start + len(values)] = values
    start += len(values)
  return padded


def stack_rows(rows: Sequence[Batch], numbers: Sequence[int]) -> Batch:
  """Stack packed rows to a batch.

  Args:
    rows: rows of `pack_row`, with leaves [L].
    numbers: the number of each row in the global batch.

  Returns:
    A batch with leaves [B L].
  """
  first = rows[0]
  return Batch(
    inputs=_stack_tokens([row.inputs for row in rows]),
    targets=_stack_tokens([row.targets for row in rows]),
    labels={term: np.stack([row.labels[term] for row in rows]) for term in first.labels},
    weights={term: np.stack([row.weights[term] for row in rows]) for term in first.weights},
    rows=np.array(numbers, np.int32),
    extras={view: stack_rows([row.extras[view] for row in rows], numbers) for view in first.extras},
  )


def _stack_tokens(streams: Sequence[Tokens | None]) -> Tokens | None:
  present = [stream for stream in streams if stream is not None]
  if not present:
    return None

  def stack_field(name: str) -> np.ndarray | None:
    return None if getattr(present[0], name) is None else np.stack([getattr(stream, name) for stream in present])

  names = ("ids", "positions", "segments", "prefix", "token_types")
  return Tokens(**{name: stack_field(name) for name in names})

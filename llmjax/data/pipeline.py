"""Batches of training and evaluation, from a source, a tokenizer and an objective.

`TrainStream` is an endless stream of batches whose position is a JSON cursor; see `data/row_streams.py` for the order
of the data. `eval_batches` covers a split exactly once.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

from llmjax.config import ConfigError, Json
from llmjax.data import packing
from llmjax.data.randomness import EVAL, counter_rng
from llmjax.data.row_streams import RowFiller, RowStream, make_row_filler
from llmjax.data.sources.base import Source
from llmjax.examples import Example, TextTokenizer, Window
from llmjax.types import Batch, Objective

# Position of a train stream as JSON. "rows" has [offset, records used of each component] by stream number, the other
# keys identify the data.
Cursor: TypeAlias = dict[str, Json]


class TrainStream:
  """An endless iterator over this host's rows of the global batches; leaves are NumPy arrays."""

  def __init__(
    self,
    source: Source,
    tokenizer: TextTokenizer,
    objective: Objective,
    *,
    batch_size: int,
    seq_len: int,
    seed: int,
    rows: Iterable[int] | None = None,
    pack: bool = True,
    interleave: int = 1,
    workers: int = 2,
    prefetch: int = 2,
  ) -> None:
    """Start a stream.

    Args:
      source: records, or a mixture.
      tokenizer: tokenizer of the run.
      objective: makes examples.
      batch_size: rows of a global batch, over all hosts.
      seq_len: input tokens of a row.
      seed: seed of the run.
      rows: global numbers of this host's rows; None: all.
      pack: whether examples share rows as far as the objective allows it; otherwise one padded example per row.
      interleave: lanes of each row, used in turn. Each lane keeps a document open, in memory.
      workers: threads that fill rows; 1: no threads.
      prefetch: batches that a thread makes ahead; 0: batches are made on request.

    Raises:
      ConfigError: a number is too small.
    """
    for key, value, minimum in (
      ("batch_size", batch_size, 1),
      ("seq_len", seq_len, 1),
      ("data.interleave", interleave, 1),
      ("data.workers", workers, 1),
      ("data.prefetch", prefetch, 0),
    ):
      if value < minimum:
        raise ConfigError(f"{key}: must be at least {minimum}, got {value}")
    num_streams = batch_size * interleave
    self.filler: RowFiller = make_row_filler(
      source, tokenizer, objective, num_streams=num_streams, seq_len=seq_len, seed=seed, pack=pack
    )
    numbers = list(range(batch_size) if rows is None else rows)
    if not numbers or not all(0 <= number < batch_size for number in numbers):
      raise ValueError(f"rows: must be numbers below the batch size {batch_size}, got {numbers}")
    self.numbers, self.batch_size = numbers, batch_size
    num_components = len(self.filler.components)
    self.lanes = [
      [RowStream(number + lane * batch_size, [0] * num_components) for number in numbers] for lane in range(interleave)
    ]
    self.turn = 0  # lane of the next batch
    self.prefetch = prefetch
    self._row_pool = ThreadPoolExecutor(workers, "llmjax-rows") if workers > 1 else None
    self._batch_pool = ThreadPoolExecutor(1, "llmjax-batches") if prefetch else None
    self._pending: collections.deque[Future[tuple[Batch, Cursor]]] = collections.deque()
    self._position = self._make_position()  # after the last batch that was handed out
    self._failure: BaseException | None = None

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    """Return the next batch. An error in a thread is raised here, and again by every later call."""
    if self._failure is not None:
      raise self._failure
    try:
      if self._batch_pool is None:
        batch, self._position = self._make_batch()
      else:
        while len(self._pending) <= self.prefetch:
          self._pending.append(self._batch_pool.submit(self._make_batch))
        batch, self._position = self._pending.popleft().result()
    except BaseException as error:
      self._failure = error  # some rows may be ahead of others
      raise
    return batch

  @property
  def rows(self) -> list[RowStream]:
    """All streams of this host, lane after lane."""
    return [row for lane in self.lanes for row in lane]

  def _make_batch(self) -> tuple[Batch, Cursor]:
    """Return the next batch and the position after it."""
    map_rows = map if self._row_pool is None else self._row_pool.map
    filled = list(map_rows(self.filler.fill_row, self.lanes[self.turn]))
    self.turn = (self.turn + 1) % len(self.lanes)
    return packing.stack_rows(filled, self.numbers), self._make_position()

  def _make_position(self) -> Cursor:
    return {"turn": self.turn, "rows": {str(row.number): [row.offset, *row.counts] for row in self.rows}}

  def _identity(self) -> Cursor:
    """Return the keys of a cursor that must be the same when a run is resumed."""
    filler = self.filler
    return {
      "version": 1,
      "seed": filler.seed,
      "batch_size": self.batch_size,
      "interleave": len(self.lanes),
      "pack": filler.packing != "never",
      "sources": [component.fingerprint for component in filler.components],
      "shares": filler.shares.tolist(),
    }

  @property
  def cursor(self) -> Cursor:
    """The position after the last batch that was handed out, whatever is prefetched."""
    return {**self._identity(), **self._position}

  def restore(self, cursor: Cursor) -> None:
    """Continue after a cursor.

    Args:
      cursor: a cursor with this host's rows; it may have others too.

    Raises:
      ConfigError: the cursor belongs to other data or settings, or lacks rows.
    """
    for key, value in self._identity().items():
      if cursor.get(key) != value:
        raise ConfigError(
          f"data cursor: the checkpoint's has {key}={cursor.get(key)!r}, got {value!r} in this run. Set it back, or "
          "start a new run with init_from"
        )
    missing = [row.number for row in self.rows if str(row.number) not in cursor["rows"]]
    if missing:
      raise ConfigError(f"data cursor: it lacks rows {missing}. Merge the cursors of all hosts with merge_cursors")
    self._drop_prefetched()
    self.turn = cursor["turn"]
    for row in self.rows:
      row.offset, *row.counts = cursor["rows"][str(row.number)]
      row.examples = row.block = None
    self._position, self._failure = self._make_position(), None

  def _drop_prefetched(self) -> None:
    """Discard prefetched batches; wait for one that is being made."""
    while self._pending:
      future = self._pending.popleft()
      if not future.cancel():
        future.exception()

  def close(self) -> None:
    """Stop the threads. The stream cannot be used afterwards."""
    self._drop_prefetched()
    for pool in (self._batch_pool, self._row_pool):
      if pool is not None:
        pool.shutdown()
    self._failure = self._failure or ValueError("the stream is closed")


def merge_cursors(cursors: Sequence[Cursor]) -> Cursor:
  """Merge the cursors of all hosts, which must be at the same step, into one with all rows.

  Raises:
    ConfigError: the hosts read other data or have other settings.
  """
  merged: Cursor = {**cursors[0], "rows": {}}
  for cursor in cursors:
    for key, value in cursor.items():
      if key != "rows" and value != merged[key]:
        raise ConfigError(
          f"data cursor: hosts differ in {key}, got {merged[key]!r} and {value!r}. Give all hosts the same config and "
          "data"
        )
    merged["rows"] |= cursor["rows"]
  merged["rows"] = {str(number): merged["rows"][str(number)] for number in sorted(map(int, merged["rows"]))}
  return merged


def eval_batches(
  source: Source,
  tokenizer: TextTokenizer,
  objective: Objective,
  *,
  batch_size: int,
  seq_len: int,
  seed: int,
  rows: Iterable[int] | None = None,
  num_batches: int | None = None,
  max_batches: int | None = None,
) -> list[Batch]:
  """Return this host's rows of batches that have every window of a split exactly once.

  Windows of all documents are assigned to rows in turn (round robin), which keeps rows equally full; whole documents
  would not. Windows of one row share batches uncut. The rest is padding, as are rows that have fewer batches.

  Args:
    source: the split.
    tokenizer: tokenizer of the run.
    objective: makes examples.
    batch_size: rows of a global batch, over all hosts.
    seq_len: input tokens of a row.
    seed: seed of the run.
    rows: global numbers of this host's rows; None: all.
    num_batches: number of batches, at least as many as this host's rows need; None: as many as they need.
    max_batches: use only as many windows of the split as this number of batches has rows.

  Raises:
    ConfigError: no record of the split gives examples.
  """
  filler = make_row_filler(source, tokenizer, objective, num_streams=batch_size, seq_len=seq_len, seed=seed, pack=False)
  numbers = range(batch_size) if rows is None else rows
  limit = None if max_batches is None else max_batches * batch_size
  examples, template = _assign_windows(filler, numbers, limit)
  if template is None:
    raise ConfigError(f"data.eval: no record of the split gives examples; {objective.skip_reason}")
  filled = {
    number: [[each] for each in row] if objective.packing == "never" else packing.best_fit(row, filler.row_lengths)
    for number, row in examples.items()
  }
  needed = max(map(len, filled.values()))
  num_batches = needed if num_batches is None else num_batches
  if num_batches < needed:
    raise ValueError(f"num_batches: the rows need {needed} batches, got {num_batches}")
  return [
    packing.stack_rows(
      [packing.pack_row(row[i] if i < len(row) else (), template, filler.row_lengths) for row in filled.values()],
      list(filled),
    )
    for i in range(num_batches)
  ]


def _assign_windows(
  filler: RowFiller, numbers: Iterable[int], limit: int | None
) -> tuple[dict[int, list[Example]], Example | None]:
  """Assign the windows of all records to the filler's streams in turn.

  Args:
    filler: makes windows and examples.
    numbers: streams whose examples are made.
    limit: maximum number of windows, over all streams.

  Returns:
    The examples of each stream, and any example as a template for rows without examples; None if there are none.
  """

  def all_windows() -> Iterator[tuple[int, int, int, Window]]:
    for component, source in enumerate(filler.components):
      for index in range(len(source)):
        for place, window in enumerate(filler.windows(component, index, whole=False)):
          yield component, index, place, window

  examples: dict[int, list[Example]] = {number: [] for number in numbers}
  template = None
  for turn, (component, index, place, window) in enumerate(itertools.islice(all_windows(), limit)):
    number = turn % filler.num_streams
    if number in examples or template is None:
      made = filler.make_examples(window, counter_rng(filler.seed, EVAL, component, index, place), component)
      template = template or next(iter(made), None)
      examples.get(number, []).extend(made)
  return examples, template

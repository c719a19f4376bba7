"""Batches as a pure function of (seed, step): row streams.

Row r of every global batch of B rows is a stream of its own. Its k-th example from a source of N records has the global
number g = r + k * B, which is record permutation(epoch)[g mod N] of epoch g div N, so that the rows together go through
every epoch exactly once. Everything random is a hash of counters: the permutation, the source that a mixture draws, the
generator that an objective gets. A row's state is therefore a few integers, a host makes only its own rows, and neither
the number of hosts nor threads nor prefetching can change the global batch.

A row that reads a long document gives the same document step after step, and training suffers: neighbouring batches are
alike. So a row may have several lanes, streams of their own that it takes in turn: `interleave` of them make
interleave * B streams in all, the one of row r in lane l numbered r + l * B, and B above becomes their number.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from llmjax.config import ConfigError
from llmjax.data import packing
from llmjax.data.packing import Piece, Sizes
from llmjax.data.sources.base import Source
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.types import Batch, Objective

Cursor = dict[str, Any]  # JSON

SHUFFLE, DRAW, TRAIN, EVAL = range(4)  # what a hash is for
BLOCK = 16  # rows that whole examples are packed into at a time: more fill better, and take memory
TABLE = 1 << 16  # index_shuffle walks a cycle of about this length, so it is slow for fewer records


def counter_hash(*counters: int) -> bytes:
  """16 bytes that are a function of the counters alone, on every machine."""
  return hashlib.blake2b(struct.pack(f"<{len(counters)}Q", *(c % 2**64 for c in counters)), digest_size=16).digest()


def generator(*counters: int) -> np.random.Generator:
  return np.random.Generator(np.random.Philox(key=np.frombuffer(counter_hash(*counters), "<u8")))


def permuted(position: int, size: int, *counters: int) -> int:
  """What stands at `position` of a permutation of range(size), one for all `counters`."""
  if size <= TABLE:
    return int(_table(size, *counters)[position])
  from grain.experimental import index_shuffle

  (key,) = struct.unpack("<I", counter_hash(*counters)[:4])
  return index_shuffle(position, max_index=size - 1, seed=key, rounds=4)


@functools.lru_cache(64)
def _table(size: int, *counters: int) -> np.ndarray:
  """A whole permutation. Only raw bits of a generator: NumPy promises that those never change."""
  bits = np.random.Philox(key=np.frombuffer(counter_hash(*counters), "<u8")).random_raw(size)
  return np.argsort(bits, kind="stable")


@dataclasses.dataclass
class Row:
  """The state of a row stream.

  Attributes:
    number: which of all streams; modulo the batch size, its place in the global batch.
    counts: examples used up, by source.
    offset: what of the current example is used up: tokens where it is split, else pieces; or rows of the block.
    pieces: the current example, made again from the rest after a restart.
    block: the rows that whole examples from `counts` on are packed into, and the counts after them; made again too.
  """

  number: int
  counts: list[int]
  offset: int = 0
  pieces: list[Piece] | None = None
  block: tuple[list[list[Piece]], list[int]] | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
  """What all rows share."""

  parts: tuple[Source, ...]
  shares: np.ndarray  # cumulative, ends at 1
  tokenizer: Tokenizer
  objective: Objective
  streams: int
  seq_len: int
  seed: int
  packing: str  # "split", "whole" or "never", see `Objective`

  @functools.cached_property
  def sizes(self) -> Sizes:
    return self.objective.row_lengths(self.seq_len)

  def locate(self, row: Row) -> tuple[int, int, int]:
    """(source, epoch, index) of the row's current example."""
    part = 0
    if len(self.parts) > 1:
      draw = struct.unpack("<Q", counter_hash(self.seed, DRAW, row.number, sum(row.counts))[:8])[0] / 2**64
      part = min(int(np.searchsorted(self.shares, draw, side="right")), len(self.parts) - 1)
    size = len(self.parts[part])
    epoch, position = divmod(row.number + row.counts[part] * self.streams, size)
    return part, epoch, permuted(position, size, self.seed, SHUFFLE, part, epoch)

  def examples(self, part: int, index: int, *, whole: bool) -> Iterator[dict[str, Any]]:
    """What a record is learned from, see `Objective.examples`."""
    record = self.parts[part][index]
    try:
      yield from self.objective.examples(record, self.tokenizer, self.seq_len, whole)
    except ConfigError as error:
      which = f" of part {part} of the mixture" if len(self.parts) > 1 else ""
      raise ConfigError(f"{self.parts[part].location(index)}{which}: {error}") from error

  def pieces(self, example: dict[str, Any], rng: np.random.Generator, part: int) -> list[Piece]:
    """The example's features, if they have tokens in every stream."""
    features = self.objective.features(example, rng, self.parts[part])
    piece = {} if features is None else packing.flatten_features(features)
    return [piece] if piece and all(packing.lengths(piece).values()) else []

  def advance(self, row: Row) -> int:
    """Makes sure that the row has a current example; returns which source it is from."""
    # A row meets every record sooner or later, but with few records not soon.
    patience = min(20 * sum(map(len, self.parts)), 5000)
    for _ in range(patience):
      part, epoch, index = self.locate(row)
      if row.pieces is None:
        rng = generator(self.seed, TRAIN, part, epoch, index)
        examples = self.examples(part, index, whole=self.packing == "split")
        row.pieces = [piece for example in examples for piece in self.pieces(example, rng, part)]
      if row.pieces:
        return part
      self.finish(row, part)
    raise ConfigError(f"data.corpus: {patience} records in a row gave no features; {self.objective.skip_reason}")

  def count_skipped(self, most: int = 64) -> tuple[int, int]:
    """(how many records give no features, of how many), of a few that are evenly spaced over every part.

    Raises:
      ConfigError: none of a part gives any, and these are all of it; a record that cannot be learned from.
    """
    empty, seen = 0, 0
    for part, records in enumerate(self.parts):
      which = np.unique(np.linspace(0, len(records) - 1, most).astype(np.int64)).tolist()
      found = [
        any(self.pieces(x, generator(self.seed, EVAL, part, i), part) for x in self.examples(part, i, whole=False))
        for i in which
      ]
      if not any(found) and len(found) == len(records):
        raise ConfigError(f"data.train: none of {len(records)} records gives features; {self.objective.skip_reason}")
      empty, seen = empty + found.count(False), seen + len(found)
    return empty, seen

  def finish(self, row: Row, part: int) -> None:
    row.counts[part] += 1
    row.offset, row.pieces = 0, None

  def fill(self, row: Row) -> Piece:
    """The row's part of the next batch."""
    taken = {"split": self.fill_split, "whole": self.fill_whole, "never": self.fill_one}[self.packing](row)
    return packing.pack_row(taken, taken[0], self.sizes)

  def fill_split(self, row: Row) -> list[Piece]:
    """Pieces cut anywhere and carried over, so that nothing is left empty."""
    taken: list[Piece] = []
    [room] = self.sizes.values()
    while room:
      part = self.advance(row)
      assert row.pieces
      piece, stop = packing.split_pieces(row.pieces[0], row.offset, room)
      taken.append(piece)
      room -= stop - row.offset
      row.offset = stop
      if row.offset == next(iter(packing.lengths(row.pieces[0]).values())):
        self.finish(row, part)
    return taken

  def fill_one(self, row: Row) -> list[Piece]:
    """One piece, padded."""
    part = self.advance(row)
    assert row.pieces
    piece = row.pieces[row.offset]
    row.offset += 1
    if row.offset == len(row.pieces):
      self.finish(row, part)
    [pieces] = packing.best_fit([piece], self.sizes)
    return pieces

  def fill_whole(self, row: Row) -> list[Piece]:
    """Uncut pieces that fit together: the next row of a block of examples packed at once."""
    if row.block is None:
      ahead = Row(row.number, list(row.counts))
      pieces: list[Piece] = []
      filled = 0.0
      # First blocks of different sizes, or all rows would have to be packed anew at the same step for ever.
      size = BLOCK if any(row.counts) else 1 + row.number % BLOCK
      while filled < size:
        part = self.advance(ahead)
        assert ahead.pieces
        pieces.extend(ahead.pieces)
        filled += packing.fill_of(ahead.pieces, self.sizes)
        self.finish(ahead, part)
      row.block = packing.best_fit(pieces, self.sizes), ahead.counts
    rows, after = row.block
    taken = rows[row.offset]
    row.offset += 1
    if row.offset == len(rows):
      row.counts, row.offset, row.block = after, 0, None
    return taken


def make_plan(source: Source, tokenizer: Tokenizer, objective: Objective, *, pack: bool, **settings: Any) -> Plan:
  parts = source.parts or (source,)
  shares = np.cumsum(source.weights or (1.0,))
  return Plan(
    parts, shares / shares[-1], tokenizer, objective, packing=objective.packing if pack else "never", **settings
  )


class TrainStream:
  """This host's rows of the global batches, for ever.

  Args:
    batch_size: rows of a global batch, over all hosts.
    seq_len: tokens of a row.
    rows: the global numbers of this host's rows.
    pack: rows are shared by documents as far as the objective allows; else a row holds one window, padded.
    interleave: lanes of a row, taken in turn; so many documents a row are open at a time, and in memory.
    workers: threads that make rows; 1 makes them one after the other.
    prefetch: batches made ahead by a thread; 0 makes them when they are asked for.
  """

  def __init__(
    self,
    source: Source,
    tokenizer: Tokenizer,
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
  ):
    for key, value, least in (
      ("batch_size", batch_size, 1),
      ("seq_len", seq_len, 1),
      ("data.interleave", interleave, 1),
      ("data.workers", workers, 1),
      ("data.prefetch", prefetch, 0),
    ):
      if value < least:
        raise ConfigError(f"{key}={value} must be at least {least}")
    streams = batch_size * interleave
    self.plan = make_plan(source, tokenizer, objective, pack=pack, streams=streams, seq_len=seq_len, seed=seed)
    numbers = list(range(batch_size) if rows is None else rows)
    if not numbers or not all(0 <= r < batch_size for r in numbers):
      raise ValueError(f"rows {numbers} must be some of the batch's {batch_size}")
    self.numbers, self.batch_size, self.turn = numbers, batch_size, 0
    self.lanes = [
      [Row(number + lane * batch_size, [0] * len(self.plan.parts)) for number in numbers] for lane in range(interleave)
    ]
    self.prefetch = prefetch
    self.workers = ThreadPoolExecutor(workers, "llmjax-rows") if workers > 1 else None
    self.producer = ThreadPoolExecutor(1, "llmjax-batches") if prefetch else None
    self.pending: collections.deque[Future] = collections.deque()
    self.state = self._state()
    self.failure: BaseException | None = None

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    """The next batch of NumPy arrays; an error in a thread is raised here, and again at every later call."""
    if self.failure is not None:
      raise self.failure
    try:
      if self.producer is None:
        batch, self.state = self._make()
      else:
        while len(self.pending) <= self.prefetch:
          self.pending.append(self.producer.submit(self._make))
        batch, self.state = self.pending.popleft().result()
    except BaseException as error:
      self.failure = error  # the rows may have moved on by halves
      raise
    return batch

  @property
  def rows(self) -> list[Row]:
    """All streams of this host, lane after lane."""
    return [row for lane in self.lanes for row in lane]

  def _make(self) -> tuple[Batch, Cursor]:
    make = map if self.workers is None else self.workers.map
    filled = list(make(self.plan.fill, self.lanes[self.turn]))
    self.turn = (self.turn + 1) % len(self.lanes)
    return packing.stack_rows(filled, self.numbers), self._state()

  def _state(self) -> Cursor:
    return {"turn": self.turn, "rows": {str(row.number): [row.offset, *row.counts] for row in self.rows}}

  def _header(self) -> Cursor:
    plan = self.plan
    return {
      "version": 1,
      "seed": plan.seed,
      "batch_size": self.batch_size,
      "interleave": len(self.lanes),
      "pack": plan.packing != "never",
      "sources": [part.fingerprint for part in plan.parts],
      "shares": plan.shares.tolist(),
    }

  @property
  def cursor(self) -> Cursor:
    """Where the stream stands after the last batch that was handed out; JSON. Per stream: offset, count by source."""
    return {**self._header(), **self.state}

  def restore(self, cursor: Cursor) -> None:
    """Continues after `cursor`, which must hold this host's rows and may hold others."""
    for key, ours in self._header().items():
      theirs = cursor.get(key)
      if theirs != ours:
        raise ConfigError(
          f"the data cursor of the checkpoint was made with {key}={theirs!r}, and this run has {ours!r}; "
          "set it back, or start a run of its own with init_from"
        )
    missing = [row.number for row in self.rows if str(row.number) not in cursor["rows"]]
    if missing:
      raise ConfigError(f"the data cursor lacks rows {missing}; it must be merged from those of all hosts")
    self._stop()
    self.turn = cursor["turn"]
    for row in self.rows:
      row.offset, *row.counts = cursor["rows"][str(row.number)]
      row.pieces = row.block = None
    self.state, self.failure = self._state(), None

  def _stop(self) -> None:
    """Drops what was made ahead; a batch in the making is waited for."""
    while self.pending:
      future = self.pending.popleft()
      if not future.cancel():
        future.exception()

  def close(self) -> None:
    """Ends the threads."""
    self._stop()
    for pool in (self.producer, self.workers):
      if pool is not None:
        pool.shutdown()
    self.failure = self.failure or ValueError("the stream is closed")


def merge_cursors(cursors: Sequence[Cursor]) -> Cursor:
  """One cursor of all rows from the hosts' own; they must stand at the same step."""
  merged: Cursor = {**cursors[0], "rows": {}}
  for cursor in cursors:
    for key, value in cursor.items():
      if key != "rows" and value != merged[key]:
        raise ConfigError(f"hosts differ in {key}: {merged[key]!r} and {value!r}; give all the same config and data")
    merged["rows"] |= cursor["rows"]
  merged["rows"] = {str(number): merged["rows"][str(number)] for number in sorted(map(int, merged["rows"]))}
  return merged


def eval_batches(
  source: Source,
  tokenizer: Tokenizer,
  objective: Objective,
  *,
  batch_size: int,
  seq_len: int,
  seed: int,
  rows: Iterable[int] | None = None,
  num_batches: int | None = None,
  max_batches: int | None = None,
) -> list[Batch]:
  """A whole split once, this host's rows of it: the windows of all documents, in order, are dealt to the rows in turn.

  Dealing windows rather than documents keeps the rows equally long. A row's windows stay whole and share batches with
  their neighbours; what is left over is padding, and so are rows that run out early.

  Args:
    num_batches: how many to give, at least as many as this host's rows need; None is just that.
    max_batches: only the beginning of the split, as many windows as there are rows in so many batches.
  """
  plan = make_plan(source, tokenizer, objective, pack=False, streams=batch_size, seq_len=seq_len, seed=seed)
  dealt: dict[int, list[Piece]] = {number: [] for number in (range(batch_size) if rows is None else rows)}
  windows = (
    (part, index, window, ids)
    for part, records in enumerate(plan.parts)
    for index in range(len(records))
    for window, ids in enumerate(plan.examples(part, index, whole=False))
  )
  example = None  # an example of a piece gives a row without any its arrays
  limit = None if max_batches is None else max_batches * batch_size
  for turn, (part, index, window, ids) in enumerate(itertools.islice(windows, limit)):
    number = turn % batch_size
    if number in dealt or example is None:
      pieces = plan.pieces(ids, generator(seed, EVAL, part, index, window), part)
      example = example or next(iter(pieces), None)
      dealt.get(number, []).extend(pieces)
  if example is None:
    raise ConfigError(f"data.eval: no record of the split gives features; {objective.skip_reason}")
  alone = objective.packing == "never"
  filled = {
    number: [[piece] for piece in pieces] if alone else packing.best_fit(pieces, plan.sizes)
    for number, pieces in dealt.items()
  }
  needed = max(map(len, filled.values()))
  num_batches = needed if num_batches is None else num_batches
  if num_batches < needed:
    raise ValueError(f"num_batches={num_batches}, but the rows need {needed}")
  return [
    packing.stack_rows(
      [packing.pack_row(row[i] if i < len(row) else (), example, plan.sizes) for row in filled.values()], list(filled)
    )
    for i in range(num_batches)
  ]

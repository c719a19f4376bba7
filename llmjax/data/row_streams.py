"""Row streams: the rows of all global batches as pure functions of (seed, step).

Row r of every global batch of B rows is a stream of its own. Its k-th example from a source of N records has the global
number g = r + k * B, which is record permutation(epoch)[g mod N] of epoch g div N. Together, the rows go through every
epoch exactly once. Everything random is a hash of counters, see `data/randomness.py`: the permutation, the component
that a mixture draws, and the generator that an objective is given.

The state of a stream is therefore a few integers. A host makes only its own rows, and neither the number of hosts nor
threads nor prefetching changes the global batch.

Consecutive rows of one stream are parts of the same long document, and similar neighbouring batches harm training. A
row may therefore have several lanes, independent streams that it uses in turn. `interleave` lanes make interleave * B
streams. Row r in lane l is stream r + l * B, and B above becomes the number of streams.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from llmjax.config import ConfigError
from llmjax.data import packing
from llmjax.data.randomness import DRAW, EVAL, SHUFFLE, TRAIN, counter_rng, counter_uniform, permute_index
from llmjax.data.sources.base import Source
from llmjax.examples import Example, RowLengths, TextTokenizer, Window
from llmjax.types import Batch, Objective

BLOCK_ROWS = 16  # rows that whole examples are packed into at a time: more are filled better, and need more memory


@dataclasses.dataclass
class RowStream:
  """The state of a row stream.

  Attributes:
    number: number of the stream; modulo the batch size, the row of the global batch.
    counts: records used, by component of the source.
    offset: what is used of the current record. With packing "split" tokens, with "whole" rows of the block, with
      "never" examples.
    examples: examples of the current record. Not part of a cursor: made again after a restart.
    block: the rows that the records from `counts` on are packed into, and the counts after them; made again too.
  """

  number: int
  counts: list[int]
  offset: int = 0
  examples: list[Example] | None = None
  block: tuple[list[list[Example]], list[int]] | None = None


@dataclasses.dataclass(frozen=True)
class RowFiller:
  """Fills rows from a source; shared by all streams, and without state of its own.

  Attributes:
    components: the components of a mixture, or the only source.
    shares: Float[components], cumulative probability of each component; the last entry is 1.
    tokenizer: tokenizer of the run.
    objective: makes examples.
    num_streams: number of streams, over all hosts.
    seq_len: input tokens of a row.
    seed: seed of the run.
    packing: "split", "whole" or "never", see `Objective.packing`.
  """

  components: tuple[Source, ...]
  shares: np.ndarray
  tokenizer: TextTokenizer
  objective: Objective
  num_streams: int
  seq_len: int
  seed: int
  packing: str

  @functools.cached_property
  def row_lengths(self) -> RowLengths:
    """The length of a row in each stream."""
    return self.objective.row_lengths(self.seq_len)

  def locate_record(self, row: RowStream) -> tuple[int, int, int]:
    """Return (component, epoch, index) of the current record."""
    component = 0
    if len(self.components) > 1:
      draw = counter_uniform(self.seed, DRAW, row.number, sum(row.counts))
      component = min(int(np.searchsorted(self.shares, draw, side="right")), len(self.components) - 1)
    size = len(self.components[component])
    epoch, position = divmod(row.number + row.counts[component] * self.num_streams, size)
    return component, epoch, permute_index(position, size, self.seed, SHUFFLE, component, epoch)

  def windows(self, component: int, index: int, *, whole: bool) -> Iterator[Window]:
    """Yield the windows of a record, see `Objective.split_record`.

    Raises:
      ConfigError: the objective rejects the record; the message starts with the record's location.
    """
    source = self.components[component]
    record = source[index]
    try:
      yield from self.objective.split_record(record, self.tokenizer, self.seq_len, whole)
    except ConfigError as error:
      which = f", mixture component {component}" if len(self.components) > 1 else ""
      raise ConfigError(f"{source.location(index)}{which}: {error}") from error

  def make_examples(self, window: Window, rng: np.random.Generator, component: int) -> list[Example]:
    """Return the example of a window, or nothing if it is skipped or has no tokens in one of its streams."""
    example = self.objective.make_example(window, rng, self.components[component])
    return [example] if example is not None and all(packing.stream_lengths(example, self.row_lengths)) else []

  def load_examples(self, row: RowStream) -> int:
    """Make the examples of the current record, skip records without any, and return the component.

    Raises:
      ConfigError: too many records in a row give no examples.
    """
    # A stream meets every record sooner or later, but it may take long if there are few.
    max_empty_records = min(20 * sum(map(len, self.components)), 5000)
    for _ in range(max_empty_records):
      component, epoch, index = self.locate_record(row)
      if row.examples is None:
        rng = counter_rng(self.seed, TRAIN, component, epoch, index)
        windows = self.windows(component, index, whole=self.packing == "split")
        row.examples = [example for window in windows for example in self.make_examples(window, rng, component)]
      if row.examples:
        return component
      self.finish_record(row, component)
    raise ConfigError(
      f"data.corpus: {max_empty_records} records in a row gave no examples; {self.objective.skip_reason}"
    )

  def finish_record(self, row: RowStream, component: int) -> None:
    """Move a stream to its next record."""
    row.counts[component] += 1
    row.offset, row.examples = 0, None

  def count_skipped(self, sample_size: int = 64) -> tuple[int, int]:
    """Count records without examples in a sample that is evenly spaced over each component.

    Args:
      sample_size: maximum number of records of each component.

    Returns:
      (records without examples, sampled records).

    Raises:
      ConfigError: all records of a component are sampled and none gives examples; the objective rejects a record.
    """
    num_empty, num_sampled = 0, 0
    for component, source in enumerate(self.components):
      indices = np.unique(np.linspace(0, len(source) - 1, sample_size).astype(np.int64)).tolist()
      has_examples = [
        any(
          self.make_examples(window, counter_rng(self.seed, EVAL, component, index), component)
          for window in self.windows(component, index, whole=False)
        )
        for index in indices
      ]
      if not any(has_examples) and len(has_examples) == len(source):
        raise ConfigError(f"data.train: none of {len(source)} records gives examples; {self.objective.skip_reason}")
      num_empty, num_sampled = num_empty + has_examples.count(False), num_sampled + len(has_examples)
    return num_empty, num_sampled

  def fill_row(self, row: RowStream) -> Batch:
    """Return the stream's next row, with leaves [L]."""
    fill = {"split": self._fill_split, "whole": self._fill_whole, "never": self._fill_single}[self.packing]
    examples = fill(row)
    return packing.pack_row(examples, examples[0], self.row_lengths)

  def _fill_split(self, row: RowStream) -> list[Example]:
    """Fill a row without padding: an example that does not fit is cut, and its rest begins the next row."""
    filled: list[Example] = []
    [(_, room)] = self.row_lengths.streams()
    while room:
      component = self.load_examples(row)
      assert row.examples
      example = row.examples[0]  # the record is one window
      part, stop = packing.cut_example(example, row.offset, room)
      filled.append(part)
      room -= stop - row.offset
      row.offset = stop
      if [row.offset] == list(packing.stream_lengths(example, self.row_lengths)):
        self.finish_record(row, component)
    return filled

  def _fill_single(self, row: RowStream) -> list[Example]:
    """Fill a row with one example."""
    component = self.load_examples(row)
    assert row.examples
    example = row.examples[row.offset]
    row.offset += 1
    if row.offset == len(row.examples):
      self.finish_record(row, component)
    [examples] = packing.best_fit([example], self.row_lengths)  # checks that it fits
    return examples

  def _fill_whole(self, row: RowStream) -> list[Example]:
    """Fill a row with whole examples: the next row of a block that is packed at once."""
    if row.block is None:
      row.block = self._pack_block(row)
    rows, counts_after = row.block
    filled = rows[row.offset]
    row.offset += 1
    if row.offset == len(rows):
      row.counts, row.offset, row.block = counts_after, 0, None
    return filled

  def _pack_block(self, row: RowStream) -> tuple[list[list[Example]], list[int]]:
    """Pack the next records of a stream into about `BLOCK_ROWS` rows; return the rows and the counts after them."""
    ahead = RowStream(row.number, list(row.counts))
    examples: list[Example] = []
    filled = 0.0
    # The first blocks differ in size; otherwise all streams would pack a new block at the same step for ever.
    size = BLOCK_ROWS if any(row.counts) else 1 + row.number % BLOCK_ROWS
    while filled < size:
      component = self.load_examples(ahead)
      assert ahead.examples
      examples.extend(ahead.examples)
      filled += packing.min_rows(ahead.examples, self.row_lengths)
      self.finish_record(ahead, component)
    return packing.best_fit(examples, self.row_lengths), ahead.counts


def make_row_filler(
  source: Source,
  tokenizer: TextTokenizer,
  objective: Objective,
  *,
  num_streams: int,
  seq_len: int,
  seed: int,
  pack: bool,
) -> RowFiller:
  """Return the filler of a source.

  Args:
    source: records, or a mixture.
    tokenizer: tokenizer of the run.
    objective: makes examples.
    num_streams: number of streams, over all hosts.
    seq_len: input tokens of a row.
    seed: seed of the run.
    pack: whether examples share rows as far as the objective allows it.
  """
  shares = np.cumsum(source.weights or (1.0,))
  return RowFiller(
    components=source.parts or (source,),
    shares=shares / shares[-1],
    tokenizer=tokenizer,
    objective=objective,
    num_streams=num_streams,
    seq_len=seq_len,
    seed=seed,
    packing=objective.packing if pack else "never",
  )

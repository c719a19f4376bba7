"""Batches and labelled records of a whole split."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import jax
import numpy as np

from llmjax.config import ConfigError
from llmjax.data import pipeline
from llmjax.data.sources.base import Source
from llmjax.examples import Record
from llmjax.objectives.task import Task
from llmjax.training.components import open_source
from llmjax.training.program import Program
from llmjax.types import Batch


def make_split_batches(
  program: Program,
  source: Source,
  batch_size: int,
  rows: Iterable[int],
  *,
  num_batches: int | None = None,
  max_batches: int | None = None,
) -> list[Batch]:
  """Return some rows of the batches of a split, see `pipeline.eval_batches`.

  Args:
    program: its tokenizer and objective make the batches.
    source: the split.
    batch_size: global batch size.
    rows: the rows of the global batch to return.
    num_batches: pad with empty batches to this number, None: no padding.
    max_batches: use only the first batches, None: all.
  """
  return pipeline.eval_batches(
    source,
    program.tokenizer,
    program.objective,
    batch_size=batch_size,
    seq_len=program.config["seq_len"],
    seed=program.config["seed"],
    rows=rows,
    num_batches=num_batches,
    max_batches=max_batches,
  )


def held_out_batches(program: Program, source: Source, batch_size: int, max_batches: int | None) -> list[Batch]:
  """Return this process's rows of every batch of a split; all processes get the same number of batches."""
  rows = program.local_rows(batch_size)
  batches = make_split_batches(program, source, batch_size, rows, max_batches=max_batches)
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    longest = int(np.max(multihost_utils.process_allgather(np.asarray(len(batches)))))
    if longest != len(batches):
      batches = make_split_batches(program, source, batch_size, rows, num_batches=longest, max_batches=max_batches)
  return batches


def labelled_records(program: Program, task: Task, split: str | None, limit: int | None) -> Callable[[], list[Record]]:
  """Check all records of a split now, and return a function that returns those with an answer.

  Args:
    program: its config names the corpus.
    task: the program's objective.
    split: split of config.data.corpus. None: config.data.eval.
    limit: maximum number of records, evenly spaced. None: all.

  Raises:
    ConfigError: the task cannot read a record, whose location is in the message.
  """
  split = split or program.config["data"]["eval"]
  source = open_source(program.config, split)
  count = len(source) if limit is None else min(limit, len(source))
  indices = np.linspace(0, len(source) - 1, count).astype(np.int64)
  for index, record in enumerate(source):
    try:
      task.check_record(record, labelled=True)
    except ConfigError as error:
      raise ConfigError(f"{source.location(index)}, of split {split!r}: {error}") from error

  @functools.cache
  def read_records() -> list[Record]:
    records: list[Record] = [
      record for record in (source[int(i)] for i in indices) if task.encode_record(record, labelled=True)
    ]
    if not records:
      raise ConfigError(f"split {split!r}: no record has both something to read and an answer; set another data.eval")
    return records

  return read_records

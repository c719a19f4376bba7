"""Batches of texts of similar length, computed one after another on a mesh.

Texts are sorted by length, so that batches contain little padding. The length of a batch is a power of two, so that few
shapes are compiled. Results do not depend on the batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, Sharding
from jaxtyping import Int

from llmjax.config import ConfigError
from llmjax.config.mesh import RULES, Rules
from llmjax.distributed import sharding
from llmjax.trees import PyTree
from llmjax.types import Batch

BATCH_TOKENS = 16384
MIN_LENGTH = 16  # of a batch, in tokens


@dataclasses.dataclass(frozen=True)
class BatchSettings:
  """Size of the batches, and the devices that compute them.

  Attributes:
    batch_tokens: maximum of rows times length of a batch, padding included; each device gets at least one row.
    mesh: devices that share the rows. None: the devices of the parameters.
    rules: sharding rules of the model.
  """

  batch_tokens: int = BATCH_TOKENS
  mesh: Mesh | None = None
  rules: Rules = dataclasses.field(default_factory=lambda: RULES)

  def __post_init__(self) -> None:
    if self.batch_tokens < 1:
      raise ConfigError(f"batch_tokens={self.batch_tokens} must be at least 1")

  @property
  def num_shards(self) -> int:
    """Number of devices or groups of devices that each hold other rows of a batch."""
    return 1 if self.mesh is None else sharding.num_batch_shards(self.mesh, self.rules)

  def use_mesh(self) -> AbstractContextManager[object]:
    """Return a context in which models are sharded over the mesh."""
    return contextlib.nullcontext() if self.mesh is None else sharding.use_mesh(self.mesh, self.rules)

  def put_on_mesh(self, batch: Batch) -> Batch:
    """Return a batch that every process holds as a whole as global arrays."""
    if self.mesh is None:
      return batch
    where: Sharding = sharding.named_sharding(self.mesh, "act_batch", rules=self.rules)
    on_mesh: Batch = jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, where, lambda index: x[index]), batch)
    return on_mesh


class PlannedBatch(NamedTuple):
  """A batch before its arrays are made.

  Attributes:
    indices: Int[n], the texts in the batch.
    num_rows: at least n.
    length: tokens of a row, at least those of the longest text.
  """

  indices: Int[np.ndarray, " n"]
  num_rows: int
  length: int


def plan_batches(
  lengths: Int[np.ndarray, " n"], max_length: int, batch_tokens: int, num_shards: int
) -> Iterator[PlannedBatch]:
  """Yield batches that contain every text once, the longest texts first.

  Args:
    lengths: number of tokens of each text.
    max_length: maximum length of a batch, at least that of the longest text.
    batch_tokens: maximum of rows times length of a batch; it has at least `num_shards` rows.
    num_shards: the number of rows is a multiple of it.
  """
  order = np.argsort(-lengths, kind="stable")
  while len(order):
    length = min(max(next_power_of_two(int(lengths[order[0]])), MIN_LENGTH), max_length)
    max_rows_per_shard = max(batch_tokens // (length * num_shards), 1)
    num_rows = num_shards * min(max_rows_per_shard, next_power_of_two(-(-len(order) // num_shards)))
    yield PlannedBatch(order[:num_rows], num_rows, length)
    order = order[num_rows:]


def next_power_of_two(number: int) -> int:
  """Return the smallest power of two that is at least `number`."""
  return 1 << (number - 1).bit_length()


def map_batches(
  compute: Callable[[Batch], PyTree],
  make_batch: Callable[[PlannedBatch], Batch],
  lengths: Int[np.ndarray, " n"],
  max_length: int,
  settings: BatchSettings,
) -> Iterator[tuple[Int[np.ndarray, " b"], PyTree]]:
  """Yield for each batch the indices of its texts and their results. Prepares the next batch while one is computed.

  Args:
    compute: returns a tree of arrays [B ...], which are the same on every device.
    make_batch: returns the arrays of a batch, in NumPy.
    lengths: number of tokens of each text.
    max_length: maximum length of a batch.
    settings: size of the batches and devices.

  Yields:
    (indices [b], tree of NumPy arrays [b ...]).
  """
  pending: list[tuple[np.ndarray, PyTree]] = []

  def fetch_first() -> tuple[np.ndarray, PyTree]:
    indices, out = pending.pop(0)
    return indices, jax.tree.map(lambda x: np.asarray(x)[: len(indices)], out)

  for planned in plan_batches(lengths, max_length, settings.batch_tokens, settings.num_shards):
    batch = make_batch(planned)
    with settings.use_mesh():
      pending.append((planned.indices, compute(settings.put_on_mesh(batch))))
    if len(pending) > 1:
      yield fetch_first()
  while pending:
    yield fetch_first()

"""Answers of a fine-tuned model to records, in memory.

Records that are too long are read in windows if their task supports it. Windows are batched by length. Answers are in
the order of the records, and do not depend on the batches or the mesh.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from llmjax.config import ConfigError
from llmjax.data import packing
from llmjax.distributed import sharding
from llmjax.examples import Example, Record, RowLengths
from llmjax.inference.batches import BatchSettings, PlannedBatch, map_batches, plan_batches
from llmjax.inference.generation import generate
from llmjax.objectives.task import Result, Task
from llmjax.trees import Params
from llmjax.types import Array, Batch, Model, Objective


@dataclasses.dataclass(frozen=True)
class PredictionSettings(BatchSettings):
  """Settings of predictions.

  Attributes:
    generation: keywords of `llmjax.generate`, for tasks whose answers are texts.
  """

  generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def check_task(objective: Objective) -> Task:
  """Return the objective if it is a task, which has answers. Raises ConfigError if it is not."""
  if not isinstance(objective, Task):
    raise ConfigError(
      f"the model was trained on {type(objective).__name__}, which has no answers; use `llmjax generate` for text, "
      "`llmjax embed` for embeddings"
    )
  return objective


def check_generation(task: Task, generation: Mapping[str, Any]) -> None:
  """Raise ConfigError if there are settings of generation for a task that generates no text."""
  if generation and not task.generates:
    name = next(iter(generation))
    raise ConfigError(
      f"{name}={generation[name]!r} is for tasks that generate text, not {type(task).__name__}; unset it"
    )


def predict(
  model: Model, params: Params, task: Task, records: Sequence[Record], settings: PredictionSettings | None = None
) -> list[Result]:
  """Return the result of each record, see `Task.make_result`, in the order of the records.

  Args:
    model: a model that was trained on the task.
    params: its parameters.
    task: the objective of the training.
    records: records with the inputs of the task.
    settings: size of the batches, devices, and generation. None: the defaults.

  Raises:
    ConfigError: the task cannot read a record, whose number is in the message.
  """
  settings = PredictionSettings() if settings is None else settings
  check_generation(task, settings.generation)
  windows = [_encode_record(task, record, number) for number, record in enumerate(records)]
  all_windows = [example for each in windows for example in each]
  compute = _generate_texts if task.generates else _decode_windows
  decoded = iter(compute(model, params, task, all_windows, settings))
  return [
    task.make_result(record, each, [next(decoded) for _ in each]) for record, each in zip(records, windows, strict=True)
  ]


def _encode_record(task: Task, record: Record, number: int) -> list[Example]:
  """Return the windows of a record; its number is for messages."""
  try:
    task.check_record(record, labelled=False)
    examples = task.encode_record(record, labelled=False)
  except ConfigError as error:
    raise ConfigError(f"record {number} (from 0): {error}") from error
  if not examples:
    raise ConfigError(f"record {number} (from 0) has no tokens to read; remove it")
  return examples


def _input_ids(example: Example) -> np.ndarray:
  """Return the input tokens Int32[n] of an example."""
  assert example.inputs is not None
  return example.inputs.ids


def _decode_windows(
  model: Model, params: Params, task: Task, windows: Sequence[Example], settings: PredictionSettings
) -> list[dict[str, np.ndarray]]:
  """Return the arrays of `Task.decode_outputs` for each window."""
  decoded: list[dict[str, np.ndarray]] = [{} for _ in windows]

  def make_batch(planned: PlannedBatch) -> Batch:
    row_lengths = RowLengths(planned.length)
    template = windows[planned.indices[0]]
    rows = [packing.pack_row([windows[i]], windows[i], row_lengths) for i in planned.indices]
    rows += [packing.pack_row([], template, row_lengths)] * (planned.num_rows - len(rows))
    return packing.stack_rows(rows, range(planned.num_rows))

  def decode(batch: Batch) -> dict[str, Array]:
    arrays: dict[str, Array] = _decode_batch(model, params, task, batch)
    return arrays

  lengths = np.array([len(_input_ids(window)) for window in windows], int)
  for indices, arrays in map_batches(decode, make_batch, lengths, model.cfg.max_len, settings):
    for row, i in enumerate(indices):
      decoded[i] = {name: x[row] for name, x in arrays.items()}
  return decoded


@functools.partial(jax.jit, static_argnames=("model", "task"))
def _decode_batch(model: Model, params: Params, task: Task, batch: Batch) -> dict[str, Array]:
  """Return the arrays of `Task.decode_outputs` for a batch, replicated on every device."""
  out = task.decode_outputs(model.apply({"params": params}, batch), batch)
  return {name: sharding.constrain(x, *(None,) * x.ndim) for name, x in out.items()}


def _generate_texts(
  model: Model, params: Params, task: Task, windows: Sequence[Example], settings: PredictionSettings
) -> list[dict[str, np.ndarray]]:
  """Return {"tokens": the tokens generated after each prompt, without the end token}."""
  prompts = [_input_ids(window) for window in windows]
  is_separate = model.cfg.stacks == "both"
  context, pad_id = model.cfg.max_len, task.tokenizer.pad_id
  generation = dict(settings.generation)
  max_new_tokens = generation.pop("max_new_tokens", task.max_new_tokens)
  ends = tuple(task.end_ids)
  decoded: list[dict[str, np.ndarray]] = [{} for _ in prompts]
  lengths = np.array([len(ids) for ids in prompts], int)
  with settings.use_mesh():
    for indices, num_rows, length in plan_batches(lengths, context, settings.batch_tokens, settings.num_shards):
      longest = int(lengths[indices].max())
      room = context - (1 if is_separate else longest)
      if room < 1:
        raise ConfigError(
          f"a prompt of {context - room} tokens leaves no room for new tokens in a context of {context}; shorten it"
        )
      count = min(max_new_tokens, room)
      if not is_separate:
        length = min(length, context - count)
      ids, mask = _pad_left([prompts[i] for i in indices], num_rows, max(length, longest), pad_id)
      tokens = generate(
        model,
        params,
        ids,
        mask,
        max_new_tokens=count,
        eos_id=ends or None,
        pad_id=pad_id,
        start_id=pad_id,
        **generation,
      )
      new = _gather_array(tokens)[:, -count:]
      for row, i in enumerate(indices):
        stop = np.flatnonzero(np.isin(new[row], ends))
        decoded[i] = {"tokens": new[row, : stop[0]] if len(stop) else new[row]}
  return decoded


def _pad_left(
  prompts: Sequence[Int[np.ndarray, " length"]], num_rows: int, length: int, pad_id: int
) -> tuple[Int[np.ndarray, "num_rows length"], Int[np.ndarray, "num_rows length"]]:
  """Return ids and mask of prompts that are padded on the left. The last one is repeated, since no row may be empty."""
  ids, mask = np.full((num_rows, length), pad_id, np.int32), np.zeros((num_rows, length), np.int32)
  for row, prompt in enumerate([*prompts, *[prompts[-1]] * (num_rows - len(prompts))]):
    ids[row, length - len(prompt) :], mask[row, length - len(prompt) :] = prompt, 1
  return ids, mask


def _gather_array(x: Array) -> np.ndarray:
  """Return a whole array, of which this process may hold only a part."""
  if x.is_fully_addressable:
    return np.asarray(x)
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(x, tiled=True))

"""Answers of a fine-tuned model to records: in memory for evaluation, and from JSONL to JSONL for `llmjax predict`.

Records are read in windows where their task says so, and those batched by length; answers come back in the order of
the records, whatever the batches and the mesh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmjax.checkpoints.sources import Pretrained, open_path
from llmjax.config import ConfigError
from llmjax.data import packing
from llmjax.data.sources.paths import json_error
from llmjax.data.sources.registry import source_kind
from llmjax.distributed import processes, sharding
from llmjax.inference.embeddings import BATCH_TOKENS, batches, check_output, in_batches, put_on_mesh, replacing
from llmjax.inference.generation import generate
from llmjax.objectives.task import Record, Result, Task
from llmjax.types import Array, Batch, Features, Objective


@dataclasses.dataclass(frozen=True)
class PredictionSettings:
  """How answers are made.

  Attributes:
    batch_tokens: rows times length of a batch, padding included.
    mesh, rules: devices to share rows; None is wherever the parameters are.
    generation: keywords of `llmjax.generate`, where the task writes texts.
  """

  batch_tokens: int = BATCH_TOKENS
  mesh: Mesh | None = None
  rules: sharding.Rules = dataclasses.field(default_factory=lambda: sharding.RULES)
  generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    if self.batch_tokens < 1:
      raise ConfigError(f"batch_tokens={self.batch_tokens} must be at least 1")


def check_task(objective: Objective) -> Task:
  """The objective, if it has answers to give."""
  if not isinstance(objective, Task):
    raise ConfigError(
      f"the model was trained on {type(objective).__name__}, which has no answers to give; `llmjax generate` writes "
      "text, `llmjax embed` vectors"
    )
  return objective


def check_generation(task: Task, generation: Mapping[str, Any]) -> None:
  """Raises ConfigError where a task that writes nothing is told how to."""
  if generation and not task.generates:
    name = next(iter(generation))
    raise ConfigError(f"{name}={generation[name]!r} is for tasks that write texts, not {type(task).__name__}; unset it")


def predict(
  model: Any, params: Any, task: Task, records: Sequence[Record], settings: PredictionSettings | None = None
) -> list[Result]:
  """A result for each record, see `Task.result`; in their order.

  Raises:
    ConfigError: a record that the task cannot read, with its number.
  """
  settings = PredictionSettings() if settings is None else settings
  check_generation(task, settings.generation)
  windows = [_windows(task, record, number) for number, record in enumerate(records)]
  flat = [features for each in windows for features in each]
  make = _write if task.generates else _decode
  found = iter(make(model, params, task, flat, settings))
  return [task.result(record, each, [next(found) for _ in each]) for record, each in zip(records, windows, strict=True)]


def _windows(task: Task, record: Record, number: int) -> list[Features]:
  try:
    task.check(record, labelled=False)
    features = task.encode(record, labelled=False)
  except ConfigError as error:
    raise ConfigError(f"record {number} (from 0): {error}") from error
  if not features:
    raise ConfigError(f"record {number} (from 0) has no tokens to read; take it out")
  return features


def _decode(
  model: Any, params: Any, task: Task, windows: Sequence[Features], settings: PredictionSettings
) -> list[dict[str, np.ndarray]]:
  """What `Task.decode` gives for each window."""
  pieces = [packing.flatten_features(features) for features in windows]
  found: list[dict[str, np.ndarray]] = [{} for _ in pieces]

  def make(which: np.ndarray, size: int, length: int) -> Batch:
    sizes = {"inputs": length}
    rows = [packing.pack_row([pieces[i]], pieces[i], sizes) for i in which]
    rows += [packing.pack_row([], pieces[which[0]], sizes)] * (size - len(rows))
    return packing.stack_rows(rows, range(size))

  def answer(batch: Batch) -> dict[str, Array]:
    return _answer(model, params, task, batch)

  lengths = np.array([len(piece["inputs/ids"]) for piece in pieces], int)
  context, mesh = model.cfg.max_len, settings.mesh
  for which, out in in_batches(answer, make, lengths, context, settings.batch_tokens, mesh, settings.rules):
    for row, i in enumerate(which):
      found[i] = {name: x[row] for name, x in out.items()}
  return found


@functools.partial(jax.jit, static_argnames=("model", "task"))
def _answer(model: Any, params: Any, task: Task, batch: Batch) -> dict[str, Array]:
  out = task.decode(model.apply({"params": params}, batch), batch)
  return jax.tree.map(lambda x: sharding.constrain(x, *(None,) * x.ndim), out)


def _write(
  model: Any, params: Any, task: Task, windows: Sequence[Features], settings: PredictionSettings
) -> list[dict[str, np.ndarray]]:
  """The tokens that follow each prompt, up to the one that ends a text."""
  prompts = [packing.flatten_features(features)["inputs/ids"] for features in windows]
  separate = model.cfg.stacks == "both"
  tokenizer = task.tokenizer
  said = dict(settings.generation)
  wanted = said.pop("max_new_tokens", task.max_new_tokens)
  ends = tuple(task.ends)
  found: list[dict[str, np.ndarray]] = [{} for _ in prompts]
  with _using(settings):
    for which, size, length in _batches(model, [len(ids) for ids in prompts], settings):
      room = model.cfg.max_len - (1 if separate else max(len(prompts[i]) for i in which))
      if room < 1:
        raise ConfigError(
          f"a prompt of {model.cfg.max_len - room} tokens leaves nothing to write in a context of {model.cfg.max_len}; "
          "shorten it"
        )
      if not separate:
        length = min(length, model.cfg.max_len - min(wanted, room))
      length = max(length, max(len(prompts[i]) for i in which))
      ids, mask = np.full((size, length), tokenizer.pad_id, np.int32), np.zeros((size, length), np.int32)
      for row, i in enumerate([*which, *[which[-1]] * (size - len(which))]):  # no row may be empty
        ids[row, length - len(prompts[i]) :], mask[row, length - len(prompts[i]) :] = prompts[i], 1
      tokens = generate(
        model,
        params,
        *_put((ids, mask), settings),
        max_new_tokens=min(wanted, room),
        eos_id=ends or None,
        pad_id=tokenizer.pad_id,
        start_id=tokenizer.pad_id,
        **said,
      )
      new = _fetch(tokens)[:, -min(wanted, room) :]
      for row, i in enumerate(which):
        stop = np.flatnonzero(np.isin(new[row], ends))
        found[i] = {"tokens": new[row, : stop[0]] if len(stop) else new[row]}
  return found


def _fetch(x: Array) -> np.ndarray:
  """All of an array that several processes may hold."""
  if x.is_fully_addressable:
    return np.asarray(x)
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _using(settings: PredictionSettings) -> Any:
  return contextlib.nullcontext() if settings.mesh is None else sharding.use_mesh(settings.mesh, settings.rules)


def _batches(model: Any, lengths: Sequence[int], settings: PredictionSettings) -> Iterator[tuple[np.ndarray, int, int]]:
  parts = 1 if settings.mesh is None else sharding.num_batch_shards(settings.mesh, settings.rules)
  return batches(np.array(lengths, int), model.cfg.max_len, settings.batch_tokens, parts)


def _put(batch: Any, settings: PredictionSettings) -> Any:
  if settings.mesh is None:
    return jax.tree.map(jnp.asarray, batch)
  return put_on_mesh(batch, sharding.named_sharding(settings.mesh, "act_batch", rules=settings.rules))


# files


def predict_file(
  path: str,
  input: str,
  output: str,
  *,
  min_confidence: float | None = None,
  batch_tokens: int = BATCH_TOKENS,
  mesh: Mapping[str, int] | None = None,
  generation: Mapping[str, Any] | None = None,
  trust: bool = False,
) -> tuple[int, int, list[str]]:
  """Writes a line of JSON for every line of a JSONL file, in their order.

  Args:
    path: see `pretrained.open_path`.
    input: JSONL with the fields that the model's task reads; a field "id" is kept.
    output: a line is what `Task.result` gives; of a line that cannot be read {"line": its number, "error": why}.
    min_confidence: only lines that are answered with at least this confidence, with all fields of the input: labelled
      data to train on.
    mesh: sizes of `sharding.make_mesh`.
    generation: keywords of `llmjax.generate`.
  Returns:
    how many lines were written with an answer, how many there are, and what is wrong with the bad ones.
  """
  source_file = Path(input)
  if not source_file.is_file():
    raise ConfigError(f"--input={input}: there is no such file")
  if source_kind(source_file) not in ("jsonl", "text"):
    raise ConfigError(f"--input={input}: predict reads JSONL, an object a line, and this is none by its ending")
  if not Path(output).parent.is_dir():
    raise ConfigError(f"--output={output}: there is no folder {Path(output).parent}")
  target = check_output(output, input)
  if min_confidence is not None and not 0 <= min_confidence <= 1:
    raise ConfigError(f"--min_confidence={min_confidence} must be from 0 to 1")
  with open_path(path) as source:
    task = check_task(source.objective(trust))
    check_generation(task, generation or {})
    if min_confidence is not None and not task.confident:
      raise ConfigError(f"--min_confidence={min_confidence}: the model's answers have no confidence; leave it out")
    lines = list(_read_lines(source_file, task))
    if not lines:
      raise ConfigError(f"--input={input}: the file is empty")
    processes.preflight(
      lambda: {"model": processes.short_digest(source.manifest), "input": processes.short_digest(lines)}
    )
    rules = {**sharding.RULES, **source.config["rules"]}
    devices = sharding.make_mesh(mesh or {"data": -1})
    loaded: Pretrained = source.load(trust, devices, rules)
  good = [record for _, record, _ in lines if record is not None]
  bad = [f"{source_file}:{number}: {error}" for number, record, error in lines if record is None]
  settings = PredictionSettings(batch_tokens, devices, rules, generation or {})
  answers = iter(predict(loaded.model, loaded.params, task, good, settings))
  out: list[dict[str, Any]] = []
  for number, record, error in lines:
    if record is None:
      out += [{"line": number, "error": error}] if min_confidence is None else []
    elif min_confidence is None:
      out.append(({"id": record["id"]} if "id" in record else {}) | next(answers))
    else:
      answer = next(answers)
      sure = answer["confidence"] >= min_confidence
      out += [{**record, **{k: v for k, v in answer.items() if k != "scores"}}] if sure else []
  if jax.process_index() == 0:
    with replacing(target) as partial:
      partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in out), encoding="utf-8")
  return len(out) - (len(bad) if min_confidence is None else 0), len(lines), bad


def _read_lines(path: Path, task: Task) -> Iterable[tuple[int, dict[str, Any] | None, str]]:
  """(line number from 1, record or None, what is wrong with it) of every line; blank ones at the end are none."""
  with path.open("rb") as file:
    blank = 0
    for number, line in enumerate(file, 1):
      if not line.strip():
        blank += 1
        continue
      yield from ((number - before, None, "the line is blank") for before in range(blank, 0, -1))
      blank = 0
      try:
        record = json.loads(line.decode("utf-8"))
        if not isinstance(record, dict):
          raise ConfigError(f"not an object but a {type(record).__name__}")
        task.check(record, labelled=False)
        if not task.encode(record, labelled=False):
          raise ConfigError("there are no tokens to read")
      except UnicodeDecodeError as error:
        yield number, None, f"byte {error.start} is not UTF-8"
      except json.JSONDecodeError as error:
        yield number, None, f"not a JSON object: {json_error(error)}"
      except ConfigError as error:
        yield number, None, str(error)
      else:
        yield number, record, ""

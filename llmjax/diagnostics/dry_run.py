"""What `train --dry_run` says: parameters, compiled memory against the device's, the first batch as text."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.checkpoints.sources import abstract_params
from llmjax.config import to_dict
from llmjax.diagnostics import mup_coord_check
from llmjax.distributed import sharding
from llmjax.training.components import open_source
from llmjax.training.interruption import make_profiler
from llmjax.training.program import Program, make_program
from llmjax.training.resume import tokenizer_to_reuse
from llmjax.training.session import RunSchedule
from llmjax.trees import flatten_tree
from llmjax.types import Batch

WAYS_OUT = "raise accum, set model.remat=full, cut along mesh.fsdp, or lower batch_size"


def dry_run(config: Any) -> str:
  """Builds and compiles the step of a config, runs nothing."""
  program, batch = checked(config)
  parts = [parameters(program, batch), memory(program, batch), tokens(program, batch)]
  if getattr(program.model.cfg, "base_width", None):
    parts.insert(1, f"muP, each over that of the base model\n{mup_coord_check.table(program)}")
  return "\n\n".join(parts)


def checked(config: Any, devices: list[Any] | None = None) -> tuple[Program, Batch]:
  """The program of a config that a run can begin with, and this process's first batch; nothing is compiled."""
  config = to_dict(config)
  program = make_program(config, tokenizer=tokenizer_to_reuse(config, None), devices=devices)
  RunSchedule(program)
  make_profiler(program.config["profile"], Path())
  stream = program.make_stream(open_source(program.config, program.config["data"]["train"]), prefetch=0)
  batch = next(iter(stream))
  stream.close()
  return program, batch


def parameters(program: Program, batch: Batch) -> str:
  """A table of parameters by group, and what a step costs."""
  groups: dict[str, int] = defaultdict(int)
  for path, leaf in flatten_tree(program.abstract_params).items():
    parts = path.split("/")
    depth = 3 if parts[0] in ("encoder", "decoder") else 1
    groups["/".join(parts[:depth][: len(parts) - 1])] += leaf.size
  lines = [f"  {name:<32} {size:>16,}" for name, size in groups.items()]
  per_step = program.config["batch_size"] * program.config["seq_len"]
  mesh = " x ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
  return "\n".join(
    [
      "Parameters",
      *lines,
      f"  {'total':<32} {program.num_params:>16,}",
      *([f"  {'of these learn':<32} {program.num_trainable:>16,}"] if program.state_shapes.frozen else []),
      f"Mesh: {mesh} on {program.mesh.size} x {jax.devices()[0].device_kind}",
      f"Step: {per_step:,} input tokens, {program.step_flops(batch):.3g} model FLOPs; "
      f"{program.total_steps:,} steps are {program.total_steps * per_step:,} tokens",
    ]
  )


def device_memory() -> int | None:
  """Bytes of one device, None if it does not say; a CPU has the machine's."""
  device = jax.local_devices()[0]
  if device.platform == "cpu":
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
  stats = device.memory_stats()
  return stats["bytes_limit"] if stats else None


def compiled_bytes(program: Program, batch: Batch) -> tuple[int, int]:
  """Bytes of a device that a step takes, as compiled: of state and batch, and of work. Fills the compilation cache."""
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((program.config["batch_size"], *np.shape(x)[1:]), x.dtype), batch
  )
  key = jax.eval_shape(jax.random.key, 0)
  rate = jax.ShapeDtypeStruct((), jnp.float32)
  with sharding.use_mesh(program.mesh, program.rules):
    others = {name: abstract_params(model) for name, model in program.auxiliary.items()}
    compiled = program.train_step.lower(program.state_shapes, shapes, key, rate, others).compile()
  used: Any = compiled.memory_analysis()
  work = used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
  return used.argument_size_in_bytes, work


def memory(program: Program, batch: Batch) -> str:
  """Compiles the real step and sets its memory against the device's."""
  state, work = compiled_bytes(program, batch)
  total, limit = state + work, device_memory()
  against = "" if limit is None else f" of {size(limit)}: {'fits' if total < limit else 'DOES NOT FIT; ' + WAYS_OUT}"
  return f"Memory per device, as compiled: {size(state)} state and batch + {size(work)} work = {size(total)}{against}"


def tokens(program: Program, batch: Batch, rows: int = 2, columns: int = 48) -> str:
  """The beginning of the first rows: what goes in, and below it what is to be predicted, `·` where nothing is."""
  lines = ["First batch: tokens, ‖ between documents; below them what is predicted"]
  for row in range(min(rows, program.config["batch_size"])):
    lines.append(f"  row {row}")
    lines.extend(f"    {name:<10} {text}" for name, text in _streams(program.tokenizer, batch, row, columns))
  return "\n".join(lines)


def _streams(tokenizer: Any, batch: Batch, row: int, columns: int, view: str = "") -> Iterator[tuple[str, str]]:
  """(name, text) of every stream of a row."""
  for name, stream in (("inputs", batch.inputs), ("targets", batch.targets)):
    if stream is None:
      continue
    segments = np.asarray(stream.segments[row])
    used = int((segments > 0).sum())
    shown = [_show(tokenizer, stream.ids[row][i]) for i in range(min(columns, used))]
    for i in reversed(range(1, len(shown))):
      if segments[i] != segments[i - 1]:
        shown.insert(i, " ‖ ")
    yield view + name, f"{''.join(shown)} ...  ({used}/{len(segments)} tokens, {segments.max()} documents)"
  predicted = batch.inputs if batch.targets is None else batch.targets
  for term, labels in batch.labels.items():
    if predicted is not None and term in batch.weights:
      bears = np.asarray(batch.weights[term][row])[:columns] > 0
      said = (str(x) if term == "sentence" else _show(tokenizer, x) for x in labels[row][:columns])
      yield view + term, "".join(x if w else "·" for x, w in zip(said, bears)) + " ..."
  for name, inner in batch.extras.items():
    yield from _streams(tokenizer, inner, row, columns, f"{view}{name}/")


def _show(tokenizer: Any, token: Any) -> str:
  return repr(tokenizer.show([int(token)]))[1:-1]


def size(count: float) -> str:
  for unit in ("B", "KiB", "MiB", "GiB"):
    if count < 1024:
      return f"{count:.4g} {unit}"
    count /= 1024
  return f"{count:.4g} TiB"

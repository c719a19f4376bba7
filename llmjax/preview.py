"""What `train --dry_run` says: parameters, compiled memory against the device's, the first batch as text."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax import sharding
from llmjax.program import Program, flat_paths, make_program, open_source
from llmjax.train import make_evals, make_stream, period
from llmjax.types import Batch


def preview(config: Any) -> str:
  """Builds and compiles the step of a config, runs nothing."""
  program = make_program(config)
  make_evals(program)
  for part in ("checkpoint", "log"):
    period(program, part)
  config = program.config
  source = open_source(config, config["data"]["train"])
  stream = make_stream(program, source, prefetch=0)
  batch = next(iter(stream))
  stream.close()
  return "\n\n".join([parameters(program), memory(program, batch), tokens(program, batch)])


def parameters(program: Program) -> str:
  """A table of parameters by group, and what a step costs."""
  groups: dict[str, int] = defaultdict(int)
  for path, leaf in flat_paths(program.state_shapes.params).items():
    parts = path.split("/")
    groups["/".join(parts[: 3 if parts[0] == "decoder" else 1][: len(parts) - 1])] += leaf.size
  lines = [f"  {name:<32} {size:>16,}" for name, size in groups.items()]
  per_step = program.config["batch_size"] * program.config["seq_len"]
  mesh = " x ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
  return "\n".join(
    [
      "Parameters",
      *lines,
      f"  {'total':<32} {program.num_params:>16,}",
      f"Mesh: {mesh} on {program.mesh.size} x {jax.devices()[0].device_kind}",
      f"Step: {per_step:,} tokens, {program.flops_per_token * per_step:.3g} model FLOPs; "
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


def memory(program: Program, batch: Batch) -> str:
  """Compiles the real step and sets its memory against the device's."""
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((program.config["batch_size"], *np.shape(x)[1:]), x.dtype), batch
  )
  key = jax.eval_shape(jax.random.key, 0)
  rate = jax.ShapeDtypeStruct((), jnp.float32)
  with sharding.use(program.mesh, program.rules):
    compiled = program.train_step.lower(program.state_shapes, shapes, key, rate).compile()
  used = compiled.memory_analysis()
  state = used.argument_size_in_bytes
  work = used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
  total, limit = state + work, device_memory()
  misfit = "DOES NOT FIT; raise accum, set model.remat=full, cut along mesh.fsdp, or lower batch_size"
  against = "" if limit is None else f" of {_size(limit)}: {'fits' if total < limit else misfit}"
  return (
    f"Memory per device, as compiled: {_size(state)} state and batch + {_size(work)} work = {_size(total)}{against}"
  )


def tokens(program: Program, batch: Batch, rows: int = 2, columns: int = 48) -> str:
  """The beginning of the first rows: each token as text, those that bear loss in [brackets], documents apart."""
  lines = ["First batch: [tokens whose prediction bears loss], ‖ between documents"]
  weights = np.sum([np.asarray(w) for w in batch.weights.values()], axis=0)
  labels = next(iter(batch.labels.values()))
  for row in range(min(rows, len(labels))):
    segments = np.asarray(batch.inputs.segments[row])
    out = []
    for i in range(min(columns, int((segments > 0).sum()))):
      if i and segments[i] != segments[i - 1]:
        out.append(" ‖ ")
      text = repr(program.tokenizer.decode([int(labels[row][i])]))[1:-1]
      out.append(f"[{text}]" if weights[row][i] > 0 else text)
    used = int((segments > 0).sum())
    lines.append(f"  row {row} ({used}/{len(segments)} tokens, {segments.max()} documents): {''.join(out)} ...")
  return "\n".join(lines)


def _size(count: float) -> str:
  for unit in ("B", "KiB", "MiB", "GiB"):
    if count < 1024:
      return f"{count:.4g} {unit}"
    count /= 1024
  return f"{count:.4g} TiB"

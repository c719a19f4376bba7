"""Dry run of a config, for `train --dry_run`: parameters, compiled memory, and the first batch as text."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.checkpoints.sources.base import abstract_params
from llmjax.config import ConfigLike, to_dict
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.diagnostics.mup_coord_check import mup_scale_table
from llmjax.distributed import sharding
from llmjax.training.components import open_source
from llmjax.training.interruption import make_profiler
from llmjax.training.program import Program, make_program
from llmjax.training.resume import tokenizer_to_reuse
from llmjax.training.session import RunSchedule
from llmjax.trees import flatten_tree
from llmjax.types import Batch, Tokens

MEMORY_ADVICE = "raise accum, set model.remat=full, raise mesh.fsdp, or lower batch_size"
SHOWN_ROWS = 2
SHOWN_TOKENS = 48


def dry_run(config: ConfigLike) -> str:
  """Build and compile the train step of a config without running it, and return a report."""
  program, batch = prepare_run(config)
  sections = [
    describe_parameters(program, batch),
    describe_memory(program, batch),
    describe_first_batch(program, batch),
  ]
  if getattr(program.model.cfg, "base_width", None) is not None:
    sections.insert(1, f"muP, each relative to the base model\n{mup_scale_table(program)}")
  return "\n\n".join(sections)


def prepare_run(config: ConfigLike, devices: Sequence[jax.Device] | None = None) -> tuple[Program, Batch]:
  """Return the program of a config and this process's first batch, after all checks of `train`. Compiles nothing.

  Args:
    config: a config as `llmjax.config.default_config` returns it.
    devices: None: all.

  Raises:
    ConfigError: a run with this config could not start.
  """
  config = to_dict(config)
  program = make_program(config, tokenizer=tokenizer_to_reuse(config, None), devices=devices)
  RunSchedule(program)
  make_profiler(program.config["profile"], Path())
  stream = program.make_stream(open_source(program.config, program.config["data"]["train"]), prefetch=0)
  batch = next(iter(stream))
  stream.close()
  return program, batch


def describe_parameters(program: Program, batch: Batch) -> str:
  """Return a table of the numbers of parameters by group, the mesh, and the cost of a step."""
  groups: dict[str, int] = defaultdict(int)
  for path, leaf in flatten_tree(program.abstract_params).items():
    parts = path.split("/")
    depth = 3 if parts[0] in ("encoder", "decoder") else 1
    groups["/".join(parts[:depth][: len(parts) - 1])] += leaf.size
  lines = [f"  {name:<32} {size:>16,}" for name, size in groups.items()]
  lines.append(f"  {'total':<32} {program.num_params:>16,}")
  if program.state_shapes.frozen:
    lines.append(f"  {'trainable':<32} {program.num_trainable:>16,}")
  step_tokens = program.config["batch_size"] * program.config["seq_len"]
  mesh = " x ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
  return "\n".join(
    [
      "Parameters",
      *lines,
      f"Mesh: {mesh} on {program.mesh.size} x {jax.devices()[0].device_kind}",
      f"Step: {step_tokens:,} input tokens, {program.step_flops(batch):.3g} model FLOPs; "
      f"{program.total_steps:,} steps are {program.total_steps * step_tokens:,} tokens",
    ]
  )


def describe_memory(program: Program, batch: Batch) -> str:
  """Compile the train step, and return its memory per device compared with the device's."""
  arguments, temporary = compiled_bytes(program, batch)
  total, limit = arguments + temporary, device_memory_bytes()
  verdict = ""
  if limit is not None:
    verdict = f" of {format_bytes(limit)}: {'fits' if total < limit else 'DOES NOT FIT; ' + MEMORY_ADVICE}"
  return (
    f"Memory per device, as compiled: {format_bytes(arguments)} state and batch + {format_bytes(temporary)} temporary "
    f"= {format_bytes(total)}{verdict}"
  )


def compiled_bytes(program: Program, batch: Batch) -> tuple[int, int]:
  """Compile the train step, which fills the compilation cache.

  Returns:
    Bytes per device of the arguments (state and batch), and of temporary arrays.
  """

  def global_shape(x: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((program.config["batch_size"], *np.shape(x)[1:]), x.dtype)

  key = jax.eval_shape(jax.random.key, 0)
  rate = jax.ShapeDtypeStruct((), jnp.float32)
  with sharding.use_mesh(program.mesh, program.rules):
    others = {name: abstract_params(model) for name, model in program.auxiliary.items()}
    lowered = program.train_step.lower(program.state_shapes, jax.tree.map(global_shape, batch), key, rate, others)
    used = lowered.compile().memory_analysis()
  assert used is not None  # all backends of JAX report it
  temporary = used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
  return used.argument_size_in_bytes, temporary


def device_memory_bytes() -> int | None:
  """Return the memory of one device, None if it is unknown; for a CPU the memory of the machine."""
  device = jax.local_devices()[0]
  if device.platform == "cpu":
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
  stats = device.memory_stats()
  return int(stats["bytes_limit"]) if stats else None


def describe_first_batch(program: Program, batch: Batch) -> str:
  """Return the beginning of the first rows: inputs, and below them the labels, `·` where there is no loss."""
  lines = ["First batch: tokens, ‖ between documents; below them what is predicted"]
  for row in range(min(SHOWN_ROWS, program.config["batch_size"])):
    lines.append(f"  row {row}")
    lines.extend(f"    {name:<10} {text}" for name, text in _describe_row(program.tokenizer, batch, row))
  return "\n".join(lines)


def _describe_row(tokenizer: Tokenizer, batch: Batch, row: int, view: str = "") -> Iterator[tuple[str, str]]:
  """Yield (name, text) of the streams and labels of a row; `view` is the prefix of the names."""
  for name, stream in (("inputs", batch.inputs), ("targets", batch.targets)):
    if stream is not None:
      yield view + name, _describe_stream(tokenizer, stream, row)
  predicted = batch.inputs if batch.targets is None else batch.targets
  for term, labels in batch.labels.items():
    if predicted is not None and term in batch.weights:
      has_loss = np.asarray(batch.weights[term][row])[:SHOWN_TOKENS] > 0
      texts = (str(x) if term == "sentence" else _show_token(tokenizer, x) for x in labels[row][:SHOWN_TOKENS])
      yield view + term, "".join(text if shown else "·" for text, shown in zip(texts, has_loss)) + " ..."
  for name, inner in batch.extras.items():
    yield from _describe_row(tokenizer, inner, row, f"{view}{name}/")


def _describe_stream(tokenizer: Tokenizer, stream: Tokens, row: int) -> str:
  segments = np.asarray(stream.segments[row])
  num_tokens = int((segments > 0).sum())
  shown = [_show_token(tokenizer, stream.ids[row][i]) for i in range(min(SHOWN_TOKENS, num_tokens))]
  for i in reversed(range(1, len(shown))):
    if segments[i] != segments[i - 1]:
      shown.insert(i, " ‖ ")
  return f"{''.join(shown)} ...  ({num_tokens}/{len(segments)} tokens, {segments.max()} documents)"


def _show_token(tokenizer: Tokenizer, token: np.integer) -> str:
  """Return the text of a token, with control characters escaped."""
  return repr(tokenizer.show([int(token)]))[1:-1]


def format_bytes(count: float) -> str:
  """Return a number of bytes with a binary unit."""
  for unit in ("B", "KiB", "MiB", "GiB"):
    if count < 1024:
      return f"{count:.4g} {unit}"
    count /= 1024
  return f"{count:.4g} TiB"

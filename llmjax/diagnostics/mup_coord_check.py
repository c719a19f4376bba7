"""The coordinate check of a parametrisation: how far training moves what a model computes, at several widths.

Where learning rates carry over from one width to another, every layer's activations move alike at all of them (Yang et
al. 2022, https://arxiv.org/abs/2203.03466, appendix D.1); see `models/width.py` for what muP changes to that end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax import trees
from llmjax.distributed import sharding
from llmjax.models import mup
from llmjax.training.components import open_source
from llmjax.training.program import Program, make_program
from llmjax.types import Outputs

Changes = dict[str, dict[int, float]]  # {layer: {width: mean |change|}}


def coordinates(configs: Mapping[int, Any], steps: int, devices: Sequence[Any] | None = None) -> Changes:
  """The mean |change| of every layer's activations on the first batch, after some steps of training.

  Args:
    configs: {width: the config of a run}, such as of one model at several `model.d_model`.
    devices: all by default.
  Returns:
    {layer: {width: change}}: "layer_0" the embeddings, "layer_1", ... the layers, "hidden" behind the final norm,
    "logits"; of an encoder–decoder also those of "encoder/".
  """
  found: Changes = {}
  for size, config in configs.items():
    program = make_program(config, devices=None if devices is None else list(devices))
    for name, change in _changes(program, steps).items():
      found.setdefault(name, {})[size] = change
  return found


def slopes(changes: Changes) -> dict[str, float]:
  """{layer: d log(change) / d log(width)} by least squares: 0 where a change does not depend on the width."""
  return {name: float(np.polyfit(np.log([*by]), np.log([*by.values()]), 1)[0]) for name, by in changes.items()}


def _changes(program: Program, steps: int) -> dict[str, float]:
  config = program.config
  stream = program.make_stream(open_source(config, config["data"]["train"]), prefetch=0)
  key = jax.device_put(jax.random.key(config["seed"]), program.replicated)
  state = program.init()

  @jax.jit
  def activations(params: Any, batch: Any) -> dict[str, jax.Array]:
    return _named(program.model.apply({"params": params}, batch, all_hidden=True))

  with sharding.use_mesh(program.mesh, program.rules):
    first = batch = program.put(next(stream), config["batch_size"])
    before = activations(program.eval_params(state), first)
    for step in range(steps):
      rate = program.replicate(np.float32(program.learning_rate(step)))
      state, _ = program.train_step(state, batch, key, rate, program.auxiliary_params)
      batch = program.put(next(stream), config["batch_size"])
    after = activations(program.eval_params(state), first)
    found = jax.tree.map(lambda x, y: float(jnp.mean(jnp.abs(x.astype(jnp.float32) - y))), after, before)
  stream.close()
  return found


def _named(out: Outputs) -> dict[str, jax.Array]:
  named: dict[str, jax.Array] = {}
  for prefix, each, last in (
    ("encoder/", out.encoder_all_hidden, out.encoder_hidden),
    ("", out.all_hidden, out.hidden),
  ):
    if each is not None:
      named |= {f"{prefix}layer_{i}": x for i, x in enumerate(each)} | {f"{prefix}hidden": last}
  return {**named, "logits": out.logits}


def table(program: Program) -> str:
  """What the width multiplies of every parameter: its initial standard deviation, what it reads ("input") and its
  learning rate, each over that of the base model."""
  axes = sharding.abstract_parameters(program.model)[1]
  ratios = program.model.cfg.width_ratios
  lines = [f"{'parameter':<52} {'stddev':>8} {'input':>8} {'rate':>8}"]
  for path, names in trees.flatten_tree(axes).items():
    own = mup.strip_stacked_axes(names)
    columns = (
      mup.init_scale(own, ratios),
      mup.input_multiplier(own, ratios),
      mup.lr_multiplier(program.config["optim"], own, ratios),
    )
    lines.append(f"{path:<52} " + " ".join(f"{value:>8.4g}" for value in columns))
  if program.model.cfg.tie_embeddings and program.model.cfg.head == "lm":
    output = mup.input_multiplier(("embed", "vocab"), ratios)
    lines.append(f"{'embedding/table, as the output head':<52} {'':>8} {output:>8.4g}")
  return "\n".join(lines)

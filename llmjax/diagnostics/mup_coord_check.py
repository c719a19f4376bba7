"""Coordinate check of a parametrization: how much training changes activations, at several widths.

If learning rates transfer between widths, the activations of every layer change equally at all of them (Yang et al.
2022, https://arxiv.org/abs/2203.03466, appendix D.1). See `llmjax/models/mup.py` for what muP changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llmjax import trees
from llmjax.config import ConfigLike
from llmjax.distributed import sharding
from llmjax.models import mup
from llmjax.training.components import open_source
from llmjax.training.program import Program, make_program
from llmjax.trees import Params
from llmjax.types import Batch, Outputs

Changes = dict[str, dict[int, float]]  # {layer: {width: mean |change|}}


def activation_changes(
  configs: Mapping[int, ConfigLike], steps: int, devices: Sequence[jax.Device] | None = None
) -> Changes:
  """Train each config for some steps, and return the mean |change| of the activations on the first batch.

  Args:
    configs: {width: config of a run}, such as of one model with several values of `model.d_model`.
    steps: number of steps.
    devices: None: all.

  Returns:
    {layer: {width: change}}. Layers are "layer_0" (the embeddings), "layer_1", ..., "hidden" (after the final norm),
    and "logits"; for an encoder-decoder also those of the encoder, with the prefix "encoder/".
  """
  changes: Changes = {}
  for width, config in configs.items():
    program = make_program(config, devices=devices)
    for layer, change in _train_and_compare(program, steps).items():
      changes.setdefault(layer, {})[width] = change
  return changes


def change_slopes(changes: Changes) -> dict[str, float]:
  """Return {layer: d log(change) / d log(width)} by least squares; 0: the change does not depend on the width."""
  return {
    layer: float(np.polyfit(np.log([*by_width]), np.log([*by_width.values()]), 1)[0])
    for layer, by_width in changes.items()
  }


def _train_and_compare(program: Program, steps: int) -> dict[str, float]:
  """Return {layer: mean |change|} of one program."""
  config = program.config
  stream = program.make_stream(open_source(config, config["data"]["train"]), prefetch=0)
  key = jax.device_put(jax.random.key(config["seed"]), program.replicated)
  state = program.init()

  @jax.jit
  def activations(params: Params, batch: Batch) -> dict[str, jax.Array]:
    return _name_layers(program.model.apply({"params": params}, batch, all_hidden=True))

  with sharding.use_mesh(program.mesh, program.rules):
    first = batch = program.put(next(stream), config["batch_size"])
    before = activations(program.eval_params(state), first)
    for step in range(steps):
      rate = program.replicate(np.float32(program.learning_rate(step)))
      state, _ = program.train_step(state, batch, key, rate, program.auxiliary_params)
      batch = program.put(next(stream), config["batch_size"])
    after = activations(program.eval_params(state), first)
    changes = {name: float(jnp.mean(jnp.abs(after[name].astype(jnp.float32) - before[name]))) for name in after}
  stream.close()
  return changes


def _name_layers(out: Outputs) -> dict[str, jax.Array]:
  """Return the activations of a forward pass by the names of `activation_changes`."""
  named: dict[str, jax.Array] = {}
  for prefix, layers, last in (
    ("encoder/", out.encoder_all_hidden, out.encoder_hidden),
    ("", out.all_hidden, out.hidden),
  ):
    if layers is not None:
      named |= {f"{prefix}layer_{i}": x for i, x in enumerate(layers)} | {f"{prefix}hidden": last}
  return {**named, "logits": out.logits}


def mup_scale_table(program: Program) -> str:
  """Return a table of what muP multiplies for every parameter, relative to the base model.

  Columns are its initial standard deviation, its input ("input"), and its learning rate ("rate").
  """
  axes = sharding.abstract_parameters(program.model)[1]
  ratios = program.model.cfg.width_ratios
  lines = [f"{'parameter':<52} {'stddev':>8} {'input':>8} {'rate':>8}"]
  for path, names in trees.flatten_tree(axes).items():
    own_axes = mup.strip_stacked_axes(names)
    columns = (
      mup.init_scale(own_axes, ratios),
      mup.input_multiplier(own_axes, ratios),
      mup.lr_multiplier(program.config["optim"], own_axes, ratios),
    )
    lines.append(f"{path:<52} " + " ".join(f"{value:>8.4g}" for value in columns))
  if program.model.cfg.tie_embeddings and program.model.cfg.head == "lm":
    output = mup.input_multiplier(("embed", "vocab"), ratios)
    lines.append(f"{'embedding/table, as the output head':<52} {'':>8} {output:>8.4g}")
  return "\n".join(lines)

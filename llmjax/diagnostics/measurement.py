"""Measurement of a run on a mesh: parameters, losses, gradients, data and collectives, to compare with another mesh."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llmjax import trees
from llmjax.config import ConfigTree, build
from llmjax.diagnostics.shrink import NUM_STEPS
from llmjax.distributed import sharding
from llmjax.metrics.sums import metric_means
from llmjax.training.components import make_config_tokenizer, open_source
from llmjax.training.optimizers import OPTIMIZERS
from llmjax.training.program import Program, make_program
from llmjax.training.resume import tokenizer_to_reuse
from llmjax.training.step import TrainState
from llmjax.trees import Params, PyTree
from llmjax.types import Batch, Metrics

# Added to every parameter. Behind a parameter that is 0, all gradients are 0, and any two of them are equal.
NOISE_STDDEV = 0.02
PARTS = ("initial", "held out", "loss", "gradient", "after")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
FlatArrays = dict[str, np.ndarray]


@dataclasses.dataclass
class Measurement:
  """Results of a config on a mesh.

  Attributes:
    parts: {each of PARTS: {name: array}}: the initial parameters, metrics on held-out data, losses of all steps, the
      gradients of the first step, and the parameters after the last step.
    rows: {"STEP/ROW of the global batch": digest of its content}, for the rows of this process.
    collectives: {kind: number} in the compiled train step.
  """

  parts: dict[str, FlatArrays]
  rows: dict[str, str]
  collectives: dict[str, int]


def measure_run(
  config: ConfigTree, sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> Measurement:
  """Run a config of `shrink_config` on a mesh. Several processes each return the same arrays, and their own rows.

  Args:
    config: the config.
    sizes: {mesh axis: size}, see `sharding.resolve_mesh_sizes`.
    devices: None: all.
  """
  program = _make_program(config, sizes, devices)
  tree = program.config
  stream = program.make_stream(open_source(tree, tree["data"]["train"]), prefetch=0)
  local_batches = [with_uneven_weights(next(stream)) for _ in range(NUM_STEPS)]
  stream.close()
  batches = [program.put(batch, tree["batch_size"]) for batch in local_batches]
  key = jax.jit(lambda: jax.random.key(tree["seed"]), out_shardings=program.replicated)()
  rate = program.replicate(np.float32(tree["optim"]["lr"]))
  auxiliary = program.auxiliary_params
  state = program.init(program.starting_params()[0])
  parts: dict[str, FlatArrays] = {part: {} for part in PARTS}
  parts["initial"] = fetch_tree(program, program.eval_params(state))
  state = perturb(program, state)
  with sharding.use_mesh(program.mesh, program.rules):
    parts["held out"] = metric_arrays(program.eval_step(program.eval_params(state), batches[1], auxiliary))
    # Compiled once, so that a step whose output has another sharding than its input raises.
    train_step = program.train_step.lower(state, batches[0], key, rate, auxiliary).compile()
    for i, batch in enumerate(batches):
      state, metrics = jax.block_until_ready(train_step(state, batch, key, rate, auxiliary))
      parts["loss"] |= {f"{name} of step {i}": value for name, value in metric_arrays(metrics).items()}
      if i == 0:
        parts["gradient"] = fetch_tree(program, recorded_gradients(program, state))
  parts["after"] = fetch_tree(program, trees.merge_trainable(state.params, state.frozen))
  average = {} if state.ema is None else fetch_tree(program, state.ema)
  parts["after"] |= {f"average/{name}": array for name, array in average.items()}
  rows = {f"{i}/{row}": digest for i, batch in enumerate(local_batches) for row, digest in row_hashes(batch)}
  return Measurement(parts, rows, count_collectives(str(train_step.as_text())))


def _make_program(config: ConfigTree, sizes: Mapping[str, int], devices: Sequence[jax.Device] | None) -> Program:
  num_devices = len(jax.devices() if devices is None else devices)
  config = {**config, "mesh": sharding.resolve_mesh_sizes(sizes, num_devices)}
  tokenizer = tokenizer_to_reuse(config, None) or make_config_tokenizer(config)
  if config["model"]["name"] == "transformer" and config["init_from"] is None and config["model"]["vocab_size"] is None:
    # A multiple of 8, so that the vocabulary can be sharded.
    config["model"] = {**config["model"], "vocab_size": -(-tokenizer.vocab_size // 8) * 8}
  return make_program(config, tokenizer=tokenizer, devices=devices)


def perturb(program: Program, state: TrainState) -> TrainState:
  """Return the state with noise added to every parameter."""

  def add_noise(tree: PyTree, key: jax.Array) -> PyTree:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves)) if leaves else ()
    noise = (NOISE_STDDEV * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves))
    return jax.tree.unflatten(structure, [x + n for x, n in zip(leaves, noise)])

  def perturb_all(state: TrainState) -> TrainState:
    trained_key, frozen_key = jax.random.split(jax.random.key(1))
    return dataclasses.replace(
      state,
      params=add_noise(state.params, trained_key),
      ema=None if state.ema is None else add_noise(state.ema, trained_key),
      frozen=add_noise(state.frozen, frozen_key),
    )

  with sharding.use_mesh(program.mesh, program.rules):
    perturbed: TrainState = jax.jit(perturb_all, out_shardings=program.state_shardings)(state)
  return perturbed


def with_uneven_weights(batch: Batch) -> Batch:
  """Return a process's batch with different total weights per row, so that a mean of means is not the mean.

  Weights [B L] are set to 0 at the end of a row, and weights [B] are multiplied. A contrastive loss has no weights, and
  sees the whole batch anyway.
  """
  rows = np.asarray(batch.rows)

  def thin_out(weight: np.ndarray) -> np.ndarray:
    if weight.ndim < 2:
      return weight * (1 + rows % 4).astype(weight.dtype)
    num_kept = weight.shape[1] - rows % 4 * weight.shape[1] // 8
    is_kept = np.arange(weight.shape[1]) < num_kept[:, None]
    return weight * is_kept.reshape(len(rows), -1, *[1] * (weight.ndim - 2))

  return dataclasses.replace(batch, weights={term: thin_out(weight) for term, weight in batch.weights.items()})


def record_gradient(axes: PyTree, optimizer: ConfigTree) -> optax.GradientTransformation:
  """Wrap the optimizer of one parameter: its state also holds the last gradient.

  Args:
    axes: logical axes of the parameter, as every optimizer gets them.
    optimizer: config of the wrapped optimizer.
  """
  tx: optax.GradientTransformation = build(optimizer, OPTIMIZERS, "optim", axes=axes)

  def init(param: jax.Array) -> PyTree:
    return {"inner": tx.init(param), "gradient": jnp.zeros_like(param)}

  def update(grad: jax.Array, state: PyTree, param: jax.Array | None = None) -> tuple[PyTree, PyTree]:
    direction, inner = tx.update(grad, state["inner"], param)
    return direction, {"inner": inner, "gradient": grad}

  return optax.GradientTransformation(init, update)


def recorded_gradients(program: Program, state: TrainState) -> Params:
  """Return the gradients, after clipping, that `record_gradient` holds."""
  return jax.tree.map(lambda _, recorder: recorder["gradient"], program.state_shapes.params, state.opt_state)


def fetch_tree(program: Program, tree: PyTree) -> FlatArrays:
  """Return {path: whole array} of a sharded tree, in every process."""
  whole = jax.jit(_identity, out_shardings=program.replicated)(tree)
  return {path: np.asarray(leaf, np.float32) for path, leaf in trees.flatten_tree(jax.device_get(whole)).items()}


def _identity(tree: PyTree) -> PyTree:  # one function for all calls, so that equal shapes compile once
  return tree


def metric_arrays(metrics: Metrics) -> FlatArrays:
  """Return {metric: mean}, without metrics of weight zero."""
  return {name: np.asarray(value, np.float32) for name, value in metric_means(jax.device_get(metrics)).items()}


def row_hashes(batch: Batch) -> Iterator[tuple[int, str]]:
  """Yield for each row of a process's batch its number in the global batch and a digest of its content."""
  leaves = jax.tree.leaves(batch)
  for i, row in enumerate(np.asarray(batch.rows)):
    content = b"".join(np.ascontiguousarray(leaf[i]).tobytes() for leaf in leaves)
    yield int(row), hashlib.sha256(content).hexdigest()[:16]


def count_collectives(hlo: str) -> dict[str, int]:
  """Return {kind: number} of the collectives in the text of a compiled program. The body of a loop counts once."""
  counts = collections.Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", hlo))
  return {name: counts[name] for name in COLLECTIVES if counts[name]}

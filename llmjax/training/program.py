"""The program of a config: model, objective, optimizer, mesh, abstract state, and the jitted steps.

Training, evaluation and everything else that runs a config starts with `make_program`. Nothing in this file loops over
steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.checkpoints.heads import FROM_PRETRAINED, with_head_fields
from llmjax.checkpoints.init_from import labels_of_init, load_params, pretrained_model_config
from llmjax.checkpoints.objectives import make_objective
from llmjax.checkpoints.sources.base import abstract_params
from llmjax.config import ConfigError, ConfigLike, ConfigTree, to_dict
from llmjax.config.mesh import RULES, Rules
from llmjax.config.model import TransformerConfig
from llmjax.data.pipeline import TrainStream
from llmjax.data.sources.base import Source
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.distributed import sharding
from llmjax.models.attention.select import check_attention_kernel
from llmjax.models.lora import check_lora_targets
from llmjax.telemetry.flops import forward_flops
from llmjax.training import optimizers, step
from llmjax.training.components import (
  check_config,
  check_model_fits_objective,
  count_examples,
  duration_converter,
  label_split,
  make_auxiliary,
  make_config_tokenizer,
  make_model,
  open_source,
)
from llmjax.training.schedules import make_schedule
from llmjax.training.trainable import layer_lr_scales, match_trainable
from llmjax.trees import Params, PyTree, flatten_tree, merge_trainable, select_leaves, split_trainable, unflatten_tree
from llmjax.types import Batch, Model, Objective, dummy_batch


@dataclasses.dataclass(frozen=True)
class Program:
  """Everything that is fixed before the first step.

  Attributes:
    config: plain data; values that were None and had to be inferred are set.
    total_steps: steps of the run.
    count_epoch_rows: returns the rows of an epoch, see `count_examples`.
    learning_rate: step -> learning rate.
    state_shapes: the train state with a jax.ShapeDtypeStruct at every leaf.
    state_shardings: the same with a NamedSharding.
    trainable: the tree of parameters with bools, True if trained.
    auxiliary: the frozen models of config.auxiliary, by name.
    train_step: jitted (state, batch, key, learning_rate, auxiliary_params) -> (state, metrics); donates the state.
    eval_step: jitted (params, batch, auxiliary_params) -> metrics.
  """

  config: ConfigTree
  model: Model
  tokenizer: Tokenizer
  objective: Objective
  tx: optax.GradientTransformation
  mesh: Mesh
  rules: Rules
  total_steps: int
  count_epoch_rows: Callable[[], int | None]
  learning_rate: Callable[[int], float]
  state_shapes: step.TrainState
  state_shardings: step.TrainState
  trainable: PyTree
  auxiliary: Mapping[str, Model]
  train_step: jax.stages.Wrapped
  eval_step: jax.stages.Wrapped

  @property
  def replicated(self) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def batch_sharding(self) -> NamedSharding:
    return sharding.named_sharding(self.mesh, "act_batch", rules=self.rules)

  @property
  def abstract_state(self) -> step.TrainState:
    """The train state with shapes and shardings: the target that a checkpoint is restored to."""

    def attach(shape: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

    abstract: step.TrainState = jax.tree.map(attach, self.state_shapes, self.state_shardings)
    return abstract

  @property
  def abstract_params(self) -> Params:
    """All parameters, trainable and frozen, with shapes and shardings."""
    return merge_trainable(self.abstract_state.params, self.abstract_state.frozen)

  @property
  def num_params(self) -> int:
    return self.num_trainable + sum(x.size for x in jax.tree.leaves(self.state_shapes.frozen))

  @property
  def num_trainable(self) -> int:
    return sum(x.size for x in jax.tree.leaves(self.state_shapes.params))

  def steps(self, value: object, key: str) -> int | None:
    """Return a duration of this config in steps; `key` is its config key, for messages."""
    return duration_converter(self.config, self.total_steps, self.count_epoch_rows)(value, key)

  def init(self, params: Params | None = None) -> step.TrainState:
    """Return the state before the first step, initialised under its sharding.

    Args:
      params: parameters (host or device arrays) that replace fresh ones, a part of the tree.
    """
    ema = self.config["ema_decay"] is not None

    def make(params: Params) -> step.TrainState:
      return step.make_train_state(params, self.tx, ema, self.trainable)

    state: step.TrainState = self._init_sharded(make, self.state_shardings, params)
    return state

  def _init_sharded(self, make: Callable[[Params], PyTree], shardings: PyTree, params: Params | None) -> PyTree:
    """Return `make` of all parameters: fresh ones, replaced by `params` where given."""

    def run(key: jax.Array, given: Mapping[str, jax.Array]) -> PyTree:
      fresh = flatten_tree(nn.unbox(step.init_params(key, self.model, dummy_batch())))
      return make(unflatten_tree({**fresh, **given}))

    where = flatten_tree(merge_trainable(self.state_shardings.params, self.state_shardings.frozen))
    given = {path: jax.device_put(leaf, where[path]) for path, leaf in flatten_tree(params or {}).items()}
    with sharding.use_mesh(self.mesh, self.rules):
      return jax.jit(run, out_shardings=shardings)(jax.random.key(self.config["seed"]), given)

  def starting_params(self) -> tuple[Params, list[str]]:
    """Return the parameters read from config.init_from, and the names of those that it does not have."""
    path = self.config["init_from"]
    if path is None:
      return {}, []
    return load_params(path, self.model, self.abstract_params, self.config["init_map"])

  @functools.cached_property
  def auxiliary_params(self) -> dict[str, Params]:
    """Parameters of the models of config.auxiliary, read at the first use."""
    return {name: self._read_auxiliary(name, model) for name, model in self.auxiliary.items()}

  def _read_auxiliary(self, name: str, model: Model) -> Params:
    path = self.config["auxiliary"][name]["init_from"]
    abstract = abstract_params(model, self.mesh, self.rules)
    if path is not None:
      return load_params(path, model, abstract)[0]
    # None means a copy of the parameters that this run starts from.
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return self._init_sharded(lambda params: select_leaves(params, shardings), shardings, self.starting_params()[0])

  def put(self, batch: Batch, batch_size: int) -> Batch:
    """Return this process's rows of a batch (NumPy) as global arrays of `batch_size` rows."""

    def one(x: np.ndarray) -> jax.Array:
      return jax.make_array_from_process_local_data(self.batch_sharding, x, (batch_size, *x.shape[1:]))

    return jax.tree.map(one, batch)

  def local_rows(self, batch_size: int) -> list[int]:
    """Return the rows of the global batch that this process's devices hold; processes may share rows."""
    pieces = self.batch_sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for piece in pieces if piece for row in range(*piece[0].indices(batch_size))})

  def replicate(self, value: np.generic) -> jax.Array:
    """Return a number on every device.

    `jax.device_put` would let the processes compare their values first, and wait for that.
    """
    return jax.make_array_from_process_local_data(self.replicated, np.asarray(value), ())

  def make_stream(self, source: Source, *, prefetch: int) -> TrainStream:
    """Return this process's rows of the training batches, made from the records of `source`."""
    config = self.config
    return TrainStream(
      source,
      self.tokenizer,
      self.objective,
      batch_size=config["batch_size"],
      seq_len=config["seq_len"],
      seed=config["seed"],
      rows=self.local_rows(config["batch_size"]),
      pack=config["data"]["pack"],
      interleave=config["data"]["interleave"],
      workers=config["data"]["workers"],
      prefetch=prefetch,
    )

  def eval_params(self, state: step.TrainState) -> Params:
    """Return all parameters as they are evaluated: the average if there is one, and the frozen ones."""
    return merge_trainable(state.params if self.config["ema_decay"] is None else state.ema, state.frozen)

  def step_flops(self, batch: Batch) -> float:
    """Return the model FLOPs of a train step, forward and backward, as if all parameters were trained."""
    others = {name: abstract_params(model) for name, model in self.auxiliary.items()}

    def loss(params: Params, batch: Batch, others: Mapping[str, Params]) -> PyTree:
      settings = {"model": self.model, "objective": self.objective, "auxiliary": self.auxiliary}
      return step.objective_sums(params, batch, others, **settings)

    with sharding.use_mesh(self.mesh, self.rules):
      return 3 * forward_flops(loss, self.abstract_params, batch, others)


def make_program(
  config: ConfigLike, *, tokenizer: Tokenizer | None = None, devices: Sequence[jax.Device] | None = None
) -> Program:
  """Build the program of a config. Compiles nothing, and allocates nothing on a device.

  Args:
    config: a config as `llmjax.config.default_config` returns it.
    tokenizer: the tokenizer of a checkpoint; None: that of the config.
    devices: None: all.

  Raises:
    ConfigError: anything in the config that cannot work.
  """
  task = _build_task(to_dict(config), tokenizer)
  mesh, rules = _build_mesh(task.config, devices)
  updates = _build_optimizer(task, mesh, rules)
  train_step, eval_step = _jit_steps(task, updates, mesh, rules)
  return Program(
    config=task.config,
    model=task.model,
    tokenizer=task.tokenizer,
    objective=task.objective,
    tx=updates.tx,
    mesh=mesh,
    rules=rules,
    total_steps=updates.total_steps,
    count_epoch_rows=updates.count_epoch_rows,
    learning_rate=updates.learning_rate,
    state_shapes=updates.state_shapes,
    state_shardings=updates.state_shardings,
    trainable=updates.trainable,
    auxiliary=task.auxiliary,
    train_step=train_step,
    eval_step=eval_step,
  )


@dataclasses.dataclass(frozen=True)
class _TaskParts:
  """What is trained on what: the config with inferred values, and the objects that it names."""

  config: ConfigTree
  tokenizer: Tokenizer
  objective: Objective
  model: Model
  auxiliary: Mapping[str, Model]


@dataclasses.dataclass(frozen=True)
class _UpdateParts:
  """How parameters are updated: durations, learning rate, optimizer, and the train state with its shardings."""

  total_steps: int
  count_epoch_rows: Callable[[], int | None]
  learning_rate: Callable[[int], float]
  tx: optax.GradientTransformation
  trainable: PyTree
  state_shapes: step.TrainState
  state_shardings: step.TrainState
  param_shardings: PyTree  # of all parameters


def _build_task(config: ConfigTree, tokenizer: Tokenizer | None) -> _TaskParts:
  """Step 1 of `make_program`: tokenizer, objective and models, and the values that they infer."""
  spec, family = config["model"], None
  if spec.get("name") == FROM_PRETRAINED:
    spec, family = pretrained_model_config(config)
    if config["seq_len"] is None:
      config["seq_len"] = min(config["data"]["longest"], spec["max_len"] or config["data"]["longest"])
  check_config(config)
  if tokenizer is None:
    tokenizer = make_config_tokenizer(config)
  objective = make_objective(
    config["objective"],
    tokenizer,
    config["seq_len"],
    spec,
    records=lambda: open_source(config, label_split(config["data"]["train"])),
    pretrained_head=labels_of_init(config),
  )
  config["objective"] |= objective.resolved_config
  spec = with_head_fields(spec, objective.head, family, config["model"])
  model, config["model"] = make_model(spec, tokenizer.vocab_size, config["seq_len"])
  check_model_fits_objective(objective, model.cfg, config)
  return _TaskParts(config, tokenizer, objective, model, make_auxiliary(config, objective))


def _build_mesh(config: ConfigTree, devices: Sequence[jax.Device] | None) -> tuple[Mesh, Rules]:
  """Step 2 of `make_program`: the mesh and the rules, which have to divide the batch."""
  mesh = sharding.make_mesh(config["mesh"], devices)
  rules = {**RULES, **config["rules"]}
  shards = sharding.num_batch_shards(mesh, rules)
  microbatch = config["batch_size"] // config["accum"]
  if microbatch % shards:
    raise ConfigError(
      f"batch_size={config['batch_size']} in accum={config['accum']} microbatches is {microbatch} sequences, not "
      f"divisible over the {shards} devices of mesh.data x mesh.fsdp; use a multiple of {shards * config['accum']}, or "
      "change mesh or accum"
    )
  return mesh, rules


def _build_optimizer(task: _TaskParts, mesh: Mesh, rules: Rules) -> _UpdateParts:
  """Step 3 of `make_program`: schedule, optimizer, and the abstract train state."""
  config, cfg = task.config, task.model.cfg
  count_epoch_rows = functools.cache(lambda: count_examples(config, task.objective, task.tokenizer))
  total_steps = duration_converter(config, None, count_epoch_rows)(config["total_steps"], "total_steps")
  assert total_steps is not None  # `check_config` refuses None
  schedule = make_schedule(config["schedule"], total_steps, duration_converter(config, total_steps, count_epoch_rows))
  peak, layer_decay = config["optim"].get("lr"), config["optim"].get("layer_decay")
  ema = config["ema_decay"] is not None
  with sharding.use_mesh(mesh, rules):
    if isinstance(cfg, TransformerConfig):
      check_attention_kernel(cfg)
    params, axes = sharding.abstract_parameters(task.model)
    check_lora_targets(params, cfg)
    trainable = match_trainable(params, config["trainable"])
    scales = None if layer_decay is None else layer_lr_scales(params, cfg, layer_decay)
    tx = optimizers.make_optimizer(config["optim"], params, axes, trainable, scales, cfg.width_ratios)
    state_shapes = jax.eval_shape(lambda p: step.make_train_state(p, tx, ema, trainable), params)
  param_shardings = sharding.param_shardings(params, axes, mesh, rules)
  trained, frozen = split_trainable(param_shardings, trainable)
  state_shardings: Any = step.TrainState(
    step=NamedSharding(mesh, PartitionSpec()),  # type: ignore[arg-type]  # shardings in the place of arrays
    params=trained,
    opt_state=optimizers.state_shardings(tx, state_shapes.params, trained, mesh),
    ema=trained if ema else None,
    frozen=frozen,
  )
  return _UpdateParts(
    total_steps=total_steps,
    count_epoch_rows=count_epoch_rows,
    learning_rate=lambda step: peak * schedule(step),
    tx=tx,
    trainable=trainable,
    state_shapes=state_shapes,
    state_shardings=state_shardings,
    param_shardings=param_shardings,
  )


def _jit_steps(
  task: _TaskParts, updates: _UpdateParts, mesh: Mesh, rules: Rules
) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped]:
  """Step 4 of `make_program`: the train step and the evaluation step, with their shardings."""
  config, replicated = task.config, NamedSharding(mesh, PartitionSpec())
  others = {
    name: jax.tree.map(lambda x: x.sharding, abstract_params(model, mesh, rules))
    for name, model in task.auxiliary.items()
  }
  batches = sharding.named_sharding(mesh, "act_batch", rules=rules)
  shared = {
    "model": task.model,
    "objective": task.objective,
    "auxiliary": task.auxiliary,
    "tiles": config["logit_tiles"],
  }
  train = functools.partial(
    step.train_step, tx=updates.tx, accum=config["accum"], ema_decay=config["ema_decay"], **shared
  )
  train_step = jax.jit(
    train,
    donate_argnums=0,
    in_shardings=(updates.state_shardings, batches, replicated, replicated, others),
    out_shardings=(updates.state_shardings, replicated),
  )
  eval_step = jax.jit(
    functools.partial(step.eval_step, **shared),
    in_shardings=(updates.param_shardings, batches, others),
    out_shardings=replicated,
  )
  return train_step, eval_step

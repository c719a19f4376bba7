"""From a config to a program: model, objective, optimizer, mesh, abstract state, and the jitted step with its layout.

Training, evaluation and everything else that runs a config starts here. Nothing in this file loops.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax import trees
from llmjax.checkpoints.sources import (
  FROM_PRETRAINED,
  abstract_params,
  labels_of_init,
  load_params,
  make_objective,
  open_path,
  pretrained_model_config,
  with_head_fields,
)
from llmjax.config import ConfigError, build, durations, values
from llmjax.data.sources.base import SOURCES, parse_split
from llmjax.data.tokenizers import base as tokenizers
from llmjax.distributed import sharding
from llmjax.models import lora
from llmjax.models.attention import kernels
from llmjax.models.transformer import MODELS
from llmjax.objectives.task import Task
from llmjax.telemetry.flops import forward_flops
from llmjax.training import optimizers, schedules, step
from llmjax.training import trainable as training_trainable
from llmjax.trees import match_rules
from llmjax.types import Batch, Objective, dummy_batch


@dataclasses.dataclass(frozen=True)
class Program:
  """Everything that is fixed before the first step. The config is plain data here, with all its `None`s decided."""

  config: Mapping[str, Any]
  model: Any  # a Linen module with its TransformerConfig as `cfg`
  tokenizer: Any
  objective: Objective
  tx: optax.GradientTransformation
  mesh: Mesh
  rules: sharding.Rules
  total_steps: int
  epoch_examples: Callable[[], int | None]  # how many rows an epoch is, see `count_examples`
  learning_rate: Callable[[int], float]  # step -> rate
  state_shapes: step.TrainState  # of ShapeDtypeStruct
  state_shardings: step.TrainState  # of NamedSharding
  trainable: Any  # the tree of parameters, True where they learn
  auxiliary: Mapping[str, Any]  # {name of config.auxiliary: a frozen model}
  train_step: Any  # jitted (state, batch, key, learning_rate, auxiliary_params) -> (state, metrics); donates the state
  eval_step: Any  # jitted (params, batch, auxiliary_params) -> metrics

  @property
  def replicated(self) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def batch_sharding(self) -> NamedSharding:
    return sharding.named_sharding(self.mesh, "act_batch", rules=self.rules)

  @property
  def abstract_state(self) -> step.TrainState:
    """Shapes with shardings: what a checkpoint is restored into."""

    def attach(shape: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

    return jax.tree.map(attach, self.state_shapes, self.state_shardings)

  def steps(self, value: Any, key: str) -> int | None:
    """A duration of this config in steps."""
    return duration_converter(self.config, self.total_steps, self.epoch_examples)(value, key)

  @property
  def abstract_params(self) -> Any:
    """Those of all parameters, whether they learn or not."""
    return trees.merge_trainable(self.abstract_state.params, self.abstract_state.frozen)

  def init(self, params: Mapping[str, Any] | None = None) -> step.TrainState:
    """A fresh state, sharded as it is made; with those of `params` that are given (host or device arrays)."""
    ema = self.config["optim"]["ema_decay"] is not None

    def make(params: Any) -> step.TrainState:
      return step.make_train_state(params, self.tx, ema, self.trainable)

    return self._start(make, self.state_shardings, params)

  def _start(self, make: Callable[[Any], Any], where: Any, params: Mapping[str, Any] | None) -> Any:
    """`make` of all parameters, fresh ones where they are not given."""

    def run(key: Any, given: Any) -> Any:
      fresh = trees.flatten_tree(nn.unbox(step.init_params(key, self.model, dummy_batch())))
      return make(trees.unflatten_tree({**fresh, **given}))

    places = trees.flatten_tree(trees.merge_trainable(self.state_shardings.params, self.state_shardings.frozen))
    given = {path: jax.device_put(leaf, places[path]) for path, leaf in trees.flatten_tree(params or {}).items()}
    with sharding.use_mesh(self.mesh, self.rules):
      return jax.jit(run, out_shardings=where)(jax.random.key(self.config["seed"]), given)

  @functools.cached_property
  def auxiliary_params(self) -> dict[str, Any]:
    """Those of config.auxiliary, read at the first use; where it names no PATH, what this run starts from."""
    return {name: self._read_auxiliary(name, model) for name, model in self.auxiliary.items()}

  def _read_auxiliary(self, name: str, model: Any) -> Any:
    path = self.config["auxiliary"][name]["init_from"]
    abstract = abstract_params(model, self.mesh, self.rules)
    if path is not None:
      return load_params(path, model, abstract)[0]
    where = jax.tree.map(lambda x: x.sharding, abstract)
    return self._start(lambda params: trees.select_leaves(params, where), where, self.starting_params()[0])

  def starting_params(self) -> tuple[Any, list[str]]:
    """Parameters from config.init_from, and the names of those that it does not have; none and all without."""
    path = self.config["init_from"]
    if path is None:
      return {}, []
    return load_params(path, self.model, self.abstract_params, self.config["init_map"])

  def put(self, batch: Batch, batch_size: int) -> Batch:
    """This host's rows of a batch (NumPy) as global arrays of `batch_size` rows."""

    def one(x: np.ndarray) -> jax.Array:
      return jax.make_array_from_process_local_data(self.batch_sharding, x, (batch_size, *x.shape[1:]))

    return jax.tree.map(one, batch)

  def local_rows(self, batch_size: int) -> list[int]:
    """The rows of the global batch that this process makes: those its devices hold (hosts may share rows)."""
    pieces = self.batch_sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for piece in pieces if piece for row in range(*piece[0].indices(batch_size))})

  def eval_params(self, state: step.TrainState) -> Any:
    """All parameters as they are evaluated: the average where one is kept, and what is frozen."""
    return trees.merge_trainable(state.params if self.config["optim"]["ema_decay"] is None else state.ema, state.frozen)

  @property
  def num_params(self) -> int:
    return self.num_trainable + sum(x.size for x in jax.tree.leaves(self.state_shapes.frozen))

  @property
  def num_trainable(self) -> int:
    return sum(x.size for x in jax.tree.leaves(self.state_shapes.params))

  def step_flops(self, batch: Batch) -> float:
    """Model FLOPs of a train step, forward and backward, as if all parameters learned; see `metrics.forward_flops`."""
    others = {name: abstract_params(model) for name, model in self.auxiliary.items()}

    def loss(params: Any, batch: Batch, others: Any) -> Any:
      settings = {"model": self.model, "objective": self.objective, "auxiliary": self.auxiliary}
      return step.objective_sums(params, batch, others, **settings)

    with sharding.use_mesh(self.mesh, self.rules):
      return 3 * forward_flops(loss, self.abstract_params, batch, others)


def count_examples(config: Mapping[str, Any], objective: Objective, tokenizer: Any) -> int | None:
  """How many rows an epoch of the training split is, where each example has one of its own; else None.

  Reads and tokenises all of the split.

  Raises:
    ConfigError: a record that cannot be learned from, with its place.
  """
  if objective.packing != "never" and (config["data"]["pack"] or not isinstance(objective, Task)):
    return None
  count = 0
  source = open_source(config, config["data"]["train"])
  for index, record in enumerate(source):
    try:
      count += sum(1 for _ in objective.examples(record, tokenizer, config["seq_len"], False))
    except ConfigError as error:
      raise ConfigError(f"{source.location(index)}: {error}") from error
  return count


def duration_converter(
  config: Mapping[str, Any], total_steps: int | None, epoch_examples: Callable[[], int | None]
) -> Callable[[Any, str], int | None]:
  """The converter of this config's durations."""
  return lambda value, key: durations.duration_to_steps(
    value,
    key,
    batch_size=config["batch_size"],
    seq_len=config["seq_len"],
    total_steps=total_steps,
    epoch_tokens=config["data"]["epoch_tokens"],
    epoch_examples=epoch_examples,
  )


def check_config(config: Mapping[str, Any]) -> None:
  """What can be said before anything is built."""
  for key in ("seed", "batch_size", "accum", "seq_len", "total_steps"):
    if config[key] is None:
      raise ConfigError(f"config.{key} must be set")
  for key in ("batch_size", "accum", "seq_len", "logit_tiles"):
    if config[key] < 1:
      raise ConfigError(f"config.{key}={config[key]} must be at least 1")
  if config["batch_size"] % config["accum"]:
    raise ConfigError(f"config.batch_size={config['batch_size']} is not divisible by config.accum={config['accum']}")
  for part in ("model", "objective", "optim", "schedule"):
    if "name" not in config[part]:
      raise ConfigError(f"config.{part} has no name; see configs/base.py")
  for part, what in (("corpus", "what to train on"), ("tokenizer", "how text becomes tokens")):
    if "name" not in config["data"][part]:
      raise ConfigError(f"config.data.{part}.name must be set: it says {what}; see configs/gpt.py")


def check_model_fits_objective(objective: Objective, cfg: Any, name: str, seq_len: int) -> None:
  """Whether a model can learn an objective; a model of one's own is trusted where its config does not say."""
  for stream, length in objective.row_lengths(seq_len).items():
    if length > getattr(cfg, "max_len", length):
      raise ConfigError(
        f"seq_len={seq_len} makes rows of {length} {stream.split('/')[-1]} by objective.name={name!r}, more than "
        f"model.max_len={cfg.max_len}; raise that, or lower seq_len"
      )
  have = getattr(cfg, "stacks", None)
  if have is not None and have not in objective.stacks:
    layers = {"encoder": "encoder_layers alone", "decoder": "decoder_layers alone", "both": "both kinds of layers"}
    wanted = " or ".join(layers[stacks] for stacks in objective.stacks)
    raise ConfigError(f"objective.name={name!r} needs a model with {wanted}, not with {layers[have]}; change model.*")
  for key, value in objective.required_model_config.items():
    if getattr(cfg, key, value) != value:
      raise ConfigError(
        f"objective.name={name!r} needs model.{key}={value}, not {getattr(cfg, key)}; change it, or the objective"
      )
  if have is not None:
    objective.check_model(cfg)


def make_tokenizer(config: Mapping[str, Any]) -> Any:
  """The config's tokenizer; trained on the training split where it asks for it, once, and cached."""
  source = open_source(config, config["data"]["train"])
  return tokenizers.make_tokenizer(config["data"]["tokenizer"], source)


def open_source(config: Mapping[str, Any], split: str) -> Any:
  """The config's corpus, one split of it."""
  return build(config["data"]["corpus"], SOURCES, "data.corpus", split=split)


def make_model(spec: Mapping[str, Any], vocab_size: int, seq_len: int, *, trust: bool = True) -> tuple[Any, dict]:
  """The model and its spec with vocabulary and context decided.

  Args:
    spec: config.model.
    vocab_size: the tokenizer's; the model's may be larger, never smaller.
    seq_len: the longest sequence that it will be trained on.
  """
  spec = dict(spec)
  if spec["vocab_size"] is None:
    spec["vocab_size"] = vocab_size
  elif spec["vocab_size"] < vocab_size:
    raise ConfigError(
      f"model.vocab_size={spec['vocab_size']} is smaller than the tokenizer's {vocab_size}; "
      f"set model.vocab_size={vocab_size} (or none, which takes the tokenizer's) or a smaller data.tokenizer"
    )
  if spec["max_len"] is None:
    spec["max_len"] = seq_len
  elif spec["max_len"] < seq_len:
    raise ConfigError(f"seq_len={seq_len} is longer than model.max_len={spec['max_len']}; lower one or raise the other")
  return build(spec, MODELS, "model", trust=trust), spec


def labelled_split(split: str) -> str:
  """The split that labels are looked for in: of a file of one's own all, since a rare one may be held out by chance."""
  name, _, _ = parse_split(split)
  return split if name else ""


def make_auxiliary(config: Mapping[str, Any], objective: Objective) -> dict[str, Any]:
  """{name: model} of config.auxiliary: that of its PATH, and without one the run's own."""
  asked = config["auxiliary"]
  for name in sorted({*objective.auxiliary, *asked}):
    if name not in asked or name not in objective.auxiliary:
      known = ", ".join(objective.auxiliary) or "none"
      raise ConfigError(
        f"auxiliary.{name}: objective.name={config['objective']['name']!r} needs {known}; mend auxiliary"
      )
  models = {}
  for name, entry in asked.items():
    if set(entry) != {"init_from"}:
      raise ConfigError(f"auxiliary.{name}={entry!r} must be {{'init_from': a PATH, or None}}")
    if entry["init_from"] is None:
      models[name] = build(config["model"], MODELS, "model")
      continue
    with open_path(entry["init_from"]) as source:
      models[name] = source.make_model(dtype=config["model"]["dtype"])
  return models


def make_program(config: Any, *, tokenizer: Any = None, devices: list[Any] | None = None) -> Program:
  """Builds everything; compiles nothing, and allocates nothing on a device.

  Args:
    config: a config like configs/base.py.
    tokenizer: one that a checkpoint carries; None makes the config's.
    devices: all by default.
  Raises:
    ConfigError: anything in the config that cannot work, one line.
  """
  config = values.to_dict(config)
  spec, family = config["model"], None
  if spec.get("name") == FROM_PRETRAINED:
    spec, family = pretrained_model_config(config)
    if config["seq_len"] is None:
      config["seq_len"] = min(config["data"]["longest"], spec["max_len"] or config["data"]["longest"])
  check_config(config)
  tokenizer = make_tokenizer(config) if tokenizer is None else tokenizer
  objective = make_objective(
    config["objective"],
    tokenizer,
    config["seq_len"],
    spec,
    records=lambda: open_source(config, labelled_split(config["data"]["train"])),
    learned=labels_of_init(config),
  )
  config["objective"] |= objective.resolved_config
  spec = with_head_fields(spec, objective.head, family, config["model"])
  model, config["model"] = make_model(spec, tokenizer.vocab_size, config["seq_len"])
  check_model_fits_objective(objective, model.cfg, config["objective"]["name"], config["seq_len"])
  auxiliary = make_auxiliary(config, objective)

  mesh = sharding.make_mesh(config["mesh"], devices)
  rules = {**sharding.RULES, **config["rules"]}
  parts = sharding.num_batch_shards(mesh, rules)
  if config["batch_size"] // config["accum"] % parts:
    raise ConfigError(
      f"batch_size={config['batch_size']} in accum={config['accum']} microbatches is "
      f"{config['batch_size'] // config['accum']} sequences, not divisible over the {parts} devices of "
      f"mesh.data x mesh.fsdp; use a multiple of {parts * config['accum']}, or change mesh or accum"
    )

  epoch = functools.cache(lambda: count_examples(config, objective, tokenizer))
  total_steps = duration_converter(config, None, epoch)(config["total_steps"], "total_steps")
  assert total_steps is not None
  schedule = schedules.make_schedule(config["schedule"], total_steps, duration_converter(config, total_steps, epoch))
  peak = config["optim"]["lr"]

  with sharding.use_mesh(mesh, rules):
    kernels.check_attention_kernel(model.cfg)
    params, axes = sharding.abstract_parameters(model)
    lora.check_lora_targets(params, model.cfg)
    trainable = training_trainable.match_trainable(params, config["trainable"], match_rules)
    decay = config["optim"]["layer_decay"]
    scales = None if decay is None else training_trainable.layer_lr_scales(params, model.cfg, decay)
    ratios = getattr(model.cfg, "width_ratios", None)  # a model of one's own has none
    tx = optimizers.make_optimizer(config["optim"], params, axes, trainable, scales, ratios)
    ema = config["optim"]["ema_decay"] is not None
    state_shapes = jax.eval_shape(lambda p: step.make_train_state(p, tx, ema, trainable), params)
  where = sharding.param_shardings(params, axes, mesh, rules)
  replicated = NamedSharding(mesh, PartitionSpec())
  learned, frozen = trees.split_trainable(where, trainable)
  state_shardings = step.TrainState(
    step=replicated,
    params=learned,
    opt_state=optimizers.state_shardings(tx, state_shapes.params, learned, mesh),
    ema=learned if ema else None,
    frozen=frozen,
  )
  others = {name: jax.tree.map(lambda x: x.sharding, abstract_params(m, mesh, rules)) for name, m in auxiliary.items()}
  batches = sharding.named_sharding(mesh, "act_batch", rules=rules)
  shared = {"model": model, "objective": objective, "auxiliary": auxiliary, "tiles": config["logit_tiles"]}
  train = functools.partial(
    step.train_step, tx=tx, accum=config["accum"], ema_decay=config["optim"]["ema_decay"], **shared
  )
  return Program(
    config=config,
    model=model,
    tokenizer=tokenizer,
    objective=objective,
    tx=tx,
    mesh=mesh,
    rules=rules,
    total_steps=total_steps,
    epoch_examples=epoch,
    learning_rate=lambda s: peak * schedule(s),
    state_shapes=state_shapes,
    state_shardings=state_shardings,
    trainable=trainable,
    auxiliary=auxiliary,
    train_step=jax.jit(
      train,
      donate_argnums=0,
      in_shardings=(state_shardings, batches, replicated, replicated, others),
      out_shardings=(state_shardings, replicated),
    ),
    eval_step=jax.jit(
      functools.partial(step.eval_step, **shared),
      in_shardings=(where, batches, others),
      out_shardings=replicated,
    ),
  )

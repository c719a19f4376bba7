"""The train step: pure functions from state and batch to the next state and metrics; `program.py` jits them.

Losses are named sums. Their denominators are computed once, on the whole global batch, so that microbatches, padding
and data parallelism cannot change the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from llmjax.config import ConfigError
from llmjax.trees import Params, PyTree, merge_trainable, split_trainable
from llmjax.types import Array, Batch, Forward, Metrics, Model, Objective, Outputs, Sums

Auxiliary: TypeAlias = Mapping[str, tuple[Model, Params]]  # {name: a frozen model with its parameters}


@struct.dataclass
class TrainState:
  """All that changes during a run. The optimizer and the model are not part of it."""

  step: Array  # Int[]
  params: Params  # the trainable parameters
  opt_state: PyTree
  ema: Params  # exponential moving average of `params`, or None
  frozen: Params = None  # all other parameters, which have no gradients and no optimizer state, or None


def init_params(key: Array, model: Model, batch: Batch) -> Params:
  """Return fresh parameters in Linen's boxes, which carry the logical axis names."""
  return model.init(key, batch)["params"]


def init_state(
  key: Array,
  model: Model,
  tx: optax.GradientTransformation,
  batch: Batch,
  ema: bool,
  trainable: PyTree | None = None,
) -> TrainState:
  """Return the state before the first step, with fresh parameters; see `make_train_state`."""
  return make_train_state(nn.unbox(init_params(key, model, batch)), tx, ema, trainable)


def make_train_state(
  params: Params, tx: optax.GradientTransformation, ema: bool, trainable: PyTree | None = None
) -> TrainState:
  """Return the state before the first step.

  Args:
    params: all parameters.
    tx: the optimizer.
    ema: whether to keep an average of the parameters.
    trainable: the tree of parameters with bools at the leaves; None: all are trained.
  """
  trained, frozen = (params, None) if trainable is None else split_trainable(params, trainable)
  average = jax.tree.map(jnp.copy, trained) if ema else None
  return TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained), average, frozen)


class ModelForward(Forward):
  """A model bound to its parameters, with the frozen models of config.auxiliary."""

  def __init__(
    self, model: Model, params: Params, chunks: int = 1, auxiliary: Auxiliary | None = None, tiles: int = 1
  ) -> None:
    """Bind a model.

    Args:
      model: the model.
      params: all its parameters.
      chunks: microbatches of `map_microbatches`.
      auxiliary: frozen models by name.
      tiles: slices of each sequence in `per_token`.
    """
    self.model, self.params, self.chunks, self.tiles = model, params, chunks, tiles
    self.auxiliary = {name: ModelForward(*each, chunks, tiles=tiles) for name, each in (auxiliary or {}).items()}

  def __call__(self, batch: Batch, rngs: Mapping[str, Array], **kwargs: Any) -> Outputs:
    return cast(Outputs, self.model.apply({"params": self.params}, batch, rngs=dict(rngs), **kwargs))

  def unembed(self, hidden: Array) -> Array:
    return cast(Array, self.model.apply({"params": self.params}, hidden, method="unembed"))

  def sentence_logits(self, hidden: Array) -> Array:
    return cast(Array, self.model.apply({"params": self.params}, hidden, method="sentence_logits"))

  def per_token(self, function: Callable[..., PyTree], out: Outputs, *aligned: Array) -> PyTree:
    if self.tiles == 1:
      return super().per_token(function, out, *aligned)
    length = out.hidden.shape[1]
    if length % self.tiles:
      raise ConfigError(
        f"logit_tiles={self.tiles} must divide the {length} tokens of a sequence; change it, or seq_len"
      )

    def split(x: Array) -> Array:  # strided, so that a sequence sharded over devices is not moved
      return jnp.moveaxis(x.reshape(x.shape[0], length // self.tiles, self.tiles, *x.shape[2:]), 2, 0)

    def tile(parts: tuple[Array, ...]) -> PyTree:
      return function(self.unembed(parts[0]), *parts[1:])

    each = jax.lax.map(jax.checkpoint(tile), tuple(map(split, (out.hidden, *aligned))))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(x.shape[1], length), each)

  def map_microbatches(self, function: Callable[[Batch], PyTree], batch: Batch) -> PyTree:
    if self.chunks == 1:
      return jax.tree.map(lambda x: x[None], function(batch))
    return jax.lax.map(jax.checkpoint(function), split_microbatches(batch, self.chunks))


def split_microbatches(batch: Batch, accum: int) -> Batch:
  """Reshape [B ...] to [accum B/accum ...]; strided, because contiguous parts of a sharded batch would be moved."""
  return jax.tree.map(lambda x: x.reshape(x.shape[0] // accum, accum, *x.shape[1:]).swapaxes(0, 1), batch)


def objective_value(sums: Sums, weights: Sums, objective: Objective) -> Array:
  """Return the sum over terms of coefficient * sum / weight; a term of weight zero contributes zero."""
  total = jnp.zeros((), jnp.float32)
  for term, coefficient in objective.coefficients.items():
    scale = jnp.where(weights[term] > 0, coefficient / jnp.maximum(weights[term], 1e-30), 0.0)
    total += scale * sums[term]
  return total


def compute_gradients(
  params: Params,
  batch: Batch,
  key: Array,
  *,
  model: Model,
  objective: Objective,
  accum: int,
  frozen: Params = None,
  auxiliary: Auxiliary | None = None,
  tiles: int = 1,
) -> tuple[Params, Metrics]:
  """Return the gradient of the objective on the whole global batch, and the metrics; arguments as in `train_step`."""
  weights = objective.weights(batch)
  chunks, accum = (accum, 1) if objective.whole_batch else (1, accum)

  def loss(params: Params, microbatch: Batch) -> tuple[Array, Metrics]:
    forward = ModelForward(model, merge_trainable(params, frozen), chunks, auxiliary, tiles)
    sums, metrics = objective.loss(forward, microbatch, {"dropout": key})
    value = objective_value(sums, weights, objective)
    return value, metrics | ({"objective": (value, jnp.zeros(()))} if len(sums) > 1 or "loss" not in metrics else {})

  gradient = jax.grad(loss, has_aux=True)
  if accum == 1:
    grads, metrics = gradient(params, batch)
  else:
    parts = split_microbatches(batch, accum)
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add_microbatch(total: PyTree, microbatch: Batch) -> tuple[PyTree, None]:
      return jax.tree.map(jnp.add, total, gradient(params, microbatch)), None

    (grads, metrics), _ = jax.lax.scan(add_microbatch, zeros, parts)
  if "objective" in metrics:  # divided by the global weights already, so the microbatches add up to the value itself
    metrics["objective"] = (metrics["objective"][0], jnp.ones(()))
  return grads, metrics


def train_step(
  state: TrainState,
  batch: Batch,
  key: Array,
  learning_rate: Array,
  auxiliary_params: Mapping[str, Params] | None = None,
  *,
  model: Model,
  objective: Objective,
  tx: optax.GradientTransformation,
  accum: int,
  ema_decay: float | None,
  auxiliary: Mapping[str, Model] | None = None,
  tiles: int = 1,
) -> tuple[TrainState, Metrics]:
  """Make one optimizer update.

  Args:
    state: the state before the update.
    batch: the global batch; its size is a multiple of `accum`.
    key: the run's key. It is folded with the step, then with global row and layer.
    learning_rate: Float[], an argument so that trials that differ only in it share one program.
    auxiliary_params: parameters of the objective's frozen models, by name.
    model: the model.
    objective: the objective.
    tx: returns a direction; parameters move by -learning_rate times it.
    accum: microbatches, computed one after the other.
    ema_decay: decay of the average of parameters, None: no average.
    auxiliary: the objective's frozen models, by name.
    tiles: slices of each sequence whose logits are computed one after the other.

  Returns:
    The state after the update, and metrics as (sum, weight).
  """
  key = jax.random.fold_in(key, state.step)
  grads, metrics = compute_gradients(
    state.params,
    batch,
    key,
    model=model,
    objective=objective,
    accum=accum,
    frozen=state.frozen,
    auxiliary=_bind_auxiliary(auxiliary, auxiliary_params),
    tiles=tiles,
  )
  direction, opt_state = tx.update(grads, state.opt_state, state.params)
  updates = jax.tree.map(lambda d: -learning_rate * d, direction)
  params = optax.apply_updates(state.params, updates)
  ema = state.ema
  if ema_decay is not None:
    ema = optax.incremental_update(params, state.ema, 1 - ema_decay)
  one = jnp.ones(())
  metrics |= {
    "grad_norm": (optax.tree.norm(grads), one),
    "update_norm": (optax.tree.norm(updates), one),
    "param_norm": (optax.tree.norm(params), one),
  }
  return TrainState(state.step + 1, params, opt_state, ema, state.frozen), metrics


def _bind_auxiliary(models: Mapping[str, Model] | None, params: Mapping[str, Params] | None) -> Auxiliary:
  return {name: (model, (params or {})[name]) for name, model in (models or {}).items()}


def evaluate_batch(
  params: Params,
  batch: Batch,
  auxiliary_params: Mapping[str, Params] | None = None,
  *,
  model: Model,
  objective: Objective,
  auxiliary: Mapping[str, Model] | None = None,
  tiles: int = 1,
) -> tuple[Sums, Metrics]:
  """Return the objective's sums, and its metrics as (sum, weight), without dropout; arguments as in `train_step`."""
  forward = ModelForward(model, params, auxiliary=_bind_auxiliary(auxiliary, auxiliary_params), tiles=tiles)
  return objective.loss(forward, batch, {})


def objective_sums(*arguments: Any, **settings: Any) -> Sums:
  """Return the sums of `evaluate_batch`."""
  return evaluate_batch(*arguments, **settings)[0]


def eval_step(*arguments: Any, **settings: Any) -> Metrics:
  """Return the metrics of `evaluate_batch`."""
  return evaluate_batch(*arguments, **settings)[1]

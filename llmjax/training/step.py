"""The step: from state and batch to the next state and its metrics. Pure functions, jitted by `program`.

Losses are named sums. Their denominators are taken first, once, on the whole global batch, so that microbatches,
padding and data parallelism cannot change the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from llmjax.config import ConfigError
from llmjax.trees import merge_trainable, split_trainable
from llmjax.types import Array, Batch, Forward, Metrics, Objective, Outputs, Sums


@struct.dataclass
class TrainState:
  """All that a run changes. The optimizer itself and the model are not in it."""

  step: Any  # Int[]
  params: Any  # those that learn
  opt_state: Any
  ema: Any  # an exponential moving average of params, or None
  frozen: Any = None  # all other parameters, which have neither gradients nor moments, or None


def init_params(key: Array, model: nn.Module, batch: Batch) -> Any:
  """Fresh parameters, in Linen's boxes that carry the logical axis names."""
  return model.init(key, batch)["params"]


def init_state(
  key: Array, model: nn.Module, tx: optax.GradientTransformation, batch: Batch, ema: bool, trainable: Any = None
) -> TrainState:
  """The state before the first step, see `start`."""
  return make_train_state(nn.unbox(init_params(key, model, batch)), tx, ema, trainable)


def make_train_state(params: Any, tx: optax.GradientTransformation, ema: bool, trainable: Any = None) -> TrainState:
  """The state before the first step from given parameters.

  Args:
    ema: whether an average of the parameters is kept.
    trainable: the tree of parameters, True where they learn; None is everywhere.
  """
  learned, frozen = (params, None) if trainable is None else split_trainable(params, trainable)
  average = jax.tree.map(jnp.copy, learned) if ema else None
  return TrainState(jnp.zeros((), jnp.int32), learned, tx.init(learned), average, frozen)


Auxiliary = Mapping[str, tuple[nn.Module, Any]]  # {name: a frozen model with its parameters}


class ModelForward(Forward):
  """A Linen module with its parameters, and frozen ones beside it."""

  def __init__(
    self, model: nn.Module, params: Any, chunks: int = 1, auxiliary: Auxiliary | None = None, tiles: int = 1
  ):
    self.model, self.params, self.chunks, self.tiles = model, params, chunks, tiles
    self.auxiliary = {name: ModelForward(*each, chunks, tiles=tiles) for name, each in (auxiliary or {}).items()}

  def __call__(self, batch: Batch, rngs: Mapping[str, Array], **kwargs: Any) -> Outputs:
    return cast(Outputs, self.model.apply({"params": self.params}, batch, rngs=dict(rngs), **kwargs))

  def unembed(self, hidden: Array) -> Array:
    return cast(Array, self.model.apply({"params": self.params}, hidden, method="unembed"))

  def sentence_logits(self, hidden: Array) -> Array:
    return cast(Array, self.model.apply({"params": self.params}, hidden, method="sentence_logits"))

  def per_token(self, function: Callable[..., Any], out: Outputs, *aligned: Array) -> Any:
    if self.tiles == 1:
      return super().per_token(function, out, *aligned)
    length = out.hidden.shape[1]
    if length % self.tiles:
      raise ConfigError(
        f"logit_tiles={self.tiles} must divide the {length} tokens of a sequence; change it, or seq_len"
      )

    def cut(x: Array) -> Array:  # strided, so that a sequence that lies on several devices stays there
      return jnp.moveaxis(x.reshape(x.shape[0], length // self.tiles, self.tiles, *x.shape[2:]), 2, 0)

    def tile(parts: tuple[Array, ...]) -> Any:
      return function(self.unembed(parts[0]), *parts[1:])

    each = jax.lax.map(jax.checkpoint(tile), tuple(map(cut, (out.hidden, *aligned))))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(x.shape[1], length), each)

  def map_microbatches(self, function: Callable[[Batch], Any], batch: Batch) -> Any:
    if self.chunks == 1:
      return jax.tree.map(lambda x: x[None], function(batch))
    return jax.lax.map(jax.checkpoint(function), split_microbatches(batch, self.chunks))


def split_microbatches(batch: Batch, accum: int) -> Batch:
  """[B ...] -> [accum B/accum ...], strided: a contiguous cut of a sharded batch would move it between devices."""
  return jax.tree.map(lambda x: x.reshape(x.shape[0] // accum, accum, *x.shape[1:]).swapaxes(0, 1), batch)


def objective_value(sums: Sums, weights: Sums, objective: Objective) -> Array:
  """Sum of coefficient * sum / weight over the terms; a term of weight zero contributes zero."""
  total = jnp.zeros((), jnp.float32)
  for term, coefficient in objective.coefficients.items():
    scale = jnp.where(weights[term] > 0, coefficient / jnp.maximum(weights[term], 1e-30), 0.0)
    total += scale * sums[term]
  return total


def compute_gradients(
  params: Any,
  batch: Batch,
  key: Array,
  *,
  model: nn.Module,
  objective: Objective,
  accum: int,
  frozen: Any = None,
  auxiliary: Auxiliary | None = None,
  tiles: int = 1,
) -> tuple[Any, Metrics]:
  """The gradient of the objective on the whole global batch by `params`, and its metrics."""
  weights = objective.weights(batch)
  chunks, accum = (accum, 1) if objective.whole_batch else (1, accum)

  def loss(params: Any, micro: Batch) -> tuple[Array, Metrics]:
    forward = ModelForward(model, merge_trainable(params, frozen), chunks, auxiliary, tiles)
    sums, metrics = objective.loss(forward, micro, {"dropout": key})
    value = objective_value(sums, weights, objective)
    return value, metrics | ({"objective": (value, jnp.zeros(()))} if len(sums) > 1 or "loss" not in metrics else {})

  gradient = jax.grad(loss, has_aux=True)
  if accum == 1:
    grads, metrics = gradient(params, batch)
  else:
    parts = split_microbatches(batch, accum)
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: Any, micro: Batch) -> tuple[Any, None]:
      return jax.tree.map(jnp.add, total, gradient(params, micro)), None

    (grads, metrics), _ = jax.lax.scan(add, zeros, parts)
  if "objective" in metrics:  # already divided by the global weights: its parts add up to the value itself
    metrics["objective"] = (metrics["objective"][0], jnp.ones(()))
  return grads, metrics


def train_step(
  state: TrainState,
  batch: Batch,
  key: Array,
  learning_rate: Array,
  auxiliary_params: Mapping[str, Any] | None = None,
  *,
  model: nn.Module,
  objective: Objective,
  tx: optax.GradientTransformation,
  accum: int,
  ema_decay: float | None,
  auxiliary: Mapping[str, nn.Module] | None = None,
  tiles: int = 1,
) -> tuple[TrainState, Metrics]:
  """One optimizer update.

  Args:
    batch: the global batch; its size is a multiple of `accum`.
    key: the run's key; randomness is this key folded with the step, then with global row and layer.
    learning_rate: Float[], an argument so that trials which differ in it share one program.
    auxiliary_params, auxiliary: of the objective's frozen models, by their names.
    tx: gives a direction; parameters move by -learning_rate times it.
    accum: microbatches, computed one after the other.
    ema_decay: of the average of parameters, None for none.
    tiles: parts of every sequence whose logits are made one after the other.
  """
  key = jax.random.fold_in(key, state.step)
  others = {name: (other, (auxiliary_params or {})[name]) for name, other in (auxiliary or {}).items()}
  grads, metrics = compute_gradients(
    state.params,
    batch,
    key,
    model=model,
    objective=objective,
    accum=accum,
    frozen=state.frozen,
    auxiliary=others,
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


def evaluate_batch(
  params: Any,
  batch: Batch,
  auxiliary_params: Mapping[str, Any] | None = None,
  *,
  model: nn.Module,
  objective: Objective,
  auxiliary: Mapping[str, nn.Module] | None = None,
  tiles: int = 1,
) -> tuple[Sums, Metrics]:
  """The objective's sums, and its metrics as (sum, weight), of a batch without dropout."""
  others = {name: (other, (auxiliary_params or {})[name]) for name, other in (auxiliary or {}).items()}
  return objective.loss(ModelForward(model, params, auxiliary=others, tiles=tiles), batch, {})


def objective_sums(*arguments: Any, **settings: Any) -> Sums:
  """The sums of `evaluate`."""
  return evaluate_batch(*arguments, **settings)[0]


def eval_step(*arguments: Any, **settings: Any) -> Metrics:
  """The metrics of `evaluate`."""
  return evaluate_batch(*arguments, **settings)[1]

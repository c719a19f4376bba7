"""Optimizers and learning-rate schedules, over optax; rules from parameter paths to values.

The learning rate is an argument of the train step, so a transformation made here returns a *direction*: the step
moves parameters by `-learning_rate * direction`. Every parameter has an optimizer of its own, and of a stacked
parameter every layer: then a method that looks at a whole matrix (Adafactor, Muon) cannot tell scanned layers from
unrolled ones. Only clipping sees the whole tree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax import trees
from llmjax.config import ConfigError, build, to_dict
from llmjax.models import mup
from llmjax.models.mup import Axes, matrix_inputs
from llmjax.training.schedules import Number, require_keys
from llmjax.trees import match_rules

OPTIMIZERS = {
  "adafactor": "llmjax.training.optimizers:adafactor",
  "adamw": "llmjax.training.optimizers:adamw",
  "lion": "llmjax.training.optimizers:lion",
  "muon": "llmjax.training.optimizers:muon",
  "sgd": "llmjax.training.optimizers:sgd",
}


# Keys of config.optim that belong to no optimizer; the rate and the average are read by the train step's caller.
SHARED_KEYS = ("lr", "ema_decay", "weight_decay", "decay_mask", "clip_norm", "lr_scale", "layer_decay")


def make_optimizer(
  spec: Any, params: Any, axes: Any, trainable: Any = None, scales: Any = None, ratios: mup.Ratios | None = None
) -> optax.GradientTransformation:
  """The optimizer that config.optim asks for. Its `update` needs params and returns a direction, not a step.

  The direction is optimizer(clip(gradient)) + weight_decay * parameter, the decay where `decay_mask` says so
  (decoupled: Loshchilov & Hutter 2019), all of it times what `lr_scale` and `scales` say. Where the model is wider than
  its base, the optimizer's part is also times `width.rate`; the decay is not, so that learning rate * weight decay, the
  inverse of the steps that a parameter remembers, stays (Wang & Aitchison 2024, https://arxiv.org/abs/2405.13698).
  State and direction are
  float32 where parameters are narrower, since a bfloat16 second moment stands still: its increments are below half a
  unit in its last place. The state is the tree of parameters with an optimizer state at every leaf.

  Args:
    spec: {"name", *COMMON, **keys of the optimizer}. "name" is in OPTIMIZERS, or "module:function" of a function
      that returns a transformation of a single parameter, to a direction; it may ask for that parameter's `axes`.
    params: tree of parameters, or of their shapes.
    axes: the same tree of tuples of logical names; those of `width.STACKED` in front mark a stacked parameter.
    trainable: the same tree, True where a parameter learns; the optimizer is of those alone. None is everywhere.
    scales: the same tree of what multiplies the directions, numbers or arrays that broadcast; None is 1.
    ratios: of the model's widths to its base's, see `models/width.py`; None is 1.
  Raises:
    ConfigError: an unknown or missing key, a value out of range, a rule that does not fit the parameters.
  """
  spec = to_dict(spec)
  require_keys(spec, SHARED_KEYS, "optim")
  common = {key: spec.pop(key) for key in SHARED_KEYS}
  clip_norm, weight_decay = common["clip_norm"], common["weight_decay"]
  if clip_norm is not None and clip_norm <= 0:
    raise ConfigError(f"optim.clip_norm={clip_norm} must be positive; none turns clipping off")
  if weight_decay < 0:
    raise ConfigError(f"optim.weight_decay={weight_decay} must not be negative; 0 turns it off")

  def rate_of(_: Any, decayed: Any, wider: float) -> Number:
    if not isinstance(decayed, bool):
      raise ConfigError(f"optim.decay_mask: {decayed!r} must be True or False")
    return weight_decay / wider if decayed else 0

  def scale_of(_: Any, own: Any, other: Any, wider: float) -> Any:
    if isinstance(own, bool) or not isinstance(own, (int, float)) or not own >= 0:
      raise ConfigError(f"optim.lr_scale: {own!r} must be a number, 0 or more")
    return own * other * wider

  wider = jax.tree.map(lambda _, names: mup.lr_multiplier(spec, mup.unstacked(names), ratios or {}), params, axes)
  rates = jax.tree.map(rate_of, params, match_rules(common["decay_mask"], params, "optim.decay_mask"), wider)
  own = match_rules(common["lr_scale"], params, "optim.lr_scale")
  scales = jax.tree.map(lambda _: 1.0, params) if scales is None else scales
  scales = jax.tree.map(scale_of, params, own, scales, wider)
  each = jax.tree.map(lambda _, names: _single_parameter_optimizer(spec, names), params, axes)
  if trainable is not None:
    rates, scales, each = (trees.split_trainable(tree, trainable)[0] for tree in (rates, scales, each))
  clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)

  def init(params: Any) -> Any:
    return jax.tree.map(lambda param, tx: tx.init(param), _promote_to_float32(params), each)

  def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    def one(param: Any, grad: Any, part: Any, tx: Any, rate: Number, scale: Any) -> tuple[Any, Any]:
      direction, part = tx.update(grad, part, param)
      direction = direction + rate * param if rate else direction
      return direction if isinstance(scale, float) and scale == 1 else direction * scale, part

    grads, _ = clip.update(_promote_to_float32(grads), optax.EmptyState())
    pairs = jax.tree.map(one, _promote_to_float32(params), grads, state, each, rates, scales)
    return tuple(jax.tree.map(lambda _, pair, i=i: pair[i], params, pairs) for i in (0, 1))

  return optax.GradientTransformation(init, update)


def _single_parameter_optimizer(spec: Mapping[str, Any], names: Axes) -> optax.GradientTransformation:
  """The optimizer of one parameter, each of its layers and experts treated alone."""
  own = mup.unstacked(names)
  tx = build(spec, OPTIMIZERS, "optim", axes=own)
  init, update = tx.init, tx.update
  for _ in range(len(names) - len(own)):
    init, update = jax.vmap(init), jax.vmap(update)
  return optax.GradientTransformation(init, update)


def _promote_to_float32(tree: Any) -> Any:
  return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def state_shardings(tx: optax.GradientTransformation, params: Any, shardings: Any, mesh: Mesh) -> Any:
  """Where the state of an optimizer made here lives, beside the parameters.

  A moment lies like its parameter; Adafactor's rows and columns like it without the dimension they sum over, told by
  field and not by shape, since those of a square kernel have one shape; all else is on every device.

  Args:
    tx: from `make_optimizer`.
    params: tree of jax.ShapeDtypeStruct.
    shardings: the same tree of NamedSharding.
  Returns:
    A NamedSharding for every leaf of the state.
  """

  def factored(x: Any) -> bool:
    return isinstance(x, optax.FactoredState)

  def place(param: Any, sharding: NamedSharding, state: Any) -> Any:
    spec = tuple(sharding.spec) + (None,) * (len(param.shape) - len(sharding.spec))

    def like(leaf: Any, dropped: int | None = None) -> NamedSharding:
      """The parameter's layout for a leaf of its shape, without the dropped dimension."""
      kept = [i for i in range(len(param.shape)) if i != dropped]
      fits = tuple(leaf.shape) == tuple(param.shape[i] for i in kept)
      return NamedSharding(mesh, PartitionSpec(*(spec[i] for i in kept)) if fits else PartitionSpec())

    def node(x: Any) -> Any:
      if not factored(x):
        return like(x)
      layers = len(x.count.shape)  # a stacked parameter counts once a layer
      smaller, larger = _factored_dims(param.shape[layers:], layers)
      return optax.FactoredState(
        count=like(x.count), v_row=like(x.v_row, larger), v_col=like(x.v_col, smaller), v=like(x.v)
      )

    return jax.tree.map(node, state, is_leaf=factored)

  return jax.tree.map(place, params, shardings, jax.eval_shape(tx.init, params))


def _factored_dims(shape: tuple[int, ...], offset: int) -> tuple[int | None, int | None]:
  """The two largest dimensions, the larger last: what optax factors over, ties broken by the same sort."""
  if len(shape) < 2:
    return None, None
  order = np.argsort(shape)
  return offset + int(order[-2]), offset + int(order[-1])


def adamw(
  b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8, moment_dtype: str | None = None
) -> optax.GradientTransformation:
  """Adam (Kingma & Ba 2015, https://arxiv.org/abs/1412.6980); decoupled decay is added by `make_optimizer`.

  `moment_dtype`, such as "bfloat16", is of the first moment alone.
  """
  return optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=_dtype(moment_dtype))


def adafactor(
  factored: bool = True,
  min_dim_size_to_factor: int = 128,
  decay_rate: Number = 0.8,
  eps: Number = 1e-30,
  clip_threshold: Number | None = 1.0,
  momentum: Number | None = None,
  parameter_scale: bool = False,
) -> optax.GradientTransformation:
  """Adafactor (Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235) with an external learning rate.

  Args:
    factored: keep row and column means of the squared gradient over the two largest dimensions, not all of it.
    min_dim_size_to_factor: only where both of them are at least this large.
    decay_rate: the second moment's decay at step t = 1, 2, ... is 1 - t^-decay_rate.
    eps: added to the squared gradient.
    clip_threshold: the largest root mean square of a parameter's direction; None for none.
    momentum: decay of an average of directions; None keeps none.
    parameter_scale: multiply by the parameter's root mean square (at least 1e-3), as the paper does.
  """
  steps = [optax.scale_by_factored_rms(factored, decay_rate, 0, min_dim_size_to_factor, eps)]
  if clip_threshold is not None:
    steps.append(optax.clip_by_block_rms(clip_threshold))
  if parameter_scale:
    steps.append(optax.scale_by_param_block_rms())
  if momentum is not None:
    steps.append(optax.ema(momentum, debias=False))
  return optax.chain(*steps)


def lion(b1: Number = 0.9, b2: Number = 0.99, moment_dtype: str | None = None) -> optax.GradientTransformation:
  """Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675): the sign of an interpolated momentum."""
  return optax.scale_by_lion(b1=b1, b2=b2, mu_dtype=_dtype(moment_dtype))


def sgd(momentum: Number = 0.0) -> optax.GradientTransformation:
  """Gradient descent with heavy-ball momentum (Polyak 1964), m = momentum * m + g; plain where momentum is 0."""
  return optax.trace(decay=momentum) if momentum else optax.identity()


def muon(
  axes: Axes,
  beta: Number = 0.95,
  ns_steps: int = 5,
  nesterov: bool = True,
  consistent_rms: Number | None = None,
  adam_lr_ratio: Number = 1.0,
  b1: Number = 0.9,
  b2: Number = 0.95,
  eps: Number = 1e-8,
) -> optax.GradientTransformation:
  """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for hidden matrices, Adam for all else.

  Args:
    axes: the parameter's logical names, without those of STACKED in front.
    beta: the momentum's decay.
    ns_steps: Newton-Schulz iterations, which bring singular values to about 0.7 ... 1.2.
    nesterov: look ahead.
    consistent_rms: None multiplies the orthogonal direction by sqrt(max(1, outputs / inputs)); a number by itself times
      sqrt(max(inputs, outputs)), so that 0.2 matches Adam's step (Liu et al. 2025, https://arxiv.org/abs/2502.16982).
    adam_lr_ratio: Adam's step relative to Muon's.
    b1, b2, eps: of Adam.
  """
  inputs = matrix_inputs(axes)
  if inputs is None:
    return optax.chain(optax.scale_by_adam(b1=b1, b2=b2, eps=eps), optax.scale(adam_lr_ratio))
  outputs = tuple(i for i in range(len(axes)) if i not in inputs)
  dimensions = optax.contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=outputs)

  def rescale(direction: Any, _: Any) -> Any:
    fan_in, fan_out = (math.prod(direction.shape[i] for i in side) for side in (inputs, outputs))
    factor = max(1.0, fan_out / fan_in) if consistent_rms is None else max(fan_in, fan_out) * consistent_rms**2
    return math.sqrt(factor) * direction

  orthogonal = optax.contrib.scale_by_muon(
    ns_steps=ns_steps, beta=beta, nesterov=nesterov, weight_dimension_numbers=dimensions
  )
  return optax.chain(orthogonal, optax.stateless(rescale))


def _dtype(name: str | None) -> Any:
  try:
    return None if name is None else jnp.dtype(name)
  except TypeError:
    raise ConfigError(f"optim.moment_dtype={name!r} is no dtype; none, 'float32' or 'bfloat16'") from None

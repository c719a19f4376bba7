"""Optimizers over optax, and the sharding of their state.

The learning rate is an argument of the train step, so a transformation made here returns a *direction*: the step moves
parameters by `-learning_rate * direction`. Each parameter has an optimizer of its own, and each layer of a stacked
parameter too. A method that works on whole matrices (Adafactor, Muon) therefore gives the same result for scanned and
unrolled layers. Only clipping sees the whole tree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.config import ConfigError, ConfigTree, build, to_dict
from llmjax.distributed.sharding import LogicalAxes
from llmjax.models import mup
from llmjax.models.mup import matrix_input_dims
from llmjax.trees import Params, PyTree, match_rules, split_trainable

Number: TypeAlias = int | float

OPTIMIZERS = {
  "adafactor": "llmjax.training.optimizers:adafactor",
  "adamw": "llmjax.training.optimizers:adamw",
  "lion": "llmjax.training.optimizers:lion",
  "muon": "llmjax.training.optimizers:muon",
  "sgd": "llmjax.training.optimizers:sgd",
}

# Keys of config.optim that every optimizer has, besides `name` and `lr`, with their values if they are missing.
DEFAULTS: Mapping[str, Any] = {
  "weight_decay": 0.0,
  "decay_mask": ((".*", True),),
  "clip_norm": None,
  "lr_scale": ((".*", 1.0),),
  "layer_decay": None,
}


def with_optimizer(optim: ConfigTree, optimizer: ConfigTree) -> ConfigTree:
  """Return config.optim with another optimizer: its own keys are replaced, those common to all optimizers stay."""
  return {key: value for key, value in optim.items() if key in ("lr", *DEFAULTS)} | optimizer


def make_optimizer(
  spec: ConfigTree,
  params: Params,
  axes: PyTree,
  trainable: PyTree | None = None,
  scales: PyTree | None = None,
  ratios: mup.WidthRatios | None = None,
) -> optax.GradientTransformation:
  """Return the optimizer of config.optim. Its `update` needs params and returns a direction, not a step.

  The direction is (optimizer(clip(gradient)) + weight_decay * parameter) * lr_scale * scale, where `decay_mask` selects
  the parameters that decay (decoupled: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101). With muP, the
  optimizer's part is also multiplied by `mup.lr_multiplier`. The decay is not, so that learning rate * weight decay,
  the inverse of the time scale of the average over updates, does not change with the width (Wang & Aitchison 2024,
  https://arxiv.org/abs/2405.13698).

  State and direction are at least float32. A bfloat16 second moment stops changing, because its increments are smaller
  than half a unit in the last place.

  Args:
    spec: {"name", "lr", **keys of `DEFAULTS`, **keys of the optimizer}. "name" is in OPTIMIZERS, or "module:function"
      of a function that returns a transformation of one parameter to a direction; it may take that parameter's `axes`.
    params: parameters, or their shapes.
    axes: the same tree of tuples of logical axis names; leading names of `mup.STACKED_AXES` mark a stacked parameter.
    trainable: the same tree of bools: the optimizer has state for these parameters only. None: all.
    scales: the same tree of factors of the direction, numbers or arrays that broadcast. None: 1.
    ratios: of the model's widths to those of its base model, see `models/mup.py`. None: 1.

  Returns:
    A transformation whose state is the tree of trainable parameters with an optimizer state at every leaf.

  Raises:
    ConfigError: an unknown or missing key, a value out of range, or a rule that does not fit the parameters.
  """
  spec = {**DEFAULTS, **to_dict(spec)}
  _check_common_keys(spec)
  common = {key: spec.pop(key) for key in ("lr", *DEFAULTS)}
  weight_decay = common["weight_decay"]

  def decay_of(_: Any, decays: object, multiplier: float) -> Number:
    if not isinstance(decays, bool):
      raise ConfigError(f"optim.decay_mask: {decays!r} must be True or False")
    return weight_decay / multiplier if decays else 0  # `scale_of` multiplies again

  def scale_of(_: Any, own: object, other: Any, multiplier: float) -> Any:
    if isinstance(own, bool) or not isinstance(own, (int, float)) or not own >= 0:
      raise ConfigError(f"optim.lr_scale: {own!r} must be a number, 0 or more")
    return own * other * multiplier

  multipliers = jax.tree.map(
    lambda _, names: mup.lr_multiplier(spec, mup.strip_stacked_axes(names), ratios or {}), params, axes
  )
  decays = jax.tree.map(decay_of, params, match_rules(common["decay_mask"], params, "optim.decay_mask"), multipliers)
  own = match_rules(common["lr_scale"], params, "optim.lr_scale")
  scales = jax.tree.map(lambda _: 1.0, params) if scales is None else scales
  scales = jax.tree.map(scale_of, params, own, scales, multipliers)
  each = jax.tree.map(lambda _, names: _single_parameter_optimizer(spec, names), params, axes)
  if trainable is not None:
    decays, scales, each = (split_trainable(tree, trainable)[0] for tree in (decays, scales, each))
  return _combine_optimizers(each, decays, scales, common["clip_norm"])


def _check_common_keys(spec: ConfigTree) -> None:
  """Raise ConfigError for values of the keys that all optimizers have."""
  lr, clip_norm, weight_decay = spec.get("lr"), spec["clip_norm"], spec["weight_decay"]
  if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 < lr < math.inf:
    raise ConfigError(f"optim.lr={lr!r} must be a positive number")
  if clip_norm is not None and clip_norm <= 0:
    raise ConfigError(f"optim.clip_norm={clip_norm} must be positive; none turns clipping off")
  if weight_decay < 0:
    raise ConfigError(f"optim.weight_decay={weight_decay} must not be negative; 0 turns it off")


def _combine_optimizers(
  each: PyTree, decays: PyTree, scales: PyTree, clip_norm: float | None
) -> optax.GradientTransformation:
  """Return clipping of the whole tree, then the optimizer of every leaf, its weight decay and its scale."""
  clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)

  def init(params: Params) -> PyTree:
    return jax.tree.map(lambda param, tx: tx.init(param), _promote_to_float32(params), each)

  def update(grads: Params, state: PyTree, params: Params | None = None) -> tuple[Params, PyTree]:
    def one(param: Any, grad: Any, part: Any, tx: Any, decay: Number, scale: Any) -> tuple[Any, Any]:
      direction, part = tx.update(grad, part, param)
      direction = direction + decay * param if decay else direction
      return direction if isinstance(scale, float) and scale == 1 else direction * scale, part

    grads, _ = clip.update(_promote_to_float32(grads), optax.EmptyState())
    pairs = jax.tree.map(one, _promote_to_float32(params), grads, state, each, decays, scales)
    return tuple(jax.tree.map(lambda _, pair, i=i: pair[i], params, pairs) for i in (0, 1))

  return optax.GradientTransformation(init, update)


def _single_parameter_optimizer(spec: ConfigTree, names: LogicalAxes) -> optax.GradientTransformation:
  """Return the optimizer of one parameter, mapped over its layers and experts."""
  own = mup.strip_stacked_axes(names)
  tx = build(spec, OPTIMIZERS, "optim", axes=own)
  init, update = tx.init, tx.update
  for _ in range(len(names) - len(own)):
    init, update = jax.vmap(init), jax.vmap(update)
  return optax.GradientTransformation(init, update)


def _promote_to_float32(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def state_shardings(tx: optax.GradientTransformation, params: Params, shardings: PyTree, mesh: Mesh) -> PyTree:
  """Return the shardings of the state of an optimizer made here.

  A moment has the sharding of its parameter. Adafactor's row and column means have it without the dimension that they
  are averaged over. All else is replicated. Adafactor's fields are told apart by name, because the row and column means
  of a square kernel have the same shape.

  Args:
    tx: from `make_optimizer`.
    params: tree of jax.ShapeDtypeStruct.
    shardings: the same tree of NamedSharding.

  Returns:
    A NamedSharding for every leaf of the state.
  """
  return jax.tree.map(
    lambda param, sharding, state: _parameter_state_shardings(param, sharding, state, mesh),
    params,
    shardings,
    jax.eval_shape(tx.init, params),
  )


def _parameter_state_shardings(param: Any, sharding: NamedSharding, state: PyTree, mesh: Mesh) -> PyTree:
  """Return the shardings of one parameter's optimizer state."""
  spec = tuple(sharding.spec) + (None,) * (len(param.shape) - len(sharding.spec))

  def is_factored(x: object) -> bool:
    return isinstance(x, optax.FactoredState)

  def like_param(leaf: Any, dropped: int | None = None) -> NamedSharding:
    """Return the parameter's sharding, without the dropped dimension, if the leaf has that shape."""
    remaining = [i for i in range(len(param.shape)) if i != dropped]
    has_shape = tuple(leaf.shape) == tuple(param.shape[i] for i in remaining)
    return NamedSharding(mesh, PartitionSpec(*(spec[i] for i in remaining)) if has_shape else PartitionSpec())

  def one(x: Any) -> PyTree:
    if not is_factored(x):
      return like_param(x)
    num_stacked = len(x.count.shape)  # a stacked parameter has one count per layer
    smaller, larger = _factored_dims(param.shape[num_stacked:], num_stacked)
    return optax.FactoredState(
      count=like_param(x.count),
      v_row=like_param(x.v_row, larger),
      v_col=like_param(x.v_col, smaller),
      v=like_param(x.v),
    )

  return jax.tree.map(one, state, is_leaf=is_factored)


def _factored_dims(shape: tuple[int, ...], offset: int) -> tuple[int | None, int | None]:
  """Return the two largest dimensions, the larger last; ties are broken by the same sort as in optax."""
  if len(shape) < 2:
    return None, None
  order = np.argsort(shape)
  return offset + int(order[-2]), offset + int(order[-1])


def adamw(
  b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8, moment_dtype: str | None = None
) -> optax.GradientTransformation:
  """Adam (Kingma & Ba 2015, https://arxiv.org/abs/1412.6980); `make_optimizer` adds decoupled weight decay.

  Args:
    b1, b2: decay of the first and of the second moment.
    eps: added to the root of the second moment.
    moment_dtype: of the first moment only, such as "bfloat16".
  """
  return optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=_moment_dtype(moment_dtype))


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
    factored: store row and column means of the squared gradient over the two largest dimensions, not all of it.
    min_dim_size_to_factor: factor only if both of them are at least this large.
    decay_rate: the decay of the second moment at step t = 1, 2, ... is 1 - t^-decay_rate.
    eps: added to the squared gradient.
    clip_threshold: maximum root mean square of a parameter's direction; None: no limit.
    momentum: decay of an average of directions; None: no average.
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
  return optax.scale_by_lion(b1=b1, b2=b2, mu_dtype=_moment_dtype(moment_dtype))


def sgd(momentum: Number = 0.0) -> optax.GradientTransformation:
  """Gradient descent with heavy-ball momentum (Polyak 1964), m = momentum * m + g; plain where momentum is 0."""
  return optax.trace(decay=momentum) if momentum else optax.identity()


def muon(
  axes: LogicalAxes,
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
    axes: the parameter's logical axis names, without leading ones of `mup.STACKED_AXES`.
    beta: decay of the momentum.
    ns_steps: Newton-Schulz iterations, which bring singular values to about 0.7 ... 1.2.
    nesterov: use Nesterov momentum.
    consistent_rms: None: scale the orthogonal direction by sqrt(max(1, outputs / inputs)). A number r: scale it by
      r * sqrt(max(inputs, outputs)); 0.2 matches Adam's step (Liu et al. 2025, https://arxiv.org/abs/2502.16982).
    adam_lr_ratio: learning rate of Adam / learning rate of Muon.
    b1, b2, eps: as in `adamw`.
  """
  inputs = matrix_input_dims(axes)
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


def _moment_dtype(name: str | None) -> Any:
  try:
    return None if name is None else jnp.dtype(name)
  except TypeError:
    raise ConfigError(f"optim.moment_dtype={name!r} is not a dtype; give none, 'float32' or 'bfloat16'") from None

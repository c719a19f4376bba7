"""Where arrays live: the mesh, the rules from logical names to mesh axes, and strict constraints.

Every parameter and every activation that matters carries logical axis names; RULES is the only place that maps
them to the mesh. A name that no rule knows is an error, never a silent no-op.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llmjax.config import ConfigError, nearest
from llmjax.types import probe

Rules = Mapping[str, str | tuple[str, ...] | None]

AXES = ("data", "fsdp", "tensor")

RULES: Rules = {
  # parameters
  "layers": None,
  "vocab": "tensor",
  "positions": None,
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "mlp": "tensor",
  "experts": None,
  "norm": None,
  "head": None,  # outputs of the projections behind the last layer
  "classes": None,
  "token_types": None,
  "buckets": None,
  "lora": None,
  # activations
  "act_batch": ("data", "fsdp"),
  "act_len": None,
  "act_embed": None,
  "act_heads": "tensor",
  "act_kv_heads": "tensor",
  "act_head_dim": None,
  "act_mlp": "tensor",
  "act_vocab": "tensor",
}

_current: ContextVar[tuple[Mesh, Rules] | None] = ContextVar("llmjax_mesh", default=None)


def make_mesh(sizes: Mapping[str, int | None], devices: list[Any] | None = None) -> Mesh:
  """A mesh over all devices. One size may be -1: it takes what the others leave.

  Raises:
    ConfigError: an unknown axis, or sizes whose product is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  for name in sizes:
    if name not in AXES:
      raise ConfigError(f"mesh.{name} is no mesh axis; {nearest(name, AXES)}")
  shape = {name: 1 if sizes.get(name) is None else int(sizes[name] or 0) for name in AXES}
  said = ", ".join(f"{k}={v}" for k, v in shape.items())
  free = [name for name, size in shape.items() if size == -1]
  fixed = math.prod(size for size in shape.values() if size != -1)
  if len(free) > 1 or any(size < 1 and size != -1 for size in shape.values()):
    raise ConfigError(f"mesh: {said}: sizes are positive, and at most one is -1 (takes what is left)")
  if free and len(devices) % fixed == 0:
    shape[free[0]] = len(devices) // fixed
  elif free or fixed != len(devices):
    raise ConfigError(
      f"mesh: {said} needs a multiple of {fixed} devices, but there are {len(devices)}; change mesh.*"
      if free
      else f"mesh: {said} is {fixed} devices, but there are {len(devices)}; set one axis to -1 to take what is left"
    )
  # jax.make_mesh defaults to explicit axes, which Linen's parameters do not support.
  auto = (AxisType.Auto,) * len(AXES)
  return jax.make_mesh(tuple(shape.values()), AXES, axis_types=auto, devices=devices)


def parse_mesh(text: str) -> dict[str, int]:
  """The sizes in "data=2,tensor=4"; where none of them is -1, `data` takes what they leave."""
  sizes = {}
  for part in text.split(","):
    match = re.fullmatch(r"\s*(\w+)\s*=\s*(-?\d+)\s*", part)
    if match is None:
      raise ConfigError(f"--mesh={text}: {part!r} is no AXIS=SIZE, such as data=-1; axes are {', '.join(AXES)}")
    sizes[match[1]] = int(match[2])
  return {"data": 1 if -1 in sizes.values() else -1} | sizes


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules = RULES) -> Iterator[None]:
  """The only way to set mesh and rules for what is traced inside."""
  for name, axes in rules.items():
    for axis in _as_tuple(axes):
      if axis not in mesh.axis_names:
        raise ConfigError(f"rules.{name}={axis!r} is no mesh axis; {nearest(axis, mesh.axis_names)}")
  token = _current.set((mesh, rules))
  try:
    with jax.set_mesh(mesh):
      yield
  finally:
    _current.reset(token)


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def spec(names: tuple[str | None, ...], rules: Rules = RULES) -> PartitionSpec:
  """Logical names, one a dimension, as a PartitionSpec. KeyError-proof: an unknown name is a ValueError."""
  for name in names:
    if name is not None and name not in rules:
      raise ValueError(f"logical axis {name!r} has no rule; {nearest(name, rules)}")
  return PartitionSpec(*(None if name is None else rules[name] for name in names))


def named(mesh: Mesh, *names: str | None, rules: Rules = RULES) -> NamedSharding:
  """The sharding of an array whose dimensions have these logical names."""
  return NamedSharding(mesh, spec(names, rules))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Says how an activation is laid out; outside `use` (one device) only the names are checked."""
  if len(names) != x.ndim:
    raise ValueError(f"{len(names)} logical names {names} for an array of shape {x.shape}")
  current = _current.get()
  if current is None:
    spec(names)
    return x
  mesh, rules = current
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(names, rules)))


def parameters(model: nn.Module) -> tuple[Any, Any]:
  """A model's parameters as ShapeDtypeStructs, and the same tree of their logical axes. Computes nothing."""
  boxed = jax.eval_shape(lambda key: model.init(key, probe())["params"], jax.random.key(0))
  axes = jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
  return nn.unbox(boxed), axes


def param_shardings(shapes: Any, axes: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
  """A NamedSharding for every parameter.

  Args:
    shapes: tree of anything with a `shape`.
    axes: the same tree of tuples of logical names.
  Raises:
    ConfigError: a dimension that its mesh axes do not divide, before anything is compiled.
  """

  def one(path, leaf, names):
    for size, name in zip(leaf.shape, names, strict=True):
      parts = math.prod(mesh.shape[a] for a in _as_tuple(rules[name])) if name in rules else 1
      if size % parts:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        raise ConfigError(
          f"parameter {where}: dimension {name!r} of {size} does not divide over {parts} devices "
          f"(mesh axes {_as_tuple(rules[name])}); change mesh.{_as_tuple(rules[name])[0]}, or set rules.{name} to None"
        )
    return NamedSharding(mesh, spec(names, rules))

  return jax.tree_util.tree_map_with_path(one, shapes, axes)


def batch_size_over(mesh: Mesh, rules: Rules = RULES) -> int:
  """Into how many parts the batch is cut."""
  return math.prod(mesh.shape[a] for a in _as_tuple(rules["act_batch"]))

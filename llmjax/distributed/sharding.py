"""Where arrays live: the mesh, the rules from logical names to mesh axes, and strict constraints.

Every parameter and every activation that matters carries logical axis names; RULES is the only place that maps
them to the mesh. A name that no rule knows is an error, never a silent no-op.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llmjax.config import ConfigError, suggest_name
from llmjax.types import dummy_batch

Rules = Mapping[str, str | tuple[str, ...] | None]
LogicalAxes = tuple[str | None, ...]  # logical ones, one a dimension

# From the outermost, whose neighbours talk least, to the innermost.
AXES = ("data", "fsdp", "expert", "context", "tensor")

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
  "experts": "expert",
  "norm": None,
  "head": None,  # outputs of the projections behind the last layer
  "classes": None,
  "token_types": None,
  "buckets": None,
  "lora": None,
  # activations
  "act_batch": ("data", "fsdp", "expert"),
  "act_len": "context",
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
  shape = resolve_mesh_sizes(sizes, len(devices))
  # jax.make_mesh defaults to explicit axes, which Linen's parameters do not support.
  auto = (AxisType.Auto,) * len(AXES)
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices == 1:
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=auto, devices=devices)
  if shape["data"] % slices:
    raise ConfigError(
      f"mesh.data={shape['data']} must be a multiple of the {slices} slices: between them the network is slow, and "
      "only the data axis goes over it"
    )
  inside = {**shape, "data": shape["data"] // slices}
  outside = [slices if name == "data" else 1 for name in AXES]
  return Mesh(mesh_utils.create_hybrid_device_mesh(list(inside.values()), outside, devices), AXES, axis_types=auto)


def resolve_mesh_sizes(sizes: Mapping[str, int | None], count: int) -> dict[str, int]:
  """The size of every axis on `count` devices, -1 replaced; raises as `make_mesh`."""
  for name in sizes:
    if name not in AXES:
      raise ConfigError(f"mesh.{name} is no mesh axis; {suggest_name(name, AXES)}")
  shape = {name: 1 if sizes.get(name) is None else int(sizes[name] or 0) for name in AXES}
  said = ", ".join(f"{k}={v}" for k, v in shape.items())
  free = [name for name, size in shape.items() if size == -1]
  fixed = math.prod(size for size in shape.values() if size != -1)
  if len(free) > 1 or any(size < 1 and size != -1 for size in shape.values()):
    raise ConfigError(f"mesh: {said}: sizes are positive, and at most one is -1 (takes what is left)")
  if free and count % fixed == 0:
    shape[free[0]] = count // fixed
  elif free or fixed != count:
    raise ConfigError(
      f"mesh: {said} needs a multiple of {fixed} devices, but there are {count}; change mesh.*"
      if free
      else f"mesh: {said} is {fixed} devices, but there are {count}; set one axis to -1 to take what is left"
    )
  return shape


def parse_mesh(text: str, flag: str = "--mesh") -> dict[str, int]:
  """The sizes in "data=2,tensor=4"; where none of them is -1, `data` takes what they leave."""
  sizes = {}
  for part in text.split(","):
    match = re.fullmatch(r"\s*(\w+)\s*=\s*(-?\d+)\s*", part)
    if match is None:
      raise ConfigError(f"{flag}={text}: {part!r} is no AXIS=SIZE, such as data=-1; axes are {', '.join(AXES)}")
    sizes[match[1]] = int(match[2])
  return {"data": 1 if -1 in sizes.values() else -1} | sizes


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules = RULES) -> Iterator[None]:
  """The only way to set mesh and rules for what is traced inside."""
  for name, axes in rules.items():
    for axis in _as_tuple(axes):
      if axis not in mesh.axis_names:
        raise ConfigError(f"rules.{name}={axis!r} is no mesh axis; {suggest_name(axis, mesh.axis_names)}")
  token = _current.set((mesh, rules))
  try:
    with jax.set_mesh(mesh):
      yield
  finally:
    _current.reset(token)


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def partition_spec(names: LogicalAxes, rules: Rules = RULES) -> PartitionSpec:
  """Logical names, one a dimension, as a PartitionSpec.

  Raises:
    ValueError: an unknown name.
    ConfigError: rules that cut two of the dimensions over one mesh axis.
  """
  cut: dict[str, str] = {}  # {mesh axis: the name that is cut over it}
  for name in names:
    if name is not None and name not in rules:
      raise ValueError(f"logical axis {name!r} has no rule; {suggest_name(name, rules)}")
    for axis in () if name is None else _as_tuple(rules[name]):
      if axis in cut:
        raise ConfigError(
          f"rules.{cut[axis]} and rules.{name} both cut over {axis!r}, and an array has both dimensions; "
          "set one of them to none"
        )
      cut[axis] = str(name)
  return PartitionSpec(*(None if name is None else rules[name] for name in names))


def named_sharding(mesh: Mesh, *names: str | None, rules: Rules = RULES) -> NamedSharding:
  """The sharding of an array whose dimensions have these logical names."""
  return NamedSharding(mesh, partition_spec(names, rules))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Says how an activation is laid out; outside `use` (one device) only the names are checked.

  A length that does not divide over its axes, such as the one token of a decoding step, is on all of their devices.
  """
  if len(names) != x.ndim:
    raise ValueError(f"{len(names)} logical names {names} for an array of shape {x.shape}")
  current = _current.get()
  if current is None:
    partition_spec(names)
    return x
  mesh, rules = current
  if jax.sharding.get_abstract_mesh().manual_axes:  # inside `per_device`, where x is what one device holds
    return x
  fits = (axis_if_divisible(name, size) if name == "act_len" else name for name, size in zip(names, x.shape))
  return jax.lax.with_sharding_constraint(x, named_sharding(mesh, *fits, rules=rules))


def _num_shards(mesh: Mesh, rules: Rules, name: str) -> int:
  """Into how many parts a dimension is cut."""
  return math.prod(mesh.shape[axis] for axis in _as_tuple(rules[name]))


def num_shards(name: str) -> int:
  """Into how many parts the mesh in use cuts dimensions of this logical name; 1 without one."""
  current = _current.get()
  return 1 if current is None else _num_shards(*current, name)


def mesh_platform() -> str:
  """ "cpu", "gpu" or "tpu": of the mesh in use, which may be of another machine; without one, of the default device."""
  current = _current.get()
  return jax.default_backend() if current is None else str(current[0].devices.flat[0].platform)


def axis_if_divisible(name: str, size: int) -> str | None:
  """The logical name of a dimension, or None where the mesh in use cannot cut it into equal parts."""
  return None if size % num_shards(name) else name


def mesh_axes_of(name: str) -> tuple[str, ...]:
  """The axes of the mesh in use, longer than 1, that cut dimensions of this logical name; none without one."""
  current = _current.get()
  if current is None:
    return ()
  mesh, rules = current
  return tuple(axis for axis in _as_tuple(rules[name]) if mesh.shape[axis] > 1)


def per_device(function: Callable[..., Any], arguments: Any, results: Any) -> Callable[..., Any]:
  """A function of what each device holds of its arguments; the function itself where no mesh is in use.

  Args:
    arguments: a tuple of the logical names of each argument's dimensions; of a tree, a tree of them, or one for all.
    results: the same of what it returns.
  """
  current = _current.get()
  if current is None:
    return function
  mesh, rules = current

  def specs(names: Any) -> Any:
    return jax.tree.map(lambda each: partition_spec(each, rules), names, is_leaf=_is_names)

  return jax.shard_map(
    function, mesh=mesh, in_specs=tuple(map(specs, arguments)), out_specs=specs(results), check_vma=False
  )


def _is_names(x: Any) -> bool:
  return isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)


def abstract_parameters(model: nn.Module) -> tuple[Any, Any]:
  """A model's parameters as ShapeDtypeStructs, and the same tree of their logical axes. Computes nothing."""
  boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), dummy_batch())["params"])
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
    return NamedSharding(mesh, partition_spec(names, rules))

  return jax.tree_util.tree_map_with_path(one, shapes, axes)


def num_batch_shards(mesh: Mesh, rules: Rules = RULES) -> int:
  """Into how many parts the batch is cut."""
  return _num_shards(mesh, rules, "act_batch")

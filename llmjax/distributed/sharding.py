"""Sharding: the mesh, logical axis names as mesh axes, and strict constraints.

Every parameter and every important activation has logical axis names. The rules (`llmjax.config.mesh.RULES`, or
config.rules) are the only place that maps them to mesh axes. A name without a rule is an error, never a silent no-op.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llmjax.config import ConfigError, suggest_name
from llmjax.config.mesh import MESH_AXES, RULES, Rules
from llmjax.trees import KeyPath, Params, PyTree, path_string
from llmjax.types import Model, dummy_batch

LogicalAxes = tuple[str | None, ...]  # one logical name for each dimension

Function = TypeVar("Function", bound=Callable[..., Any])

_current: ContextVar[tuple[Mesh, Rules] | None] = ContextVar("llmjax_mesh", default=None)


def make_mesh(sizes: Mapping[str, int | None], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Return a mesh over all devices.

  Args:
    sizes: {mesh axis: size}; missing axes have size 1, and one size may be -1: the devices that remain.
    devices: None: all.

  Raises:
    ConfigError: an unknown axis, or sizes whose product is not the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  shape = resolve_mesh_sizes(sizes, len(devices))
  # jax.make_mesh defaults to explicit axes, which Linen's parameters do not support.
  auto = (AxisType.Auto,) * len(MESH_AXES)
  num_slices = len({getattr(device, "slice_index", 0) for device in devices})
  if num_slices == 1:
    return jax.make_mesh(tuple(shape.values()), MESH_AXES, axis_types=auto, devices=devices)
  if shape["data"] % num_slices:
    raise ConfigError(
      f"mesh.data={shape['data']} must be a multiple of the {num_slices} slices: the network between them is slow, and "
      "only the data axis crosses it"
    )
  within = {**shape, "data": shape["data"] // num_slices}
  across = [num_slices if name == "data" else 1 for name in MESH_AXES]
  return Mesh(mesh_utils.create_hybrid_device_mesh(list(within.values()), across, devices), MESH_AXES, axis_types=auto)


def resolve_mesh_sizes(sizes: Mapping[str, int | None], num_devices: int) -> dict[str, int]:
  """Return the size of every mesh axis on `num_devices` devices, -1 replaced; raises as `make_mesh`."""
  for name in sizes:
    if name not in MESH_AXES:
      raise ConfigError(f"mesh.{name} is not a mesh axis; {suggest_name(name, MESH_AXES)}")
  shape = {name: 1 if sizes.get(name) is None else int(sizes[name] or 0) for name in MESH_AXES}
  text = ", ".join(f"{k}={v}" for k, v in shape.items())
  free = [name for name, size in shape.items() if size == -1]
  fixed = math.prod(size for size in shape.values() if size != -1)
  if len(free) > 1 or any(size < 1 and size != -1 for size in shape.values()):
    raise ConfigError(f"mesh: {text}: sizes are positive, and at most one is -1 (all devices that remain)")
  if free and num_devices % fixed == 0:
    shape[free[0]] = num_devices // fixed
  elif free:
    raise ConfigError(f"mesh: {text} needs a multiple of {fixed} devices, but there are {num_devices}; change mesh.*")
  elif fixed != num_devices:
    raise ConfigError(
      f"mesh: {text} is {fixed} devices, but there are {num_devices}; set one axis to -1 to take what is left"
    )
  return shape


def parse_mesh(text: str, flag: str = "--mesh") -> dict[str, int]:
  """Return the sizes in "data=2,tensor=4"; `data` takes the remaining devices if no size is -1."""
  sizes = {}
  for part in text.split(","):
    match = re.fullmatch(r"\s*(\w+)\s*=\s*(-?\d+)\s*", part)
    if match is None:
      raise ConfigError(f"{flag}={text}: {part!r} is not AXIS=SIZE, such as data=-1; axes are {', '.join(MESH_AXES)}")
    sizes[match[1]] = int(match[2])
  return {"data": 1 if -1 in sizes.values() else -1} | sizes


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules = RULES) -> Iterator[None]:
  """Set mesh and rules for everything that is traced inside; the only way to set them."""
  for name, axes in rules.items():
    for axis in _as_tuple(axes):
      if axis not in mesh.axis_names:
        raise ConfigError(f"rules.{name}={axis!r} is not a mesh axis; {suggest_name(axis, mesh.axis_names)}")
  token = _current.set((mesh, rules))
  try:
    with jax.set_mesh(mesh):
      yield
  finally:
    _current.reset(token)


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def partition_spec(names: LogicalAxes, rules: Rules = RULES) -> PartitionSpec:
  """Return the PartitionSpec of logical axis names.

  Raises:
    ValueError: a name without a rule.
    ConfigError: rules that shard two of the dimensions over the same mesh axis.
  """
  sharded: dict[str, str] = {}  # {mesh axis: the logical axis that is sharded over it}
  for name in names:
    if name is not None and name not in rules:
      raise ValueError(f"logical axis {name!r} has no rule; {suggest_name(name, rules)}")
    for axis in () if name is None else _as_tuple(rules[name]):
      if axis in sharded:
        raise ConfigError(
          f"rules.{sharded[axis]} and rules.{name} both shard over {axis!r}, and an array has both dimensions; "
          "set one of them to none"
        )
      sharded[axis] = str(name)
  return PartitionSpec(*(None if name is None else rules[name] for name in names))


def named_sharding(mesh: Mesh, *names: str | None, rules: Rules = RULES) -> NamedSharding:
  """Return the sharding of an array whose dimensions have these logical names."""
  return NamedSharding(mesh, partition_spec(names, rules))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Constrain the sharding of an activation; outside `use_mesh` (one device), only check the names.

  A length that its mesh axes do not divide, such as the single token of a decoding step, is replicated.
  """
  if len(names) != x.ndim:
    raise ValueError(f"{len(names)} logical names {names} for an array of shape {x.shape}")
  current = _current.get()
  if current is None:
    partition_spec(names)
    return x
  mesh, rules = current
  if jax.sharding.get_abstract_mesh().manual_axes:  # inside `per_device`, where x is the part of one device
    return x
  divisible = (axis_if_divisible(name, size) if name == "act_len" else name for name, size in zip(names, x.shape))
  return jax.lax.with_sharding_constraint(x, named_sharding(mesh, *divisible, rules=rules))


def _num_shards(mesh: Mesh, rules: Rules, name: str) -> int:
  return math.prod(mesh.shape[axis] for axis in _as_tuple(rules[name]))


def num_shards(name: str) -> int:
  """Return the number of shards of a logical axis under the current mesh; 1 without a mesh."""
  current = _current.get()
  return 1 if current is None else _num_shards(*current, name)


def num_batch_shards(mesh: Mesh, rules: Rules = RULES) -> int:
  """Return the number of shards of the batch on a mesh."""
  return _num_shards(mesh, rules, "act_batch")


def mesh_platform() -> str:
  """Return "cpu", "gpu" or "tpu": that of the current mesh, whose devices may be absent, else of the default device."""
  current = _current.get()
  return jax.default_backend() if current is None else str(current[0].devices.flat[0].platform)


def axis_if_divisible(name: str, size: int) -> str | None:
  """Return the logical axis, or None if the current mesh does not divide a dimension of this size."""
  return None if size % num_shards(name) else name


def mesh_axes_of(name: str) -> tuple[str, ...]:
  """Return the axes of the current mesh, longer than 1, that shard a logical axis; none without a mesh."""
  current = _current.get()
  if current is None:
    return ()
  mesh, rules = current
  return tuple(axis for axis in _as_tuple(rules[name]) if mesh.shape[axis] > 1)


def per_device(function: Function, arguments: Sequence[Any], results: Any) -> Function:
  """Return `function` applied to the shard of each device (`jax.shard_map`); unchanged without a mesh.

  Args:
    function: reads and returns what one device holds.
    arguments: for each argument the logical names of its dimensions; for a tree a tree of them, or one for all leaves.
    results: the same for what it returns.
  """
  current = _current.get()
  if current is None:
    return function
  mesh, rules = current

  def specs(names: Any) -> PyTree:
    return jax.tree.map(lambda each: partition_spec(each, rules), names, is_leaf=_is_names)

  return jax.shard_map(
    function, mesh=mesh, in_specs=tuple(map(specs, arguments)), out_specs=specs(results), check_vma=False
  )


def _is_names(x: object) -> bool:
  return isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)


def abstract_parameters(model: Model) -> tuple[Params, PyTree]:
  """Return a model's parameters as ShapeDtypeStructs, and the same tree of their logical axes. Computes nothing."""
  boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), dummy_batch())["params"])
  axes = jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
  return nn.unbox(boxed), axes


def param_shardings(shapes: Params, axes: PyTree, mesh: Mesh, rules: Rules = RULES) -> PyTree:
  """Return a NamedSharding for every parameter.

  Args:
    shapes: parameters, or anything with a `shape`.
    axes: the same tree of tuples of logical axis names.
    mesh: the mesh.
    rules: logical axis -> mesh axes.

  Raises:
    ConfigError: a dimension that its mesh axes do not divide; raised before anything is compiled.
  """

  def one(path: KeyPath, leaf: jax.ShapeDtypeStruct, names: LogicalAxes) -> NamedSharding:
    for size, name in zip(leaf.shape, names, strict=True):
      mesh_axes = _as_tuple(rules[name]) if name is not None and name in rules else ()
      shards = math.prod(mesh.shape[axis] for axis in mesh_axes)
      if size % shards:
        raise ConfigError(
          f"parameter {path_string(path)}: dimension {name!r} of {size} does not divide over {shards} devices "
          f"(mesh axes {mesh_axes}); change mesh.{mesh_axes[0]}, or set rules.{name} to None"
        )
    return NamedSharding(mesh, partition_spec(names, rules))

  return jax.tree_util.tree_map_with_path(one, shapes, axes)

"""Meshes, sharding rules and the values that they reject."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from llmjax.config import ConfigError, load_config, to_dict
from llmjax.distributed import sharding


def test_make_mesh_infers_one_axis_and_makes_axes_auto():
  mesh = sharding.make_mesh({"data": -1, "tensor": 2})
  assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "expert": 1, "context": 1, "tensor": 2}
  assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
  "sizes, words",
  [
    ({"data": 3}, ["3 devices", "there are 8", "-1"]),
    ({"data": -1, "tensor": 3}, ["multiple of 3", "8"]),
    ({"data": -1, "fsdp": -1}, ["at most one"]),
    ({"data": 0}, ["positive"]),
    ({"fdsp": 8}, ["mesh.fdsp", "fsdp"]),
  ],
)
def test_make_mesh_rejects_invalid_sizes_in_one_line(sizes, words):
  with pytest.raises(ConfigError) as error:
    sharding.make_mesh(sizes)
  assert "\n" not in str(error.value)
  for word in words:
    assert word in str(error.value)


def test_constrain_rejects_unknown_logical_names():
  x = jnp.ones((8, 4))
  with pytest.raises(ValueError, match=r"act_btch.*act_batch"):
    sharding.constrain(x, "act_btch", None)
  with sharding.use_mesh(sharding.make_mesh({"data": -1})), pytest.raises(ValueError, match="act_btch"):
    sharding.constrain(x, "act_btch", None)
  with pytest.raises(ValueError, match="1 logical names"):
    sharding.constrain(x, "act_batch")


def test_constrain_adds_a_constraint_to_the_program():
  """Flax's logical constraints are dropped silently in a wrong context."""
  mesh = sharding.make_mesh({"data": 4, "tensor": 2})
  with sharding.use_mesh(mesh):
    function = jax.jit(lambda x: sharding.constrain(x * 2, "act_batch", "act_len", "act_mlp"))
    assert function.lower(jnp.ones((8, 2, 4))).as_text().count("sharding_constraint") == 1
    assert function(jnp.ones((8, 2, 4))).sharding.spec == PartitionSpec("data", None, "tensor")


def test_param_shardings_name_a_dimension_that_does_not_divide():
  mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
  shapes = {"embedding": {"table": jax.ShapeDtypeStruct((50257, 768), jnp.float32)}}
  axes = {"embedding": {"table": ("vocab", "embed")}}
  with pytest.raises(ConfigError, match=r"embedding/table.*'vocab' of 50257.*2 devices.*rules\.vocab"):
    sharding.param_shardings(shapes, axes, mesh)
  where = sharding.param_shardings(shapes, axes, mesh, {**sharding.RULES, "vocab": None})
  assert where["embedding"]["table"].spec == PartitionSpec(None, "fsdp")


def test_config_contains_every_rule_with_its_default():
  assert to_dict(load_config(["--config=gpt:debug"]).rules) == sharding.RULES


def test_use_rejects_a_rule_with_an_unknown_mesh_axis():
  with (
    pytest.raises(ConfigError, match=r"rules\.mlp='tensors'.*tensor"),
    sharding.use_mesh(sharding.make_mesh({"data": -1}), {**sharding.RULES, "mlp": "tensors"}),
  ):
    pass


def test_spec_rejects_two_dimensions_on_one_mesh_axis():
  rules = {**sharding.RULES, "embed": "tensor"}
  with pytest.raises(ConfigError, match=r"rules\.embed and rules\.mlp both shard over 'tensor'"):
    sharding.partition_spec(("embed", "mlp"), rules)
  assert sharding.partition_spec(("embed", None), rules) == PartitionSpec("tensor", None)

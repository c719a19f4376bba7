"""Optimizers against their published formulas, with stacked and unstacked layers and on a mesh; schedules."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from llmjax import trees
from llmjax.config import ConfigError, duration_to_steps
from llmjax.distributed import sharding
from llmjax.training import optimizers, schedules

LAYERS = 2
AXES = {
  "embedder": {"table": ("vocab", "embed")},
  "layers": {
    "norm": {"scale": ("layers", "norm")},
    "out": {"kernel": ("layers", "heads", "head_dim", "embed")},
    "query": {"bias": ("layers", "heads", "head_dim"), "kernel": ("layers", "embed", "heads", "head_dim")},
    "square": {"kernel": ("layers", "embed", "mlp")},
    "up": {"bias": ("layers", "mlp"), "kernel": ("layers", "embed", "mlp")},
  },
}
SIZES = {"layers": LAYERS, "vocab": 24, "embed": 8, "heads": 2, "head_dim": 6, "mlp": 16, "norm": 8}
EVERYWHERE = ((".*", True),)
OPTIMIZERS = {
  "adamw": {"b1": 0.9, "b2": 0.95},
  "adafactor": {"min_dim_size_to_factor": 4, "momentum": 0.9, "parameter_scale": True},
  "lion": {},
  "muon": {"adam_lr_ratio": 0.3},
  "sgd": {"momentum": 0.9},
}


def is_names(x):
  return isinstance(x, tuple)


def make_params(seed=0):
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda a: rng.normal(size=[SIZES[n] for n in a]).astype(np.float32), AXES, is_leaf=is_names)
  params["layers"]["square"]["kernel"] = params["layers"]["square"]["kernel"][:, :, :8]
  return params


def make_grads(steps=4):
  return [make_params(seed) for seed in range(1, steps + 1)]


def make_tx(name, params, axes=AXES, **keys):
  common = {"lr": 1.0, "weight_decay": 0.0, "decay_mask": EVERYWHERE, "clip_norm": None}
  common |= {"lr_scale": ((".*", 1.0),), "layer_decay": None}
  return optimizers.make_optimizer({"name": name, **common, **OPTIMIZERS.get(name, {}), **keys}, params, axes)


def compiler_options(name):
  """Fusion emitters for Muon: without them, XLA's rounding on CPUs grows to 1e-5 in Newton-Schulz iterations.

  Tests switch them off where XLA has other ones; later releases have neither those nor the option.
  """
  optional = "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", "")
  return {"xla_cpu_use_fusion_emitters": True} if name == "muon" and optional else None


def move(params, direction):
  """Parameters after a step at the rate 0.1."""
  return jax.tree.map(lambda p, d: np.asarray(p) - np.float32(0.1) * np.asarray(d), params, direction)


def directions(tx, params, grads, options=None):
  """The direction of every step of training with these gradients."""
  update = jax.jit(tx.update, compiler_options=options)
  state, history = jax.jit(tx.init)(params), []
  for grad in grads:
    direction, state = update(grad, state, params)
    params = move(params, direction)
    history.append(jax.device_get(direction))
  return history


def single(name, grads, **keys):
  """The directions of one hidden matrix [4 6]."""
  params = {"kernel": np.full_like(grads[0], 0.5)}
  tx = make_tx(name, params, {"kernel": ("embed", "mlp")}, **keys)
  return [d["kernel"] for d in directions(tx, params, [{"kernel": g} for g in grads])]


MATRICES = [np.random.default_rng(s).normal(size=(4, 6)).astype(np.float32) for s in range(5)]


def assert_norms_close(got, expected):
  """Compare leaf by leaf in the L2 norm: Newton-Schulz iterations amplify the rounding of single elements."""

  def leaf(path, x, y):
    error = np.linalg.norm(np.subtract(x, y)) / np.linalg.norm(y)
    assert error < 2e-6, f"{jax.tree_util.keystr(path)}: {error:.1e}"

  jax.tree_util.tree_map_with_path(leaf, got, expected)


def unroll(tree, is_leaf=None):
  take = lambda i: jax.tree.map(lambda x: x[1:] if is_leaf else x[i], tree["layers"], is_leaf=is_leaf)  # noqa: E731
  return {"embedder": tree["embedder"], **{f"layers_{i}": take(i) for i in range(LAYERS)}}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_stacked_layers_equal_unstacked(name):
  params, grads = make_params(), make_grads()
  keys = {"weight_decay": 0.1, "clip_norm": 1.0}
  options = compiler_options(name)
  stacked = directions(make_tx(name, params, **keys), params, grads, options)
  flat, axes = unroll(params), unroll(AXES, is_names)
  alone = directions(make_tx(name, flat, axes, **keys), flat, [unroll(g) for g in grads], options)
  assert_norms_close([unroll(d) for d in stacked], alone)


def test_adamw_equals_its_formula():
  m = v = 0.0
  for t, (g, direction) in enumerate(zip(MATRICES, single("adamw", MATRICES, eps=1e-6)), start=1):
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
    np.testing.assert_allclose(direction, m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6), rtol=1e-5)


def test_lion_equals_its_formula():
  m = 0.0
  for g, direction in zip(MATRICES, single("lion", MATRICES, b1=0.8, b2=0.95)):
    np.testing.assert_array_equal(direction, np.sign(0.8 * m + 0.2 * g))
    m = 0.95 * m + 0.05 * g


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_its_formula(momentum):
  m = 0.0
  for g, direction in zip(MATRICES, single("sgd", MATRICES, momentum=momentum)):
    m = momentum * m + g
    np.testing.assert_allclose(direction, m, rtol=1e-5)


def test_adafactor_equals_its_formula():
  # Algorithm 4 of the paper, with row and column sums and without the paper's step size.
  rows = columns = 0.0
  keys = {"min_dim_size_to_factor": 4, "momentum": None, "parameter_scale": False}
  for t, (g, direction) in enumerate(zip(MATRICES, single("adafactor", MATRICES, **keys)), start=1):
    decay = 1 - t**-0.8
    rows = decay * rows + (1 - decay) * (g**2 + 1e-30).sum(axis=1)
    columns = decay * columns + (1 - decay) * (g**2 + 1e-30).sum(axis=0)
    u = g / np.sqrt(np.outer(rows, columns) / rows.sum())
    np.testing.assert_allclose(direction, u / max(1.0, np.sqrt((u**2).mean())), rtol=1e-5)


def test_muon_orthogonalizes_hidden_matrices_and_uses_adam_elsewhere():
  params, grads = make_params(), make_grads()
  muon = directions(make_tx("muon", params, b1=0.9, b2=0.95, eps=1e-8), params, grads)[-1]
  adam = directions(make_tx("adamw", params, b1=0.9, b2=0.95, eps=1e-8), params, grads)[-1]
  widths = {"query": (8, 12), "out": (12, 8), "up": (8, 16), "square": (8, 8)}  # inputs, outputs
  for name, (inputs, outputs) in widths.items():
    for layer in muon["layers"][name]["kernel"]:
      values = np.linalg.svd(np.asarray(layer).reshape(inputs, outputs) / max(1, outputs / inputs) ** 0.5)[1]
      assert values.min() > 0.6 and values.max() < 1.3, name
  others = [t["layers"] | {"table": t["embedder"]["table"]} for t in (muon, adam)]
  for tree in others:
    for name in widths:
      tree[name] = {k: v for k, v in tree[name].items() if k != "kernel"}
  jax.tree.map(lambda m, a: np.testing.assert_allclose(m, 0.3 * a, rtol=1e-5), *others)


def test_muon_with_consistent_rms_gives_equal_rms_to_all_shapes():
  params, grads = make_params(), make_grads()
  out = directions(make_tx("muon", params, consistent_rms=0.2), params, grads)[-1]["layers"]
  for name in ("query", "out", "up", "square"):
    assert 0.13 < np.sqrt(np.mean(np.square(out[name]["kernel"]))) < 0.26


def test_matrix_input_dims_follow_from_axis_names():
  assert optimizers.matrix_input_dims(("embed", "heads", "head_dim")) == (0,)
  assert optimizers.matrix_input_dims(("heads", "head_dim", "embed")) == (0, 1)
  assert optimizers.matrix_input_dims(("mlp", "embed")) == (0,)
  none = [("vocab", "embed"), ("embed", "vocab"), ("positions", "embed"), ("heads", "head_dim"), ("norm",)]
  assert all(optimizers.matrix_input_dims(axes) is None for axes in none)


def test_clip_norm_is_the_norm_of_the_whole_tree():
  params, grad = make_params(), make_grads(1)[0]
  out = directions(make_tx("sgd", params, momentum=0.0, clip_norm=0.5), params, [grad])[0]
  norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(grad)))
  jax.tree.map(lambda d, g: np.testing.assert_allclose(d, g * 0.5 / norm, rtol=1e-5), out, grad)
  out = directions(make_tx("sgd", params, momentum=0.0, clip_norm=2 * norm), params, [grad])[0]
  jax.tree.map(np.testing.assert_array_equal, out, grad)


def test_weight_decay_is_decoupled_and_masked():
  params, grads = make_params(), make_grads(1)
  mask = ((r".*(norm|bias|table).*", False), (r".*", True))
  plain = directions(make_tx("adamw", params), params, grads)[0]
  decayed = directions(make_tx("adamw", params, weight_decay=0.1, decay_mask=mask), params, grads)[0]
  expected = jax.tree.map(lambda p, path: 0.1 * p * path.endswith("kernel"), params, trees.leaf_paths(params))
  jax.tree.map(lambda d, p, e: np.testing.assert_allclose(d - p, e, atol=1e-6), decayed, plain, expected)


def test_bfloat16_parameters_have_float32_moments():
  params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), make_params())
  tx = make_tx("adamw", params, weight_decay=0.1)
  state = jax.eval_shape(tx.init, params)
  direction, after = jax.eval_shape(tx.update, params, state, params)
  assert {x.dtype.name for x in jax.tree.leaves((direction, state))} == {"float32", "int32"}
  assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, after)
  narrow = jax.eval_shape(make_tx("adamw", params, moment_dtype="bfloat16").init, params)["embedder"]["table"]
  assert (narrow.mu.dtype, narrow.nu.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.fixture
def mesh():
  return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_on_mesh_equals_one_device(name, mesh):
  params, grads = make_params(), make_grads()
  tx = make_tx(name, params, weight_decay=0.1, clip_norm=1.0)
  shapes = jax.eval_shape(lambda: params)
  where = sharding.param_shardings(shapes, AXES, mesh)
  states = optimizers.state_shardings(tx, shapes, where, mesh)
  for shape, sharded in zip(jax.tree.leaves(jax.eval_shape(tx.init, shapes)), jax.tree.leaves(states), strict=True):
    sharded.shard_shape(shape.shape)  # raises if a dimension does not divide
  place = functools.partial(jax.device_put, device=where)
  options = compiler_options(name)
  update = jax.jit(
    tx.update, in_shardings=(where, states, where), out_shardings=(where, states), compiler_options=options
  )
  state = jax.jit(tx.init, out_shardings=states)(place(params))
  for grad, expected in zip(grads, directions(tx, params, grads, options)):
    direction, state = update(place(grad), state, place(params))
    params = move(params, jax.device_get(direction))
    assert_norms_close(direction, expected)


def test_adam_moments_are_sharded_like_their_parameter(mesh):
  params = make_params()
  shapes = jax.eval_shape(lambda: params)
  where = sharding.param_shardings(shapes, AXES, mesh)
  states = optimizers.state_shardings(make_tx("adamw", params), shapes, where, mesh)
  jax.tree.map(lambda w, s: (w, w) == (s.mu, s.nu) or pytest.fail(f"{w} {s}"), where, states)
  assert states["layers"]["up"]["kernel"].count.spec == PartitionSpec()


def test_adafactor_factors_are_sharded_like_the_remaining_dimension(mesh):
  params = make_params()
  shapes = jax.eval_shape(lambda: params)
  where = sharding.param_shardings(shapes, AXES, mesh)
  states = optimizers.state_shardings(make_tx("adafactor", params, momentum=None), shapes, where, mesh)
  state = jax.eval_shape(make_tx("adafactor", params, momentum=None).init, shapes)

  def factors(part):
    factored = part[0]
    return factored.v_row, factored.v_col

  up = factors(states["layers"]["up"]["kernel"])  # [2 8 16], embed over fsdp, mlp over tensor
  assert [f.spec for f in up] == [PartitionSpec(None, "fsdp"), PartitionSpec(None, "tensor")]
  assert [f.shape for f in factors(state["layers"]["up"]["kernel"])] == [(2, 8), (2, 16)]
  table = factors(states["embedder"]["table"])  # [24 8], vocab over tensor, embed over fsdp
  assert [f.spec for f in table] == [PartitionSpec("fsdp"), PartitionSpec("tensor")]
  query = factors(states["layers"]["query"]["kernel"])  # [2 8 2 6]: over 8 and 6
  assert [f.spec for f in query] == [PartitionSpec(None, "tensor", None), PartitionSpec(None, "fsdp", "tensor")]
  norm = states["layers"]["norm"]["scale"][0]
  assert norm.v == where["layers"]["norm"]["scale"] and norm.v_row.spec == PartitionSpec()

  # Both factors of a square kernel have one shape. An update with an uneven gradient shows which one is which.
  square = factors(states["layers"]["square"]["kernel"])
  tx = make_tx("adafactor", params, momentum=None)
  grad = jax.tree.map(np.zeros_like, params)
  grad["layers"]["square"]["kernel"][:, 0, :] = 1.0  # one row of dimension "embed"
  after = jax.jit(lambda grad, params: tx.update(grad, tx.init(params), params)[1])(grad, params)
  after = factors(jax.device_get(after)["layers"]["square"]["kernel"])
  along_embed = [bool(f[0, 0] > 2 * f[0, 1]) for f in after]
  assert sorted(along_embed) == [False, True]
  assert [f.spec for f in square] == [PartitionSpec(None, "fsdp" if e else "tensor") for e in along_embed]


def test_match_rules_takes_the_first_match_and_names_unmatched_paths():
  tree = {"a": {"kernel": 0, "bias": 0}, "b": {"kernel": 0}}
  assert trees.leaf_paths(tree) == {"a": {"kernel": "a/kernel", "bias": "a/bias"}, "b": {"kernel": "b/kernel"}}
  values = trees.match_rules((("a/.*", 1), (".*kernel", 2)), tree, "key")
  assert values == {"a": {"kernel": 1, "bias": 1}, "b": {"kernel": 2}}
  wrong = {
    "key: no rule matches a/bias": ((".*kernel", 1),),
    "key: 'kernel' matches no parameter": (("kernel", 1), (".*", 2)),
    "not a regular expression": (("(", 1),),
    "is not a rule": ((".*",),),
  }
  for message, rules in wrong.items():
    with pytest.raises(ConfigError, match=message):
      trees.match_rules(rules, tree, "key")


@pytest.mark.parametrize(
  "keys, message",
  [
    ({"clip_norm": 0.0}, "optim.clip_norm=0.0 must be positive"),
    ({"weight_decay": -0.1}, "optim.weight_decay=-0.1"),
    ({"decay_mask": ((".*", "yes"),)}, "'yes' must be True or False"),
    ({"moment_dtype": "float31"}, "optim.moment_dtype='float31'"),
    ({"beta1": 0.9}, "optim.beta1: 'adamw' has no such key"),
  ],
)
def test_make_optimizer_rejects_invalid_values(keys, message):
  with pytest.raises(ConfigError, match=message):
    make_tx("adamw", make_params(), **keys)


def rates(total, **spec):
  steps = lambda value, key: duration_to_steps(value, key, batch_size=1, seq_len=1, total_steps=total)  # noqa: E731
  schedule = schedules.make_schedule({"warmup": None} | spec, total, steps)
  values = [schedule(step) for step in range(total)]
  assert all(type(v) is float and 0 <= v <= 1 for v in values)
  return values


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_schedule_has_no_zero_warmup_step_and_ends_at_final(name):
  keys = {"decay": "20%"} if name == "wsd" else {}
  final = {} if name == "constant" else {"final": 0.1}
  values = rates(50, name=name, warmup="10%", **keys, **final)
  np.testing.assert_allclose(values[:5], np.arange(1, 6) / 5)
  assert values[-1] == pytest.approx(final.get("final", 1.0), abs=1e-12)
  assert values[4:] == sorted(values[4:], reverse=True)
  assert rates(50, name=name, **keys, **final)[0] == 1.0
  for total in (1, 2, 5):  # almost or entirely warm-up
    assert rates(total, name=name, warmup=total, **({"decay": 0} if keys else {}), **final)[-1] == 1.0


def test_cosine_and_linear_schedules_equal_optax():
  cosine = optax.warmup_cosine_decay_schedule(1 / 10, 1.0, warmup_steps=9, decay_steps=99, end_value=0.1)
  np.testing.assert_allclose(
    rates(100, name="cosine", warmup=10, final=0.1), [cosine(s) for s in range(100)], rtol=1e-5
  )
  linear = optax.linear_schedule(1.0, 0.2, transition_steps=90, transition_begin=9)
  np.testing.assert_allclose(
    rates(100, name="linear", warmup=10, final=0.2)[9:], [linear(s) for s in range(9, 100)], rtol=1e-5
  )


def test_inverse_sqrt_and_wsd_schedules_equal_their_formulas():
  vaswani = rates(100, name="inverse_sqrt", warmup=16)
  np.testing.assert_allclose(vaswani, [min((t + 1) / 16, (16 / (t + 1)) ** 0.5) for t in range(100)])
  assert rates(100, name="inverse_sqrt", timescale=10)[30] == pytest.approx(0.5)
  for shape, middle in (("linear", 0.5), ("sqrt", 1 - 0.5**0.5)):
    values = rates(101, name="wsd", warmup=10, decay=20, shape=shape)
    assert values[9:81] == [1.0] * 72 and values[81] < 1.0
    assert values[90] == pytest.approx(middle) and values[100] == 0.0


@pytest.mark.parametrize(
  "spec, message",
  [
    ({"name": "cosine", "warmup": 101}, "schedule.warmup=101 is 101 steps, but the run has total_steps=100"),
    ({"name": "cosine", "final": 1.5}, "schedule.final=1.5"),
    ({"name": "cosin"}, "did you mean `cosine`"),
    ({"name": "cosine", "decay": 10}, "schedule.decay: 'cosine' has no such key"),
    ({"name": "wsd", "warmup": 50, "decay": 60}, "schedule.decay=60 is 60 steps, but only 50 follow"),
    ({"name": "wsd", "decay": 10, "shape": "cosine"}, "schedule.shape='cosine'"),
    ({"name": "inverse_sqrt", "timescale": 0}, "schedule.timescale=0"),
  ],
)
def test_make_schedule_rejects_invalid_values(spec, message):
  with pytest.raises(ConfigError, match=message):
    rates(100, **spec)

"""Adapters, frozen parameters and learning rates by layer: the functions, without whole runs."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.models import lora
from llmjax.models.layer_stacks import stack_layers, unstack_layers
from llmjax.models.lora import is_adapter, merge_lora
from llmjax.models.transformer import Transformer
from llmjax.training import optimizers, step
from llmjax.training.trainable import layer_lr_scales, match_trainable
from llmjax.trees import flatten_tree, merge_trainable, split_trainable, unflatten_tree
from tests.support.cases import CASES, GPT, MODERNBERT, T5, gradients, make_batch, mesh_shardings, parameters
from tests.support.tiers import by_tier

LORA = ((r".*lora_[ab]", True), (r".*", False))
ATTENTION, ALL = r".*attention/(query|value)", r"(en|de)coder/.*"
COMMON = {"lr": 1.0, "weight_decay": 0.0, "decay_mask": ((".*", True),), "clip_norm": None}
COMMON |= {"lr_scale": ((".*", 1.0),), "layer_decay": None}


def with_adapters(name, targets=ATTENTION, **changes):
  """A case with adapters of rank 3 and scale 2."""
  changes = {"lora_rank": 3, "lora_alpha": 6.0, "lora_targets": targets, **changes}
  return dataclasses.replace(CASES[name], cfg=dataclasses.replace(CASES[name].cfg, **changes))


def trained_parameters(cfg, seed=0):
  """Parameters whose adapters are not at their initial values."""
  rng = np.random.default_rng(seed)
  flat = flatten_tree(parameters(cfg)[0])
  return unflatten_tree(
    {k: rng.normal(0, 0.1, x.shape).astype(np.float32) if is_adapter(k) else x for k, x in flat.items()}
  )


@functools.cache
def forward(cfg):
  return jax.jit(lambda params, batch, rngs: Transformer(cfg).apply({"params": params}, batch, rngs=rngs).logits)


def logits(cfg, params, batch, **rngs):
  return np.asarray(forward(cfg)(params, batch, rngs))


def trainable(params, rules=LORA):
  return match_trainable(params, rules)


def assert_close(got, want, tolerance=1e-5):
  """Check |got - want| <= tolerance * |want| in the L2 norm."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want), np.linalg.norm(got - want)


# Adapters.


@pytest.mark.parametrize("name", by_tier(["gpt causal_lm", "t5 span_corruption"], ["gpt causal_lm"]))
def test_adapters_at_initialization_leave_logits_identical(name):
  case, plain = with_adapters(name, ALL), CASES[name].cfg
  params, batch = parameters(case.cfg)[0], make_batch(CASES[name])
  others = {path: leaf for path, leaf in flatten_tree(params).items() if not is_adapter(path)}
  assert any(map(is_adapter, flatten_tree(params)))
  np.testing.assert_array_equal(logits(case.cfg, params, batch), logits(plain, unflatten_tree(others), batch))


TARGETS = {"llama causal_lm": ATTENTION, "modernbert masked_lm": ALL, "t5 span_corruption": ALL}


@pytest.mark.parametrize("name", by_tier(TARGETS, ["llama causal_lm"]))
def test_merged_adapters_compute_the_same_logits(name):
  """Scanned and unrolled; also projections of two dimensions, cross-attention and layers outside the scan."""
  targets = TARGETS[name]
  case, plain = with_adapters(name, targets), CASES[name].cfg
  params, batch = trained_parameters(case.cfg), make_batch(CASES[name])
  count = sum(is_adapter(path) for path in flatten_tree(params))
  assert count == 2 * sum(re.fullmatch(targets + "/kernel", path) is not None for path in flatten_tree(params))
  want = logits(case.cfg, params, batch)
  merged = merge_lora(params, case.cfg)
  assert not any(map(is_adapter, flatten_tree(merged)))
  assert_close(logits(plain, merged, batch), want)
  assert np.abs(logits(plain, parameters(plain)[0], batch) - want).max() > 0.01
  unrolled_cfg, unrolled = dataclasses.replace(case.cfg, scan=False), unstack_layers(params, case.cfg)
  assert_close(logits(unrolled_cfg, unrolled, batch), want)
  restacked = jax.jit(functools.partial(stack_layers, cfg=case.cfg))(merge_lora(unrolled, unrolled_cfg))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), restacked, merged)


@pytest.mark.parametrize("name", by_tier(["gpt causal_lm", "t5 span_corruption"], ["gpt causal_lm"]))
def test_adapter_gradients_follow_from_gradients_of_merged_kernels(name):
  """Chain rule in float64: if G is the gradient by W + s A B, then dA = s G B' and dB = s A' G."""
  case = with_adapters(name, ALL)
  params, batch = jax.device_get(trained_parameters(case.cfg)), make_batch(CASES[name])
  trained, frozen = split_trainable(params, trainable(params))
  gradient = jax.jit(
    functools.partial(step.compute_gradients, model=Transformer(case.cfg), objective=case.objective, accum=1)
  )
  got = flatten_tree(jax.device_get(gradient(trained, batch, jax.random.key(0), frozen=frozen)[0]))
  assert all(map(is_adapter, got))
  merged_gradients, _ = gradients(CASES[name], merge_lora(params, case.cfg), batch)
  merged_gradients, flat = flatten_tree(jax.device_get(merged_gradients)), flatten_tree(params)
  for path, a in flat.items():
    if path.endswith("lora_a"):
      prefix = path.removesuffix("/lora_a")
      layers, inputs = a.shape[0], int(np.prod(a.shape[1:-1]))
      g = np.asarray(merged_gradients[f"{prefix}/kernel"], np.float64).reshape(layers, inputs, -1)
      a, b = np.reshape(a, (layers, inputs, 3)), np.reshape(flat[f"{prefix}/lora_b"], (layers, 3, -1))
      for factor, want in (("lora_a", 2 * g @ b.swapaxes(1, 2)), ("lora_b", 2 * a.swapaxes(1, 2) @ g)):
        assert_close(got[f"{prefix}/{factor}"], want.reshape(flat[f"{prefix}/{factor}"].shape), 1e-4)


def test_adapter_dropout_runs_only_with_a_key_and_differs_by_row():
  case, without = with_adapters("gpt causal_lm", ALL, lora_dropout=0.4), with_adapters("gpt causal_lm", ALL)
  params, batch = trained_parameters(case.cfg), make_batch(CASES["gpt causal_lm"])
  np.testing.assert_array_equal(logits(case.cfg, params, batch), logits(without.cfg, params, batch))
  repeated = dataclasses.replace(jax.tree.map(lambda x: np.repeat(x[:1], len(x), axis=0), batch), rows=batch.rows)
  first, second = logits(case.cfg, params, repeated, dropout=jax.random.key(0))[:2]
  assert np.abs(first - second).max() > 0.01
  np.testing.assert_array_equal(*logits(without.cfg, params, repeated, dropout=jax.random.key(0))[:2])


@pytest.mark.slow
def test_adapter_gradients_accumulated_on_mesh_equal_one_device():
  case = with_adapters("gpt causal_lm", ALL, lora_dropout=0.4)
  params, batch = trained_parameters(case.cfg), make_batch(CASES["gpt causal_lm"])
  chosen = trainable(params)
  gradient = functools.partial(step.compute_gradients, model=Transformer(case.cfg), objective=case.objective)
  trained, frozen = split_trainable(params, chosen)
  want, _ = jax.jit(functools.partial(gradient, accum=1))(trained, batch, jax.random.key(0), frozen=frozen)
  with mesh_shardings(case.cfg, {"data": 2, "fsdp": 2, "tensor": 2}) as (param_shardings, row_sharding):
    where = split_trainable(param_shardings, chosen)
    trained, frozen = (jax.device_put(part, place) for part, place in zip((trained, frozen), where, strict=True))
    rows = jax.device_put(batch, row_sharding)
    got, _ = jax.jit(functools.partial(gradient, accum=2))(trained, rows, jax.random.key(0), frozen=frozen)
  got = flatten_tree(jax.device_get(got))
  for path, leaf in flatten_tree(jax.device_get(want)).items():
    assert_close(got[path], leaf, 1e-4)


# Frozen parameters.


def steps(case, rules, count=3, ema_decay=None, **optimizer):
  """(state before, state after) `count` steps of training the parameters that `rules` select."""
  params, axes = parameters(case.cfg)
  chosen = trainable(params, rules)
  tx = optimizers.make_optimizer({"name": "adamw", **COMMON, **optimizer}, params, axes, chosen)
  first = jax.device_get(
    jax.jit(lambda params: step.make_train_state(params, tx, ema_decay is not None, chosen))(params)
  )
  function = functools.partial(step.train_step, model=Transformer(case.cfg), objective=case.objective, tx=tx, accum=1)
  function = jax.jit(functools.partial(function, ema_decay=ema_decay))
  state = first
  for _ in range(count):
    state, _ = function(state, make_batch(CASES["gpt causal_lm"]), jax.random.key(0), jnp.float32(0.01))
  return first, jax.device_get(state)


NORMS = ((r"decoder/.*(norm|bias).*", True), (r".*", False))


@pytest.mark.parametrize("rules", [LORA, pytest.param(NORMS, marks=pytest.mark.slow)], ids=["lora", "norms"])
def test_frozen_parameters_stay_and_have_no_moments_or_average(rules):
  case = with_adapters("gpt causal_lm")
  first, last = steps(case, rules, ema_decay=0.5, weight_decay=0.1, clip_norm=1.0)
  chosen = {path for path, value in flatten_tree(trainable(parameters(case.cfg)[0], rules)).items() if value}
  assert set(flatten_tree(last.params)) == set(flatten_tree(last.ema)) == chosen
  assert set(flatten_tree(last.frozen)) == set(flatten_tree(parameters(case.cfg)[0])) - chosen
  assert set(flatten_tree(merge_trainable(last.ema, last.frozen))) == set(flatten_tree(parameters(case.cfg)[0]))
  jax.tree.map(np.testing.assert_array_equal, last.frozen, first.frozen)
  for path, leaf in flatten_tree(last.params).items():
    assert (np.asarray(leaf) != flatten_tree(first.params)[path]).any(), path
  sizes = [leaf.size for leaf in jax.tree.leaves(last.opt_state) if leaf.ndim]
  layers = sum(len(leaf) for leaf in jax.tree.leaves(last.params) if leaf.ndim)
  numbers = sum(leaf.size for leaf in jax.tree.leaves(last.params))
  assert sum(sizes) <= 2 * numbers + layers and sum(sizes) >= 2 * numbers


@pytest.mark.parametrize(
  "rules, words",
  [
    (((r".*lorra.*", True), (r".*", False)), r"trainable: '\.\*lorra\.\*' matches no parameter"),
    (((r".*", 1),), r"trainable: 1 must be True or False"),
    (((r".*", False),), r"trainable: no parameter is trained"),
    (((r".*lora_a", True),), r"trainable: no rule matches .* end with a rule for all others"),
  ],
)
def test_trainable_rejects_invalid_rules(rules, words):
  with pytest.raises(ConfigError, match=words) as error:
    trainable(parameters(with_adapters("gpt causal_lm").cfg)[0], rules)
  assert "\n" not in str(error.value)


def test_lora_targets_that_match_no_projection_are_rejected():
  cfg = with_adapters("gpt causal_lm", "attention/query").cfg
  with pytest.raises(ConfigError, match=r"model\.lora_targets='attention/query' matches no projection.*decoder/layers"):
    lora.check_lora_targets(parameters(cfg)[0], cfg)


# Rates by layer.


def test_layer_scales_are_powers_of_the_depth_below_the_top():
  """Two stacks, layers outside the scan and patterns of two kinds of layers, scanned and unrolled."""

  def scales_of(cfg, **changes):
    cfg = dataclasses.replace(cfg, **changes)
    return {k: np.ravel(v).tolist() for k, v in flatten_tree(layer_lr_scales(parameters(cfg)[0], cfg, 0.5)).items()}

  scales = scales_of(GPT, tie_embeddings=False)
  assert scales["embedding/table"] == scales["positions/table"] == [1 / 8]
  assert scales["decoder/layers/attention/query/kernel"] == scales["decoder/layers/mlp_norm/scale"] == [1 / 4, 1 / 2]
  assert scales["decoder/final_norm/scale"] == scales["head/kernel"] == [1.0]
  unrolled = scales_of(GPT, scan=False)
  assert [unrolled[f"decoder/layers_{i}/mlp/up/bias"] for i in (0, 1)] == [[1 / 4], [1 / 2]]
  assert unrolled["embedding/table"] == [1 / 8] and unrolled["decoder/final_norm/scale"] == [1.0]

  scales = scales_of(MODERNBERT)  # 4 layers: one before the scan, a pattern of two in it, one after it
  assert scales["embedding/table"] == scales["embedding_norm/scale"] == [1 / 32]
  assert scales["encoder/first/mlp/up/kernel"] == [1 / 16]
  assert scales["encoder/layers/sublayer_0/attention/out/kernel"] == [1 / 8]
  assert scales["encoder/layers/sublayer_1/attention/out/kernel"] == [1 / 4]
  assert scales["encoder/last_0/attention_norm/scale"] == [1 / 2]
  assert scales["head_transform/kernel"] == scales["head_norm/scale"] == scales["head_bias/bias"] == [1.0]
  scales = scales_of(MODERNBERT, encoder_layers=5)
  assert scales["encoder/first/mlp/up/kernel"] == [1 / 32]
  assert scales["encoder/layers/sublayer_0/mlp/up/kernel"] == [1 / 16, 1 / 4]
  assert scales["encoder/layers/sublayer_1/mlp/up/kernel"] == [1 / 8, 1 / 2]

  scales = scales_of(T5, encoder_layers=3)  # each stack counts its own layers; the shared table is below the deeper one
  assert scales["encoder/layers/mlp/up/kernel"] == [1 / 8, 1 / 4, 1 / 2]
  assert scales["decoder/layers/cross_attention/out/kernel"] == [1 / 4, 1 / 2]
  assert scales["embedding/table"] == scales["encoder/relative/table"] == [1 / 16]
  assert scales["decoder/relative/table"] == [1 / 8]
  for decay in (0.0, 1.5):
    with pytest.raises(ConfigError, match=rf"optim\.layer_decay={decay} must be above 0 and at most 1"):
      layer_lr_scales(parameters(GPT)[0], GPT, decay)


def test_lr_scale_and_layer_decay_multiply_the_whole_update():
  """SGD with decoupled decay: the update is scale * (g + decay * p), scale = layer_decay's factor * lr_scale's."""
  params, axes = parameters(GPT)
  grads = jax.tree.map(lambda x: np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape), params)
  spec = {"name": "sgd", "momentum": 0.0, **COMMON, "weight_decay": 0.1}
  spec["lr_scale"] = ((r".*bias", 3.0), (r".*positions.*", 0), (r".*", 1.0))
  scales = layer_lr_scales(params, GPT, 0.5)
  tx = optimizers.make_optimizer(spec, params, axes, scales=scales)
  got = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])(grads, params)
  for path, direction in flatten_tree(jax.device_get(got)).items():
    by_rule = 3.0 if path.endswith("bias") else 0.0 if "positions" in path else 1.0
    layer = np.array([1 / 4, 1 / 2]) if path.startswith("decoder/layers/") else None
    by_layer = 1.0 if path.startswith("decoder/final") else 1 / 8
    leaf, grad = (np.asarray(flatten_tree(tree)[path], np.float64) for tree in (params, grads))
    scale = by_rule * (by_layer if layer is None else layer.reshape(-1, *(1,) * (leaf.ndim - 1)))
    np.testing.assert_allclose(direction, scale * (grad + 0.1 * leaf), rtol=1e-5, atol=1e-8)
  with pytest.raises(ConfigError, match=r"optim\.lr_scale: -1 must be a number, 0 or more"):
    optimizers.make_optimizer({**spec, "lr_scale": ((".*", -1),)}, params, axes)


@pytest.mark.slow
def test_lr_scale_of_zero_freezes_parameters_with_adam():
  _, last = steps(CASES["gpt causal_lm"], ((r".*", True),), count=2, lr_scale=((r"embedding.*", 0.0), (r".*", 1.0)))
  before = parameters(GPT)[0]
  np.testing.assert_array_equal(last.params["embedding"]["table"], before["embedding"]["table"])
  assert (np.asarray(last.params["positions"]["table"]) != before["positions"]["table"]).any()

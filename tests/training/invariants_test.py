"""Invariants of a step, a checkpoint, an evaluation and a resumed run that no other file states."""

import dataclasses
import functools
import itertools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.checkpoints.manager import Checkpoints
from llmjax.config import files as cfglib
from llmjax.distributed import sharding
from llmjax.evaluation import evaluators
from llmjax.examples import Window
from llmjax.models.attention import masks, select
from llmjax.models.attention.masks import AttentionSettings
from llmjax.models.transformer import Transformer
from llmjax.objectives.causal_lm import CausalLM
from llmjax.training import loop, optimizers, step
from llmjax.training.program import Program
from llmjax.types import Tokens
from tests.support.cases import CASES, GPT, gradients, make_batch, parameters, with_dropout
from tests.support.compare import assert_trees_close, assert_trees_identical, norm

CASE = CASES["gpt causal_lm"]
RATE, DECAY = 0.5, 0.8
SGD = {"name": "sgd", "momentum": 0.0, "lr": 1.0, "weight_decay": 0.0, "clip_norm": None}
SGD |= {"decay_mask": ((".*", True),), "lr_scale": ((".*", 1.0),), "layer_decay": None}


@pytest.mark.parametrize(
  "name, tiles", [("gpt causal_lm", 4), pytest.param("t5 span_corruption", 3, marks=pytest.mark.slow)]
)
def test_tiled_logits_give_the_untiled_loss_and_gradients(name, tiles):
  case = CASES[name]
  params, _ = parameters(case.cfg)
  batch = make_batch(case)
  # Another weight for every token, so that a loss that comes back in another order is another sum.
  weights = {term: w * np.linspace(0.1, 1, w.shape[1], dtype=np.float32) for term, w in batch.weights.items()}
  batch = dataclasses.replace(batch, weights=weights)
  want, metrics = gradients(case, params, batch)
  tiled = jax.jit(
    functools.partial(
      step.compute_gradients, model=Transformer(case.cfg), objective=case.objective, accum=1, tiles=tiles
    )
  )
  got, same = tiled(params, batch, jax.random.key(0))
  assert_trees_close(same, metrics)
  assert_trees_close(got, want)


def test_causal_labels_are_the_next_tokens():
  ids = np.array([3, 1, 4, 1, 5], np.int32)
  example = CausalLM().make_example(Window({}, ids), np.random.default_rng(0), ())
  np.testing.assert_array_equal(example.inputs.ids, ids[:-1])
  np.testing.assert_array_equal(example.labels["nll"], ids[1:])
  np.testing.assert_array_equal(example.weights["nll"], np.ones(4))


def test_tied_table_gets_the_sum_of_the_gradients_of_both_its_uses():
  """Compare with a model of the same values whose embedding table and head are separate."""
  params, _ = parameters(GPT)
  tied, _ = gradients(CASE, params, make_batch(CASE))
  untied = dataclasses.replace(CASE, cfg=dataclasses.replace(GPT, tie_embeddings=False))
  table = np.asarray(params["embedding"]["table"])
  apart, _ = gradients(untied, {**params, "head": {"kernel": table.T}}, make_batch(CASE))
  apart = jax.device_get(apart)
  head = apart.pop("head")["kernel"]
  apart["embedding"]["table"] = apart["embedding"]["table"] + head.T
  assert_trees_close(tied, apart)


@functools.cache
def sgd():
  """(a step of gradient descent with dropout and an average, as a function of the state, the first state)."""
  case, (params, axes) = with_dropout(CASE), parameters(GPT)
  tx = optimizers.make_optimizer(SGD, params, axes)
  settings = {"model": Transformer(case.cfg), "objective": case.objective, "accum": 1}

  @jax.jit
  def advance(state, batch):
    key = jax.random.key(7)
    grads, _ = step.compute_gradients(state.params, batch, jax.random.fold_in(key, state.step), **settings)
    return grads, *step.train_step(state, batch, key, jnp.float32(RATE), tx=tx, ema_decay=DECAY, **settings)

  return lambda state: jax.device_get(advance(state, make_batch(CASE))), jax.device_get(
    step.make_train_state(params, tx, True)
  )


@functools.cache
def sgd_steps():
  """(gradients, states, metrics) of two steps."""
  advance, first = sgd()
  grads, states, metrics = [], [first], []
  for _ in range(2):
    for history, value in zip((grads, states, metrics), advance(states[-1])):
      history.append(value)
  return grads, states, metrics


def test_sgd_step_moves_parameters_by_rate_times_gradient():
  grads, states, _ = sgd_steps()
  for before, gradient, after in zip(states, grads, states[1:]):
    want = jax.tree.map(lambda p, g: p - RATE * g, before.params, gradient)
    moved = [jax.tree.map(np.subtract, params, before.params) for params in (after.params, want)]
    assert_trees_close(*moved, tolerance=1e-4)
    assert after.step == before.step + 1


def test_ema_decays_towards_the_updated_parameters():
  _, states, _ = sgd_steps()
  assert_trees_identical(states[0].ema, states[0].params)
  for before, after in itertools.pairwise(states):
    want = jax.tree.map(lambda e, p: DECAY * e + (1 - DECAY) * p, before.ema, after.params)
    moved = [jax.tree.map(np.subtract, average, before.ema) for average in (after.ema, want)]
    assert_trees_close(*moved, tolerance=1e-4)


def test_step_reports_norms_of_the_whole_gradient_and_update():
  grads, states, metrics = sgd_steps()
  for gradient, after, measured in zip(grads, states[1:], metrics):
    whole = np.sqrt(sum(norm(leaf) ** 2 for leaf in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(measured["grad_norm"][0], whole, rtol=1e-5)
    np.testing.assert_allclose(measured["update_norm"][0], RATE * whole, rtol=1e-5)
    size = np.sqrt(sum(norm(leaf) ** 2 for leaf in jax.tree.leaves(after.params)))
    np.testing.assert_allclose(measured["param_norm"][0], size, rtol=1e-5)


def test_dropout_differs_between_steps():
  """The parameters and the batch are the same; only the step number differs."""
  advance, first = sgd()
  each = [advance(dataclasses.replace(first, step=np.int32(number)))[2]["loss"][0] for number in (0, 0, 1)]
  assert each[0] == each[1] != each[2]


def test_clipping_scales_gradients_and_not_directions():
  """Adam's first direction is g / (|g| + eps), whatever the gradient is scaled by; a clipped one would be short."""
  params = {"kernel": np.ones((4, 6), np.float32)}
  gradient = {"kernel": np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)}
  spec = {**SGD, "name": "adamw", "b1": 0.9, "b2": 0.95, "eps": 1e-12, "clip_norm": 0.1}
  del spec["momentum"]
  tx = optimizers.make_optimizer(spec, params, {"kernel": ("embed", "mlp")})
  direction, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
  np.testing.assert_allclose(direction["kernel"], np.sign(gradient["kernel"]), rtol=1e-4)


def test_checkpoint_restores_every_leaf_of_equal_shape_by_name(tmp_path):
  """All leaves have one shape, so that an exchange of two would load."""
  tree = {"query": {"kernel": 0, "bias": 0}, "key": {"kernel": 0, "bias": 0}, "a": {"kernel": 0}}
  numbers = iter(range(1, 1000))
  draw = lambda _: np.full((2, 3), next(numbers), np.float32)  # noqa: E731
  params, moments = jax.tree.map(draw, tree), jax.tree.map(lambda _: {"mu": draw(0), "nu": draw(0)}, tree)
  state = step.TrainState(np.full((), 5, np.int32), params, moments, jax.tree.map(draw, tree), None)
  checkpoints = Checkpoints(tmp_path, write=True)
  checkpoints.save(5, state, {}, {}, {})
  checkpoints.wait()
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state)
  assert_trees_identical(checkpoints.restore(5, abstract), state)
  part = checkpoints.restore_parts(5, {"ema": abstract.ema})
  assert_trees_identical(part["ema"], state.ema)
  checkpoints.close()


def test_evaluation_weighs_batches_by_their_weights(monkeypatch):
  """The mean over a split is that of its tokens, not of its batches' means."""
  batches = [{"loss": (np.float32(total), np.float32(count))} for total, count in ((6, 2), (5, 10), (0, 0))]
  monkeypatch.setattr(evaluators, "held_out_batches", lambda *_: batches)
  monkeypatch.setattr(evaluators, "open_source", lambda *_: None)
  program = types.SimpleNamespace(
    config={"batch_size": 8, "data": {"eval": "test"}},
    mesh=sharding.make_mesh({"data": -1}),
    rules=sharding.RULES,
    objective=CASE.objective,
    auxiliary_params={},
    put=lambda batch, size: batch,
    eval_step=lambda params, batch, others: batch,
  )
  means = evaluators.heldout_loss(program)({})
  assert means["loss"] == pytest.approx(11 / 12) and means["perplexity"] == pytest.approx(np.exp(11 / 12))


def test_evaluated_parameters_are_the_average():
  """Frozen parameters have no average."""
  state = step.TrainState(0, {"a": 1}, None, {"a": 2}, {"b": 3})
  for decay, expected in ((None, 1), (0.9, 2)):
    program = types.SimpleNamespace(config={"ema_decay": decay})
    assert Program.eval_params(program, state) == {"a": expected, "b": 3}


def losses(workdir):
  """{step: (training loss, learning rate)} of a run's curves."""
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {x["step"]: (x["train/loss"], x["train/learning_rate"]) for x in lines if "train/loss" in x}


def test_interrupted_run_has_the_loss_curve_of_a_whole_run(home):
  """Equality is bitwise, with warm-up, Adam, an EMA, dropout and prefetched batches, from a checkpoint in mid-epoch."""
  (home / "t.txt").write_text("".join(f"{i}: a quick fox jumps over {i * 37 % 101} dogs.\n" for i in range(200)))
  flags = [f"--config=char:text={home / 't.txt'},debug", "--config.batch_size=8", "--config.log.tensorboard=false"]
  flags += ["--config.model.dropout=0.1", "--config.ema_decay=0.9", "--config.data.prefetch=3"]
  flags += ["--config.total_steps=5", "--config.schedule.warmup=3", "--config.log.every=1", "--config.evals={}"]
  flags += ["--config.checkpoint.every=2", "--config.checkpoint.keep=9", "--config.model.decoder_layers=1"]
  config = cfglib.load_config(flags)
  loop.run(config, home / "whole")
  shutil.copytree(home / "whole", home / "interrupted")
  for last in ("4", "5"):
    shutil.rmtree(home / "interrupted" / "checkpoints" / last)
  loop.run(config, home / "interrupted")
  assert losses(home / "interrupted") == losses(home / "whole") and set(losses(home / "whole")) == {1, 2, 3, 4, 5}
  states = []
  for name in ("interrupted", "whole"):
    checkpoints = Checkpoints(home / name)
    states.append((checkpoints.manager.restore(5)["state"], checkpoints.read_cursor(5)))
    checkpoints.close()
  assert states[0][1] == states[1][1]
  assert_trees_identical(states[0][0], states[1][0])


def test_cudnn_kernel_gets_scale_mask_and_bias(monkeypatch):
  """On CPU, JAX's own implementation stands in for cuDNN's."""
  attention = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: attention(*a, **k | {"implementation": "xla"}))
  rng = np.random.default_rng(0)
  vectors = [rng.normal(size=(2, 16, heads, 8)).astype(np.float32) for heads in (4, 2, 2)]
  table = rng.normal(size=(8, 4)).astype(np.float32)
  segments = np.repeat([[1, 2]], 8, axis=1).repeat(2, axis=0)
  positions = np.tile(np.arange(8), (2, 2))
  tokens = jax.tree.map(jnp.asarray, Tokens(segments, positions, segments))
  settings = AttentionSettings(0.4, causal=True, window=5, buckets=8, max_distance=16)
  mask = masks.attention_mask(tokens, tokens, causal=True, window=5)
  each = [
    jax.jit(functools.partial(select.dot_product_attention, kernel, settings=settings))(
      *vectors, tokens, tokens, mask=mask, relative=table
    )
    for kernel in ("xla", "cudnn")
  ]
  np.testing.assert_allclose(each[1], each[0], atol=1e-5)

"""Invariants of the train step, for every kind of attention with an objective that uses it.

The mesh, microbatches, scanned layers, rematerialisation, packing, padding and other documents in the row do not change
the gradient.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.distributed import sharding
from llmjax.models.layer_stacks import stack_layers, unstack_layers
from llmjax.models.transformer import Transformer
from llmjax.training import optimizers, step
from llmjax.types import Batch, Tokens
from tests.support.cases import (
  CASES,
  GPT,
  LENGTH,
  ROWS,
  gradient_function,
  gradients,
  gradients_on_mesh,
  make_batch,
  make_examples,
  pack_batch,
  parameters,
  predicted_tokens,
  widen_rows,
  with_dropout,
)
from tests.support.compare import assert_trees_close, assert_trees_identical
from tests.support.tiers import by_tier

# A decoder, an encoder, an encoder-decoder and the objective that needs the whole batch at once.
FAST = ("gpt causal_lm", "bert masked_lm", "t5 span_corruption", "bert contrastive")
WEIGHTED = [name for name in CASES if name not in ("bert contrastive", "bert weighted_sum")]
PACKED = [name for name, case in CASES.items() if case.shared]
EACH_CASE = pytest.mark.parametrize("name", by_tier(CASES, FAST))
EACH_PACKED_CASE = pytest.mark.parametrize("name", by_tier(PACKED, [name for name in FAST if name in PACKED]))


def assert_same_results(got, want):
  """Compare (gradients, metrics): each tree by itself, because sums of losses are much larger than gradients."""
  for got_tree, want_tree in zip(got, want, strict=True):
    assert_trees_close(got_tree, want_tree)


# Packing and padding. All of these call one compiled program per case: gradients at one batch shape.


def replace_ids(batch, where):
  """The batch with random letters as the tokens at which `where(tokens)` is true."""

  def replace(tokens):
    if tokens is None:
      return None
    random = np.random.default_rng(1).integers(97, 123, tokens.ids.shape).astype(np.int32)
    return dataclasses.replace(tokens, ids=np.where(where(tokens), random, tokens.ids))

  extras = {name: replace_ids(inner, where) for name, inner in batch.extras.items()}
  return dataclasses.replace(batch, inputs=replace(batch.inputs), targets=replace(batch.targets), extras=extras)


@EACH_PACKED_CASE
def test_gradient_of_a_document_ignores_other_documents_in_the_row(name):
  """Bit by bit, except with experts: they sort tokens, and the position in a matrix product changes its rounding."""
  case = CASES[name]
  assert_same = assert_same_results if case.cfg.num_experts else assert_trees_identical
  params, _ = parameters(case.cfg)
  batch = make_batch(case)
  segments = predicted_tokens(batch).segments
  assert (segments.max(axis=1) >= 2).sum() > 4
  changed = replace_ids(batch, lambda tokens: tokens.segments == 1)
  with pytest.raises(AssertionError):
    assert_trees_close(gradients(case, params, changed)[0], gradients(case, params, batch)[0])

  def weigh_second(batch):
    return dataclasses.replace(batch, weights={term: w * (segments == 2) for term, w in batch.weights.items()})

  assert_same(gradients(case, params, weigh_second(changed)), gradients(case, params, weigh_second(batch)))


@EACH_CASE
def test_gradient_ignores_ids_at_padding(name):
  case, batch = CASES[name], make_batch(CASES[name])
  params, _ = parameters(case.cfg)
  changed = replace_ids(batch, lambda tokens: tokens.segments == 0)
  assert_same_results(gradients(case, params, changed), gradients(case, params, batch))


def check_packed_equals_separate(case, extra_padding=0):
  """Compare examples that share rows with the same examples in one row each."""
  params, _ = parameters(case.cfg)
  examples, row_lengths = make_examples(case, ROWS), case.objective.row_lengths(LENGTH)
  packed = pack_batch(examples, row_lengths, ROWS, shared=case.shared)
  separate = pack_batch(examples, widen_rows(row_lengths, extra_padding), ROWS, shared=False)
  want, got = gradients(case, params, packed), gradients(case, params, separate)
  assert_same_results(got, want)


@EACH_PACKED_CASE
def test_gradient_of_packed_rows_equals_separate_rows(name):
  check_packed_equals_separate(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gradient_of_packed_rows_equals_longer_separate_rows(name):
  check_packed_equals_separate(CASES[name], extra_padding=8)


# Denominators.


def scale_weights(batch, factor):
  return dataclasses.replace(batch, weights={term: w * np.float32(factor) for term, w in batch.weights.items()})


@pytest.mark.parametrize("name", by_tier(WEIGHTED, [name for name in FAST if name in WEIGHTED]))
def test_gradient_unchanged_if_all_weights_are_scaled(name):
  """Denominators are sums of weights, not numbers of tokens."""
  case, batch = CASES[name], make_batch(CASES[name])
  params, _ = parameters(case.cfg)
  want, _ = gradients(case, params, batch)
  got, _ = gradients(case, params, scale_weights(batch, 3.0))
  assert_trees_close(got, want)


def with_term_alone(batch, term):
  """The batch in which only `term` has a weight. A contrastive term is weighted by rows that are not empty."""
  *component, name = term.split("/")
  if not component:
    return dataclasses.replace(batch, weights={key: w * (key == name) for key, w in batch.weights.items()})

  def empty(inner):
    inputs = dataclasses.replace(inner.inputs, segments=np.zeros_like(inner.inputs.segments))
    return dataclasses.replace(scale_weights(inner, 0.0), inputs=inputs)

  extras = {key: inner if key == component[0] else empty(inner) for key, inner in batch.extras.items()}
  return dataclasses.replace(batch, extras=extras)


@pytest.mark.parametrize("name", by_tier(["bert masked_lm", "bert weighted_sum"], ["bert masked_lm"]))
def test_gradient_is_the_sum_of_gradients_of_single_terms(name):
  """Each term has its own denominator."""
  case, batch = CASES[name], make_batch(CASES[name])
  params, _ = parameters(case.cfg)
  weights = case.objective.weights(batch)
  assert len({round(float(w), 3) for w in weights.values()}) == len(weights) == 2
  want, _ = gradients(case, params, batch)
  terms = [jax.device_get(gradients(case, params, with_term_alone(batch, term))[0]) for term in weights]
  assert_trees_close(jax.tree.map(np.add, *terms), want)


def test_gradient_of_a_batch_without_weights_is_zero():
  case = CASES["gpt causal_lm"]
  grads, _ = gradients(case, parameters(GPT)[0], scale_weights(make_batch(case), 0.0))
  assert all(not np.asarray(g).any() for g in jax.tree.leaves(grads))


def test_causal_lm_metrics_equal_their_formula():
  """Loss, label smoothing and z-loss in float64 from the model's logits."""
  case = CASES["gpt causal_lm"]
  params, _ = parameters(GPT)
  batch = make_batch(case)
  forward = jax.jit(lambda params, batch: Transformer(GPT).apply({"params": params}, batch).logits)
  logits = np.asarray(forward(params, batch), np.float64)
  log_z = np.log(np.exp(logits).sum(-1))
  log_p = logits - log_z[..., None]
  labels, weight = batch.labels["nll"], np.asarray(batch.weights["nll"], np.float64)
  nll = -np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
  smoothed = 0.9 * nll - 0.1 * log_p.mean(-1)
  want = ((smoothed + 1e-3 * log_z**2) * weight).sum() / weight.sum()
  metrics = jax.device_get(gradients(case, params, batch)[1])
  np.testing.assert_allclose(metrics["objective"][0], want, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], (nll * weight).sum() / weight.sum(), rtol=1e-5)


# Attention.

ONE_LOCAL = {"attention_pattern": ("local",), "window": 4, "first_attention_norm": True}
VISIBLE = {  # name: (config, whether position p of a document attends at distance d = key - query)
  "decoder": (CASES["llama causal_lm"].cfg, lambda p, d: d <= 0),
  "decoder with learned positions": (CASES["gpt causal_lm"].cfg, lambda p, d: d <= 0),
  "windowed decoder": (
    dataclasses.replace(CASES["mistral causal_lm"].cfg, decoder_layers=1, **ONE_LOCAL),
    lambda p, d: (d <= 0) & (d > -4),
  ),
  "prefix decoder": (CASES["llama prefix_lm"].cfg, lambda p, d: (d <= 0) | (p + d < 5)),
  "encoder": (CASES["bert masked_lm"].cfg, lambda p, d: d == d),
  "local encoder": (
    dataclasses.replace(CASES["modernbert masked_lm"].cfg, encoder_layers=1, **ONE_LOCAL),
    lambda p, d: abs(d) <= 2,
  ),
}


@functools.cache
def table_gradient(cfg):
  """A function that returns the gradient of one hidden state of the last stream by the embedding table."""

  def hidden(table, params, batch, position):
    params = params | {"embedding": {"table": table}}
    out = Transformer(cfg).apply({"params": params}, batch, logits=False)
    # A plain sum is constant after a LayerNorm.
    return out.hidden[0, position] @ jnp.cos(jnp.arange(cfg.d_model))

  return jax.jit(jax.grad(hidden))


def visible_tokens(cfg, batch, position):
  """Masks of the tokens of each stream on which the hidden state at `position` of the last stream depends."""
  params, _ = parameters(cfg)
  streams = [s for s in (batch.inputs, batch.targets) if s is not None]
  starts = np.cumsum([0] + [s.ids.shape[1] for s in streams])
  # Every token has another id, so that the table's gradient has one row per token.
  streams = [dataclasses.replace(s, ids=np.arange(a, b)[None]) for s, a, b in zip(streams, starts, starts[1:])]
  batch = Batch(inputs=streams[0], targets=streams[1] if len(streams) > 1 else None)
  gradient = table_gradient(cfg)(params["embedding"]["table"], params, batch, position)
  visible = np.abs(np.asarray(gradient)).sum(-1) > 0
  return [visible[a:b] for a, b in itertools.pairwise(starts)]


def row(*lengths, prefix=None):
  """One row of documents with these lengths, and two tokens of padding."""
  tokens = Tokens(
    ids=np.zeros((1, sum(lengths) + 2), np.int32),
    positions=np.concatenate([*map(np.arange, lengths), np.zeros(2)])[None].astype(np.int32),
    segments=np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, 2])[None].astype(np.int32),
  )
  return tokens if prefix is None else dataclasses.replace(tokens, prefix=(tokens.positions < prefix).astype(np.int32))


@pytest.mark.parametrize("name", by_tier(VISIBLE, set(VISIBLE) - {"decoder with learned positions"}))
def test_token_attends_to_exactly_the_tokens_of_its_mask(name):
  cfg, rule = VISIBLE[name]
  tokens = row(7, 11, prefix=5 if cfg.bidirectional_prompt else None)
  for p in (0, 2, 6, 10):
    [visible] = visible_tokens(cfg, Batch(inputs=tokens), 7 + p)
    distance = np.arange(len(visible)) - (7 + p)
    np.testing.assert_array_equal(visible, (tokens.segments[0] == 2) & rule(p, distance), err_msg=f"position {p}")


def test_target_attends_to_its_whole_input_and_earlier_targets():
  cfg = CASES["t5 span_corruption"].cfg
  batch = Batch(inputs=row(5, 6), targets=row(3, 8))
  for p in (0, 4, 7):
    inputs, targets = visible_tokens(cfg, batch, 3 + p)
    np.testing.assert_array_equal(inputs, batch.inputs.segments[0] == 2)
    np.testing.assert_array_equal(targets, (batch.targets.segments[0] == 2) & (np.arange(13) <= 3 + p))


# Mesh, microbatches, unrolled layers, rematerialisation and dropout.

CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
REMAT = dict(zip(CASES, itertools.cycle(["dots", "full", "weight_dots"])))


@EACH_CASE
def test_gradient_unrolled_remat_accumulated_on_mesh_equals_scanned(name):
  """All changes at once that must not change the gradient. Tests in the tier `full` make one at a time."""
  case, batch = CASES[name], make_batch(CASES[name])
  params, _ = parameters(case.cfg)
  want, metrics = gradients(case, params, batch)
  unrolled = dataclasses.replace(case, cfg=dataclasses.replace(case.cfg, scan=False, remat=REMAT[name]))
  got, mesh_metrics = gradients_on_mesh(unrolled, unstack_layers(params, case.cfg), batch, CUBE, accum=2)
  assert_trees_close(got, unstack_layers(jax.device_get(want), case.cfg))
  assert_trees_close(mesh_metrics, metrics)


DROPOUT_SLOW = ("mixtral causal_lm", "modernbert masked_lm", "t5 span_corruption", "bert contrastive")


def dropout_tier(name):
  marks = {"gpt causal_lm": (), **dict.fromkeys(DROPOUT_SLOW, pytest.mark.slow)}
  return pytest.param(name, marks=marks.get(name, pytest.mark.full("meshes")))


@pytest.mark.parametrize("name", map(dropout_tier, CASES))
def test_gradient_with_dropout_accumulated_on_mesh_equals_one_device(name):
  case, batch = with_dropout(CASES[name]), make_batch(CASES[name])
  params, _ = parameters(case.cfg)
  want, metrics = gradients(case, params, batch)
  got, mesh_metrics = gradients_on_mesh(case, params, batch, {"data": 2, "tensor": 2}, accum=4)
  assert_trees_close(got, want)
  assert_trees_close(mesh_metrics, metrics)
  other_key, _ = gradients(case, params, batch, key=1)
  with pytest.raises(AssertionError):
    assert_trees_close(other_key, want)


@pytest.mark.full("meshes")
@pytest.mark.parametrize("name", CASES)
def test_gradient_with_dropout_on_three_axes_equals_one_device(name):
  case, batch = with_dropout(CASES[name]), make_batch(CASES[name])
  params, _ = parameters(case.cfg)
  assert_same_results(gradients_on_mesh(case, params, batch, CUBE, accum=2), gradients(case, params, batch))


@pytest.mark.full("meshes")
@pytest.mark.parametrize("name, accum", [("gpt causal_lm", 2), ("gpt causal_lm", 4), ("bert contrastive", 8)])
def test_gradient_accumulated_with_dropout_equals_whole_batch(name, accum):
  case, batch = with_dropout(CASES[name]), make_batch(CASES[name])
  params, _ = parameters(case.cfg)
  assert_same_results(gradients(case, params, batch, accum), gradients(case, params, batch))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gradient_unrolled_with_dropout_equals_scanned(name):
  case, batch = with_dropout(CASES[name]), make_batch(CASES[name])
  params, _ = parameters(case.cfg)
  want, metrics = gradients(case, params, batch)
  unrolled = dataclasses.replace(case, cfg=dataclasses.replace(case.cfg, scan=False, remat="full"))
  got, unrolled_metrics = gradients(unrolled, unstack_layers(params, case.cfg), batch)
  assert_trees_close(got, unstack_layers(jax.device_get(want), case.cfg))
  assert_trees_close(unrolled_metrics, metrics)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots", "weight_dots"])
def test_gradient_scanned_with_remat_and_dropout_equals_no_remat(remat):
  case, batch = with_dropout(CASES["gpt causal_lm"]), make_batch(CASES["gpt causal_lm"])
  params, _ = parameters(case.cfg)
  other = dataclasses.replace(case, cfg=dataclasses.replace(case.cfg, remat=remat))
  assert_same_results(gradients(other, params, batch), gradients(case, params, batch))


@pytest.mark.parametrize("name", by_tier(CASES, ["modernbert masked_lm", "t5 span_corruption"]))
def test_layout_stack_inverts_unstack(name):
  cfg = CASES[name].cfg
  params, _ = parameters(cfg)
  assert_trees_identical(
    jax.jit(functools.partial(stack_layers, cfg=cfg))(unstack_layers(jax.device_get(params), cfg)), params
  )


OPTIM = {"weight_decay": 0.1, "decay_mask": ((".*", True),), "clip_norm": 1.0, "lr": 0.1}
OPTIM |= {"lr_scale": ((".*", 1.0),), "layer_decay": None}


@functools.cache
def train_two_steps(name, accum=1, **sizes):
  """(state, metrics of both steps) of gradient descent with dropout, clipping and an average of the parameters."""
  case = with_dropout(CASES[name])
  params, axes = parameters(case.cfg)
  mesh = sharding.make_mesh(sizes or {"data": 1}, jax.devices()[: int(np.prod(list(sizes.values())))])
  rules = {**sharding.RULES, "vocab": None, "act_vocab": None}
  tx = optimizers.make_optimizer({"name": "sgd", "momentum": 0.9, **OPTIM}, params, axes)
  where = sharding.param_shardings(params, axes, mesh, rules)
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shardings = step.TrainState(replicated, where, optimizers.state_shardings(tx, params, where, mesh), where)
  rows = sharding.named_sharding(mesh, "act_batch", rules=rules)
  train_step = functools.partial(step.train_step, model=Transformer(case.cfg), objective=case.objective, tx=tx)
  with sharding.use_mesh(mesh, rules):
    state = jax.device_put(jax.jit(lambda params: step.make_train_state(params, tx, True))(params), shardings)
    function = jax.jit(
      functools.partial(train_step, accum=accum, ema_decay=0.5),
      in_shardings=(shardings, rows, replicated, replicated),
      out_shardings=(shardings, replicated),
    )
    history = []
    for seed in range(2):
      batch = jax.device_put(make_batch(CASES[name], seed=seed), rows)
      state, metrics = function(state, batch, jax.random.key(3), jnp.float32(0.1))
      history.append(metrics)
  assert function._cache_size() == 1
  return jax.device_get((state, history))


FULL_MESHES = pytest.mark.full("meshes")


@pytest.mark.parametrize(
  "name, sizes, accum",
  [
    ("llama causal_lm", CUBE, 2),
    pytest.param("llama causal_lm", {"data": 8}, 1, marks=FULL_MESHES),
    pytest.param("llama causal_lm", {"fsdp": 4, "tensor": 2}, 1, marks=FULL_MESHES),
    pytest.param("t5 span_corruption", CUBE, 2, marks=pytest.mark.slow),
  ],
)
def test_two_train_steps_on_mesh_equal_one_device(name, sizes, accum):
  want, want_metrics = train_two_steps(name)
  got, metrics = train_two_steps(name, accum, **sizes)
  assert_trees_close(got.params, want.params)
  assert_trees_close(got.ema, want.ema)
  assert_trees_close(metrics, want_metrics)


@pytest.mark.slow
def test_contrastive_chunks_need_activations_of_one_chunk():
  """Memory as compiled. Other tests check that the loss still sees the whole batch."""
  case = CASES["bert contrastive"]
  params, _ = parameters(case.cfg)
  batch = make_batch(case, rows=64)

  def temporary_bytes(accum):
    compiled = gradient_function(case, accum).lower(params, batch, jax.random.key(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary_bytes(16) < temporary_bytes(1) / 4

"""The step's invariants, for every kind of attention with an objective that uses it: neither mesh, microbatches, scan,
remat, packing, padding nor a neighbour in the row may change the numbers. Each check is shown to fail on a bug."""

import copy
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmjax.models.layers
import llmjax.models.scores
from llmjax import optim, sharding, step
from llmjax.data import packing
from llmjax.models.layout import stack, unstack
from llmjax.models.transformer import Transformer
from llmjax.types import Batch, Tokens
from tests.support.cases import (
  CASES,
  GPT,
  LENGTH,
  ROWS,
  gradient_function,
  gradients,
  make_batch,
  parameters,
  pieces,
  predicted,
  with_dropout,
)
from tests.support.compare import assert_trees_close, assert_trees_identical

ODD = {"vocab": None, "act_vocab": None}  # the tokenizer's number of tokens does not divide
SHARED = [name for name, case in CASES.items() if case.shared]


# Bugs, each planted once to see that a check finds it.


def forget(monkeypatch, **fields):
  """Masks are made of tokens whose `fields` are these constants instead."""
  real = llmjax.models.scores.attention_mask

  def broken(query, key, **settings):
    blind = [
      dataclasses.replace(t, **{f: jnp.full_like(t.segments, v) for f, v in fields.items()}) for t in (query, key)
    ]
    return real(*blind, **settings)

  monkeypatch.setattr(llmjax.models.scores, "attention_mask", broken)


def fresh(case):
  """The case as a new object: nothing that was traced before is used again."""
  return dataclasses.replace(case, objective=copy.copy(case.objective))


def check_leak(case):
  """Changes the first document of a row: nothing of the second may change, not by a bit.

  Experts get their tokens sorted, and a product rounds by the place of a row in it.
  """
  same = assert_trees_close if case.cfg.num_experts else assert_trees_identical
  params, _ = parameters(case.cfg)
  batch = make_batch(case)
  model = Transformer(case.cfg)
  forward = jax.jit(lambda params, batch: model.apply({"params": params}, batch).logits)
  gradient = gradient_function(case)
  segments = np.asarray(predicted(batch).segments)
  assert (segments.max(axis=1) >= 2).sum() > 4
  of_second = segments == 2
  batch = dataclasses.replace(batch, weights={term: w * of_second for term, w in batch.weights.items()})

  def change(tokens):
    other = np.random.default_rng(1).integers(97, 123, tokens.ids.shape).astype(np.int32)
    return dataclasses.replace(tokens, ids=np.where(tokens.segments == 1, other, tokens.ids))

  changed = dataclasses.replace(
    batch, inputs=change(batch.inputs), targets=None if batch.targets is None else change(batch.targets)
  )
  assert (forward(params, changed) != forward(params, batch)).any()
  same(forward(params, changed)[of_second], forward(params, batch)[of_second])
  key = jax.random.key(0)
  same(gradient(params, changed, key)[0], gradient(params, batch, key)[0])


@pytest.mark.parametrize("name", SHARED)
def test_a_document_never_sees_its_neighbour(name):
  check_leak(CASES[name])


@pytest.mark.parametrize("name", SHARED)
def test_a_leak_would_be_seen(name, monkeypatch):
  forget(monkeypatch, segments=1)
  with pytest.raises(AssertionError):
    check_leak(fresh(CASES[name]))


def check_packing(case):
  """The same examples, sharing rows or each in a longer row of its own, bear the same gradient."""
  params, _ = parameters(case.cfg)
  each = pieces(case, ROWS)
  sizes = case.objective.row_lengths(LENGTH)
  wide = {stream: length + 8 for stream, length in sizes.items()}
  shared = packing.best_fit(each, sizes) if case.shared else [[piece] for piece in each]
  rows = [packing.make_row(row, each[0], sizes) for row in shared]
  alone = [packing.make_row([piece], each[0], wide) for piece in each]
  assert not case.shared or len(rows) < len(each)
  rows += [packing.make_row([], each[0], sizes)] * (ROWS - len(rows))
  want, metrics = gradients(case, params, packing.make_batch(rows, range(ROWS)))
  got, same = gradients(case, params, packing.make_batch(alone, range(ROWS)))
  assert_trees_close(got, want)
  assert_trees_close(same, metrics)


@pytest.mark.parametrize("name", CASES)
def test_packed_is_separate_and_padding_is_nothing(name):
  check_packing(CASES[name])


def test_counting_padding_would_be_seen(monkeypatch):
  """Denominators that are the size of the batch, not its weights."""
  case = fresh(CASES["modernbert masked_lm"])
  monkeypatch.setattr(type(case.objective), "weights", lambda self, b: {"mlm": jnp.float32(b.inputs.ids.size)})
  with pytest.raises(AssertionError):
    check_packing(case)


def reach(cfg, batch, position):
  """Which tokens of (inputs, targets) the hidden state at a position of the last stream depends on, by gradient."""
  model, (params, _) = Transformer(cfg), parameters(cfg)
  streams = [s for s in (batch.inputs, batch.targets) if s is not None]
  starts = np.cumsum([0] + [s.ids.shape[1] for s in streams])
  own = [dataclasses.replace(s, ids=np.arange(a, b)[None]) for s, a, b in zip(streams, starts, starts[1:])]
  batch = Batch(inputs=own[0], targets=own[1] if len(own) > 1 else None)

  def hidden(table):  # every token has a row of its own in the table, so that its gradient can be told apart
    out = model.apply({"params": params | {"embedding": {"table": table}}}, batch, logits=False)
    return out.hidden[0, position] @ jnp.cos(jnp.arange(cfg.d_model))  # the plain sum is constant behind a LayerNorm

  moved = np.abs(np.asarray(jax.grad(hidden)(params["embedding"]["table"]))).sum(-1) > 0
  return [moved[a:b] for a, b in itertools.pairwise(starts)]


def row(*lengths, prefix=None):
  """One row of documents of these lengths, two tokens of padding behind."""
  tokens = Tokens(
    ids=np.zeros((1, sum(lengths) + 2), np.int32),
    positions=np.concatenate([*map(np.arange, lengths), np.zeros(2)])[None].astype(np.int32),
    segments=np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, 2])[None].astype(np.int32),
  )
  return tokens if prefix is None else dataclasses.replace(tokens, prefix=(tokens.positions < prefix).astype(np.int32))


ONE_LOCAL = {"attention_pattern": ("local",), "window": 4, "first_attention_norm": True}
SEES = {  # name: (config, row, what position p of the second document may see at distance d, key - query)
  "decoder": (CASES["llama causal_lm"].cfg, row(7, 11), lambda p, d: d <= 0),
  "learned decoder": (CASES["gpt causal_lm"].cfg, row(7, 11), lambda p, d: d <= 0),
  "windowed decoder": (
    dataclasses.replace(CASES["mistral causal_lm"].cfg, decoder_layers=1, **ONE_LOCAL),
    row(7, 11),
    lambda p, d: (d <= 0) & (d > -4),
  ),
  "prefix decoder": (CASES["llama prefix_lm"].cfg, row(7, 11, prefix=5), lambda p, d: (d <= 0) | (p + d < 5)),
  "encoder": (CASES["bert masked_lm"].cfg, row(7, 11), lambda p, d: d == d),
  "local encoder": (
    dataclasses.replace(CASES["modernbert masked_lm"].cfg, encoder_layers=1, **ONE_LOCAL),
    row(7, 11),
    lambda p, d: abs(d) <= 2,
  ),
}


@pytest.mark.parametrize("name", SEES)
def test_a_token_sees_what_its_kind_of_attention_says(name):
  cfg, tokens, rule = SEES[name]
  for p in (0, 2, 6, 10):
    [seen] = reach(cfg, Batch(inputs=tokens), 7 + p)
    distance = np.arange(len(seen)) - (7 + p)
    np.testing.assert_array_equal(seen, (tokens.segments[0] == 2) & rule(p, distance), err_msg=f"position {p}")


def test_a_target_sees_all_of_its_input_and_earlier_targets():
  cfg = CASES["t5 span_corruption"].cfg
  batch = Batch(inputs=row(5, 6), targets=row(3, 8))
  for p in (0, 4, 7):
    inputs, targets = reach(cfg, batch, 3 + p)
    np.testing.assert_array_equal(inputs, batch.inputs.segments[0] == 2)
    np.testing.assert_array_equal(targets, (batch.targets.segments[0] == 2) & (np.arange(13) <= 3 + p))


@pytest.mark.parametrize(
  "name, forgotten",
  [
    ("decoder", {"positions": 0}),
    ("windowed decoder", {"positions": 0}),
    ("prefix decoder", {"positions": 0}),
    ("prefix decoder", {"prefix": 0}),
    ("encoder", {"segments": 1}),
    ("local encoder", {"positions": 0}),
  ],
)
def test_seeing_too_much_or_too_little_would_be_seen(name, forgotten, monkeypatch):
  forget(monkeypatch, **forgotten)
  with pytest.raises(AssertionError):
    test_a_token_sees_what_its_kind_of_attention_says(name)


def test_an_encoder_that_looks_back_alone_would_be_seen(monkeypatch):
  real = llmjax.models.scores.attention_mask
  monkeypatch.setattr(llmjax.models.scores, "attention_mask", lambda q, k, **s: real(q, k, **s | {"causal": True}))
  with pytest.raises(AssertionError):
    test_a_token_sees_what_its_kind_of_attention_says("encoder")


def test_a_target_that_sees_other_inputs_would_be_seen(monkeypatch):
  real = llmjax.models.scores.attention_mask

  def everything(query, key, **settings):
    mask = real(query, key, **settings)
    return mask if query is key else jnp.ones_like(mask)

  monkeypatch.setattr(llmjax.models.scores, "attention_mask", everything)
  with pytest.raises(AssertionError):
    test_a_target_sees_all_of_its_input_and_earlier_targets()


@pytest.mark.parametrize("name", CASES)
def test_scanned_is_unrolled_and_remat_is_none(name):
  case = with_dropout(CASES[name])
  cfg, batch = case.cfg, make_batch(CASES[name])
  params, _ = parameters(cfg)
  want, metrics = gradients(case, params, batch)
  other = dataclasses.replace(case, cfg=dataclasses.replace(cfg, scan=False, remat="full"))
  got, same = gradients(other, unstack(params, cfg), batch)
  assert_trees_close(stack(got, cfg), want)
  assert_trees_close(same, metrics)
  assert_trees_identical(stack(unstack(params, cfg), cfg), params)
  for remat in ("full", "dots", "weight_dots") if name == "gpt causal_lm" else ():
    case = dataclasses.replace(case, cfg=dataclasses.replace(cfg, remat=remat))
    assert_trees_close(gradients(case, params, batch)[0], want)


def check_accumulated(case, accum):
  params, _ = parameters(case.cfg)
  batch = make_batch(case)
  want, metrics = gradients(case, params, batch)
  got, same = gradients(case, params, batch, accum)
  assert_trees_close(got, want)
  assert_trees_close(same, metrics)
  other, _ = gradients(case, params, batch, key=1)
  with pytest.raises(AssertionError):  # dropout is really on
    assert_trees_close(other, want)


@pytest.mark.parametrize("name, accum", [("gpt causal_lm", 2), ("gpt causal_lm", 4), ("bert contrastive", 8)])
def test_accumulated_is_whole_under_uneven_weights_and_dropout(name, accum):
  """Of a contrastive objective, the chunks of GradCache are the whole batch. All others: on a mesh, below."""
  check_accumulated(with_dropout(CASES[name]), accum)


def test_dropout_keyed_by_the_place_in_a_microbatch_would_be_seen(monkeypatch):
  real = llmjax.models.layers.row_keys
  monkeypatch.setattr(llmjax.models.layers, "row_keys", lambda key, rows: real(key, jnp.arange(len(rows))))
  with pytest.raises(AssertionError):
    check_accumulated(fresh(with_dropout(CASES["gpt causal_lm"])), 2)


def only(batch, keep):
  """The batch with all but some rows empty."""

  def empty(tokens):
    return None if tokens is None else dataclasses.replace(tokens, segments=tokens.segments * keep)

  return dataclasses.replace(
    batch,
    inputs=empty(batch.inputs),
    targets=empty(batch.targets),
    weights={term: w * keep for term, w in batch.weights.items()},
    extras={name: only(inner, keep) for name, inner in batch.extras.items()},
  )


@pytest.mark.parametrize("name", CASES)
def test_a_mean_of_microbatch_means_would_be_seen(name):
  """The bug that sums and weights prevent, and of a contrastive loss negatives from the microbatch alone."""
  case, batch = CASES[name], make_batch(CASES[name])
  params, _ = parameters(case.cfg)
  want, _ = gradients(case, params, batch)
  each = [gradients(case, params, only(batch, (np.arange(ROWS) % 2 == i)[:, None].astype(np.int32)))[0] for i in (0, 1)]
  with pytest.raises(AssertionError):
    assert_trees_close(jax.tree.map(lambda a, b: (a + b) / 2, *each), want)


@pytest.mark.parametrize("name", CASES)
def test_accumulated_gradients_on_a_mesh_are_those_of_one_device(name):
  """Data, fsdp and tensor parallel at once, in two microbatches, with dropout."""
  case = with_dropout(CASES[name])
  params, axes = parameters(case.cfg)
  want, metrics = gradients(case, params, make_batch(CASES[name]))
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  rules = {**sharding.RULES, **ODD}
  where, rows = sharding.param_shardings(params, axes, mesh, rules), sharding.named(mesh, "act_batch", rules=rules)
  gradient = functools.partial(step.gradients, model=Transformer(case.cfg), objective=case.objective, accum=2)
  with sharding.use(mesh, rules):
    function = jax.jit(gradient, in_shardings=(where, rows, sharding.named(mesh)))
    got, same = jax.device_get(function(params, make_batch(CASES[name]), jax.random.key(0)))
  assert_trees_close(got, want)
  assert_trees_close(same, metrics)


@pytest.mark.parametrize("name", ["bert masked_lm", "bert weighted_sum"])
def test_each_term_has_a_denominator_of_its_own(name):
  """The gradient is the sum of those of the terms alone; one weight for all of them would be seen."""
  case, batch = CASES[name], jax.tree.map(jnp.asarray, make_batch(CASES[name]))
  params, _ = parameters(case.cfg)
  want, _ = gradients(case, params, batch)
  weights = case.objective.weights(batch)
  assert len({round(float(w), 3) for w in weights.values()}) == len(weights) == 2

  @jax.jit
  def term_gradients(params):
    sums = functools.partial(step.objective_sums, batch=batch, model=Transformer(case.cfg), objective=case.objective)
    return jax.jacrev(lambda p: sums(p))(params)

  each = term_gradients(params)
  coefficients = case.objective.coefficients

  def total(weights):
    parts = [jax.tree.map(lambda g, t=term: g * coefficients[t] / weights[t], each[term]) for term in coefficients]
    return jax.tree.map(lambda *xs: sum(xs), *parts)

  assert_trees_close(total(weights), want)
  shared = dict.fromkeys(weights, next(iter(weights.values())))
  with pytest.raises(AssertionError):
    assert_trees_close(total(shared), want)


def test_a_batch_without_loss_has_zero_gradient():
  case = CASES["gpt causal_lm"]
  params, _ = parameters(GPT)
  batch = make_batch(case)
  nothing = dataclasses.replace(batch, weights={"nll": np.zeros_like(batch.weights["nll"])})
  grads, _ = gradients(case, params, nothing)
  assert all(not np.asarray(g).any() for g in jax.tree.leaves(grads))


def test_the_objective_is_a_direct_sum_of_its_terms():
  """Loss, smoothing and z-loss in float64 NumPy from the model's logits."""
  case = CASES["gpt causal_lm"]
  params, _ = parameters(GPT)
  batch = make_batch(case)
  logits = np.asarray(Transformer(GPT).apply({"params": params}, batch).logits, np.float64)
  log_z = np.log(np.exp(logits).sum(-1))
  log_p = logits - log_z[..., None]
  labels, weight = batch.labels["nll"], np.asarray(batch.weights["nll"], np.float64)
  nll = -np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
  smoothed = 0.9 * nll - 0.1 * log_p.mean(-1)
  want = ((smoothed + 1e-3 * log_z**2) * weight).sum() / weight.sum()
  _, metrics = gradients(case, params, batch)
  np.testing.assert_allclose(metrics["objective"][0], want, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], (nll * weight).sum() / weight.sum(), rtol=1e-5)


OPTIM = {"weight_decay": 0.1, "decay_mask": ((".*", True),), "clip_norm": 1.0, "lr": 0.1, "ema_decay": None}
OPTIM |= {"lr_scale": ((".*", 1.0),), "layer_decay": None}


@pytest.mark.parametrize("name", ["llama causal_lm", "t5 span_corruption"])
def test_steps_on_any_mesh_equal_one_device(name):
  case = with_dropout(CASES[name])
  cfg = case.cfg
  params, axes = parameters(cfg)
  batches = [make_batch(CASES[name], seed=i) for i in range(2)]

  def train(sizes, accum):
    count = int(np.prod(list(sizes.values())))
    mesh = sharding.make_mesh(sizes, jax.devices()[:count])
    rules = {**sharding.RULES, **ODD}
    tx = optim.make_optimizer({"name": "sgd", "momentum": 0.9, **OPTIM}, params, axes)
    where = sharding.param_shardings(params, axes, mesh, rules)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings = step.TrainState(replicated, where, optim.state_shardings(tx, params, where, mesh), where)
    rows = sharding.named(mesh, "act_batch", rules=rules)
    with sharding.use(mesh, rules):
      state = jax.device_put(step.start(params, tx, True), shardings)
      function = jax.jit(
        functools.partial(
          step.train_step, model=Transformer(cfg), objective=case.objective, tx=tx, accum=accum, ema_decay=0.5
        ),
        in_shardings=(shardings, rows, replicated, replicated),
        out_shardings=(shardings, replicated),
      )
      losses = []
      for batch in batches:
        state, metrics = function(state, jax.device_put(batch, rows), jax.random.key(3), jnp.float32(0.1))
        losses.append(metrics)
    assert function._cache_size() == 1
    return jax.device_get((state, losses))

  want, losses = train({"data": 1, "fsdp": 1, "tensor": 1}, 1)
  meshes = [({"data": 2, "fsdp": 2, "tensor": 2}, 2), ({"data": 8}, 1), ({"fsdp": 4, "tensor": 2}, 1)]
  for sizes, accum in meshes if name == "llama causal_lm" else meshes[:1]:
    got, same = train(sizes, accum)
    assert_trees_close(got.params, want.params)
    assert_trees_close(got.ema, want.ema)
    assert_trees_close(same, losses)


def test_chunks_of_a_contrastive_batch_need_the_activations_of_one():
  """Memory as compiled; the loss itself sees the whole batch (`test_accumulated_is_whole...`)."""
  case = CASES["bert contrastive"]
  params, _ = parameters(case.cfg)
  batch = make_batch(case, rows=64)

  def work(accum):
    compiled = gradient_function(case, accum).lower(params, batch, jax.random.key(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert work(16) < work(1) / 4

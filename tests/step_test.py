"""The step's invariants: neither mesh, microbatches, scan, remat nor packing may change the numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from llmjax import optim, sharding, step
from llmjax.models.transformer import Transformer, TransformerConfig, stack, unstack
from llmjax.objectives.causal_lm import CausalLM
from llmjax.types import Batch, Tokens

VOCAB, LENGTH, ROWS = 48, 16, 8
GPT = TransformerConfig(VOCAB, 32, 2, 4, LENGTH, init_stddev=0.15)
LLAMA = TransformerConfig(
  *(VOCAB, 32, 2, 4, LENGTH),
  num_kv_heads=2,
  norm="rmsnorm",
  norm_bias=False,
  positions="rotary",
  activation="silu",
  gated=True,
  qkv_bias=False,
  attention_out_bias=False,
  mlp_bias=False,
  qk_norm=True,
  tie_embeddings=False,
  init_stddev=0.15,
)
FAMILIES = {"gpt": GPT, "llama": LLAMA}
OBJECTIVE = CausalLM(z_loss=1e-3, label_smoothing=0.1)


def make_batch(rows=ROWS, length=LENGTH, seed=0):
  """Random documents packed two a row, with uneven weights: some rows bear much loss, some little."""
  rng = np.random.default_rng(seed)
  cut = rng.integers(4, length - 4, rows)[:, None]
  where = np.arange(length)[None]
  segments = np.where(where < cut, 1, 2)
  segments[:, -2:] = 0
  return Batch(
    inputs=Tokens(
      ids=rng.integers(0, VOCAB, (rows, length)),
      positions=np.where(where < cut, where, where - cut),
      segments=segments,
    ),
    labels={"nll": rng.integers(0, VOCAB, (rows, length))},
    weights={"nll": ((rng.random((rows, length)) < np.linspace(0.05, 1, rows)[:, None]) * (segments > 0)).astype("f4")},
    rows=np.arange(rows, dtype=np.int32),
  )


def parameters(cfg, seed=0):
  boxed = Transformer(cfg).init(jax.random.key(seed), Batch.from_tokens(np.zeros((1, LENGTH), np.int32)))["params"]
  return nn.unbox(boxed), jax.tree.map(lambda b: b.names, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


@functools.cache
def gradient_function(cfg, accum):
  return jax.jit(functools.partial(step.gradients, model=Transformer(cfg), objective=OBJECTIVE, accum=accum))


def gradients(cfg, params, batch, accum=1, key=0):
  return gradient_function(cfg, accum)(params, batch, jax.random.key(key))


def assert_same(got, want, tolerance=1e-5):
  """Per leaf: |difference| <= tolerance * max(|leaf|, 1e-3 |everything|), in the 2-norm."""
  whole = optax.global_norm(want)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
    difference = float(jnp.linalg.norm(jnp.ravel(a - b)))
    bound = tolerance * max(float(jnp.linalg.norm(jnp.ravel(b))), 1e-3 * float(whole))
    assert difference <= bound, f"{jax.tree_util.keystr(path)}: {difference:.2e} > {bound:.2e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_causal_and_sees_only_its_document(family):
  cfg = FAMILIES[family]
  params, _ = parameters(cfg)
  batch = make_batch(rows=1)
  model = Transformer(cfg)
  embedded = params["embedding"]["table"][batch.inputs.ids]

  def logit_sum(x, position):
    table = x.reshape(-1, cfg.d_model)  # every position gets a row of its own, so that its gradient can be told apart
    ids = jnp.arange(LENGTH)[None]
    own = params | {"embedding": {"table": jnp.pad(table, ((0, VOCAB - LENGTH), (0, 0)))}}
    head = jnp.ones((cfg.d_model,)) if cfg.tie_embeddings else None
    inputs = Tokens(ids, batch.inputs.positions, batch.inputs.segments)
    out = model.apply({"params": own}, Batch(inputs=inputs), logits=head is None)
    return (out.hidden if head is not None else out.logits)[0, position].sum()

  segments = np.asarray(batch.inputs.segments[0])
  for position in (2, 7, LENGTH - 3):
    reach = np.abs(np.asarray(jax.grad(logit_sum)(embedded, position))[0]).sum(-1) > 0
    allowed = (np.arange(LENGTH) <= position) & (segments == segments[position])
    np.testing.assert_array_equal(reach, allowed)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_separate(family):
  cfg = FAMILIES[family]
  params, _ = parameters(cfg)
  batch = make_batch(rows=2)
  model = Transformer(cfg)
  packed = model.apply({"params": params}, batch).logits
  segments = np.asarray(batch.inputs.segments)
  for row, segment in ((0, 1), (0, 2), (1, 1), (1, 2)):
    where = segments[row] == segment
    alone = model.apply({"params": params}, Batch.from_tokens(np.asarray(batch.inputs.ids)[row][where][None])).logits
    np.testing.assert_allclose(packed[row][where], alone[0], atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_scanned_is_unrolled_and_remat_is_none(family):
  cfg, batch = FAMILIES[family], make_batch()
  cfg = dataclasses.replace(cfg, dropout=0.2, attention_dropout=0.1)
  params, _ = parameters(cfg)
  want, metrics = gradients(cfg, params, batch)
  unrolled, same = gradients(dataclasses.replace(cfg, scan=False), unstack(params, cfg), batch)
  assert_same(stack(unrolled, cfg), want)
  assert_same(same, metrics)
  for remat in ("full", "dots", "weight_dots"):
    assert_same(gradients(dataclasses.replace(cfg, remat=remat), params, batch)[0], want)


@pytest.mark.parametrize("accum", [2, 4])
def test_accumulated_is_whole_under_uneven_weights_and_dropout(accum):
  cfg, batch = dataclasses.replace(GPT, dropout=0.3, attention_dropout=0.2), make_batch()
  params, _ = parameters(cfg)
  want, metrics = gradients(cfg, params, batch)
  got, same = gradients(cfg, params, batch, accum)
  assert_same(got, want)
  assert_same(same, metrics)
  other, _ = gradients(cfg, params, batch, key=1)
  with pytest.raises(AssertionError):  # dropout is really on
    assert_same(other, want)


def test_a_mean_of_microbatch_means_would_be_seen():
  """The bug that sums and weights prevent: the test above can fail."""
  params, _ = parameters(GPT)
  batch = make_batch()
  want, _ = gradients(GPT, params, batch)
  parts = step.microbatches(jax.tree.map(jnp.asarray, batch), 2)
  each = [gradients(GPT, params, jax.tree.map(lambda x, i=i: x[i], parts))[0] for i in (0, 1)]
  with pytest.raises(AssertionError):
    assert_same(jax.tree.map(lambda a, b: (a + b) / 2, *each), want)


def test_a_batch_without_loss_has_zero_gradient():
  params, _ = parameters(GPT)
  batch = make_batch()
  nothing = batch.replace(weights={"nll": np.zeros_like(batch.weights["nll"])})
  grads, _ = gradients(GPT, params, nothing)
  assert all(not np.asarray(g).any() for g in jax.tree.leaves(grads))


def test_the_objective_is_a_direct_sum_of_its_terms():
  """Loss, smoothing and z-loss in float64 NumPy from the model's logits."""
  params, _ = parameters(GPT)
  batch = make_batch()
  logits = np.asarray(Transformer(GPT).apply({"params": params}, batch).logits, np.float64)
  log_z = np.log(np.exp(logits).sum(-1))
  log_p = logits - log_z[..., None]
  labels, weight = batch.labels["nll"], np.asarray(batch.weights["nll"], np.float64)
  nll = -np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
  smoothed = 0.9 * nll - 0.1 * log_p.mean(-1)
  want = ((smoothed + 1e-3 * log_z**2) * weight).sum() / weight.sum()
  _, metrics = gradients(GPT, params, batch)
  np.testing.assert_allclose(metrics["objective"][0], want, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], (nll * weight).sum() / weight.sum(), rtol=1e-5)


OPTIM = {"weight_decay": 0.1, "decay_mask": ((".*", True),), "clip_norm": 1.0, "lr": 0.1, "ema_decay": None}


@pytest.mark.parametrize("family", FAMILIES)
def test_three_steps_on_any_mesh_equal_one_device(family):
  cfg = dataclasses.replace(FAMILIES[family], dropout=0.1)
  params, axes = parameters(cfg)
  batches = [make_batch(seed=i) for i in range(3)]

  def train(sizes, accum):
    count = int(np.prod(list(sizes.values())))
    mesh = sharding.make_mesh(sizes, jax.devices()[:count])
    tx = optim.make_optimizer({"name": "sgd", "momentum": 0.9, **OPTIM}, params, axes)
    where = sharding.param_shardings(params, axes, mesh)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings = step.TrainState(replicated, where, optim.state_shardings(tx, params, where, mesh), where)
    rows = sharding.named(mesh, "act_batch")
    with sharding.use(mesh):
      state = jax.device_put(step.start(params, tx, True), shardings)
      function = jax.jit(
        functools.partial(
          step.train_step, model=Transformer(cfg), objective=OBJECTIVE, tx=tx, accum=accum, ema_decay=0.5
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
  for sizes, accum in (({"data": 2, "fsdp": 2, "tensor": 2}, 2), ({"data": 8}, 1), ({"fsdp": 4, "tensor": 2}, 1)):
    got, same = train(sizes, accum)
    assert_same(got.params, want.params)
    assert_same(got.ema, want.ema)
    assert_same(same, losses)

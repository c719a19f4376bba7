"""Attention kernels against the kernel "xla", which `masks_test.py` compares with NumPy."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.distributed import sharding
from llmjax.models import layers
from llmjax.models.attention import blocks, blockwise, masks, select, splash
from llmjax.models.attention.masks import AttentionSettings
from llmjax.models.transformer import Transformer
from llmjax.training import step
from llmjax.types import Batch, Tokens
from tests.support.cases import CASES as MODELS
from tests.support.cases import GPT, gradient_function, make_batch, parameters, with_dropout
from tests.support.cases import Case as ModelCase
from tests.support.compare import assert_trees_close
from tests.support.tiers import by_tier

SCALE = 0.4
ROWS, LENGTH, HEADS, WIDTH, BUCKETS = 4, 64, 4, 8, 8
CAUSAL, BIDIRECTIONAL = AttentionSettings(SCALE, causal=True), AttentionSettings(SCALE)


@dataclasses.dataclass(frozen=True)
class Case:
  """Inputs of an attention.

  Attributes:
    settings: its static settings.
    rows: documents of a row: one ("whole"), three ("packed"), or one with padding on the "left" or the "right".
    length: L.
    source: S of cross-attention; None: self-attention.
    kv_heads: K.
    prefix: whether the first tokens of each document are its prefix.
  """

  settings: AttentionSettings = CAUSAL
  rows: str = "packed"
  length: int = LENGTH
  source: int | None = None
  kv_heads: int = HEADS
  prefix: bool = False


T5 = {"buckets": BUCKETS, "max_distance": 16}

CASES = {
  "causal": Case(rows="whole"),
  "packed": Case(),
  "bidirectional": Case(BIDIRECTIONAL),
  "left padding": Case(rows="left"),
  "right padding, bidirectional": Case(BIDIRECTIONAL, rows="right"),
  "prefix": Case(prefix=True),
  "window": Case(dataclasses.replace(CAUSAL, window=9)),
  "prefix window": Case(dataclasses.replace(CAUSAL, window=9), prefix=True),
  "bidirectional window": Case(dataclasses.replace(BIDIRECTIONAL, window=9)),
  "softcap": Case(dataclasses.replace(CAUSAL, softcap=1.5)),
  "grouped heads": Case(kv_heads=2),
  "one key head": Case(kv_heads=1),
  "relative": Case(dataclasses.replace(CAUSAL, **T5), rows="whole"),
  "bidirectional relative": Case(dataclasses.replace(BIDIRECTIONAL, **T5)),
  "dropout": Case(dataclasses.replace(CAUSAL, dropout=0.3), kv_heads=2),
  "odd length": Case(length=51),
  "cross": Case(BIDIRECTIONAL, source=48),
  "cross of odd lengths with dropout": Case(dataclasses.replace(BIDIRECTIONAL, dropout=0.3), length=30, source=51),
  "all": Case(
    AttentionSettings(SCALE, causal=True, window=20, softcap=1.5, dropout=0.2, **T5),
    length=50,
    kv_heads=2,
    prefix=True,
  ),
}


def make_tokens(length, kind, seed=0, prefix=False):
  """Return rows of documents; see `Case` for the kinds."""
  rng = np.random.default_rng(seed)
  segments, positions = np.zeros((2, ROWS, length), np.int32)
  for row in range(ROWS):
    cuts = {"whole": [], "packed": sorted(rng.choice(np.arange(3, length - 3), 3, replace=False))}.get(kind, [])
    first = 3 + row if kind == "left" else 0
    last = length - 3 - row if kind == "right" else length
    for i, (start, end) in enumerate(zip([first, *cuts], [*cuts, last]), 1):
      # The last piece of a packed row is padding.
      segments[row, start:end] = i % (len(cuts) + 1) if kind == "packed" else i
      positions[row, start:end] = np.arange(end - start)
  in_prefix = (positions < 4).astype(np.int32) if prefix else None
  return jax.tree.map(jnp.asarray, Tokens(segments, positions, segments, in_prefix))


@functools.cache
def make_inputs(case):
  """Return (differentiable arrays, query tokens, key tokens, cotangent, whether each query attends to a key)."""
  rng = np.random.default_rng(1)
  source = case.source or case.length
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  query_tokens = make_tokens(case.length, case.rows, prefix=case.prefix)
  key_tokens = query_tokens if case.source is None else make_tokens(source, case.rows, seed=1)
  arrays = {
    "query": draw(ROWS, case.length, HEADS, WIDTH),
    "key": draw(ROWS, source, case.kv_heads, WIDTH),
    "value": draw(ROWS, source, case.kv_heads, WIDTH),
    "relative": draw(BUCKETS, HEADS) if case.settings.buckets else None,
  }
  settings = {"causal": case.settings.causal, "window": case.settings.window}
  attends = np.asarray(masks.attention_mask(query_tokens, key_tokens, **settings)).any(-1)[:, :, None, None]
  return arrays, query_tokens, key_tokens, attends * draw(ROWS, case.length, HEADS, WIDTH), attends


def value_and_gradients(kernel, case, arrays, query_tokens, key_tokens, cotangent):
  """Return (output, {array: its gradient})."""
  row_keys = layers.row_keys(jax.random.key(0), jnp.arange(ROWS)) if case.settings.dropout else None

  def attend(arrays):
    vectors = (arrays[name] for name in ("query", "key", "value"))
    settings = {"relative": arrays["relative"], "dropout_keys": row_keys}
    return select.dot_product_attention(kernel, *vectors, query_tokens, key_tokens, case.settings, **settings)

  out, pull = jax.vjp(attend, arrays)
  return out, pull(cotangent.astype(out.dtype))[0]


def compile_on_mesh(kernel, case):
  """Return `value_and_gradients`, compiled for the current mesh, with arrays sharded as in a model."""

  def shard(x):
    divides = x.ndim < 4 or x.shape[2] % sharding.num_shards("act_heads") == 0
    return sharding.constrain(x, *("act_batch", "act_len", "act_heads" if divides else None, None)[: x.ndim])

  def sharded(arrays, *others):
    table = {"relative": arrays["relative"]}  # replicated
    arrays, *others = jax.tree.map(shard, (arrays | {"relative": None}, *others))
    out, gradients = value_and_gradients(kernel, case, arrays | table, *others)
    d_table = {"relative": gradients["relative"]}
    out, gradients = jax.tree.map(shard, (out, gradients | {"relative": None}))
    return out, gradients | d_table

  return jax.jit(sharded)


@functools.cache
def reference(case):
  """Return output and gradients of the kernel "xla"."""
  *arguments, attends = make_inputs(case)
  out, gradients = jax.jit(functools.partial(value_and_gradients, "xla", case))(*arguments)
  return np.where(attends, out, 0), jax.device_get(gradients)


def assert_equals_reference(case, out_and_gradients, tolerance=1e-5):
  """Compare output and gradients with the reference, relative to the norm of each array."""
  attends = make_inputs(case)[-1]
  (out, gradients), (expected_out, expected) = jax.device_get(out_and_gradients), reference(case)
  pairs = {"out": (np.where(attends, out, 0), expected_out)}
  pairs |= {name: (gradients[name], gradient) for name, gradient in expected.items()}
  for name, (actual, gradient) in pairs.items():
    if gradient is not None:
      difference = np.linalg.norm(np.ravel(np.asarray(actual, np.float32) - gradient))
      relative = difference / np.linalg.norm(np.ravel(gradient))
      assert relative < tolerance, f"{name}: {relative:.1e}"


MESHES = {"c4t2": {"context": 4, "tensor": 2}, "d2c2t2": {"data": 2, "context": 2, "tensor": 2}, "c8": {"context": 8}}


@contextlib.contextmanager
def use_mesh(sizes):
  """Use a mesh with these sizes; yield it."""
  mesh = sharding.make_mesh(sizes)
  with sharding.use_mesh(mesh):
    yield mesh


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(blockwise, "BLOCK_SIZE", 16)


CHUNKED_FAST = (
  *("packed", "left padding", "right padding, bidirectional", "bidirectional window", "prefix window"),
  *("bidirectional relative", "cross of odd lengths with dropout", "all"),
)


@pytest.mark.parametrize("name", by_tier(CASES, CHUNKED_FAST))
def test_chunked_attention_equals_reference(name):
  case = CASES[name]
  assert_equals_reference(
    case, jax.jit(functools.partial(value_and_gradients, "chunked", case))(*make_inputs(case)[:-1])
  )


RING = {
  "c4t2": ("all", "prefix window", "relative"),
  "d2c2t2": ("cross of odd lengths with dropout", "packed", "one key head"),
  "c8": ("left padding", "bidirectional", "all"),
}
RING_FAST = ["c4t2-all", "d2c2t2-cross of odd lengths with dropout", "c8-left padding"]


@pytest.mark.parametrize(
  "combination", by_tier([f"{m}-{name}" for m, names in RING.items() for name in names], RING_FAST)
)
def test_ring_attention_equals_reference(combination):
  sizes, name = combination.split("-", 1)
  case = CASES[name]
  with use_mesh(MESHES[sizes]):
    assert_equals_reference(case, compile_on_mesh("ring", case)(*make_inputs(case)[:-1]))


SPLASH = {
  "packed": Case(length=256, kv_heads=2),
  "window": Case(dataclasses.replace(CAUSAL, window=50), length=256),
  "bidirectional window": Case(dataclasses.replace(BIDIRECTIONAL, window=51, softcap=1.5), length=256),
  "cross": Case(BIDIRECTIONAL, length=128, source=256),
}


@pytest.mark.parametrize("name", by_tier(SPLASH, ["packed", "bidirectional window"]))
def test_splash_attention_interpreted_equals_reference(name, monkeypatch):
  monkeypatch.setattr(splash, "INTERPRET", True)
  case = SPLASH[name]
  with use_mesh({"data": 2, "fsdp": 2, "tensor": 2}):
    assert_equals_reference(case, compile_on_mesh("splash", case)(*make_inputs(case)[:-1]))


@pytest.mark.parametrize("name", ["packed", "prefix", "grouped heads", "bidirectional relative"])
def test_cudnn_attention_lowers_for_gpus(name, monkeypatch):
  """Forward and backward pass. JAX's checks of the cuDNN version and the device are replaced, as there is no GPU."""
  for check, value in {"check_cudnn_version": 91000, "check_compute_capability": True}.items():
    monkeypatch.setattr(f"jax._src.cudnn.fused_attention_stablehlo.{check}", lambda *_, value=value: value)
  arrays, *others, _ = make_inputs(CASES[name])
  arrays = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)
  traced = jax.jit(functools.partial(value_and_gradients, "cudnn", CASES[name])).trace(arrays, *others)
  lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert len(re.findall(r"@__cudnn\$fmha\w*Softmax\(", lowered)) == 1
  assert len(re.findall(r"@__cudnn\$fmha\w*Backward\(", lowered)) == 1


def test_xla_attention_on_context_mesh_equals_reference():
  case = CASES["all"]
  with use_mesh(MESHES["c4t2"]):
    assert_equals_reference(case, compile_on_mesh("xla", case)(*make_inputs(case)[:-1]))


def test_ring_devices_compute_equal_numbers_of_blocks():
  """Under a causal mask, in zigzag order. In contiguous order, the last device computes the most."""
  devices, block, length = 8, 4, 128

  def count_blocks(order):
    all_blocks = order.reshape(-1, block)
    return [
      sum(queries.max() >= keys.min() for queries in local_blocks for keys in all_blocks)
      for local_blocks in order.reshape(devices, -1, block)
    ]

  with use_mesh(MESHES["c8"]):
    layout = blocks.BlockLayout((None, "act_len", None), ("context",), True, block)
    exchange = sharding.per_device(lambda x: blocks.exchange_halves(layout, x), [(None, "act_len")], (None, "act_len"))
    order = np.asarray(jax.jit(exchange)(jnp.arange(length)[None]))[0]
  assert sorted(order) == list(range(length)) and len(set(count_blocks(order))) == 1
  assert max(count_blocks(np.arange(length))) > 1.7 * max(count_blocks(order))


def test_chunked_and_ring_arrays_are_linear_in_length():
  case = dataclasses.replace(CASES["all"], length=256)
  arguments = make_inputs(case)[:-1]

  def text(kernel):
    return compile_on_mesh(kernel, case).lower(*arguments).compile().as_text()

  with use_mesh({"data": 2, "context": 4}):
    ring = text("ring")
  assert "collective-permute" in ring and "all-gather" not in ring
  vectors = ROWS * case.length * HEADS * WIDTH
  assert max(largest_array(ring), largest_array(text("chunked"))) <= vectors < largest_array(text("xla")) // 8


@pytest.mark.slow
def test_scanned_chunked_layers_have_no_quadratic_mask():
  """Flax computes what depends only on inputs shared by all layers before the loop over layers."""
  length, cfg = 512, dataclasses.replace(GPT, attention="chunked", max_len=512)
  params, _ = parameters(cfg)
  tokens = jnp.zeros((1, length), jnp.int32)
  batch = Batch.from_tokens(tokens)
  batch = dataclasses.replace(batch, labels={"nll": tokens}, weights={"nll": jnp.ones((1, length))})
  function = gradient_function(ModelCase(cfg, MODELS["llama causal_lm"].objective))
  text = function.lower(params, batch, jax.random.key(0)).compile().as_text()
  assert largest_array(text) < length**2


def largest_array(text):
  """Return the number of elements of the largest array in a compiled program."""
  shapes = re.findall(r"[fsu]\d+\[([\d,]+)\]|pred\[([\d,]+)\]", text)
  return max(int(np.prod([int(d) for d in (a or b).split(",")])) for a, b in shapes)


@pytest.mark.parametrize(
  "name, sizes",
  [
    ("llama prefix_lm", "c4t2"),
    pytest.param("modernbert masked_lm", "c8", marks=pytest.mark.slow),
    pytest.param("t5 span_corruption", "d2c2t2", marks=pytest.mark.slow),
  ],
)
def test_model_on_context_mesh_equals_one_device(name, sizes):
  """Metrics and gradients, with the kernel that "auto" chooses; the prefix LM also with dropout."""
  case, batch = MODELS[name], make_batch(MODELS[name])
  case = with_dropout(case) if name.startswith("llama") else case
  params, axes = parameters(case.cfg)
  expected = jax.device_get(gradient_function(case)(params, batch, jax.random.key(0)))
  gradient = functools.partial(step.compute_gradients, model=Transformer(case.cfg), objective=case.objective, accum=1)
  with use_mesh(MESHES[sizes]) as mesh:
    rows, replicated = sharding.named_sharding(mesh, "act_batch"), sharding.named_sharding(mesh)
    function = jax.jit(gradient, in_shardings=(sharding.param_shardings(params, axes, mesh), rows, replicated))
    program = function.lower(params, batch, jax.random.key(0)).compile()
    gradients, metrics = jax.device_get(program(params, batch, jax.random.key(0)))
  assert "collective-permute" in program.as_text()
  assert_trees_close(gradients, expected[0])
  assert_trees_close(metrics, expected[1])


@pytest.mark.slow
def test_remat_attention_saves_the_attention_output():
  """Count passes over blocks: each pass compiles to one conditional."""
  case, batch = MODELS["llama causal_lm"], make_batch(MODELS["llama causal_lm"])
  params, _ = parameters(case.cfg)

  def count_passes(remat):
    other = ModelCase(dataclasses.replace(case.cfg, attention="chunked", remat=remat), case.objective)
    return gradient_function(other).lower(params, batch, jax.random.key(0)).compile().as_text().count(" conditional(")

  assert (count_passes("none"), count_passes("attention"), count_passes("full")) == (2, 2, 3)


def test_chunked_bfloat16_is_close_to_float32():
  case = CASES["all"]
  arrays, *others, _ = make_inputs(case)
  arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in arrays.items()}
  out, gradients = jax.jit(functools.partial(value_and_gradients, "chunked", case))(arrays, *others)
  assert out.dtype == gradients["key"].dtype == jnp.bfloat16
  assert_equals_reference(case, (out, gradients), tolerance=0.02)

"""Attention kernels against the reference kernel `xla`, which `model_test` compares with NumPy."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.distributed import sharding
from llmjax.models import layers
from llmjax.models.attention import blockwise, kernels, masks
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


CAUSAL, BOTH = AttentionSettings(SCALE, causal=True), AttentionSettings(SCALE)


@dataclasses.dataclass(frozen=True)
class Case:
  settings: AttentionSettings = CAUSAL
  rows: str = "packed"  # "whole", "packed", or with padding: "left", "right"
  length: int = LENGTH
  source: int | None = None  # length of the keys in cross-attention
  key_heads: int = HEADS
  prefix: bool = False


T5 = {"buckets": BUCKETS, "max_distance": 16}

CASES = {
  "causal": Case(rows="whole"),
  "packed": Case(),
  "both ways": Case(BOTH),
  "left padding": Case(rows="left"),
  "right padding, both ways": Case(BOTH, rows="right"),
  "prefix": Case(prefix=True),
  "window": Case(dataclasses.replace(CAUSAL, window=9)),
  "prefix window": Case(dataclasses.replace(CAUSAL, window=9), prefix=True),
  "window both ways": Case(dataclasses.replace(BOTH, window=9)),
  "softcap": Case(dataclasses.replace(CAUSAL, softcap=1.5)),
  "grouped heads": Case(key_heads=2),
  "one key head": Case(key_heads=1),
  "relative": Case(dataclasses.replace(CAUSAL, **T5), rows="whole"),
  "relative both ways": Case(dataclasses.replace(BOTH, **T5)),
  "dropout": Case(dataclasses.replace(CAUSAL, dropout=0.3), key_heads=2),
  "odd length": Case(length=51),
  "cross": Case(BOTH, source=48),
  "cross of odd lengths with dropout": Case(dataclasses.replace(BOTH, dropout=0.3), length=30, source=51),
  "all": Case(
    AttentionSettings(SCALE, causal=True, window=20, softcap=1.5, dropout=0.2, **T5),
    length=50,
    key_heads=2,
    prefix=True,
  ),
}


def tokens(length, kind, seed=0, prefix=False):
  """Rows of three documents, or of one document with padding on one side."""
  rng = np.random.default_rng(seed)
  segments, positions = np.zeros((2, ROWS, length), np.int32)
  for row in range(ROWS):
    cuts = {"whole": [], "packed": sorted(rng.choice(np.arange(3, length - 3), 3, replace=False))}.get(kind, [])
    start = 3 + row if kind == "left" else 0
    end = length - 3 - row if kind == "right" else length
    for i, (a, b) in enumerate(zip([start, *cuts], [*cuts, end]), 1):
      segments[row, a:b], positions[row, a:b] = i % (len(cuts) + 1) if kind == "packed" else i, np.arange(b - a)
  marks = (positions < 4).astype(np.int32) if prefix else None
  return jax.tree.map(jnp.asarray, Tokens(segments, positions, segments, marks))


@functools.cache
def example(case):
  """(differentiable arrays, query tokens, key tokens, cotangent, whether each query attends to something)."""
  rng = np.random.default_rng(1)
  source = case.source or case.length
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  queries = tokens(case.length, case.rows, prefix=case.prefix)
  keys = queries if case.source is None else tokens(source, case.rows, seed=1)
  arrays = {
    "query": draw(ROWS, case.length, HEADS, WIDTH),
    "key": draw(ROWS, source, case.key_heads, WIDTH),
    "value": draw(ROWS, source, case.key_heads, WIDTH),
    "relative": draw(BUCKETS, HEADS) if case.settings.buckets else None,
  }
  mask = np.asarray(masks.attention_mask(queries, keys, causal=case.settings.causal, window=case.settings.window))
  attends = mask.any(-1)[:, :, None, None]
  return arrays, queries, keys, attends * draw(ROWS, case.length, HEADS, WIDTH), attends


def value_and_gradients(kernel, case, arrays, queries, keys, cotangent):
  """(output, {array: its gradient})."""
  row_keys = layers.row_keys(jax.random.key(0), jnp.arange(ROWS)) if case.settings.dropout else None

  def attend(arrays):
    vectors = (arrays[name] for name in ("query", "key", "value"))
    settings = {"relative": arrays["relative"], "dropout_keys": row_keys}
    return kernels.dot_product_attention(kernel, *vectors, queries, keys, case.settings, **settings)

  out, pull = jax.vjp(attend, arrays)
  return out, pull(cotangent.astype(out.dtype))[0]


def compile_on_mesh(kernel, case):
  """`value_and_gradients` for the mesh in use, with arrays sharded as in a model."""

  def shard(x):
    cut = x.ndim < 4 or x.shape[2] % sharding.num_shards("act_heads") == 0
    return sharding.constrain(x, *("act_batch", "act_len", "act_heads" if cut else None, None)[: x.ndim])

  def sharded(arrays, queries, keys, cotangent):
    others = {"relative": arrays["relative"]}
    arrays, queries, keys, cotangent = jax.tree.map(shard, (arrays | {"relative": None}, queries, keys, cotangent))
    out, gradients = value_and_gradients(kernel, case, arrays | others, queries, keys, cotangent)
    others = {"relative": gradients["relative"]}
    out, gradients = jax.tree.map(shard, (out, gradients | {"relative": None}))
    return out, gradients | others

  return jax.jit(sharded)


@functools.cache
def reference(case):
  *arguments, attends = example(case)
  out, gradients = jax.jit(functools.partial(value_and_gradients, "xla", case))(*arguments)
  return np.where(attends, out, 0), jax.device_get(gradients)


def assert_equals_reference(case, got, tolerance=1e-5):
  """Compare outputs and gradients, relative to the norm of each array."""
  attends = example(case)[-1]
  (out, gradients), (want, want_gradients) = jax.device_get(got), reference(case)
  pairs = {"out": (np.where(attends, out, 0), want)}
  pairs |= {name: (gradients[name], gradient) for name, gradient in want_gradients.items()}
  for name, (a, b) in pairs.items():
    if b is not None:
      difference = np.linalg.norm(np.ravel(np.asarray(a, np.float32) - b)) / np.linalg.norm(np.ravel(b))
      assert difference < tolerance, f"{name}: {difference:.1e}"


MESHES = {"c4t2": {"context": 4, "tensor": 2}, "d2c2t2": {"data": 2, "context": 2, "tensor": 2}, "c8": {"context": 8}}


@contextlib.contextmanager
def use_mesh(sizes):
  current = sharding.make_mesh(sizes)
  with sharding.use_mesh(current):
    yield current


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(blockwise, "BLOCK_SIZE", 16)


CHUNKED_FAST = (
  *("packed", "left padding", "right padding, both ways", "window both ways", "prefix window", "relative both ways"),
  *("cross of odd lengths with dropout", "all"),
)


@pytest.mark.parametrize("name", by_tier(CASES, CHUNKED_FAST))
def test_chunked_attention_equals_reference(name):
  case = CASES[name]
  assert_equals_reference(case, jax.jit(functools.partial(value_and_gradients, "chunked", case))(*example(case)[:-1]))


RING = {
  "c4t2": ("all", "prefix window", "relative"),
  "d2c2t2": ("cross of odd lengths with dropout", "packed", "one key head"),
  "c8": ("left padding", "both ways", "all"),
}
RING_FAST = ["c4t2-all", "d2c2t2-cross of odd lengths with dropout", "c8-left padding"]


@pytest.mark.parametrize(
  "combination", by_tier([f"{m}-{name}" for m, names in RING.items() for name in names], RING_FAST)
)
def test_ring_attention_equals_reference(combination):
  sizes, name = combination.split("-", 1)
  case = CASES[name]
  with use_mesh(MESHES[sizes]):
    assert_equals_reference(case, compile_on_mesh("ring", case)(*example(case)[:-1]))


SPLASH = {
  "packed": Case(length=256, key_heads=2),
  "window": Case(dataclasses.replace(CAUSAL, window=50), length=256),
  "window both ways": Case(dataclasses.replace(BOTH, window=51, softcap=1.5), length=256),
  "cross": Case(BOTH, length=128, source=256),
}


@pytest.mark.parametrize("name", by_tier(SPLASH, ["packed", "window both ways"]))
def test_splash_attention_interpreted_equals_reference(name, monkeypatch):
  monkeypatch.setattr(kernels, "INTERPRET", True)
  case = SPLASH[name]
  with use_mesh({"data": 2, "fsdp": 2, "tensor": 2}):
    assert_equals_reference(case, compile_on_mesh("splash", case)(*example(case)[:-1]))


@pytest.mark.parametrize("name", ["packed", "prefix", "grouped heads", "relative both ways"])
def test_cudnn_attention_lowers_for_gpus(name, monkeypatch):
  """Forward and backward pass. The checks of the cuDNN version and the device are replaced: there is no GPU."""
  for check, value in {"check_cudnn_version": 91000, "check_compute_capability": True}.items():
    monkeypatch.setattr(f"jax._src.cudnn.fused_attention_stablehlo.{check}", lambda *_, value=value: value)
  arrays, *others, _ = example(CASES[name])
  arrays = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)
  traced = jax.jit(functools.partial(value_and_gradients, "cudnn", CASES[name])).trace(arrays, *others)
  lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert len(re.findall(r"@__cudnn\$fmha\w*Softmax\(", lowered)) == 1
  assert len(re.findall(r"@__cudnn\$fmha\w*Backward\(", lowered)) == 1


def test_xla_attention_on_context_mesh_equals_reference():
  case = CASES["all"]
  with use_mesh(MESHES["c4t2"]):
    assert_equals_reference(case, compile_on_mesh("xla", case)(*example(case)[:-1]))


def test_ring_devices_compute_equal_numbers_of_blocks():
  """In the order of tokens on the devices, under a causal mask. In the plain order one device computes the most."""
  devices, block, length = 8, 4, 128

  def counts(order):
    parts = order.reshape(devices, -1, block)
    computed = [[(a.max() >= b.min()) for a in part for b in order.reshape(-1, block)] for part in parts]
    return np.sum(computed, axis=1)

  with use_mesh(MESHES["c8"]):
    layout = blockwise.BlockLayout((None, "act_len", None), ("context",), True, block)
    run = sharding.per_device(lambda x: blockwise._exchanged(layout, x), [(None, "act_len")], (None, "act_len"))
    order = np.asarray(jax.jit(run)(jnp.arange(length)[None]))[0]
  assert sorted(order) == list(range(length)) and len(set(counts(order))) == 1
  assert max(counts(np.arange(length))) > 1.7 * max(counts(order))


def test_chunked_and_ring_arrays_are_linear_in_length():
  case = dataclasses.replace(CASES["all"], length=256)
  arguments = example(case)[:-1]

  def text(kernel):
    return compile_on_mesh(kernel, case).lower(*arguments).compile().as_text()

  with use_mesh({"data": 2, "context": 4}):
    ring = text("ring")
  assert "collective-permute" in ring and "all-gather" not in ring
  vectors = ROWS * case.length * HEADS * WIDTH
  assert max(largest_array(ring), largest_array(text("chunked"))) <= vectors < largest_array(text("xla")) // 8


@pytest.mark.slow
def test_scanned_chunked_layers_have_no_quadratic_mask():
  """Flax moves whatever depends only on the layers' shared arguments out of the loop over layers."""
  length, cfg = 512, dataclasses.replace(GPT, attention="chunked", max_len=512)
  params, _ = parameters(cfg)
  tokens = jnp.zeros((1, length), jnp.int32)
  batch = Batch.from_tokens(tokens)
  batch = dataclasses.replace(batch, labels={"nll": tokens}, weights={"nll": jnp.ones((1, length))})
  function = gradient_function(ModelCase(cfg, MODELS["llama causal_lm"].objective))
  text = function.lower(params, batch, jax.random.key(0)).compile().as_text()
  assert largest_array(text) < length**2


def largest_array(text):
  """Number of elements of the largest array in a compiled program."""
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
  """Metrics and all gradients, with the kernel that "auto" selects; the prefix LM also with dropout."""
  case, batch = MODELS[name], make_batch(MODELS[name])
  case = with_dropout(case) if name.startswith("llama") else case
  params, axes = parameters(case.cfg)
  want = jax.device_get(gradient_function(case)(params, batch, jax.random.key(0)))
  gradient = functools.partial(step.compute_gradients, model=Transformer(case.cfg), objective=case.objective, accum=1)
  with use_mesh(MESHES[sizes]) as current:
    where = sharding.param_shardings(params, axes, current)
    function = jax.jit(
      gradient, in_shardings=(where, sharding.named_sharding(current, "act_batch"), sharding.named_sharding(current))
    )
    program = function.lower(params, batch, jax.random.key(0)).compile()
    got = jax.device_get(program(params, batch, jax.random.key(0)))
  assert "collective-permute" in program.as_text()
  assert_trees_close(got[0], want[0])
  assert_trees_close(got[1], want[1])


@pytest.mark.slow
def test_remat_attention_saves_the_attention_output():
  """Count passes over blocks: each pass compiles to one conditional."""
  case, batch = MODELS["llama causal_lm"], make_batch(MODELS["llama causal_lm"])
  params, _ = parameters(case.cfg)

  def passes(remat):
    other = ModelCase(dataclasses.replace(case.cfg, attention="chunked", remat=remat), case.objective)
    return gradient_function(other).lower(params, batch, jax.random.key(0)).compile().as_text().count(" conditional(")

  assert (passes("none"), passes("attention"), passes("full")) == (2, 2, 3)


def test_chunked_bfloat16_is_close_to_float32():
  case = CASES["all"]
  arrays, *others, _ = example(case)
  arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in arrays.items()}
  out, gradients = jax.jit(functools.partial(value_and_gradients, "chunked", case))(arrays, *others)
  assert out.dtype == gradients["key"].dtype == jnp.bfloat16
  assert_equals_reference(case, (out, gradients), tolerance=0.02)


@pytest.mark.parametrize(
  "kernel, change, sizes, words",
  [
    ("chunked", {}, {"context": 8}, ["lengths cut over devices", "mesh.context", "'xla', 'ring'"]),
    ("splash", {}, {"context": 8}, ["lengths cut over devices", "'ring'"]),
    ("splash", {"attention_dropout": 0.1}, {}, ["dropout", "model.attention_dropout", "'chunked'"]),
    ("splash", {"positions": "relative"}, {}, ["relative biases", "model.positions"]),
    ("cudnn", {}, {}, ["float32", "model.dtype"]),
    ("cudnn", {"dtype": "bfloat16", "attention_softcap": 5.0}, {}, ["softcaps", "model.attention_softcap"]),
    ("cudnn", {"dtype": "bfloat16", "attention_dropout": 0.1}, {}, ["dropout", "'xla'"]),
    ("cudnn", {"dtype": "bfloat16", "head_dim": 12}, {}, ["multiple of 8", "model.head_dim"]),
  ],
)
def test_kernel_check_rejects_unsupported_features(kernel, change, sizes, words, monkeypatch):
  monkeypatch.setattr(
    kernels, "_device", lambda: {"splash": "tpu devices", "cudnn": "gpu devices"}.get(kernel, "cpu devices")
  )
  cfg = dataclasses.replace(GPT, attention=kernel, **change)
  with use_mesh({"data": -1, **sizes}), pytest.raises(ConfigError) as error:
    kernels.check_attention_kernel(cfg)
  assert "\n" not in str(error.value)
  for word in (f"model.attention={kernel!r}", "auto", *words):
    assert word in str(error.value)


def test_kernel_of_another_device_is_rejected_or_replaced_on_load():
  cfg = dataclasses.replace(GPT, attention="splash")
  with pytest.raises(ConfigError, match=r"model\.attention='splash'.*cpu devices.*'xla', 'chunked', 'ring'"):
    kernels.check_attention_kernel(cfg)
  row = tokens(128, "whole")
  assert kernels.choose_kernel(cfg, row, row, causal=True) == "xla"


def test_kernel_choice_rejects_unsupported_batches(monkeypatch):
  monkeypatch.setattr(kernels, "INTERPRET", True)
  cfg = dataclasses.replace(GPT, attention="splash")
  kernels.check_attention_kernel(cfg)
  for length, prefix, words in ((128, True, "prefixes"), (100, False, "lengths that are no multiple of 128")):
    row = tokens(length, "whole", prefix=prefix)
    with pytest.raises(ConfigError, match=rf"model\.attention='splash'.*{words}.*'xla'"):
      kernels.choose_kernel(cfg, row, row, causal=True)


def test_auto_kernel_depends_on_device_mesh_features_and_length(monkeypatch):
  def choose(length=128, device="cpu", sizes=None, causal=True, **change):
    monkeypatch.setattr(kernels, "_device", lambda: f"{device} devices")
    row = tokens(length, "whole")
    with use_mesh({"data": -1, **(sizes or {})}):
      return kernels.choose_kernel(dataclasses.replace(GPT, **change), row, row, causal=causal, training=True)

  assert choose() == "xla" and choose(8192) == "chunked"
  assert choose(8192, sizes={"context": 4}) == "ring" and choose(device="tpu", sizes={"context": 4}) == "ring"
  assert choose(device="tpu") == "splash" and choose(100, "tpu") == "xla"
  assert (
    choose(device="tpu", attention_dropout=0.1) == "xla" and choose(8192, "tpu", attention_dropout=0.1) == "chunked"
  )
  assert choose(device="gpu") == "xla" and choose(100, "gpu", dtype="bfloat16") == "cudnn"
  assert choose(device="gpu", dtype="bfloat16", attention_softcap=5.0) == "xla"
  assert choose(8192, attention="xla") == "xla"

"""Every attention kernel against the reference, which is held against NumPy in `model_test`."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import sharding, step
from llmjax.config import ConfigError
from llmjax.models import blockwise, kernels, layers, scores
from llmjax.models.scores import Settings
from llmjax.models.transformer import Transformer
from llmjax.types import Batch, Tokens
from tests.support.cases import CASES as MODELS
from tests.support.cases import GPT, gradient_function, make_batch, parameters, with_dropout
from tests.support.cases import Case as ModelCase
from tests.support.compare import assert_trees_close

SCALE = 0.4
ROWS, LENGTH, HEADS, WIDTH, BUCKETS = 4, 64, 4, 8, 8


CAUSAL, BOTH = Settings(SCALE, causal=True), Settings(SCALE)


@dataclasses.dataclass(frozen=True)
class Case:
  settings: Settings = CAUSAL
  rows: str = "packed"  # "whole", "packed", "left" or "right" padding
  length: int = LENGTH
  source: int | None = None  # another length of the keys
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
    Settings(SCALE, causal=True, window=20, softcap=1.5, dropout=0.2, **T5), length=50, key_heads=2, prefix=True
  ),
}


def tokens(length, kind, seed=0, prefix=False):
  """Rows of three documents, or of one with padding before or behind it."""
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
  """(arrays that have a gradient, others) of a case."""
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
  mask = np.asarray(scores.attention_mask(queries, keys, causal=case.settings.causal, window=case.settings.window))
  sees = mask.any(-1)[:, :, None, None]
  return arrays, queries, keys, sees * draw(ROWS, case.length, HEADS, WIDTH), sees


def run(kernel, case, arrays, queries, keys, cotangent):
  """(what every query that sees something gets, the gradient of every array)."""
  row_keys = layers.row_keys(jax.random.key(0), jnp.arange(ROWS)) if case.settings.dropout else None

  def attend(arrays):
    vectors = (arrays[name] for name in ("query", "key", "value"))
    settings = {"relative": arrays["relative"], "dropout_keys": row_keys}
    return kernels.attend(kernel, *vectors, queries, keys, case.settings, **settings)

  out, pull = jax.vjp(attend, arrays)
  return out, pull(cotangent.astype(out.dtype))[0]


def compiled(kernel, case):
  """`run`, compiled for the mesh in use, arrays laid out as a model has them."""

  def place(x):
    cut = x.ndim < 4 or x.shape[2] % sharding.parts("act_heads") == 0
    return sharding.constrain(x, *("act_batch", "act_len", "act_heads" if cut else None, None)[: x.ndim])

  def laid_out(arrays, queries, keys, cotangent):
    others = {"relative": arrays["relative"]}
    arrays, queries, keys, cotangent = jax.tree.map(place, (arrays | {"relative": None}, queries, keys, cotangent))
    out, gradients = run(kernel, case, arrays | others, queries, keys, cotangent)
    others = {"relative": gradients["relative"]}
    out, gradients = jax.tree.map(place, (out, gradients | {"relative": None}))
    return out, gradients | others

  return jax.jit(laid_out)


@functools.cache
def reference(case):
  *arguments, sees = example(case)
  out, gradients = jax.jit(functools.partial(run, "xla", case))(*arguments)
  return np.where(sees, out, 0), jax.device_get(gradients)


def assert_same(case, got, tolerance=1e-5):
  """Relative to the norm of each array."""
  sees = example(case)[-1]
  (out, gradients), (want, wanted) = got, reference(case)
  pairs = {"out": (np.where(sees, out, 0), want), **{name: (gradients[name], wanted[name]) for name in wanted}}
  for name, (a, b) in pairs.items():
    if b is not None:
      difference = np.linalg.norm(np.ravel(np.asarray(a, np.float32) - b)) / np.linalg.norm(np.ravel(b))
      assert difference < tolerance, f"{name}: {difference:.1e}"


MESHES = {"c4t2": {"context": 4, "tensor": 2}, "d2c2t2": {"data": 2, "context": 2, "tensor": 2}, "c8": {"context": 8}}


@contextlib.contextmanager
def mesh(sizes):
  current = sharding.make_mesh(sizes)
  with sharding.use(current):
    yield current


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(blockwise, "BLOCK", 16)


@pytest.mark.parametrize("name", CASES)
def test_chunked_attention_is_the_reference_in_value_and_every_gradient(name):
  case = CASES[name]
  assert_same(case, jax.jit(functools.partial(run, "chunked", case))(*example(case)[:-1]))


RING = {
  "c4t2": ("prefix window", "relative", "all"),
  "d2c2t2": ("packed", "one key head", "cross of odd lengths with dropout"),
  "c8": ("both ways", "left padding", "all"),
}


@pytest.mark.parametrize("sizes, name", [(sizes, name) for sizes, names in RING.items() for name in names])
def test_ring_attention_is_the_reference_in_value_and_every_gradient(name, sizes):
  case = CASES[name]
  with mesh(MESHES[sizes]):
    assert_same(case, jax.device_get(compiled("ring", case)(*example(case)[:-1])))


SPLASH = {
  "packed": Case(length=256, key_heads=2),
  "window": Case(dataclasses.replace(CAUSAL, window=50), length=256),
  "window both ways": Case(dataclasses.replace(BOTH, window=51, softcap=1.5), length=256),
  "cross": Case(BOTH, length=128, source=256),
}


@pytest.mark.parametrize("name", SPLASH)
def test_splash_attention_interpreted_is_the_reference(name, monkeypatch):
  monkeypatch.setattr(kernels, "INTERPRET", True)
  case = SPLASH[name]
  with mesh({"data": 2, "fsdp": 2, "tensor": 2}):
    assert_same(case, jax.device_get(compiled("splash", case)(*example(case)[:-1])))


@pytest.mark.parametrize("name", ["packed", "prefix", "grouped heads", "relative both ways"])
def test_cudnn_attention_lowers_for_gpus_both_ways(name, monkeypatch):
  """Where there is no GPU, the library's version and the device's capability are not asked for."""
  for question, answer in {"check_cudnn_version": 91000, "check_compute_capability": True}.items():
    monkeypatch.setattr(f"jax._src.cudnn.fused_attention_stablehlo.{question}", lambda *_, answer=answer: answer)
  arrays, *others, _ = example(CASES[name])
  arrays = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)
  traced = jax.jit(functools.partial(run, "cudnn", CASES[name])).trace(arrays, *others)
  lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert len(re.findall(r"@__cudnn\$fmha\w*Softmax\(", lowered)) == 1
  assert len(re.findall(r"@__cudnn\$fmha\w*Backward\(", lowered)) == 1


def test_a_forgotten_sum_over_devices_and_a_mask_of_the_wrong_keys_would_be_seen(monkeypatch):
  """Tables of biases are whole on every device, and tokens travel with their keys."""
  case = CASES["relative"]
  for name, broken in (
    ("psum", lambda x, axes: x),
    ("ppermute", lambda x, *to, **how: x if x.dtype == jnp.int32 and how else jax.lax.ppermute(x, *to, **how)),
  ):
    with mesh(MESHES["c8"]), monkeypatch.context() as patch:
      patch.setattr(blockwise, "lax", Patched(name, broken))
      with pytest.raises(AssertionError):
        assert_same(case, jax.device_get(compiled("ring", case)(*example(case)[:-1])))


class Patched:
  """`jax.lax` with one function in another's place."""

  def __init__(self, name, function):
    setattr(self, name, function)

  def __getattr__(self, name):
    return getattr(jax.lax, name)


def test_keys_are_gathered_where_the_reference_runs_on_cut_lengths():
  case = CASES["all"]
  with mesh(MESHES["c4t2"]):
    assert_same(case, jax.device_get(compiled("xla", case)(*example(case)[:-1])))


def test_every_device_of_a_ring_works_on_the_same_number_of_blocks():
  """By the order in which tokens really lie on the devices, under a causal mask; in the plain order one works most."""
  devices, block, length = 8, 4, 128

  def counts(order):
    parts = order.reshape(devices, -1, block)
    seen = [[(a.max() >= b.min()) for a in part for b in order.reshape(-1, block)] for part in parts]
    return np.sum(seen, axis=1)

  with mesh(MESHES["c8"]):
    layout = blockwise.Layout((None, "act_len", None), ("context",), True, block)
    run = sharding.per_device(lambda x: blockwise._exchanged(layout, x), [(None, "act_len")], (None, "act_len"))
    order = np.asarray(jax.jit(run)(jnp.arange(length)[None]))[0]
  assert sorted(order) == list(range(length)) and len(set(counts(order))) == 1
  assert max(counts(np.arange(length))) > 1.7 * max(counts(order))


def test_nothing_grows_with_the_square_of_the_length_and_a_ring_gathers_no_keys():
  case = dataclasses.replace(CASES["all"], length=256)
  arguments = example(case)[:-1]

  def text(kernel):
    return compiled(kernel, case).lower(*arguments).compile().as_text()

  with mesh({"data": 2, "context": 4}):
    ring = text("ring")
  assert "collective-permute" in ring and "all-gather" not in ring
  vectors = ROWS * case.length * HEADS * WIDTH
  assert max(largest(ring), largest(text("chunked"))) <= vectors < largest(text("xla")) // 8


def test_scanned_layers_do_not_make_the_masks_of_all_blocks_beforehand():
  """What layers share is known before their loop, and Flax computes there whatever follows from it alone."""
  length, cfg = 512, dataclasses.replace(GPT, attention="chunked", max_len=512)
  params, _ = parameters(cfg)
  tokens = jnp.zeros((1, length), jnp.int32)
  batch = Batch.from_tokens(tokens)
  batch = dataclasses.replace(batch, labels={"nll": tokens}, weights={"nll": jnp.ones((1, length))})
  function = gradient_function(ModelCase(cfg, MODELS["llama causal_lm"].objective))
  text = function.lower(params, batch, jax.random.key(0)).compile().as_text()
  assert largest(text) < length**2


def largest(text):
  """Elements of the largest array of a compiled program."""
  shapes = re.findall(r"[fsu]\d+\[([\d,]+)\]|pred\[([\d,]+)\]", text)
  return max(int(np.prod([int(d) for d in (a or b).split(",")])) for a, b in shapes)


@pytest.mark.parametrize(
  "name, sizes", [("llama prefix_lm", "c4t2"), ("modernbert masked_lm", "c8"), ("t5 span_corruption", "d2c2t2")]
)
def test_a_model_with_cut_lengths_is_that_of_one_device(name, sizes):
  """The metrics and the gradient of every parameter, by the kernel that "auto" takes there; once with dropout."""
  case, batch = MODELS[name], make_batch(MODELS[name])
  case = with_dropout(case) if name.startswith("llama") else case
  params, axes = parameters(case.cfg)
  want = jax.device_get(gradient_function(case)(params, batch, jax.random.key(0)))
  gradient = functools.partial(step.gradients, model=Transformer(case.cfg), objective=case.objective, accum=1)
  with mesh(MESHES[sizes]) as current:
    where = sharding.param_shardings(params, axes, current)
    function = jax.jit(gradient, in_shardings=(where, sharding.named(current, "act_batch"), sharding.named(current)))
    program = function.lower(params, batch, jax.random.key(0)).compile()
    got = jax.device_get(program(params, batch, jax.random.key(0)))
  assert "collective-permute" in program.as_text()
  assert_trees_close(got[0], want[0])
  assert_trees_close(got[1], want[1])


def test_rematerialised_layers_keep_what_attention_gave():
  """Every pass over blocks has a condition of its own."""
  case, batch = MODELS["llama causal_lm"], make_batch(MODELS["llama causal_lm"])
  params, _ = parameters(case.cfg)

  def passes(remat):
    other = ModelCase(dataclasses.replace(case.cfg, attention="chunked", remat=remat), case.objective)
    return gradient_function(other).lower(params, batch, jax.random.key(0)).compile().as_text().count(" conditional(")

  assert (passes("none"), passes("attention"), passes("full")) == (2, 2, 3)


def test_bfloat16_is_near_float32():
  case = CASES["all"]
  arrays, *others, _ = example(case)
  arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in arrays.items()}
  out, gradients = jax.jit(functools.partial(run, "chunked", case))(arrays, *others)
  assert out.dtype == gradients["key"].dtype == jnp.bfloat16
  assert_same(case, (out, gradients), tolerance=0.02)


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
def test_what_a_kernel_does_not_support_is_refused_in_one_line(kernel, change, sizes, words, monkeypatch):
  monkeypatch.setattr(
    kernels, "_device", lambda: {"splash": "tpu devices", "cudnn": "gpu devices"}.get(kernel, "cpu devices")
  )
  cfg = dataclasses.replace(GPT, attention=kernel, **change)
  with mesh({"data": -1, **sizes}), pytest.raises(ConfigError) as error:
    kernels.check(cfg)
  assert "\n" not in str(error.value)
  for word in (f"model.attention={kernel!r}", "auto", *words):
    assert word in str(error.value)


def test_a_kernel_of_another_device_is_refused_for_a_run_and_replaced_in_a_loaded_model():
  cfg = dataclasses.replace(GPT, attention="splash")
  with pytest.raises(ConfigError, match=r"model\.attention='splash'.*cpu devices.*'xla', 'chunked', 'ring'"):
    kernels.check(cfg)
  row = tokens(128, "whole")
  assert kernels.choose(cfg, row, row, causal=True) == "xla"


def test_what_a_batch_alone_shows_is_refused_while_it_is_traced(monkeypatch):
  monkeypatch.setattr(kernels, "INTERPRET", True)
  cfg = dataclasses.replace(GPT, attention="splash")
  kernels.check(cfg)
  for length, prefix, words in ((128, True, "prefixes"), (100, False, "lengths that are no multiple of 128")):
    row = tokens(length, "whole", prefix=prefix)
    with pytest.raises(ConfigError, match=rf"model\.attention='splash'.*{words}.*'xla'"):
      kernels.choose(cfg, row, row, causal=True)


def test_the_kernel_is_chosen_by_device_mesh_features_and_length(monkeypatch):
  def choose(length=128, device="cpu", sizes=None, causal=True, **change):
    monkeypatch.setattr(kernels, "_device", lambda: f"{device} devices")
    row = tokens(length, "whole")
    with mesh({"data": -1, **(sizes or {})}):
      return kernels.choose(dataclasses.replace(GPT, **change), row, row, causal=causal, training=True)

  assert choose() == "xla" and choose(8192) == "chunked"
  assert choose(8192, sizes={"context": 4}) == "ring" and choose(device="tpu", sizes={"context": 4}) == "ring"
  assert choose(device="tpu") == "splash" and choose(100, "tpu") == "xla"
  assert (
    choose(device="tpu", attention_dropout=0.1) == "xla" and choose(8192, "tpu", attention_dropout=0.1) == "chunked"
  )
  assert choose(device="gpu") == "xla" and choose(100, "gpu", dtype="bfloat16") == "cudnn"
  assert choose(device="gpu", dtype="bfloat16", attention_softcap=5.0) == "xla"
  assert choose(8192, attention="xla") == "xla"

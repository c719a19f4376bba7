"""What learns and what does not: adapters, frozen parts, rates by layer, and runs that start from other ones."""

import dataclasses
import functools
import json
import re
import shutil
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

import llmjax
import llmjax.models.layers
from llmjax import config as cfglib
from llmjax import finetune, optim, sharding, step, train
from llmjax.checkpoint import Checkpoints
from llmjax.config import ConfigError
from llmjax.convert import export_adapter
from llmjax.finetune import flatten, is_adapter, join, layer_scales, merge_lora, split, unflatten
from llmjax.models.layout import stack, unstack
from llmjax.models.transformer import Transformer
from llmjax.program import make_program, open_source
from llmjax.types import Outputs
from tests.support.cases import (
  CASES,
  GPT,
  MODERNBERT,
  T5,
  gradients,
  make_batch,
  parameters,
)

LORA = ((r".*lora_[ab]", True), (r".*", False))
FEW, ALL = r".*attention/(query|value)", r"(en|de)coder/.*"
COMMON = {"lr": 1.0, "ema_decay": None, "weight_decay": 0.0, "decay_mask": ((".*", True),), "clip_norm": None}
COMMON |= {"lr_scale": ((".*", 1.0),), "layer_decay": None}


def adapted(name, targets=FEW, **changes):
  """A case with adapters of rank 3, whose products are doubled."""
  changes = {"lora_rank": 3, "lora_alpha": 6.0, "lora_targets": targets, **changes}
  return dataclasses.replace(CASES[name], cfg=dataclasses.replace(CASES[name].cfg, **changes))


def moved(cfg, seed=0):
  """Parameters whose adapters have learned something."""
  rng = np.random.default_rng(seed)
  flat = flatten(parameters(cfg)[0])
  return unflatten({k: rng.normal(0, 0.1, x.shape).astype(np.float32) if is_adapter(k) else x for k, x in flat.items()})


def logits(cfg, params, batch, **rngs):
  apply = jax.jit(lambda params, batch, rngs: Transformer(cfg).apply({"params": params}, batch, rngs=rngs).logits)
  return np.asarray(apply(params, batch, rngs))


def learns(params, rules=LORA):
  return finetune.trainable(params, rules, optim.match_rules)


def assert_close(got, want, tolerance=1e-5):
  """|difference| <= tolerance * |want|, in the 2-norm."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want), np.linalg.norm(got - want)


# Adapters.


@pytest.mark.parametrize("name", ["gpt causal_lm", "t5 span_corruption"])
def test_a_fresh_adapter_changes_nothing(name):
  """Not by a bit."""
  case, plain = adapted(name, ALL), CASES[name].cfg
  params, batch = parameters(case.cfg)[0], make_batch(CASES[name])
  others = {path: leaf for path, leaf in flatten(params).items() if not is_adapter(path)}
  assert any(map(is_adapter, flatten(params)))
  np.testing.assert_array_equal(logits(case.cfg, params, batch), logits(plain, unflatten(others), batch))


@pytest.mark.parametrize(
  "name, targets", [("llama causal_lm", FEW), ("modernbert masked_lm", ALL), ("t5 span_corruption", ALL)]
)
def test_merged_is_unmerged_scanned_or_not(name, targets):
  """Also of projections that contract two dimensions, of cross-attention and of odd layers."""
  case = adapted(name, targets)
  params, batch = moved(case.cfg), make_batch(CASES[name])
  count = sum(is_adapter(path) for path in flatten(params))
  assert count == 2 * sum(re.fullmatch(targets + "/kernel", path) is not None for path in flatten(params))
  want = logits(case.cfg, params, batch)
  merged = merge_lora(params, case.cfg)
  assert not any(map(is_adapter, flatten(merged)))
  plain = CASES[name].cfg
  assert_close(logits(plain, merged, batch), want)
  assert np.abs(logits(plain, parameters(plain)[0], batch) - want).max() > 0.01
  unrolled = dataclasses.replace(case.cfg, scan=False)
  loose = unstack(params, case.cfg)
  assert_close(logits(unrolled, loose, batch), want)
  again = stack(merge_lora(loose, unrolled), case.cfg)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, merged)


@pytest.mark.parametrize("name", ["gpt causal_lm", "t5 span_corruption"])
def test_gradients_are_those_of_the_merged_kernels(name):
  """By the chain rule in float64: with G that of W + s A B, dA = s G B', dB = s A' G."""
  case = adapted(name, ALL)
  params, batch = moved(case.cfg), make_batch(CASES[name])
  chosen = learns(params)
  learned, frozen = split(params, chosen)
  gradient = jax.jit(functools.partial(step.gradients, model=Transformer(case.cfg), objective=case.objective, accum=1))
  got, _ = gradient(learned, batch, jax.random.key(0), frozen=frozen)
  assert all(is_adapter(path) for path in flatten(got))
  whole, _ = gradients(CASES[name], merge_lora(params, case.cfg), batch)
  whole, flat = flatten(whole), flatten(params)
  for path, a in flat.items():
    if path.endswith("lora_a"):
      stem = path.removesuffix("/lora_a")
      layers, inputs = a.shape[0], int(np.prod(a.shape[1:-1]))
      g = np.asarray(whole[f"{stem}/kernel"], np.float64).reshape(layers, inputs, -1)
      a, b = np.reshape(a, (layers, inputs, 3)), np.reshape(flat[f"{stem}/lora_b"], (layers, 3, -1))
      for each, want in (("lora_a", 2 * g @ b.swapaxes(1, 2)), ("lora_b", 2 * a.swapaxes(1, 2) @ g)):
        assert_close(flatten(got)[f"{stem}/{each}"], want.reshape(flat[f"{stem}/{each}"].shape), 1e-4)


def test_another_scale_would_be_seen(monkeypatch):
  monkeypatch.setattr(llmjax.models.layers.Lora, "scale", property(lambda self: self.alpha))
  case = adapted("gpt causal_lm")
  params, batch = moved(case.cfg), make_batch(CASES["gpt causal_lm"])
  want = logits(case.cfg, params, batch)
  monkeypatch.undo()
  with pytest.raises(AssertionError):
    assert_close(logits(CASES["gpt causal_lm"].cfg, merge_lora(params, case.cfg), batch), want)


def test_dropout_of_adapters_is_keyed_by_the_row():
  """It runs with a key alone; equal rows drop otherwise; microbatches and a mesh change nothing."""
  case = adapted("gpt causal_lm", ALL, lora_dropout=0.4)
  params, batch = moved(case.cfg), make_batch(CASES["gpt causal_lm"])
  without = adapted("gpt causal_lm", ALL)
  np.testing.assert_array_equal(logits(case.cfg, params, batch), logits(without.cfg, params, batch))
  twice = dataclasses.replace(jax.tree.map(lambda x: np.repeat(x[:1], len(x), axis=0), batch), rows=batch.rows)
  first, second = logits(case.cfg, params, twice, dropout=jax.random.key(0))[:2]
  assert np.abs(first - second).max() > 0.01
  np.testing.assert_array_equal(*logits(without.cfg, params, twice, dropout=jax.random.key(0))[:2])

  learned, frozen = split(params, learns(params))
  axes = parameters(case.cfg)[1]
  settings = {"model": Transformer(case.cfg), "objective": case.objective}
  want, _ = jax.jit(functools.partial(step.gradients, accum=1, **settings))(
    learned, batch, jax.random.key(0), frozen=frozen
  )
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  rules = {**sharding.RULES, "vocab": None, "act_vocab": None}
  where = split(sharding.param_shardings(params, axes, mesh, rules), learns(params))
  with sharding.use(mesh, rules):
    placed = [jax.device_put(part, places) for part, places in zip((learned, frozen), where, strict=True)]
    rows = jax.device_put(batch, sharding.named(mesh, "act_batch", rules=rules))
    got, _ = jax.jit(functools.partial(step.gradients, accum=2, **settings))(
      placed[0], rows, jax.random.key(0), frozen=placed[1]
    )
  for path, leaf in flatten(want).items():
    assert_close(flatten(got)[path], leaf, 1e-4)


def steps(case, rules, count=3, ema_decay=None, **optimizer):
  """(the state before, the state after some steps) of training what the rules say."""
  params, axes = parameters(case.cfg)
  chosen = learns(params, rules)
  tx = optim.make_optimizer({"name": "adamw", **COMMON, **optimizer}, params, axes, chosen)
  first = step.start(params, tx, ema_decay is not None, chosen)
  function = functools.partial(step.train_step, model=Transformer(case.cfg), objective=case.objective, tx=tx, accum=1)
  function = jax.jit(functools.partial(function, ema_decay=ema_decay))
  state = first
  for _ in range(count):
    state, _ = function(state, make_batch(CASES["gpt causal_lm"]), jax.random.key(0), jnp.float32(0.01))
  return first, state


@pytest.mark.parametrize("rules", [LORA, ((r"decoder/.*(norm|bias).*", True), (r".*", False))], ids=["lora", "norms"])
def test_what_is_frozen_stays_and_has_no_moments(rules):
  """Decay, clipping and the average are of what learns alone."""
  case = adapted("gpt causal_lm")
  first, last = steps(case, rules, ema_decay=0.5, weight_decay=0.1, clip_norm=1.0)
  chosen = {path for path, value in flatten(learns(parameters(case.cfg)[0], rules)).items() if value}
  assert set(flatten(last.params)) == set(flatten(last.ema)) == chosen
  assert set(flatten(last.frozen)) == set(flatten(parameters(case.cfg)[0])) - chosen
  jax.tree.map(np.testing.assert_array_equal, last.frozen, first.frozen)
  for path, leaf in flatten(last.params).items():
    assert (np.asarray(leaf) != flatten(first.params)[path]).any(), path
  sizes = [leaf.size for leaf in jax.tree.leaves(last.opt_state) if leaf.ndim]
  layers = sum(len(leaf) for leaf in jax.tree.leaves(last.params) if leaf.ndim)
  numbers = sum(leaf.size for leaf in jax.tree.leaves(last.params))
  assert sum(sizes) <= 2 * numbers + layers and sum(sizes) >= 2 * numbers


def test_an_average_of_what_learns_is_evaluated_with_what_is_frozen():
  case = adapted("gpt causal_lm")
  _, last = steps(case, LORA, count=2, ema_decay=0.5)
  whole = join(last.ema, last.frozen)
  assert set(flatten(whole)) == set(flatten(parameters(case.cfg)[0]))
  assert np.isfinite(logits(case.cfg, whole, make_batch(CASES["gpt causal_lm"]))).all()


@pytest.mark.parametrize(
  "rules, words",
  [
    (((r".*lorra.*", True), (r".*", False)), r"trainable: '\.\*lorra\.\*' matches no parameter"),
    (((r".*", 1),), r"trainable: 1 must be True or False"),
    (((r".*", False),), r"trainable: no parameter learns"),
    (((r".*lora_a", True),), r"trainable: no rule matches .* end with a rule for all the rest"),
  ],
)
def test_rules_that_cannot_be_meant(rules, words):
  with pytest.raises(ConfigError, match=words) as error:
    learns(parameters(adapted("gpt causal_lm").cfg)[0], rules)
  assert "\n" not in str(error.value)


def test_targets_that_match_nothing():
  cfg = adapted("gpt causal_lm", "attention/query").cfg
  with pytest.raises(ConfigError, match=r"model\.lora_targets='attention/query' matches no projection.*decoder/layers"):
    finetune.check_targets(parameters(cfg)[0], cfg)


# Rates by layer.


def test_scales_of_layers_are_those_of_a_table():
  """Two stacks, odd layers, periods of two kinds, scanned and unrolled, against powers written by hand."""

  def of(cfg, **changes):
    cfg = dataclasses.replace(cfg, **changes)
    return {k: np.ravel(v).tolist() for k, v in flatten(layer_scales(parameters(cfg)[0], cfg, 0.5)).items()}

  found = of(GPT, tie_embeddings=False)
  assert found["embedding/table"] == found["positions/table"] == [1 / 8]
  assert found["decoder/layers/attention/query/kernel"] == found["decoder/layers/mlp_norm/scale"] == [1 / 4, 1 / 2]
  assert found["decoder/final_norm/scale"] == found["head/kernel"] == [1.0]
  unrolled = of(GPT, scan=False)
  assert [unrolled[f"decoder/layers_{i}/mlp/up/bias"] for i in (0, 1)] == [[1 / 4], [1 / 2]]
  assert unrolled["embedding/table"] == [1 / 8] and unrolled["decoder/final_norm/scale"] == [1.0]

  found = of(MODERNBERT)  # of 4 layers: the first, a period of two, and one that is left over
  assert found["embedding/table"] == found["embedding_norm/scale"] == [1 / 32]
  assert found["encoder/first/mlp/up/kernel"] == [1 / 16]
  assert found["encoder/layers/slot_0/attention/out/kernel"] == [1 / 8]
  assert found["encoder/layers/slot_1/attention/out/kernel"] == [1 / 4]
  assert found["encoder/last_0/attention_norm/scale"] == [1 / 2]
  assert found["head_transform/kernel"] == found["head_norm/scale"] == found["head_bias/bias"] == [1.0]
  found = of(MODERNBERT, encoder_layers=5)
  assert found["encoder/first/mlp/up/kernel"] == [1 / 32]
  assert found["encoder/layers/slot_0/mlp/up/kernel"] == [1 / 16, 1 / 4]
  assert found["encoder/layers/slot_1/mlp/up/kernel"] == [1 / 8, 1 / 2]

  found = of(T5, encoder_layers=3)  # each stack counts its own; the shared table is below the deeper one
  assert found["encoder/layers/mlp/up/kernel"] == [1 / 8, 1 / 4, 1 / 2]
  assert found["decoder/layers/cross_attention/out/kernel"] == [1 / 4, 1 / 2]
  assert found["embedding/table"] == found["encoder/relative/table"] == [1 / 16]
  assert found["decoder/relative/table"] == [1 / 8]
  for decay in (0.0, 1.5):
    with pytest.raises(ConfigError, match=rf"optim\.layer_decay={decay} must be above 0 and at most 1"):
      layer_scales(parameters(GPT)[0], GPT, decay)


def test_a_scale_multiplies_the_whole_step():
  """Of SGD with decoupled decay: p - lr scale (g + decay p), the scale by layer times the one by regex."""
  params, axes = parameters(GPT)
  grads = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), params)
  spec = {"name": "sgd", "momentum": 0.0, **COMMON, "weight_decay": 0.1}
  spec["lr_scale"] = ((r".*bias", 3.0), (r".*positions.*", 0), (r".*", 1.0))
  scales = layer_scales(params, GPT, 0.5)
  tx = optim.make_optimizer(spec, params, axes, scales=scales)
  got, _ = tx.update(grads, tx.init(params), params)
  for path, direction in flatten(got).items():
    own = 3.0 if path.endswith("bias") else 0.0 if "positions" in path else 1.0
    layer = np.array([1 / 4, 1 / 2]) if path.startswith("decoder/layers/") else None
    by_layer = 1.0 if path.startswith("decoder/final") else 1 / 8
    leaf, grad = (np.asarray(flatten(tree)[path], np.float64) for tree in (params, grads))
    scale = own * (by_layer if layer is None else layer.reshape(-1, *(1,) * (leaf.ndim - 1)))
    np.testing.assert_allclose(direction, scale * (grad + 0.1 * leaf), rtol=1e-5, atol=1e-8)
  with pytest.raises(ConfigError, match=r"optim\.lr_scale: -1 must be a number, 0 or more"):
    optim.make_optimizer({**spec, "lr_scale": ((".*", -1),)}, params, axes)


def test_a_rate_of_zero_is_frozen_for_adam_too():
  _, last = steps(CASES["gpt causal_lm"], ((r".*", True),), count=2, lr_scale=((r"embedding.*", 0.0), (r".*", 1.0)))
  before = parameters(GPT)[0]
  np.testing.assert_array_equal(last.params["embedding"]["table"], before["embedding"]["table"])
  assert (np.asarray(last.params["positions"]["table"]) != before["positions"]["table"]).any()


# Whole runs.

LABELS = ("no", "yes")
SMALL = {"d_model": 32, "num_heads": 2, "decoder_layers": 0, "encoder_layers": 2, "d_ff": 48, "max_len": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Texts, labelled ones, and a run of masked_lm and one of causal_lm that others start from."""
  home = tmp_path_factory.mktemp("finetune")
  rng = np.random.default_rng(0)
  lines = ["".join(map(chr, rng.integers(97, 123, 12))) for _ in range(64)]
  (home / "t.txt").write_text("\n".join(lines) + "\n")
  records = [{"text": line, "label": LABELS[line[0] < "n"]} for line in lines]
  (home / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("LLMJAX_CACHE", str(home / "cache"))
    train.run(config(home, {"name": "masked_lm"}, {"optim.ema_decay": 0.5}), home / "masked")
    train.run(
      config(home, {"name": "causal_lm"}, {"model.encoder_layers": 0, "model.decoder_layers": 2}), home / "causal"
    )
    yield home


def config(home, objective, changes):
  """A tiny run; `changes` are {dotted key: value}."""
  found = cfglib.load_config(["--config=base"])
  labelled = objective["name"] in ("classification", "preference")
  found.data.corpus = ConfigDict(
    {"name": "jsonl" if labelled else "text", "files": str(home / f"t.{'jsonl' if labelled else 'txt'}")}
  )
  found.data.tokenizer = ConfigDict({"name": "bytes", "mask": True})
  found.data.train = found.data.eval = "train"
  found.objective = ConfigDict(objective)
  found.model.update(SMALL)
  found.update(total_steps=2, batch_size=8, seq_len=24)
  found.log.update(every=1, tensorboard=False)
  found.data.update(pack=False, workers=1, prefetch=0)
  found.checkpoint.every = None
  for key, value in changes.items():
    holder = found
    for part in key.split(".")[:-1]:
      holder = holder[part]
    with holder.unlocked():
      holder[key.split(".")[-1]] = value
  return found


CLASSES = {"name": "classification"}
TUNED = {
  "trainable": ((r".*lora_[ab]|head.*", True), (r".*", False)),
  "model.lora_rank": 2,
  "model.lora_dropout": 0.1,
  "model.dropout": 0.1,
  "optim.layer_decay": 0.5,
  "optim.ema_decay": 0.9,
  "schedule": ConfigDict({"name": "constant", "warmup": None}),
}


def run(folder, name, changes, objective=CLASSES):
  train.run(config(folder, objective, changes), folder / name)
  return saved(folder / name)


def saved(workdir):
  """Everything in the newest checkpoint, {path: array}."""
  checkpoints = Checkpoints(workdir)
  tree = checkpoints.manager.restore(checkpoints.steps()[-1])["state"]
  checkpoints.close()
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def assert_equal(one, other):
  assert one.keys() == other.keys()
  for path, leaf in one.items():
    np.testing.assert_array_equal(leaf, other[path], err_msg=path)


def parts(state, part):
  return {path.removeprefix(f"{part}/"): leaf for path, leaf in state.items() if path.startswith(f"{part}/")}


def test_a_run_goes_on_where_it_was_and_freezes_what_it_should(folder):
  """Bitwise; the body is that of the run it started from, its average."""
  tuned = TUNED | {"init_from": str(folder / "masked"), "data.prefetch": 2}
  whole = run(folder, "whole", tuned | {"total_steps": 4})
  run(folder, "halves", tuned)
  run(folder, "halves", tuned | {"total_steps": 4})
  assert_equal(saved(folder / "halves"), whole)
  body = parts(saved(folder / "masked"), "ema")
  for path, leaf in parts(whole, "frozen").items():
    np.testing.assert_array_equal(leaf, body[path], err_msg=path)
  learned = parts(whole, "params")
  assert set(learned) == set(parts(whole, "ema")) and all(is_adapter(p) or p.startswith("head/") for p in learned)
  assert all(leaf.any() for path, leaf in learned.items() if path.endswith("lora_b"))
  loaded = llmjax.load(folder / "whole")
  assert set(flatten(loaded.params)) == {*learned, *parts(whole, "frozen")}


def test_a_run_of_before_these_keys_goes_on(folder):
  keys = ("trainable", "init_map", "auxiliary", "optim/lr_scale", "optim/layer_decay", "model/crf", "model/num_classes")
  keys += tuple(f"model/lora_{key}" for key in ("rank", "alpha", "dropout", "targets"))
  shutil.copytree(folder / "masked", folder / "older")
  for manifest in (folder / "older" / "checkpoints").glob("*/manifest/metadata"):
    content = json.loads(manifest.read_text())
    for key in keys:
      *section, name = key.split("/")
      del (content["config"][section[0]] if section else content["config"])[name]
    content["model"] = content["config"]["model"]
    manifest.write_text(json.dumps(content))
  assert "lora_rank" not in manifest.read_text()
  assert llmjax.load(folder / "older").model.cfg.lora is None
  longer = {"optim.ema_decay": 0.5, "total_steps": 3, "schedule": ConfigDict({"name": "constant", "warmup": None})}
  for name in ("older", "masked-again"):
    if name == "masked-again":
      shutil.copytree(folder / "masked", folder / name)
    run(folder, name, longer, {"name": "masked_lm"})
  assert_equal(saved(folder / "older"), saved(folder / "masked-again"))


def test_the_state_of_a_program_has_moments_of_what_learns_alone(folder):
  program = make_program(config(folder, CLASSES, TUNED))
  state = program.abstract_state
  learned = {path for path, value in flatten(program.trainable).items() if value}
  assert set(flatten(state.params)) == learned and all(is_adapter(p) or p.startswith("head/") for p in learned)
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim and leaf.size > 2]
  assert sum(leaf.size for leaf in moments) <= 2 * program.num_trainable < program.num_params / 10
  assert program.num_params == sum(leaf.size for leaf in jax.tree.leaves(program.abstract_params))


@pytest.mark.parametrize("name", ["masked", "causal"])
def test_a_head_begins_afresh_on_anothers_body(folder, name):
  stacks = {} if name == "masked" else {"model.encoder_layers": 0, "model.decoder_layers": 2, "model.pooling": "last"}
  still = {"init_from": str(folder / name), "optim.lr": 0.0, "total_steps": 1, **stacks}
  state = parts(run(folder, f"{name}-1", still), "params")
  before = saved(folder / name)
  before = parts(before, "ema") or parts(before, "params")
  fresh = {path for path in state if path.startswith("head")}
  assert fresh and set(state) - set(before) <= fresh
  for path in set(state) - fresh:
    np.testing.assert_array_equal(state[path], before[path], err_msg=path)
  again, other = (make_program(config(folder, CLASSES, {**still, "seed": seed})).init() for seed in (0, 1))
  np.testing.assert_array_equal(again.params["head"]["kernel"], state["head/kernel"])
  assert (np.asarray(other.params["head"]["kernel"]) != state["head/kernel"]).any()


def test_a_head_of_another_size_and_a_name_of_another_time(folder):
  first = run(folder, "two", {"total_steps": 1})
  three = {"name": "classification", "labels": ("maybe", "no", "yes")}
  still = {"init_from": str(folder / "two"), "optim.lr": 0.0, "total_steps": 1}
  with pytest.raises(ConfigError, match=r"head/\w+ is of size .* --config\.init_map='(.*)'") as error:
    run(folder, "three", still, three)
  assert "\n" not in str(error.value)
  flag = re.search(r"--config\.init_map='.*'", str(error.value))[0].replace("'(", "(", 1)[:-1]
  rules = cfglib.load_config(["--config=base", flag]).init_map
  found = parts(run(folder, "three", still | {"init_map": rules}, three), "params")
  assert found["head/kernel"].shape == (32, 3)
  np.testing.assert_array_equal(found["embedding/table"], first["params/embedding/table"])

  crossed = ((r"(encoder/layers/attention)/query/(.*)", r"\1/key/\2"), (r"(.*)/key/(.*)", r"\1/query/\2"))
  found = parts(run(folder, "crossed", still | {"init_map": crossed}), "params")
  for one, other in (("query", "key"), ("key", "query"), ("value", "value")):
    kernel = first[f"params/encoder/layers/attention/{other}/kernel"]
    np.testing.assert_array_equal(found[f"encoder/layers/attention/{one}/kernel"], kernel)


def test_adapters_without_a_place_are_not_dropped(folder):
  run(folder, "adapted", {"model.lora_rank": 2, "total_steps": 1})
  with pytest.raises(ConfigError, match=r"init_from=.*lora_a has no place in this model.*set model\.\* as it was"):
    run(folder, "bare", {"init_from": str(folder / "adapted"), "total_steps": 1})


def test_a_run_on_eight_devices_is_that_of_one(folder):
  """Two steps of SGD with adapters, dropout and a head."""
  settings = TUNED | {"optim.name": "sgd", "optim.momentum": 0.9, "optim.lr": 0.1, "optim.clip_norm": 1.0}

  def states(sizes, devices):
    mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1, **sizes})
    rules = {"rules.vocab": None, "rules.act_vocab": None, "mesh": mesh}
    program = make_program(config(folder, CLASSES, settings | rules), devices=jax.devices()[:devices])
    stream = train.make_stream(program, open_source(program.config, "train"), prefetch=0)
    state, key = program.init(), jax.device_put(jax.random.key(0), program.replicated)
    with sharding.use(program.mesh, program.rules):
      for _ in range(2):
        state, _ = program.train_step(state, program.put(next(stream), 8), key, 0.1, {})
        jax.block_until_ready(state)  # two programs at once can starve each other of threads on a busy CPU
    stream.close()
    return jax.device_get(state)

  want, got = states({}, 1), states({"data": 2, "fsdp": 2, "tensor": 2}, 8)
  jax.tree.map(np.testing.assert_array_equal, got.frozen, want.frozen)
  for path, leaf in flatten(want.params).items():
    assert_close(flatten(got.params)[path], leaf, 1e-4)


def test_adapters_alone_are_the_run_again(folder):
  """As a folder of PEFT's beside the run that it started from; another run goes on from it."""
  decoder = {"model.encoder_layers": 0, "model.decoder_layers": 2, "model.lora_rank": 2, "model.lora_alpha": 3.0}
  tuned = {**decoder, "trainable": ((r".*lora_[ab]|.*/mlp_norm/.*", True), (r".*", False)), "total_steps": 2}
  run(folder, "lora", tuned | {"init_from": str(folder / "causal")}, {"name": "causal_lm"})
  architecture, base = export_adapter(str(folder / "lora"), str(folder / "peft"))
  assert (architecture, base) == ("GPT2LMHeadModel", str((folder / "causal").resolve()))
  said = json.loads((folder / "peft" / "adapter_config.json").read_text())
  assert said["target_modules"] == ["c_attn"] and len(said["modules_to_save"]) == 2
  want, got = (llmjax.load(folder / name) for name in ("lora", "peft"))
  assert_equal(flatten(got.params), flatten(want.params))
  assert got.tokenizer.vocab_size == want.tokenizer.vocab_size
  still = tuned | {"init_from": str(folder / "peft"), "optim.lr": 0.0, "total_steps": 1}
  state = run(folder, "further", still, {"name": "causal_lm"})
  assert_equal(parts(state, "params") | parts(state, "frozen"), flatten(want.params))
  with pytest.raises(ConfigError, match=r"did not start from a model \(init_from\)"):
    export_adapter(str(folder / "causal"), str(folder / "none"))


PREFERENCE = {"name": "preference", "prompt": "text", "chosen": "label", "rejected": "text", "sft_weight": 0.1}


def test_a_reference_is_what_the_run_starts_from_with_its_adapters(folder):
  """Also after a restart, to the bit."""
  decoder = {"model.encoder_layers": 0, "model.decoder_layers": 2, "model.lora_rank": 2}
  adapters = {"trainable": ((r".*lora_[ab]", True), (r".*", False)), "optim.lr": 0.1}
  adapters["schedule"] = ConfigDict({"name": "constant", "warmup": None})
  run(folder, "sft", decoder | adapters | {"init_from": str(folder / "causal")}, {"name": "causal_lm"})
  tuned = (
    decoder | adapters | {"init_from": str(folder / "sft"), "auxiliary.reference": ConfigDict({"init_from": None})}
  )
  program = make_program(config(folder, PREFERENCE, tuned))
  state = program.init(program.starting_params()[0])
  stream = train.make_stream(program, open_source(program.config, "train"), prefetch=0)
  batch = program.put(next(stream), 8)
  stream.close()
  measured = program.eval_step(program.eval_params(state), batch, program.auxiliary_params)
  loss, margin = (float(measured[name][0] / measured[name][1]) for name in ("loss", "margin"))
  np.testing.assert_allclose([loss, margin], [np.log(2), 0], atol=1e-6)
  whole = run(folder, "dpo", tuned | {"total_steps": 4}, PREFERENCE)
  run(folder, "dpo-halves", tuned, PREFERENCE)
  assert_equal(run(folder, "dpo-halves", tuned | {"total_steps": 4}, PREFERENCE), whole)
  with pytest.raises(ConfigError, match=r"holds a run with init_from="):
    run(
      folder, "dpo", tuned | {"total_steps": 5, "init_from": str(folder / "causal"), "model.lora_rank": 2}, PREFERENCE
    )


class Own(nn.Module):
  """A model of one's own, with as little of a config as may be."""

  cfg: Any
  vocab_size: int

  @nn.compact
  def __call__(self, batch):
    init = nn.with_logical_partitioning(nn.initializers.normal(0.1), ("vocab", "embed"))
    table = self.param("table", init, (self.vocab_size, 8))
    return Outputs(logits=jnp.take(table, batch.inputs.ids, axis=0) @ table.T)


def make_own(vocab_size, max_len, width):
  return Own(types.SimpleNamespace(max_len=max_len, dtype="float32", stacks="decoder"), vocab_size)


def test_a_model_of_ones_own_needs_no_more_than_before(folder):
  found = config(folder, {"name": "causal_lm"}, {})
  found.model = ConfigDict({"name": "finetune_test:make_own", "vocab_size": None, "max_len": None, "width": 8})
  found.optim.decay_mask = ((".*", True),)
  assert make_program(found).num_params > 0
  found.optim.layer_decay = 0.5
  with pytest.raises(ConfigError, match=r"layer_decay needs a model whose layers are known"):
    make_program(found)


def test_an_epoch_is_every_example_once(folder):
  assert make_program(config(folder, CLASSES, {"total_steps": "2 epochs"})).total_steps == 16
  context = "one two three four five six seven. " * 4
  (folder / "qa.jsonl").write_text(json.dumps({"question": "q", "context": context, "answers": []}) + "\n")
  found = config(folder, CLASSES, {"total_steps": "8 epochs", "batch_size": 8})
  found.data.corpus = ConfigDict({"name": "jsonl", "files": str(folder / "qa.jsonl"), "text": None})
  found.objective = ConfigDict({"name": "span_qa", "stride": 4, "max_question": 4, "no_answer": True})
  program = make_program(found)
  assert program.total_steps == len(
    program.objective.encode(json.loads((folder / "qa.jsonl").read_text()), labelled=True)
  )
  with pytest.raises(ConfigError, match="an epoch of packed data has no known number of steps"):
    make_program(config(folder, {"name": "masked_lm"}, {"total_steps": "1 epochs"}))

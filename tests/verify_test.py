"""Every kind of model on every kind of mesh gives what one device gives; and the check is one that can fail."""

import dataclasses
import functools
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from llmjax import cli, sharding, verify
from llmjax.config import load_config, to_dict
from llmjax.models import blockwise
from llmjax.models.transformer import Transformer
from llmjax.objectives.causal_lm import CausalLM
from llmjax.objectives.losses import cross_entropy
from llmjax.optim import COMMON
from llmjax.types import Batch
from tests.support.cases import MIXTRAL

GOLDEN = Path(__file__).parent / "testdata" / "collectives.json"  # written anew with LLMJAX_UPDATE_GOLDEN=1

DROPOUT = ["--config.model.dropout=0.1", "--config.model.attention_dropout=0.1"]
EXPERTS = ["--config.model.num_experts=4", "--config.model.mlp_bias=False", "--config.model.gated=True"]
KINDS = {
  "encoder": ["--config=bert:debug", *DROPOUT],
  "decoder": ["--config=gpt:debug", *DROPOUT, "--config.accum=2", "--config.logit_tiles=4"],
  "both": ["--config=t5:debug", *DROPOUT],
  "experts": ["--config=gpt:debug", *EXPERTS, "--config.objective.balance=0.01"],
  "contrastive": ["--config=contrastive:debug", "--config.accum=2"],
  "adapters": ["--config=lora:debug"],
}
TENSOR, CONTEXT, EXPERT = "data=2,fsdp=2,tensor=2", "context=4,tensor=2", "fsdp=2,expert=2,context=2"
MESHES = ["data=8", "fsdp=8", "data=4,tensor=2", "context=8", "data=2,fsdp=2,context=2", TENSOR, CONTEXT]
MATRIX = [
  *((kind, mesh) for kind in KINDS for mesh in MESHES),
  *(("experts", mesh) for mesh in (EXPERT, "data=2,expert=4", "expert=4,tensor=2")),
]
FAST = {("decoder", "data=8"), ("experts", EXPERT), *((kind, mesh) for kind in KINDS for mesh in (TENSOR, CONTEXT))}
COMBINATIONS = [pytest.param(*c, marks=[] if c in FAST else [pytest.mark.slow, pytest.mark.matrix]) for c in MATRIX]


@functools.cache
def shrunk(kind):
  return verify.shrink(load_config(KINDS[kind]), 8)


@functools.cache
def one_device(kind):
  return verify.measure(shrunk(kind), {}, jax.devices()[:1])


@pytest.mark.parametrize("kind, mesh", COMBINATIONS)
def test_any_mesh_gives_what_one_device_gives(kind, mesh):
  got = verify.measure(shrunk(kind), sharding.parse_mesh(mesh), jax.devices())
  assert verify.report(mesh, one_device(kind), got)
  golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
  if os.environ.get("LLMJAX_UPDATE_GOLDEN"):
    golden.setdefault(jax.__version__, {}).setdefault(kind, {})[mesh] = got.collectives
    GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
  if jax.__version__ not in golden:
    pytest.skip(f"the same; of collectives there is no record for jax {jax.__version__}, whose compiler may differ")
  assert got.collectives == golden[jax.__version__][kind][mesh]


# What is planted, each beside the same without the mistake.


@dataclasses.dataclass(frozen=True, eq=False)
class Summed(CausalLM):
  """A loss that each device takes of its own tokens; `across` makes one of them all."""

  across: str = "sum"

  def loss(self, forward, batch, rngs):
    tokens = ("act_batch", "act_len")
    axes = sharding.axes_of("act_batch") + sharding.axes_of("act_len")

    def total(logits, labels, weight):
      nll = jnp.sum(cross_entropy(logits, labels)[1] * weight)
      if not axes or self.across == "nothing":
        return nll
      if self.across == "sum":
        return jax.lax.psum(nll, axes)
      count = jnp.sum(weight)
      return jax.lax.pmean(nll / count, axes) * jax.lax.psum(count, axes)

    local = sharding.per_device(total, ((*tokens, None), tokens, tokens), ())
    value = local(forward(batch, rngs=rngs).logits, batch.labels["nll"], batch.weights["nll"])
    return {"nll": value}, {"loss": (value, jnp.sum(batch.weights["nll"]))}


def clipped(axes, clip):
  """Gradient descent that clips each parameter's gradient by itself."""

  def update(grad, param):
    def one(piece):
      square = jnp.sum(jnp.square(piece))
      cut = tuple(axis for name in axes for axis in sharding.axes_of(name))
      norm = jnp.sqrt(jax.lax.psum(square, cut) if clip == "global" and cut else square)
      return piece / jnp.maximum(norm / 1e-3, 1.0)

    return sharding.per_device(one, (axes,), axes)(grad)

  return optax.stateless(update)


def planted(**keys):
  config = to_dict(load_config(["--config=gpt:debug"]))
  if "clip" in keys:
    common = {key: config["optim"][key] for key in COMMON}
    config["optim"] = {**common, "name": "tests.verify_test:clipped", **keys}
  else:
    config["objective"] |= {"name": "tests.verify_test:Summed", **keys}
  return config


@pytest.mark.parametrize(
  "mistake, right",
  [
    ({"across": "nothing"}, {"across": "sum"}),  # a missing psum
    ({"across": "mean"}, {"across": "sum"}),  # a mean of local means
    ({"clip": "local"}, {"clip": "global"}),  # a local gradient norm
  ],
)
def test_a_planted_mistake_is_found(mistake, right, capsys):
  assert verify.verify(planted(**right), ["data=2,fsdp=4"])
  assert not verify.verify(planted(**mistake), ["data=2,fsdp=4"])
  said = capsys.readouterr().out
  assert said.rstrip().endswith("NOT the same") and "times the tolerance" in said


@pytest.mark.slow
def test_two_processes_give_what_one_device_gives(capsys):
  meshes = "--meshes=context=4,tensor=2;expert=4,data=2"
  assert cli.main(["verify", *KINDS["experts"], meshes, "--processes=2"]) == 0
  said = capsys.readouterr().out
  assert "the same on 2 meshes" in said and said.count("process 1 of 2") == 2


def test_rows_that_no_process_has_are_missed(monkeypatch, capsys):
  whole = one_device("decoder")
  lost = dataclasses.replace(whole, rows={place: name for place, name in whole.rows.items() if place != "0/3"})
  monkeypatch.setattr(verify, "measure", lambda *_: whole)
  monkeypatch.setattr(verify, "measure_processes", lambda *_: [lost, lost])
  assert not verify.verify(load_config(KINDS["decoder"]), ["data=8"], [2])
  assert "row 0/3 is no process's" in capsys.readouterr().out


def test_shrinking_keeps_a_config_that_can_run():
  flags = ["--config=gpt:debug", "--config.seq_len=192", "--config.logit_tiles=3", "--config.model.attention=splash"]
  config = verify.shrink(load_config(flags), 8)
  assert (config["seq_len"], config["logit_tiles"], config["model"]["attention"]) == (128, 1, "auto")
  own = verify.shrink({**to_dict(load_config(["--config=gpt:debug"])), "model": {"name": "my:make"}}, 8)
  assert own["model"] == {"name": "my:make"}


@pytest.mark.parametrize("kind", ["decoder", "adapters"])
def test_a_gradient_that_is_wrong_inside_attention_is_found_in_every_kind(kind, monkeypatch):
  right = blockwise._backward

  def wrong(*arguments):
    query, *others = right(*arguments)
    return 1.5 * query, *others

  monkeypatch.setattr(blockwise, "_backward", wrong)
  got = verify.measure(shrunk(kind), {"context": 8}, jax.devices())
  found = {difference.part for difference in verify.differences(one_device(kind), got) if difference.excess > 1}
  assert "gradient" in found and "held out" not in found


def test_loss_of_whole_rows_is_uneven_too():
  labels = {"class": np.zeros(8, np.int32)}
  batch = Batch(inputs=None, labels=labels, weights={"class": np.ones(8, np.float32)}, rows=np.arange(8))
  assert len(set(verify.uneven(batch).weights["class"])) > 1


@pytest.mark.parametrize("devices", [2, 4, 6, 8])
def test_there_are_meshes_for_any_number_of_devices(devices):
  for mesh in verify.meshes_of(devices):
    assert math.prod(sharding.resolve(sharding.parse_mesh(mesh), devices).values()) == devices


def test_a_capacity_loses_tokens_and_is_told_from_none(capsys):
  tight = load_config([*KINDS["experts"], "--config.model.expert_capacity=0.5"])
  assert not verify.verify(tight, ["expert=4"])
  ample = load_config([*KINDS["experts"], "--config.model.expert_capacity=4"])
  assert verify.verify(ample, ["expert=4"])


@pytest.mark.parametrize("mesh", ["data=8", "expert=4,data=2", "context=8", "expert=2,context=2,tensor=2"])
def test_experts_take_batches_that_no_mesh_can_cut(mesh):
  """Three rows of ten tokens, as a prompt has them."""
  model = Transformer(MIXTRAL)
  batch = Batch.from_tokens(np.random.default_rng(0).integers(0, MIXTRAL.vocab_size, (3, 10)))
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), batch)["params"])
  want = jax.jit(lambda params, batch: model.apply({"params": params}, batch).logits)(params, batch)
  with sharding.use(sharding.make_mesh(sharding.parse_mesh(mesh))):
    got = jax.jit(lambda params, batch: model.apply({"params": params}, batch).logits)(params, batch)
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--meshes=data=3"], "mesh"),
    (["--meshes=dta=8"], "data"),
    (["--processes=3"], "divide the 8 devices"),
    (["--processes=two"], "--processes=two must be numbers"),
  ],
)
def test_what_cannot_be_verified_is_said_in_one_line(flags, words, capsys):
  assert cli.main(["verify", "--config=gpt:debug", "--meshes=data=8", *flags]) == 2
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and words in said

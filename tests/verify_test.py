"""Every kind of model on every kind of mesh gives what one device gives; and the check is one that can fail."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from llmjax import cli, sharding, verify
from llmjax.config import load_config, to_dict
from llmjax.objectives.causal_lm import CausalLM
from llmjax.objectives.losses import cross_entropy
from llmjax.optim import COMMON

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
COMBINATIONS = [
  *(("decoder", mesh) for mesh in ("data=8", TENSOR, CONTEXT)),
  *(("experts", mesh) for mesh in (TENSOR, EXPERT, "expert=4,tensor=2")),
  *((kind, mesh) for kind in ("encoder", "both", "contrastive", "adapters") for mesh in (TENSOR, CONTEXT)),
]


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
  if jax.__version__ in golden:  # another compiler chooses otherwise
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


def test_a_capacity_loses_tokens_and_is_told_from_none(capsys):
  tight = load_config([*KINDS["experts"], "--config.model.expert_capacity=0.5"])
  assert not verify.verify(tight, ["expert=4"])
  ample = load_config([*KINDS["experts"], "--config.model.expert_capacity=4"])
  assert verify.verify(ample, ["expert=4"])


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--meshes=data=3"], "mesh"),
    (["--meshes=dta=8"], "data"),
    (["--processes=3"], "--processes=3 must divide the 8 devices"),
  ],
)
def test_what_cannot_be_verified_is_said_in_one_line(flags, words, capsys):
  assert cli.main(["verify", "--config=gpt:debug", "--meshes=data=8", *flags]) == 2
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and words in said

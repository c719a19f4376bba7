"""Every shipped config builds, nothing in it goes unread, and its shapes have their published sizes."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn

import llmjax
from configs import base
from configs.sizes import SIZES
from llmjax import config as cfglib
from llmjax import program, sharding, step, train
from llmjax.config import ConfigError
from llmjax.models.transformer import Transformer, TransformerConfig
from llmjax.types import Batch

# Counted from the released checkpoints (Hugging Face model cards and safetensors headers).
PUBLISHED = {
  "gpt2_124m": 124_439_808,
  "gpt2_355m": 354_823_168,
  "gpt2_774m": 774_030_080,
  "gpt2_1.5b": 1_557_611_200,
  "llama2_7b": 6_738_415_616,
  "llama2_13b": 13_015_864_320,
  "llama2_70b": 68_976_648_192,
  "llama3_1b": 1_235_814_400,
  "llama3_3b": 3_212_749_824,
  "llama3_8b": 8_030_261_248,
  "llama3_70b": 70_553_706_496,
  "llama3_405b": 405_853_388_800,
}
# The GPT-3 paper gives rounded names; the counts agree with them to the digits they have.
ROUNDED = {
  "gpt3_125m": 125e6,
  "gpt3_350m": 356e6,
  "gpt3_760m": 760e6,
  "gpt3_1.3b": 1.3e9,
  "gpt3_2.7b": 2.65e9,
  "gpt3_6.7b": 6.66e9,
  "gpt3_13b": 12.85e9,
  "gpt3_175b": 174.6e9,
}


def count(name):
  fields = {k: v for k, v in SIZES[name]["model"].items() if v is not None or k != "vocab_size"}
  model = Transformer(TransformerConfig(**fields))
  batch = Batch.from_tokens(np.zeros((1, 2), np.int32))
  shapes = nn.unbox(jax.eval_shape(functools.partial(step.init_params, model=model), jax.random.key(0), batch=batch))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_parameter_counts_are_the_published_ones():
  assert {name: count(name) for name in PUBLISHED} == PUBLISHED
  for name, size in ROUNDED.items():
    assert abs(count(name) / size - 1) < 0.02, name
  assert {"debug", "nano", *PUBLISHED, *ROUNDED} == set(SIZES)


def test_base_lists_every_choice_of_the_model_with_its_default():
  ours = cfglib.to_dict(base.get_config().model)
  fields = {f.name: f.default for f in dataclasses.fields(TransformerConfig)}
  assert set(ours) == {"name", *fields}
  assert all(ours[k] == v for k, v in fields.items() if v is not dataclasses.MISSING)


# `build` refuses what these do not know.
BUILT = ("model", "objective", "optim", "schedule", "data.corpus", "data.tokenizer", "evals")


def unread(config):
  """Keys that no line of the library subscripts."""
  source = "".join(path.read_text(encoding="utf-8") for path in Path(llmjax.__file__).parent.rglob("*.py"))
  loose = [k for k in cfglib.flatten(config) if not k.startswith(BUILT)]
  return [key for key in loose if not all(f'["{part}"]' in source for part in key.split("."))]


def test_a_knob_that_nothing_reads_is_found(home):
  config = base.get_config()
  config.mesh = config.rules = cfglib.optional(None)  # read as a whole
  assert not unread(config)
  config.log.colour = "red"
  assert unread(config) == ["log.colour"]
  for part in ("model", "objective", "optim", "schedule", "data.tokenizer", "evals.heldout"):
    config = cfglib.to_dict(cfglib.load_config(["--config=gpt:debug"]))
    functools.reduce(lambda c, key: c[key], part.split("."), config)["planted"] = 1
    with pytest.raises(ConfigError, match="planted"):
      train.make_evals(program.make_program(config))


@pytest.mark.parametrize("name", sorted(cfglib.shipped()))
def test_every_config_builds_and_traces_abstractly(home, name):
  config = cfglib.load_config([f"--config={name}:debug", "--config.batch_size=8"])
  built = program.make_program(config)
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((config.batch_size, config.seq_len), x.dtype),
    Batch.from_tokens(np.zeros((1, 1), np.int32)).inputs,
  )
  labels = {"nll": jax.ShapeDtypeStruct((config.batch_size, config.seq_len), np.int32)}
  weights = {"nll": jax.ShapeDtypeStruct((config.batch_size, config.seq_len), np.float32)}
  rows = jax.ShapeDtypeStruct((config.batch_size,), np.int32)
  with sharding.use(built.mesh, built.rules):
    state, metrics = jax.eval_shape(
      built.train_step,
      built.state_shapes,
      Batch(batch, labels, weights, rows),
      jax.eval_shape(jax.random.key, 0),
      jax.ShapeDtypeStruct((), np.float32),
    )
  assert jax.tree.structure(state) == jax.tree.structure(built.state_shapes) and "loss" in metrics

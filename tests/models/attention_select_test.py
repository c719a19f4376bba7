"""The choice of the attention kernel by config, devices, mesh and tokens."""

import dataclasses

import jax.numpy as jnp
import pytest

from llmjax.config import ConfigError
from llmjax.distributed import sharding
from llmjax.models.attention import select, splash
from llmjax.types import Tokens
from tests.support.cases import GPT


def make_row(length, prefix=False):
  """Return a batch of one document, without padding."""
  ones, positions = jnp.ones((1, length), jnp.int32), jnp.arange(length, dtype=jnp.int32)[None]
  return Tokens(ones, positions, ones, (positions < 4).astype(jnp.int32) if prefix else None)


@pytest.mark.parametrize(
  "kernel, change, sizes, words",
  [
    ("chunked", {}, {"context": 8}, ["sharded sequences", "mesh.context", "'xla', 'ring'"]),
    ("splash", {}, {"context": 8}, ["sharded sequences", "'ring'"]),
    ("splash", {"attention_dropout": 0.1}, {}, ["dropout", "model.attention_dropout", "'chunked'"]),
    ("splash", {"positions": "relative"}, {}, ["relative biases", "model.positions"]),
    ("cudnn", {}, {}, ["float32", "model.dtype"]),
    ("cudnn", {"dtype": "bfloat16", "attention_softcap": 5.0}, {}, ["softcaps", "model.attention_softcap"]),
    ("cudnn", {"dtype": "bfloat16", "attention_dropout": 0.1}, {}, ["dropout", "'xla'"]),
    ("cudnn", {"dtype": "bfloat16", "head_dim": 12}, {}, ["multiple of 8", "model.head_dim"]),
  ],
)
def test_kernel_check_rejects_unsupported_features(kernel, change, sizes, words, monkeypatch):
  device = {"splash": "tpu devices", "cudnn": "gpu devices"}.get(kernel, "cpu devices")
  monkeypatch.setattr(select, "_device_feature", lambda: device)
  cfg = dataclasses.replace(GPT, attention=kernel, **change)
  with sharding.use_mesh(sharding.make_mesh({"data": -1, **sizes})), pytest.raises(ConfigError) as error:
    select.check_attention_kernel(cfg)
  assert "\n" not in str(error.value)
  for word in (f"model.attention={kernel!r}", "auto", *words):
    assert word in str(error.value)


def test_kernel_check_rejects_kernels_of_other_devices():
  with pytest.raises(ConfigError, match=r"model\.attention='splash'.*cpu devices.*'xla', 'chunked', 'ring'"):
    select.check_attention_kernel(dataclasses.replace(GPT, attention="splash"))


def test_kernel_choice_replaces_kernels_of_other_devices():
  row = make_row(128)
  assert select.choose_kernel(dataclasses.replace(GPT, attention="splash"), row, row, causal=True) == "xla"


@pytest.mark.parametrize(
  "length, prefix, words", [(128, True, "prefixes"), (100, False, "lengths that are not a multiple of 128")]
)
def test_kernel_choice_rejects_unsupported_batches(length, prefix, words, monkeypatch):
  monkeypatch.setattr(splash, "INTERPRET", True)
  cfg, row = dataclasses.replace(GPT, attention="splash"), make_row(length, prefix)
  select.check_attention_kernel(cfg)
  with pytest.raises(ConfigError, match=rf"model\.attention='splash'.*{words}.*'xla'"):
    select.choose_kernel(cfg, row, row, causal=True)


@pytest.mark.parametrize(
  "device, length, context, change, expected",
  [
    ("cpu", 128, 1, {}, "xla"),
    ("cpu", 8192, 1, {}, "chunked"),
    ("cpu", 8192, 4, {}, "ring"),
    ("tpu", 128, 4, {}, "ring"),
    ("tpu", 128, 1, {}, "splash"),
    ("tpu", 100, 1, {}, "xla"),
    ("tpu", 128, 1, {"attention_dropout": 0.1}, "xla"),
    ("tpu", 8192, 1, {"attention_dropout": 0.1}, "chunked"),
    ("gpu", 128, 1, {}, "xla"),
    ("gpu", 100, 1, {"dtype": "bfloat16"}, "cudnn"),
    ("gpu", 128, 1, {"dtype": "bfloat16", "attention_softcap": 5.0}, "xla"),
  ],
)
def test_auto_kernel_is_the_fastest_that_supports_the_model(device, length, context, change, expected, monkeypatch):
  monkeypatch.setattr(select, "_device_feature", lambda: f"{device} devices")
  cfg, row = dataclasses.replace(GPT, **change), make_row(length)
  with sharding.use_mesh(sharding.make_mesh({"data": -1, "context": context})):
    assert select.choose_kernel(cfg, row, row, causal=True, training=True) == expected


def test_kernel_of_the_config_is_used_for_long_sequences():
  row = make_row(8192)
  assert select.choose_kernel(dataclasses.replace(GPT, attention="xla"), row, row, causal=True) == "xla"

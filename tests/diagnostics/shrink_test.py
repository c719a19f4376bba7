"""Shrunk configs and the meshes that `verify` tries."""

import math

import pytest

from llmjax.config import load_config, to_dict
from llmjax.diagnostics.shrink import candidate_meshes, shrink_config
from llmjax.distributed import sharding


def test_shrink_config_selects_values_that_fit_short_sequences():
  flags = ["--config=gpt:debug", "--config.seq_len=192", "--config.logit_tiles=3", "--config.model.attention=splash"]
  config = shrink_config(load_config(flags), 8)
  assert (config["seq_len"], config["logit_tiles"], config["model"]["attention"]) == (128, 1, "auto")


def test_shrink_config_does_not_change_a_model_of_the_user():
  config = shrink_config({**to_dict(load_config(["--config=gpt:debug"])), "model": {"name": "my:make"}}, 8)
  assert config["model"] == {"name": "my:make"}


@pytest.mark.parametrize("num_devices", [2, 4, 6, 8])
def test_candidate_meshes_use_all_devices(num_devices):
  for mesh in candidate_meshes(num_devices):
    assert math.prod(sharding.resolve_mesh_sizes(sharding.parse_mesh(mesh), num_devices).values()) == num_devices

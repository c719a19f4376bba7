"""Hugging Face folders, written and read again; the choice of a family."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from llmjax.checkpoints.sources.base import abstract_params
from llmjax.config import ConfigError
from llmjax.config.mesh import RULES
from llmjax.distributed import sharding
from llmjax.interop.config_json import architecture_differences, class_names
from llmjax.interop.folder_reader import open_huggingface_folder, read_folder_params
from llmjax.interop.folder_writer import choose_family, write_folder
from llmjax.models.transformer import Transformer
from tests.support.huggingface_folders import DATA, FAST, NAMES, SLOW, reference_folder, reference_model
from tests.support.tiers import by_tier


@pytest.mark.parametrize("name", by_tier(NAMES, fast=(*FAST, *SLOW)))
def test_folder_read_and_written_again_is_bitwise_equal(name, tmp_path):
  folder = reference_folder(name)
  family = folder.family
  params = read_folder_params(folder, folder.cfg, abstract_params(Transformer(folder.cfg)))
  labels = class_names(folder.config) if folder.cfg.head in ("sequence", "token") else None
  architecture = write_folder(tmp_path / "a", folder.cfg, params, prefer=family.model_type, labels=labels)
  assert architecture == folder.architecture
  original, written = load_file(DATA / name / "model.safetensors"), load_file(tmp_path / "a" / "model.safetensors")
  missing = set(original) - set(written)
  assert all(n.removeprefix(family.prefix) in family.tied or n in family.tied for n in missing), missing
  num_unused = 2 if family.model_type in ("roberta", "opt") else 0  # rows of the position table
  for key, tensor in written.items():
    start = num_unused if "position" in key and "embed" in key else 0
    np.testing.assert_array_equal(tensor[start:], original[key][start:], err_msg=key)
  assert not architecture_differences(open_huggingface_folder(tmp_path / "a").cfg, folder.cfg)

  unrolled = dataclasses.replace(folder.cfg, scan=False)
  params = read_folder_params(folder, unrolled, abstract_params(Transformer(unrolled)))
  write_folder(tmp_path / "b", unrolled, params, prefer=family.model_type, labels=labels)
  for file in ("config.json", "model.safetensors"):
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("name", by_tier(["llama", "mixtral", "t5_v1_1", "modernbert"], fast=("mixtral",)))
def test_folder_read_onto_a_mesh_is_sharded_and_written_alike(name, tmp_path):
  folder = reference_folder(name)
  mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2, "data": 2})
  rules = {**RULES, "kv_heads": None} if folder.cfg.kv_heads % 2 else RULES
  params = read_folder_params(folder, folder.cfg, abstract_params(Transformer(folder.cfg), mesh, rules))
  assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(params))
  _, on_one_device = reference_model(name)
  jax.tree.map(np.testing.assert_array_equal, params, on_one_device)
  write_folder(tmp_path / "eight", folder.cfg, params, prefer=folder.family.model_type)
  write_folder(tmp_path / "one", folder.cfg, on_one_device, prefer=folder.family.model_type)
  one, eight = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "eight"))
  assert one == eight


def test_folder_of_several_bfloat16_files_is_read_again(tmp_path):
  folder = reference_folder("llama")
  _, params = reference_model("llama")
  write_folder(tmp_path / "a", folder.cfg, params, max_shard_bytes=5_000, dtype="bfloat16")
  assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 2
  cfg = dataclasses.replace(folder.cfg, param_dtype="bfloat16")
  written = open_huggingface_folder(tmp_path / "a")
  narrow = read_folder_params(written, cfg, abstract_params(Transformer(cfg)))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), narrow, params)
  wide = read_folder_params(written, folder.cfg, abstract_params(Transformer(folder.cfg)))
  assert jax.tree.leaves(wide)[0].dtype == jnp.float32


def test_choose_family_with_a_named_family_tries_no_other():
  cfg = reference_folder("llama").cfg
  assert choose_family(cfg, only="mistral")[1] == "MistralForCausalLM"
  for only, words in (("qwen3_moe", "no architecture of the family qwen3_moe"), ("lama", "`llama`")):
    with pytest.raises(ConfigError, match=words):
      choose_family(cfg, only=only)


def test_choose_family_without_a_match_names_the_differences():
  cfg = dataclasses.replace(reference_folder("llama").cfg, norm="layernorm", norm_bias=True)
  with pytest.raises(ConfigError, match=r"the nearest is \w+, but for model\.norm"):
    choose_family(cfg)

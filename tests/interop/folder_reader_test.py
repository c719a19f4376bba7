"""Parameters of Hugging Face folders: onto meshes, of text models and other variants, and tensors that do not fit."""

import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmjax.checkpoints.sources.base import abstract_params
from llmjax.config import ConfigError
from llmjax.distributed import sharding
from llmjax.interop import folder_reader
from llmjax.models.transformer import Transformer
from tests.support.huggingface_folders import DATA, copy_reference, read_params_of, reference_folder, reference_model


def test_read_folder_params_on_a_mesh_places_one_shard_at_a_time(monkeypatch):
  folder = reference_folder("llama")
  mesh = sharding.make_mesh({"fsdp": 8, "tensor": 1, "data": 1})
  sizes, device_put = [], jax.device_put
  monkeypatch.setattr(folder_reader.jax, "device_put", lambda x, device: sizes.append(x.size) or device_put(x, device))
  abstract = abstract_params(Transformer(folder.cfg), mesh)
  folder_reader.read_folder_params(folder, folder.cfg, abstract)
  assert max(sizes) <= max(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(abstract))


def test_unequal_tied_tables_are_refused(tmp_path):
  path = copy_reference("llama", tmp_path, {"tie_word_embeddings": True})
  with pytest.raises(ConfigError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight, but their values"):
    read_params_of(path)


def test_equal_tied_tables_are_read_once(tmp_path):
  path = copy_reference(
    "llama", tmp_path, {"tie_word_embeddings": True}, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]}
  )
  assert "head" not in read_params_of(path)


@pytest.mark.parametrize(("name", "count"), [("t5", 3), ("t5_v1_1", 2)])  # v1.0 is tied whatever the file has
def test_copies_of_t5_tables_are_accepted(name, count, tmp_path):
  copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")[:count]
  read_params_of(copy_reference(name, tmp_path, None, lambda t: t | dict.fromkeys(copies, t["shared.weight"])))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_multimodal_folder_gives_the_text_model(prefix, tmp_path):
  text_config = json.loads((DATA / "gemma3" / "config.json").read_text())
  config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text_config}
  (tmp_path / "config.json").write_text(json.dumps(config))
  tensors = load_file(DATA / "gemma3" / "model.safetensors")
  tensors = {prefix + name.removeprefix("model."): x for name, x in tensors.items()}
  vision = prefix.removesuffix("language_model.").replace("language_model.model.", "") + "vision_tower.x"
  save_file({**tensors, vision: np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
  jax.tree.map(np.testing.assert_array_equal, read_params_of(tmp_path), reference_model("gemma3")[1])


@pytest.mark.parametrize(
  "change, words",
  [
    (lambda t: {k: v for k, v in t.items() if "ln_f.bias" not in k}, ["no tensor", "ln_f.bias", "[16]"]),
    (lambda t: {**t, "transformer.h.7.x": np.zeros(3, np.float32)}, ["transformer.h.7.x", "[3]", "no place"]),
    (
      lambda t: {k: v[:-1] if k.endswith("wte.weight") else v for k, v in t.items()},
      ["wte.weight", "[47, 16]", "[48, 16]"],
    ),
  ],
  ids=["missing", "extra", "misshapen"],
)
def test_tensor_that_does_not_fit_is_refused_by_name(change, words, tmp_path):
  with pytest.raises(ConfigError) as error:
    read_params_of(copy_reference("gpt2", tmp_path, change_tensors=change))
  assert all(word in str(error.value) for word in words), error.value


def test_masked_lm_folder_may_have_other_pretraining_heads(tmp_path):
  """As in bert-base-uncased, which declares BertForMaskedLM and has names of norms from TensorFlow."""

  def tensorflow_name(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

  path = copy_reference(
    "bert",
    tmp_path,
    {"architectures": ["BertForMaskedLM"]},
    lambda t: {tensorflow_name(name): tensor for name, tensor in t.items()},
  )
  params, (_, all_params) = read_params_of(path), reference_model("bert")
  jax.tree.map(np.testing.assert_array_equal, params, {k: v for k, v in all_params.items() if k in params})
  assert set(all_params) - set(params) == {"pooler", "sentence_head"}


def test_base_model_folder_may_lack_its_pooler(tmp_path):
  path = copy_reference(
    "bert", tmp_path, {"architectures": ["BertModel"]}, lambda t: {k: v for k, v in t.items() if "pool" not in k}
  )
  missing = set(reference_model("bert")[1]) - set(read_params_of(path))
  assert missing == {"pooler", "sentence_head", "head_transform", "head_norm", "head_bias"}

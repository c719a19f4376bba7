"""config.json: either generation of Transformers, and values that are not supported."""

import shutil

import pytest

from llmjax.config import ConfigError
from llmjax.interop.config_json import architecture_differences
from llmjax.interop.folder_reader import open_huggingface_folder
from tests.support.huggingface_folders import DATA, NAMES, copy_reference, read_params_of, reference_folder


@pytest.mark.parametrize("name", [n for n in NAMES if (DATA / n / "config_hub.json").is_file()])
def test_config_of_transformers_4_equals_that_of_transformers_5(name, tmp_path):
  shutil.copy(DATA / name / "model.safetensors", tmp_path / "model.safetensors")
  shutil.copy(DATA / name / "config_hub.json", tmp_path / "config.json")
  folder = open_huggingface_folder(tmp_path)
  assert not architecture_differences(folder.cfg, reference_folder(name).cfg)
  assert folder.architecture == reference_folder(name).architecture


@pytest.mark.parametrize(
  "name, change, words",
  [
    ("gpt2", {"model_type": "gpt3"}, ["model_type='gpt3'", "`gpt2`"]),
    ("gpt2", {"architectures": ["GPT2ForCausalLM"]}, ["'GPT2ForCausalLM'", "GPT2"]),
    (
      "gpt2",
      {"scale_attn_by_inverse_layer_idx": True},
      ["config.json", "scale_attn_by_inverse_layer_idx=True", "False"],
    ),
    ("gpt2", {"activation_function": "mish"}, ["activation_function='mish'", "gelu_new"]),
    ("llama", {"rope_parameters": {"rope_type": "spiral"}}, ["rope_type='spiral'", "yarn"]),
    ("gemma2", {"layer_types": ["chunked_attention"] * 2}, ["layer_types", "chunked_attention", "sliding_attention"]),
    ("bert", {"position_embedding_type": "relative_key"}, ["position_embedding_type='relative_key'", "absolute"]),
    ("qwen3_moe", {"mlp_only_layers": [0]}, ["mlp_only_layers=[0]"]),
    ("mixtral", {"num_experts_per_tok": 9}, ["experts_per_token=9", "num_experts"]),
    ("gemma2", {"layer_types": ["full_attention"]}, ["layer_types has 1 entries for"]),
    ("gpt2", {"n_layer": 2.0}, ["config.json", "2.0, not an integer"]),
    ("gpt2", {"architectures": "GPT2LMHead"}, ["'GPT2LMHead'", "GPT2LMHeadModel"]),
    ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config", "not supported"]),
    ("qwen3_moe", {"moe_intermediate_size": "wide"}, ["config.json", "wrong type"]),
    ("llama", {"hidden_size": None}, ["config.json", "wrong type"]),
    ("t5", {"feed_forward_proj": "gated-mish"}, ["feed_forward_proj='gated-mish'"]),
    ("modernbert", {"classifier_activation": "relu"}, ["classifier_activation='relu'", "hidden_activation='gelu'"]),
  ],
)
def test_unsupported_config_field_is_refused_by_name(name, change, words, tmp_path):
  with pytest.raises(ConfigError) as error:
    read_params_of(copy_reference(name, tmp_path, change))
  assert all(word in str(error.value) for word in words), error.value


def test_damaged_config_file_is_refused(tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ConfigError, match=r"config.json is damaged"):
    read_params_of(tmp_path)

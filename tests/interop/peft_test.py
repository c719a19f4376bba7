"""Adapters against PEFT (references: tests/support/make_peft.py), their export and import, and invalid folders."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llmjax
from llmjax.checkpoints.convert import export_folder, import_folder
from llmjax.checkpoints.init_from import load_params
from llmjax.checkpoints.sources.base import abstract_params
from llmjax.config import ConfigError
from llmjax.distributed import sharding
from llmjax.interop.folder_reader import open_huggingface_folder, read_folder_params
from llmjax.interop.peft.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llmjax.interop.peft.writer import changed_parameters, write_adapter
from llmjax.models.lora import is_adapter, merge_lora
from llmjax.models.transformer import Transformer
from llmjax.trees import flatten_tree, unflatten_tree
from llmjax.types import Batch
from tests.support.tiers import by_tier

DATA = Path(__file__).parents[1] / "testdata"
NAMES = sorted(path.name for path in (DATA / "peft").iterdir())
# Every layout of projections in a family's matrices, and every kind of head.
FOLDERS = [
  *("bert_sequence", "roberta_sequence", "distilbert_sequence", "bert_qa", "gpt2_token", "gpt_neox", "phi3_partial"),
  *("modernbert_sequence", "opt_350m_like", "gemma2", "qwen2_moe", "t5_v1_1"),
]
EVERYTHING = r"(en|de)coder/.*"


def batch_of(name):
  e = np.load(DATA / "huggingface" / name / "expected.npz")
  return Batch.from_tokens(
    e["input_ids"], e.get("attention_mask"), target_ids=e.get("decoder_input_ids"), token_types=e.get("token_type_ids")
  )


def logits(model, params, batch):
  return np.asarray(jax.jit(lambda params, batch: model.apply({"params": params}, batch).logits)(params, batch))


def peft_logits(name):
  return np.load(DATA / "peft" / name / "logits.npy")


@pytest.mark.parametrize("name", by_tier(NAMES, ["bert", "gpt2", "gpt_neox"]))
def test_logits_equal_peft(name):
  """With adapters and with merged weights."""
  # The rotary frequencies of phi3 depend on the maximum length.
  model, params, _ = llmjax.load(DATA / "peft" / name, **({"max_len": 24} if name == "phi3" else {}))
  want, batch = peft_logits(name), batch_of(name)
  np.testing.assert_allclose(logits(model, params, batch), want, atol=1e-4, rtol=0)
  plain = Transformer(dataclasses.replace(model.cfg, lora_rank=0))
  np.testing.assert_allclose(logits(plain, merge_lora(params, model.cfg), batch), want, atol=1e-4, rtol=0)


def copy_adapter(name, target, **changes):
  """Copy an adapter with changes of its config; it refers to the original base."""
  shutil.copytree(DATA / "peft" / name, target)
  config = json.loads((target / ADAPTER_CONFIG).read_text()) | {
    "base_model_name_or_path": str(DATA / "huggingface" / name)
  }
  (target / ADAPTER_CONFIG).write_text(json.dumps(config | changes))
  return target


# Export and import.


@functools.cache
def model_with_adapters(name, targets=EVERYTHING, **changes):
  """(config, parameters, family) of a folder's model with random adapters."""
  folder = open_huggingface_folder(DATA / "huggingface" / name)
  cfg = dataclasses.replace(folder.cfg, lora_rank=2, lora_alpha=3.0, lora_targets=targets, **changes)
  plain = dataclasses.replace(cfg, lora_rank=0)
  params = flatten_tree(read_folder_params(folder, plain, abstract_params(Transformer(plain))))
  rng = np.random.default_rng(0)
  shapes = flatten_tree(sharding.abstract_parameters(Transformer(cfg))[0])
  params |= {k: rng.normal(0, 0.4, s.shape).astype(np.float32) for k, s in shapes.items() if is_adapter(k)}
  return cfg, unflatten_tree(params), folder.family


def write_to(name, output, cfg, params, family, saved=()):
  base = str(DATA / "huggingface" / name)
  write_adapter(output, params, cfg, base=base, prefer=family.model_type, saved=saved)


@pytest.mark.parametrize("name", by_tier(FOLDERS, ["bert_sequence", "gpt_neox", "qwen2_moe", "t5_v1_1"]))
def test_exported_adapter_loads_identically(name, tmp_path):
  """Adapters and a head that differs from the base's; unrolled layers are written like scanned ones."""
  cfg, params, family = model_with_adapters(name)
  frozen = {path: False for path in flatten_tree(params)}
  saved = changed_parameters(cfg, unflatten_tree(frozen))
  assert bool(saved) == (cfg.head != "lm")
  params = {path: leaf + 1 if path in saved else leaf for path, leaf in flatten_tree(params).items()}
  write_to(name, tmp_path / "a", cfg, unflatten_tree(params), family, saved)
  model, again, _ = llmjax.load(tmp_path / "a")
  assert model.cfg == dataclasses.replace(cfg, lora_targets=model.cfg.lora_targets)
  again = flatten_tree(again)
  assert again.keys() == params.keys()
  for path, leaf in params.items():
    np.testing.assert_array_equal(again[path], leaf, err_msg=path)
  unrolled = llmjax.load(tmp_path / "a", scan=False)
  write_to(
    name, tmp_path / "b", unrolled.model.cfg, unrolled.params, family, saved & set(flatten_tree(unrolled.params))
  )
  for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
    assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()


def test_export_of_adapters_for_parts_of_a_fused_matrix(tmp_path):
  cfg, params, family = model_with_adapters("gpt2", r".*attention/(query|value)|.*mlp/up")
  write_to("gpt2", tmp_path / "a", cfg, params, family)
  config = json.loads((tmp_path / "a" / ADAPTER_CONFIG).read_text())
  assert config["target_modules"] == ["c_attn", "c_fc"] and config["fan_in_fan_out"] is True
  assert (config["r"], config["rank_pattern"], config["lora_alpha"]) == (2, {"c_attn": 6}, 3)
  assert config["alpha_pattern"] == {"c_attn": 9}
  tensors = load_file(tmp_path / "a" / ADAPTER_WEIGHTS)
  a, b = (tensors[f"base_model.model.transformer.h.0.attn.c_attn.lora_{x}.weight"] for x in "AB")
  merged = flatten_tree(merge_lora(params, cfg))["decoder/layers/attention/value/kernel"][0]
  before = flatten_tree(params)["decoder/layers/attention/value/kernel"][0]
  delta = (9 / 6 * b @ a).T  # [inputs outputs], as in this family's matrices
  np.testing.assert_allclose(delta[:, 2 * cfg.d_model :], (merged - before).reshape(cfg.d_model, -1), atol=1e-5)
  assert not delta[:, cfg.d_model : 2 * cfg.d_model].any()
  assert llmjax.load(tmp_path / "a").model.cfg.lora_targets == "decoder/.*/(attention/query|attention/value|mlp/up)"


def test_export_merges_adapters_of_a_head_that_is_saved_whole(tmp_path):
  cfg, params, family = model_with_adapters("bert_sequence", ".*")
  write_to("bert_sequence", tmp_path / "a", cfg, params, family, {"head/kernel", "head/bias"})
  _, again, _ = llmjax.load(tmp_path / "a")
  np.testing.assert_allclose(again["head"]["kernel"], merge_lora(params, cfg)["head"]["kernel"], atol=1e-6)


def test_imported_adapter_and_its_merged_export_equal_peft(tmp_path):
  batch = batch_of("gpt2")
  import_folder(str(DATA / "peft" / "gpt2"), str(tmp_path / "run"))
  model, params, _ = llmjax.load(tmp_path / "run")
  np.testing.assert_allclose(logits(model, params, batch), peft_logits("gpt2"), atol=1e-4)
  export_folder(str(tmp_path / "run"), str(tmp_path / "merged"))
  model, params, _ = llmjax.load(tmp_path / "merged")
  assert model.cfg.lora is None
  np.testing.assert_allclose(logits(model, params, batch), peft_logits("gpt2"), atol=1e-4)


# Invalid folders.


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"use_dora": True}, r"adapter_config\.json: use_dora=True is not supported"),
    ({"peft_type": "IA3"}, r"peft_type='IA3' is not supported.*'LORA'"),
    ({"bias": "all"}, r"bias='all' is not supported.*'none'"),
    ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' is not supported"),
    ({"r": None}, r"r=None must be a number"),
    ({"base_model_name_or_path": None}, r"does not name its base model; set base_model_name_or_path"),
    ({"task_type": "SEQ_CLS"}, r"task_type='SEQ_CLS' needs a head, .*modules_to_save"),
    ({"base_model_name_or_path": "."}, r"is an adapter itself; name its base model"),
    ({"base_model_name_or_path": str(DATA / "huggingface" / "gpt2")}, r"no place in a gpt2"),
    ({"base_model_name_or_path": str(DATA / "huggingface" / "qwen3")}, r"has shape .*, but its base model requires"),
  ],
)
def test_load_rejects_unsupported_adapter_configs(changes, words, tmp_path):
  with pytest.raises(ConfigError, match=words) as error:
    llmjax.load(copy_adapter("llama", tmp_path / "a", **changes))
  assert "\n" not in str(error.value)


def test_load_rejects_damaged_adapter_folders_in_one_line(tmp_path):
  folder = copy_adapter("llama", tmp_path / "a")
  (folder / ADAPTER_WEIGHTS).write_bytes(b"\0" * 100)
  with pytest.raises(ConfigError, match="is not a safetensors file, or is damaged"):
    llmjax.load(folder)
  (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")
  with pytest.raises(ConfigError, match=r"has no adapter_model\.safetensors; .*adapter_model\.bin is a pickle"):
    llmjax.load(folder)
  (folder / ADAPTER_CONFIG).write_text("{")
  with pytest.raises(ConfigError, match=r"adapter_config\.json is damaged"):
    llmjax.load(folder)


def test_export_and_load_name_parameters_an_adapter_cannot_hold(tmp_path):
  cfg, params, family = model_with_adapters("gpt2")
  with pytest.raises(ConfigError, match=r"model\.lora_rank=0: the model has no adapters"):
    write_to("gpt2", tmp_path / "a", dataclasses.replace(cfg, lora_rank=0), params, family)
  with pytest.raises(ConfigError, match=r"embedding/table was trained and is also the output projection"):
    write_to("gpt2", tmp_path / "a", cfg, params, family, {"embedding/table"})
  with pytest.raises(ConfigError, match=r"model\.lora_\* as they are there"):
    llmjax.load(DATA / "peft" / "llama", lora_rank=3)
  with pytest.raises(ConfigError, match=r"model\.lora_\* as they are there"):
    llmjax.load(DATA / "peft" / "llama", lora_rank=0)


def test_trained_norm_is_saved_for_all_layers_or_rejected(tmp_path):
  cfg, params, family = model_with_adapters("llama")
  write_to("llama", tmp_path / "a", cfg, params, family, {"decoder/layers/mlp_norm/scale"})
  np.testing.assert_array_equal(
    llmjax.load(tmp_path / "a").params["decoder"]["layers"]["mlp_norm"]["scale"],
    params["decoder"]["layers"]["mlp_norm"]["scale"],
  )
  tensors = load_file(tmp_path / "a" / ADAPTER_WEIGHTS)
  del tensors["base_model.model.model.layers.0.post_attention_layernorm.weight"]
  save_file(tensors, tmp_path / "a" / ADAPTER_WEIGHTS)
  with pytest.raises(ConfigError, match=r"for some layers only, but not decoder/layers_0/mlp_norm/scale"):
    llmjax.load(tmp_path / "a")


def test_init_from_adapter_keeps_a_head_of_equal_kind_and_size():
  """The body and the adapters are loaded in any case."""
  path = DATA / "peft" / "bert"
  source = llmjax.load(path)
  adapter = "encoder/layers/attention/query/lora_b"

  def start(rules=(), **changes):
    model = Transformer(dataclasses.replace(source.model.cfg, **changes))
    return load_params(path, model, abstract_params(model), rules)

  params, fresh = start()
  assert not fresh
  jax.tree.map(np.testing.assert_array_equal, params, source.params)
  with pytest.raises(ConfigError, match=r"head/bias has shape \[3\] there and \[5\] here; .*init_map"):
    start(num_classes=5)
  for again, fresh in (start(((".*head.*", None),), num_classes=5), start(head="token", pooler=False)):
    assert fresh == ["head/bias", "head/kernel"]
    assert again["encoder"].keys() == params["encoder"].keys()
    np.testing.assert_array_equal(flatten_tree(again)[adapter], flatten_tree(params)[adapter])

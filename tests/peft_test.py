"""Adapters against PEFT (references: tests/support/make_peft.py), written and read again, and bad folders."""

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
from llmjax import sharding
from llmjax.config import ConfigError
from llmjax.convert import export_folder, import_folder
from llmjax.finetune import flatten, is_adapter, merge_lora, unflatten
from llmjax.interop import huggingface, peft
from llmjax.models.transformer import Transformer
from llmjax.pretrained import abstract_params, load_params
from llmjax.types import Batch

DATA = Path(__file__).parent / "testdata"
NAMES = sorted(path.name for path in (DATA / "peft").iterdir())
# Every way in which a family's matrices hold projections, and every kind of head.
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


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_pefts(name):
  original = 24 if name == "phi3" else None  # its frequencies are those of the maximum length
  model, params, _ = llmjax.load(DATA / "peft" / name, **({"max_len": original} if original else {}))
  want = np.load(DATA / "peft" / name / "logits.npy")
  batch = batch_of(name)
  np.testing.assert_allclose(logits(model, params, batch), want, atol=1e-4, rtol=0)
  plain = Transformer(dataclasses.replace(model.cfg, lora_rank=0))
  np.testing.assert_allclose(logits(plain, merge_lora(params, model.cfg), batch), want, atol=1e-4, rtol=0)


def test_a_scale_or_a_part_that_is_read_wrongly_would_be_seen(tmp_path):
  """Alpha of one matrix, and which rows of a fused one are whose."""
  for change in ({"alpha_pattern": {}}, {"use_rslora": True}):
    folder = copy("gpt2", tmp_path / next(iter(change)), **change)
    with pytest.raises(AssertionError):
      np.testing.assert_allclose(logits(*llmjax.load(folder)[:2], batch_of("gpt2")), wanted("gpt2"), atol=1e-3)
  folder = copy("gpt_neox", tmp_path / "rows")
  tensors = load_file(folder / peft.WEIGHTS)
  name = next(name for name in tensors if name.endswith("lora_B.weight"))
  save_file(tensors | {name: np.roll(tensors[name], 1, axis=0)}, folder / peft.WEIGHTS)
  with pytest.raises(AssertionError):
    np.testing.assert_allclose(logits(*llmjax.load(folder)[:2], batch_of("gpt_neox")), wanted("gpt_neox"), atol=1e-3)


def wanted(name):
  return np.load(DATA / "peft" / name / "logits.npy")


def copy(name, target, **changes):
  """An adapter with some of its config changed; its base is where it was."""
  shutil.copytree(DATA / "peft" / name, target)
  config = json.loads((target / peft.CONFIG).read_text()) | {
    "base_model_name_or_path": str(DATA / "huggingface" / name)
  }
  (target / peft.CONFIG).write_text(json.dumps(config | changes))
  return target


# Written and read again.


@functools.cache
def adapted(name, targets=EVERYTHING, **changes):
  """(config, parameters) of a folder's model with random adapters, and its family."""
  folder = huggingface.open_folder(DATA / "huggingface" / name)
  cfg = dataclasses.replace(folder.cfg, lora_rank=2, lora_alpha=3.0, lora_targets=targets, **changes)
  plain = dataclasses.replace(cfg, lora_rank=0)
  params = flatten(huggingface.read_params(folder, plain, abstract_params(Transformer(plain))))
  rng = np.random.default_rng(0)
  shapes = flatten(sharding.parameters(Transformer(cfg))[0])
  params |= {k: rng.normal(0, 0.4, s.shape).astype(np.float32) for k, s in shapes.items() if is_adapter(k)}
  return cfg, unflatten(params), folder.family


def write(name, output, cfg, params, family, saved=()):
  base = str(DATA / "huggingface" / name)
  peft.write_adapter(output, params, cfg, base=base, prefer=family.model_type, saved=saved)


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_written_is_read_again(name, tmp_path):
  """All adapters and the head, which differs from the base's, to the last bit; unrolled layers as scanned ones."""
  cfg, params, family = adapted(name)
  learns = {path: False for path in flatten(params)}
  saved = peft.trained(cfg, unflatten(learns))
  assert bool(saved) == (cfg.head != "lm")
  params = {path: leaf + 1 if path in saved else leaf for path, leaf in flatten(params).items()}
  write(name, tmp_path / "a", cfg, unflatten(params), family, saved)
  model, again, _ = llmjax.load(tmp_path / "a")
  assert model.cfg == dataclasses.replace(cfg, lora_targets=model.cfg.lora_targets)
  again = flatten(again)
  assert again.keys() == params.keys()
  for path, leaf in params.items():
    np.testing.assert_array_equal(again[path], leaf, err_msg=path)
  unrolled = llmjax.load(tmp_path / "a", scan=False)
  write(name, tmp_path / "b", unrolled.model.cfg, unrolled.params, family, saved & set(flatten(unrolled.params)))
  for file in (peft.CONFIG, peft.WEIGHTS):
    assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()


def test_a_fused_matrix_of_which_some_parts_are_adapted(tmp_path):
  cfg, params, family = adapted("gpt2", r".*attention/(query|value)|.*mlp/up")
  write("gpt2", tmp_path / "a", cfg, params, family)
  config = json.loads((tmp_path / "a" / peft.CONFIG).read_text())
  assert config["target_modules"] == ["c_attn", "c_fc"] and config["fan_in_fan_out"] is True
  assert (config["r"], config["rank_pattern"], config["lora_alpha"]) == (2, {"c_attn": 6}, 3)
  assert config["alpha_pattern"] == {"c_attn": 9}
  tensors = load_file(tmp_path / "a" / peft.WEIGHTS)
  a, b = (tensors[f"base_model.model.transformer.h.0.attn.c_attn.lora_{x}.weight"] for x in "AB")
  merged = flatten(merge_lora(params, cfg))["decoder/layers/attention/value/kernel"][0]
  before = flatten(params)["decoder/layers/attention/value/kernel"][0]
  delta = (9 / 6 * b @ a).T  # [inputs outputs], as this family's matrices are
  np.testing.assert_allclose(delta[:, 2 * cfg.d_model :], (merged - before).reshape(cfg.d_model, -1), atol=1e-5)
  assert not delta[:, cfg.d_model : 2 * cfg.d_model].any()
  assert llmjax.load(tmp_path / "a").model.cfg.lora_targets == "decoder/.*/(attention/query|attention/value|mlp/up)"


def test_an_adapted_head_is_merged_where_it_is_saved_whole(tmp_path):
  cfg, params, family = adapted("bert_sequence", ".*")
  write("bert_sequence", tmp_path / "a", cfg, params, family, {"head/kernel", "head/bias"})
  _, again, _ = llmjax.load(tmp_path / "a")
  np.testing.assert_allclose(again["head"]["kernel"], merge_lora(params, cfg)["head"]["kernel"], atol=1e-6)


def test_a_folder_of_merged_weights_and_a_checkpoint_compute_the_same(tmp_path):
  batch = batch_of("gpt2")
  import_folder(str(DATA / "peft" / "gpt2"), str(tmp_path / "run"))
  model, params, _ = llmjax.load(tmp_path / "run")
  np.testing.assert_allclose(logits(model, params, batch), wanted("gpt2"), atol=1e-4)
  export_folder(str(tmp_path / "run"), str(tmp_path / "merged"))
  model, params, _ = llmjax.load(tmp_path / "merged")
  assert model.cfg.lora is None
  np.testing.assert_allclose(logits(model, params, batch), wanted("gpt2"), atol=1e-4)


# Bad folders.


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"use_dora": True}, r"adapter_config\.json: use_dora=True is not supported"),
    ({"peft_type": "IA3"}, r"peft_type='IA3' is not supported.*'LORA'"),
    ({"bias": "all"}, r"bias='all' is not supported.*'none'"),
    ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' is not supported"),
    ({"r": None}, r"r=None must be a number"),
    ({"base_model_name_or_path": None}, r"does not say which model it is for; set base_model_name_or_path"),
    ({"task_type": "SEQ_CLS"}, r"task_type='SEQ_CLS' is of a model with a head, .*modules_to_save"),
    ({"base_model_name_or_path": "."}, r"is an adapter itself; name its base"),
    ({"base_model_name_or_path": str(DATA / "huggingface" / "gpt2")}, r"no place in a gpt2"),
    ({"base_model_name_or_path": str(DATA / "huggingface" / "qwen3")}, r"has the shape .* is what fits its base"),
  ],
)
def test_what_an_adapter_is_refused_for(changes, words, tmp_path):
  with pytest.raises(ConfigError, match=words) as error:
    llmjax.load(copy("llama", tmp_path / "a", **changes))
  assert "\n" not in str(error.value)


def test_a_damaged_folder_is_one_line(tmp_path):
  folder = copy("llama", tmp_path / "a")
  (folder / peft.WEIGHTS).write_bytes(b"\0" * 100)
  with pytest.raises(ConfigError, match="is no safetensors file, or damaged"):
    llmjax.load(folder)
  (folder / peft.WEIGHTS).rename(folder / "adapter_model.bin")
  with pytest.raises(ConfigError, match=r"has no adapter_model\.safetensors; .*adapter_model\.bin is a pickle"):
    llmjax.load(folder)
  (folder / peft.CONFIG).write_text("{")
  with pytest.raises(ConfigError, match=r"adapter_config\.json is damaged"):
    llmjax.load(folder)


def test_what_an_adapter_has_no_place_for_is_named(tmp_path):
  cfg, params, family = adapted("gpt2")
  with pytest.raises(ConfigError, match=r"no adapters \(model\.lora_rank=0\)"):
    write("gpt2", tmp_path / "a", dataclasses.replace(cfg, lora_rank=0), params, family)
  with pytest.raises(ConfigError, match=r"embedding/table was trained, which is the output projection"):
    write("gpt2", tmp_path / "a", cfg, params, family, {"embedding/table"})
  with pytest.raises(ConfigError, match=r"model\.lora_\* as they are there"):
    llmjax.load(DATA / "peft" / "llama", lora_rank=3)
  with pytest.raises(ConfigError, match=r"model\.lora_\* as they are there"):
    llmjax.load(DATA / "peft" / "llama", lora_rank=0)


def test_a_norm_that_was_trained_in_some_layers_alone(tmp_path):
  cfg, params, family = adapted("llama")
  write("llama", tmp_path / "a", cfg, params, family, {"decoder/layers/mlp_norm/scale"})
  np.testing.assert_array_equal(
    llmjax.load(tmp_path / "a").params["decoder"]["layers"]["mlp_norm"]["scale"],
    params["decoder"]["layers"]["mlp_norm"]["scale"],
  )
  tensors = load_file(tmp_path / "a" / peft.WEIGHTS)
  del tensors["base_model.model.model.layers.0.post_attention_layernorm.weight"]
  save_file(tensors, tmp_path / "a" / peft.WEIGHTS)
  with pytest.raises(ConfigError, match=r"of some layers alone, and there is none for decoder/layers_0/mlp_norm/scale"):
    llmjax.load(tmp_path / "a")


def test_training_goes_on_from_an_adapter_with_another_head():
  """As `init_from` asks: the body and the adapters, and the head where it is of the same kind and size."""
  path = DATA / "peft" / "bert"
  there = llmjax.load(path)

  def start(rules=(), **changes):
    model = Transformer(dataclasses.replace(there.model.cfg, **changes))
    return load_params(path, model, abstract_params(model), rules)

  params, fresh = start()
  assert not fresh
  jax.tree.map(np.testing.assert_array_equal, params, there.params)
  with pytest.raises(ConfigError, match=r"head/bias is of size \[3\] there and \[5\] here; .*init_map"):
    start(num_classes=5)
  for again, fresh in (start(((".*head.*", None),), num_classes=5), start(head="token", pooler=False)):
    assert fresh == ["head/bias", "head/kernel"]
    assert again["encoder"].keys() == params["encoder"].keys()
    np.testing.assert_array_equal(flatten(again)[ADAPTER], flatten(params)[ADAPTER])


ADAPTER = "encoder/layers/attention/query/lora_b"

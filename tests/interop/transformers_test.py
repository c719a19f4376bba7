"""Exported folders opened by Transformers: `bash launch/test.sh full transformers` installs it and torch."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra `references`")
pytest.importorskip("transformers", reason="needs the extra `references`")

import jax
import torch
import transformers

from llmjax.checkpoints.convert import export_folder, import_folder
from llmjax.config.model import TransformerConfig
from llmjax.data.tokenizers.hf_export import to_huggingface
from llmjax.data.tokenizers.registry import make_tokenizer
from llmjax.interop.folder_writer import write_folder
from llmjax.models.transformer import Transformer
from llmjax.types import Batch
from tests.support.cases import parameters
from tests.support.huggingface_folders import DATA, NAMES, TOLERANCE, expected_outputs

pytestmark = pytest.mark.full("transformers")


def logits(path, e):
  architecture = json.loads((path / "config.json").read_text())["architectures"][0]
  model = getattr(transformers, architecture).from_pretrained(path, attn_implementation="eager").eval()
  names = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")
  with torch.no_grad():
    out = model(**{name: torch.tensor(e[name]).long() for name in names if name in e})
  if "start_logits" in e:
    return np.stack([out.start_logits.numpy(), out.end_logits.numpy()], axis=-1)
  return (out.prediction_logits if "nsp_logits" in e else out.logits).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_exported_folder_has_the_logits_of_the_original(name, tmp_path):
  import_folder(str(DATA / name), str(tmp_path / "run"))
  export_folder(str(tmp_path / "run"), str(tmp_path / "back"), max_shard_size="20KB")
  e = expected_outputs(name)
  expected = e["logits"] if "logits" in e else np.stack([e["start_logits"], e["end_logits"]], axis=-1)
  has_padded_tokens = "attention_mask" in e and expected.ndim == 3 and "decoder_input_ids" not in e
  mask = e["attention_mask"] > 0 if has_padded_tokens else ...
  np.testing.assert_allclose(logits(tmp_path / "back", e)[mask], expected[mask], atol=TOLERANCE)


def test_exported_generation_config_equals_the_original(tmp_path):
  shutil.copytree(DATA / "gpt2", tmp_path / "m")
  fields = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "eos_token_id": [3, 4], "pad_token_id": 0}
  (tmp_path / "m" / "generation_config.json").write_text(json.dumps(fields))
  import_folder(str(tmp_path / "m"), str(tmp_path / "run"))
  export_folder(str(tmp_path / "run"), str(tmp_path / "back"))
  config = transformers.GenerationConfig.from_pretrained(tmp_path / "back")
  assert {key: getattr(config, key) for key in fields} == fields


def test_exported_qwen3_and_tokenizer_equal_ours(tmp_path):
  """The architecture is that of configs/gpt.py."""
  own = make_tokenizer({"name": "bytes"})
  cfg = TransformerConfig(
    *(own.vocab_size, 32, 2, 4, 64),
    **dict.fromkeys(("qkv_bias", "attention_out_bias", "mlp_bias", "norm_bias"), False),
    norm="rmsnorm",
    positions="rotary",
    activation="silu",
    init_stddev=None,
    gated=True,
    qk_norm=True,
  )
  model, (params, _) = Transformer(cfg), parameters(cfg)
  assert write_folder(tmp_path, cfg, params) == "Qwen3ForCausalLM"
  for name, content in to_huggingface(own).items():
    (tmp_path / name).write_bytes(content)
  hf_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ids = own.encode("Thé quick fox\n  jumps")
  assert hf_tokenizer("Thé quick fox\n  jumps", add_special_tokens=False).input_ids == ids.tolist()
  hf_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
  with torch.no_grad():
    logits = hf_model(torch.tensor(ids)[None].long()).logits.numpy()
  np.testing.assert_allclose(
    logits, jax.jit(model.apply)({"params": params}, Batch.from_tokens(ids[None])).logits, atol=TOLERANCE
  )

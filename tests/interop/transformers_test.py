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

from llmjax.checkpoints import convert
from llmjax.config.model import TransformerConfig
from llmjax.data.tokenizers.hf_export import to_huggingface
from llmjax.data.tokenizers.registry import make_tokenizer
from llmjax.interop import huggingface
from llmjax.models.transformer import Transformer
from llmjax.types import Batch
from tests.interop.huggingface_test import DATA, NAMES, TOLERANCE, expected
from tests.support.cases import parameters

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
  convert.import_folder(str(DATA / name), str(tmp_path / "run"))
  convert.export_folder(str(tmp_path / "run"), str(tmp_path / "back"), max_shard_size="20KB")
  e = expected(name)
  want = e["logits"] if "logits" in e else np.stack([e["start_logits"], e["end_logits"]], axis=-1)
  real = e["attention_mask"] > 0 if "attention_mask" in e and want.ndim == 3 and "decoder_input_ids" not in e else ...
  np.testing.assert_allclose(logits(tmp_path / "back", e)[real], want[real], atol=TOLERANCE)


def test_exported_generation_config_equals_the_original(tmp_path):
  shutil.copytree(DATA / "gpt2", tmp_path / "m")
  said = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "eos_token_id": [3, 4], "pad_token_id": 0}
  (tmp_path / "m" / "generation_config.json").write_text(json.dumps(said))
  convert.import_folder(str(tmp_path / "m"), str(tmp_path / "run"))
  convert.export_folder(str(tmp_path / "run"), str(tmp_path / "back"))
  found = transformers.GenerationConfig.from_pretrained(tmp_path / "back")
  assert {key: getattr(found, key) for key in said} == said


def test_exported_qwen3_and_tokenizer_equal_ours(tmp_path):
  """The architecture is the one that configs/gpt.py makes."""
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
  assert huggingface.write_folder(tmp_path, cfg, params) == "Qwen3ForCausalLM"
  for name, content in to_huggingface(own).items():
    (tmp_path / name).write_bytes(content)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ids = own.encode("Thé quick fox\n  jumps")
  assert theirs("Thé quick fox\n  jumps", add_special_tokens=False).input_ids == ids.tolist()
  found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
  with torch.no_grad():
    got = found(torch.tensor(ids)[None].long()).logits.numpy()
  np.testing.assert_allclose(
    got, jax.jit(model.apply)({"params": params}, Batch.from_tokens(ids[None])).logits, atol=TOLERANCE
  )

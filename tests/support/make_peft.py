"""Adapters that PEFT wrote, and what their models compute with them: tests/testdata/peft/NAME.

  pip install torch==2.13.0 transformers peft
  python tests/support/make_peft.py [NAME ...]      # all of them, without names

The tests read the files and need none of the packages. A folder holds what `save_pretrained` writes of an adapter on a
model of tests/testdata/huggingface, which its base_model_name_or_path names as seen from the folder, with A and B drawn
at random, and logits.npy, of that model's input_ids, attention_mask and so on in expected.npz.
"""

import dataclasses
import json
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

DATA = Path(__file__).parents[1] / "testdata"
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")


@dataclasses.dataclass(frozen=True)
class Case:
  """`model` is a class of transformers, `base` the folder that it is read from."""

  model: str
  base: str
  config: dict
  settings: dict = dataclasses.field(default_factory=dict)


CASES = {
  "llama": Case(
    "LlamaForCausalLM",
    "llama",
    {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]},
  ),
  # One layer alone, and a head of the adapter's own.
  "bert": Case(
    "BertForSequenceClassification",
    "bert",
    {"task_type": "SEQ_CLS", "r": 3, "lora_alpha": 4, "target_modules": ["query", "key"], "layers_to_transform": [1]},
    {"num_labels": 3},
  ),
  # Fused matrices, of several ranks and scales.
  "gpt2": Case(
    "GPT2LMHeadModel",
    "gpt2",
    {
      "task_type": "CAUSAL_LM",
      **{"r": 2, "lora_alpha": 3, "target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True},
      **{"rank_pattern": {"c_fc": 4}, "alpha_pattern": {"mlp.c_proj": 5}},
    },
  ),
  "gpt_neox": Case(
    "GPTNeoXForCausalLM",
    "gpt_neox",
    {"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 3, "target_modules": ["query_key_value"]},
  ),
  "phi3": Case(
    "Phi3ForCausalLM",
    "phi3",
    {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
  ),
  "t5": Case(
    "T5ForConditionalGeneration",
    "t5",
    {"task_type": "SEQ_2_SEQ_LM", "r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": ["q", "o", "wi"]},
  ),
}


def load(kind, base, settings):
  known = {"attn_implementation": "eager", "dtype": torch.float32}
  return getattr(transformers, kind).from_pretrained(base, **known, **settings).eval()


def logits(model, base):
  expected = np.load(base / "expected.npz")
  inputs = {name: torch.from_numpy(expected[name]).long() for name in INPUTS if name in expected}
  with torch.no_grad():
    return model(**inputs).logits.numpy()


def make(name):
  case, folder = CASES[name], DATA / "peft" / name
  base = DATA / "huggingface" / case.base
  torch.manual_seed(zlib.crc32(name.encode()))
  plain = load(case.model, base, case.settings)
  model = peft.get_peft_model(plain, peft.LoraConfig(**case.config)).eval()
  for key, weight in model.named_parameters():
    if "lora_" in key or "modules_to_save" in key:
      torch.nn.init.normal_(weight, std=0.4)
  found = logits(model, base)
  with model.disable_adapter():
    without = logits(model, base)
  assert np.abs(found - without).max() > 0.1
  shutil.rmtree(folder, ignore_errors=True)
  model.save_pretrained(folder)
  (folder / "README.md").unlink(missing_ok=True)
  (folder / "adapter_model.safetensors").chmod(0o644)
  config = json.loads((folder / "adapter_config.json").read_text())
  config["base_model_name_or_path"] = f"../../huggingface/{case.base}"
  config["target_modules"] = sorted(config["target_modules"])
  (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
  np.save(folder / "logits.npy", found)
  print(name, sum(file.stat().st_size for file in folder.iterdir()))


def main(names):
  torch.set_num_threads(1)
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  for name in names or CASES:
    make(name)


if __name__ == "__main__":
  main(sys.argv[1:])

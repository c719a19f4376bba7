"""Adapters that PEFT wrote, and the outputs of their models: tests/testdata/peft/NAME.

  pip install torch==2.13.0 transformers peft
  python tests/support/make_peft.py [NAME ...]      # without names: all

The tests read the files and need none of the packages. A folder has the files of `save_pretrained` for an adapter with
random A and B, and logits.npy. Its base_model_name_or_path is the relative path of a model in
tests/testdata/huggingface, whose expected.npz has the inputs of the logits.
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
  """An adapter.

  Attributes:
    model: class of transformers.
    base: folder of the base model.
    config: arguments of LoraConfig.
    settings: arguments of `from_pretrained`.
  """

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
  # One layer only, and a head of its own.
  "bert": Case(
    "BertForSequenceClassification",
    "bert",
    {"task_type": "SEQ_CLS", "r": 3, "lora_alpha": 4, "target_modules": ["query", "key"], "layers_to_transform": [1]},
    {"num_labels": 3},
  ),
  # Fused matrices with several ranks and scales.
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


def load_base(kind, base, settings):
  arguments = {"attn_implementation": "eager", "dtype": torch.float32}
  return getattr(transformers, kind).from_pretrained(base, **arguments, **settings).eval()


def compute_logits(model, base):
  expected = np.load(base / "expected.npz")
  inputs = {name: torch.from_numpy(expected[name]).long() for name in INPUTS if name in expected}
  with torch.no_grad():
    return model(**inputs).logits.numpy()


def make_adapter(name):
  case, folder = CASES[name], DATA / "peft" / name
  base = DATA / "huggingface" / case.base
  torch.manual_seed(zlib.crc32(name.encode()))
  plain = load_base(case.model, base, case.settings)
  model = peft.get_peft_model(plain, peft.LoraConfig(**case.config)).eval()
  for key, weight in model.named_parameters():
    if "lora_" in key or "modules_to_save" in key:
      torch.nn.init.normal_(weight, std=0.4)
  logits = compute_logits(model, base)
  with model.disable_adapter():
    base_logits = compute_logits(model, base)
  assert np.abs(logits - base_logits).max() > 0.1
  shutil.rmtree(folder, ignore_errors=True)
  model.save_pretrained(folder)
  (folder / "README.md").unlink(missing_ok=True)
  (folder / "adapter_model.safetensors").chmod(0o644)
  config = json.loads((folder / "adapter_config.json").read_text())
  config["base_model_name_or_path"] = f"../../huggingface/{case.base}"
  config["target_modules"] = sorted(config["target_modules"])
  (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
  np.save(folder / "logits.npy", logits)
  print(name, sum(file.stat().st_size for file in folder.iterdir()))


def main(names):
  torch.set_num_threads(1)
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  for name in names or CASES:
    make_adapter(name)


if __name__ == "__main__":
  main(sys.argv[1:])

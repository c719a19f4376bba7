"""Tiny random Hugging Face models and the outputs of Transformers for them: tests/testdata/huggingface/NAME.

  pip install torch==2.13.0 transformers
  python -m tests.support.make_huggingface [NAME ...]      # without names: all

The tests read the files and need neither package. A folder has the files of `save_pretrained` (config.json,
model.safetensors, generation_config.json) and expected.npz. If the fields of Transformers 5 have other names than in
configs on the Hub, it also has config_hub.json with those; loading with it gives the same logits to the last bit.

Everything is float32 on a CPU, with eager attention and without dropout. Matrices are drawn from N(0, 1.6²/width) (T5,
which does not scale its queries: 1.2²), embeddings and biases from N(0, .2²), scales of norms from U(.5, 1.5) (Gemma,
which adds 1 to them: U(-.5, .5)). With these, a misread config or weight changes logits by 1e-4 or more (an exact gelu,
a tiny epsilon; most by .1 to 10), while float32 rounding is at most 1.5e-5.

Arrays in expected.npz of a model that is trained (B rows, S tokens, width D, L layers; -100 among labels: no label):
  input_ids [B S], labels       labels at the position of their token; Transformers shifts those of causal models
  attention_mask                of encoders and T5, whose rows have different lengths
  loss, logits [B S V]
  all_hidden [L+1 B S D]        the embeddings and the states after each layer; the last one after the final norm
                                (if that is projected to another width, it is last_hidden instead)
  grad_names, grad_norms        names of tensors in the file, and L2 norms of their gradients (tied ones count once)
  adamw_losses [6]              losses before each of five AdamW steps and after the last: rate 1e-3, betas .9 and .999,
                                epsilon 1e-8, weight decay .01 of all weights, no clipping
Causal models also have:
  padded_ids, padded_mask, padded_logits    padded on the right; to be compared where the mask is 1
  gen_prompt [1 7], gen_sequences           12 greedy tokens without an end of sequence
  left_ids, left_mask, left_sequences       8 greedy tokens of a batch that is padded on the left
  input_ids_long, logits_long               if positions depend on the length: a text beyond the original context
  router_logits [L B*S E], aux_loss, loss_with_aux, padded_aux_loss    mixtures of experts: balance loss of `input_ids`
                                            as Transformers weighs it, the loss with it, and that of `padded_ids`
BERT has token_type_ids, next_sentence_label, nsp_logits [B 2] and pooler_output [B D]; its `loss` is the sum of both.
T5 has decoder_input_ids, encoder_all_hidden, decoder_all_hidden, and gen_sequences of gen_ids and gen_mask, which start
with token 0.
Heads have input_ids, attention_mask, loss, and labels and logits, or start_positions, end_positions, start_logits and
end_logits.
Beam search: beam_settings (JSON: arguments of `generate` for each search), beam_ids, beam_mask, and for search number i
beam_{i}_sequences and beam_{i}_scores. After the end of a sequence follows padding, or the end again if the padding is
token 0.
"""

import itertools
import json
import math
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.support.huggingface_cases import CASES
from tests.support.huggingface_records import forward

OUTPUT = Path(__file__).parents[1] / "testdata" / "huggingface"
FIELDS_OF_5 = ("dtype", "rope_parameters", "layer_types")  # Transformers 4 did not write these
LOGITS = {"prediction_logits": "logits", **{name: name for name in ("logits", "start_logits", "end_logits")}}
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")


def randomize_weights(model, rng):
  matrix = (1.2 if model.config.model_type == "t5" else 1.6) / math.sqrt(model.config.hidden_size)
  center = 0 if model.config.model_type.startswith("gemma") else 1
  owners = dict(model.named_modules())
  for name, weight in sorted(model.named_parameters()):
    if weight.ndim == 1 and name.endswith("weight"):
      values = center + rng.uniform(-0.5, 0.5, weight.shape)
    elif weight.ndim == 1 or isinstance(owners[name.rpartition(".")[0]], torch.nn.Embedding):
      values = rng.normal(0, 0.2, weight.shape)
    else:
      values = rng.normal(0, matrix, weight.shape)
    weight.data = torch.from_numpy(values).float()


def build_model(case, rng):
  kind = getattr(transformers, case.model)
  model = kind(kind.config_class(**case.config))
  if case.config.get("tie_word_embeddings") is False:  # T5Config of Transformers 5 has another meaning for it
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.all_tied_weights_keys.clear()
  randomize_weights(model, rng)
  return model


def load_model(case, folder):
  kind = getattr(transformers, case.model)
  settings = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
  model, report = kind.from_pretrained(folder, **settings, output_loading_info=True)
  assert not any(report.values()), report
  return model.eval()


def write_hub_config(case, folder):
  config = json.loads((folder / "config.json").read_text())
  hub_config = {name: value for name, value in config.items() if name not in (*FIELDS_OF_5, *case.not_hub)}
  (folder / "config_hub.json").write_text(
    json.dumps({**hub_config, "transformers_version": "4.44.0", **case.hub}, indent=2, sort_keys=True) + "\n"
  )


def check_logits(case, folder, expected, config):
  """Assert that the model loaded with this config gives the recorded logits to the last bit."""
  with tempfile.TemporaryDirectory() as copy_folder:
    shutil.copy(folder / config, f"{copy_folder}/config.json")
    shutil.copy(folder / "model.safetensors", copy_folder)
    transformers.AutoConfig.from_pretrained(copy_folder)
    for ending in ("", "_long"):
      inputs = {name: torch.from_numpy(expected[name + ending]).long() for name in INPUTS if name + ending in expected}
      out = forward(load_model(case, copy_folder), **inputs) if inputs else {}
      for name, key in LOGITS.items():
        assert name not in out or np.array_equal(out[name].numpy(), expected[key + ending]), (folder, config, key)


def to_stored(value):
  """Return numbers as float32 or int32, and text unchanged."""
  value = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
  return value.astype({"f": np.float32, "i": np.int32}.get(value.dtype.kind, value.dtype))


def make_reference(name):
  case = CASES[name]
  seeds = itertools.count(zlib.crc32(name.encode()))
  torch.manual_seed(next(seeds))
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary) / name
    build_model(case, np.random.default_rng(next(seeds))).save_pretrained(folder)
    model, recorded = load_model(case, folder), {}
    for recorder in case.recorders:
      recorded |= recorder(model, np.random.default_rng(next(seeds)), recorded)
    expected = {key: to_stored(value) for key, value in recorded.items()}
    assert all(np.isfinite(value).all() for value in expected.values() if value.dtype.kind == "f")
    np.savez_compressed(folder / "expected.npz", **expected)
    if case.hub:
      write_hub_config(case, folder)
    for config in folder.glob("config*.json"):
      check_logits(case, folder, expected, config.name)
    shutil.rmtree(OUTPUT / name, ignore_errors=True)
    shutil.copytree(folder, OUTPUT / name)
  sizes = {file.name: file.stat().st_size for file in sorted((OUTPUT / name).iterdir())}
  print(name, sum(sizes.values()), sizes)


def main(names):
  torch.set_num_threads(1)
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  for name in names or CASES:
    make_reference(name)


if __name__ == "__main__":
  main(sys.argv[1:])

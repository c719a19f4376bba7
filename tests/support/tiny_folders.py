"""Tiny Hugging Face folders with random weights and a tokenizer of tests/testdata/tokenizers."""

import shutil
from pathlib import Path

from llmjax.config.model import TransformerConfig
from llmjax.data.tokenizers.huggingface import tokenizer_from_folder
from llmjax.interop.folder_writer import write_folder
from tests.support.cases import parameters

TOKENIZERS = Path(__file__).parents[1] / "testdata" / "tokenizers"
NO_BIASES = {"qkv_bias": False, "attention_out_bias": False, "mlp_bias": False, "norm_bias": False}
SHAPES = {
  "gpt2": {"decoder_layers": 2, "positions": "learned"},
  "llama3": {
    "decoder_layers": 2,
    "positions": "rotary",
    "norm": "rmsnorm",
    "activation": "silu",
    "gated": True,
    **NO_BIASES,
  },
  "bert": {
    "decoder_layers": 0,
    "encoder_layers": 2,
    "norm_placement": "post",
    "embedding_norm": True,
    "activation": "gelu_exact",
    "norm_epsilon": 1e-12,
    "token_types": 2,
    "head_transform": True,
    "head_bias": True,
  },
  "t5": {
    "decoder_layers": 2,
    "encoder_layers": 2,
    "norm": "rmsnorm",
    "positions": "relative",
    "attention_scale": 1.0,
    "activation": "relu",
    "scale_tied_logits": True,
    **NO_BIASES,
  },
}
MODEL_TYPES = {"gpt2": "gpt2", "llama3": "llama", "bert": "bert", "t5": "t5"}


def write_tiny_folder(kind, folder):
  """Write the folder of a kind in SHAPES."""
  files = TOKENIZERS / kind
  cfg = TransformerConfig(
    vocab_size=tokenizer_from_folder(files).vocab_size,
    d_model=16,
    num_heads=2,
    max_len=64,
    init_stddev=0.3,
    d_ff=24,
    **SHAPES[kind],
  )
  write_folder(folder, cfg, parameters(cfg)[0], prefer=MODEL_TYPES[kind])
  for file in files.iterdir():
    shutil.copy(file, folder / file.name)
  return folder

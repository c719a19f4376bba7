"""Small models and prompts for tests of generation."""

import dataclasses
import functools

import numpy as np

from llmjax.config.model import TransformerConfig
from llmjax.models.transformer import Transformer
from tests.support.cases import parameters

VOCAB_SIZE = 31
PLAIN = {"qkv_bias": False, "mlp_bias": False, "norm": "rmsnorm", "norm_bias": False, "init_stddev": 0.3}
ROTARY = TransformerConfig(
  *(VOCAB_SIZE, 32, 2, 4, 64),
  **{"num_kv_heads": 2, "norm": "rmsnorm", "norm_bias": False, "positions": "rotary", "gated": True},
  init_stddev=0.3,
)
CONFIGS = {
  "learned": TransformerConfig(VOCAB_SIZE, 32, 2, 4, 64, init_stddev=0.3),
  "unrolled": TransformerConfig(VOCAB_SIZE, 32, 2, 4, 64, init_stddev=0.3, scan=False),
  "rotary": ROTARY,
  "prefix": dataclasses.replace(ROTARY, bidirectional_prompt=True),
  "scanned": TransformerConfig(VOCAB_SIZE, 32, 2, 4, 64, **PLAIN, positions="rotary", num_kv_heads=2),
  "windowed": TransformerConfig(
    VOCAB_SIZE, 32, 3, 4, 64, **PLAIN, positions="rotary", attention_pattern=("local", "global"), window=4
  ),
  "periods": TransformerConfig(
    VOCAB_SIZE, 32, 5, 4, 64, **PLAIN, positions="rotary", attention_pattern=("local", "global"), window=4
  ),
  "encoder–decoder": TransformerConfig(
    VOCAB_SIZE, 32, 2, 4, 64, 2, **PLAIN, positions="relative", relative_buckets=8, relative_max_distance=16
  ),
}


@functools.cache
def model_and_params(name):
  return Transformer(CONFIGS[name]), parameters(CONFIGS[name])[0]


def padded_prompts():
  """Return ids and mask of three prompts of 9, 5 and 6 tokens, one padded on the left and one on the right."""
  ids = np.random.default_rng(0).integers(1, VOCAB_SIZE, (3, 9))
  mask = np.ones_like(ids)
  mask[1, :4] = 0
  mask[2, 6:] = 0
  return ids, mask

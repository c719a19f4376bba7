"""The whole model: precision, hidden states of all layers, and values that its config rejects."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ConfigError
from llmjax.config.model import TransformerConfig
from llmjax.models import layers
from llmjax.models.transformer import Transformer, make_transformer
from llmjax.types import Batch
from tests.support.cases import parameters


def test_bfloat16_model_has_float32_logits_close_to_float32():
  cfg = TransformerConfig(32, 64, 2, 4, 16, init_stddev=0.1)
  batch, (params, _) = Batch.from_tokens(np.arange(16)[None]), parameters(cfg)
  models = [Transformer(cfg), Transformer(dataclasses.replace(cfg, dtype="bfloat16"))]
  forward = jax.jit(lambda params: [model.apply({"params": params}, batch) for model in models])
  expected, out = jax.device_get(forward(params))
  assert out.hidden.dtype == jnp.bfloat16 and out.logits.dtype == jnp.float32
  assert np.abs(out.logits - expected.logits).max() < 0.05 * np.abs(expected.logits).max()


def test_all_hidden_has_one_state_per_layer_and_the_embedding():
  cfg = TransformerConfig(32, 64, 3, 4, 16)
  batch, (params, _) = Batch.from_tokens(np.arange(16)[None]), parameters(cfg)

  @jax.jit
  def forward(params):
    out = Transformer(cfg).apply({"params": params}, batch, all_hidden=True)
    return out, layers.make_norm(cfg, "final_norm").apply(
      {"params": params["decoder"]["final_norm"]}, out.all_hidden[-1]
    )

  out, final = forward(params)
  assert out.all_hidden.shape == (4, 1, 16, 64)
  np.testing.assert_allclose(final, out.hidden, atol=1e-6)


@pytest.mark.parametrize(
  "change, words",
  [
    ({"norm": "layer_norm"}, ["model.norm", "layernorm"]),
    ({"num_heads": 5}, ["d_model=64", "num_heads=5", "head_dim"]),
    ({"num_kv_heads": 3}, ["num_kv_heads=3"]),
    ({"num_kv_heads": 0}, ["num_kv_heads=0", "at least 1", "none"]),
    ({"head_dim": 0}, ["head_dim=0", "at least 1"]),
    ({"d_ff": -1}, ["d_ff=-1", "at least 1"]),
    ({"init_stddev": -0.02}, ["init_stddev=-0.02", "negative"]),
    ({"embedding_stddev": float("nan")}, ["embedding_stddev=nan", "negative"]),
    ({"dtype": "bf16"}, ["model.dtype='bf16'", "here it is called `bfloat16`"]),
    ({"param_dtype": "fp32"}, ["model.param_dtype='fp32'", "here it is called `float32`"]),
    ({"dtype": "int32"}, ["model.dtype='int32'", "float32, bfloat16, float16"]),
    ({"dropout": 1.0}, ["dropout=1.0"]),
    ({"positions": "rotary", "head_dim": 7}, ["head_dim=7", "even"]),
    ({"remat": "all"}, ["model.remat", "full"]),
    ({"decoder_layers": 0}, ["decoder_layers", "encoder_layers", "both 0"]),
    ({"norm_placement": "after"}, ["model.norm_placement='after'", "pre, post, sandwich"]),
    ({"norm_placement": "post", "first_attention_norm": False}, ["first_attention_norm=False", "post"]),
    ({"positions": "relative", "relative_max_distance": 8}, ["relative_buckets=32", "relative_max_distance=8"]),
    ({"attention_pattern": ("local",)}, ["model.window"]),
    ({"attention_pattern": ("lokal",), "window": 4}, ["'lokal'", "global, local"]),
    ({"attention_pattern": ()}, ["attention_pattern", "global, local"]),
    ({"window": 0}, ["window=0", "at least 1"]),
    ({"scale_tied_logits": True, "tie_embeddings": False}, ["scale_tied_logits", "tie_embeddings=True"]),
    ({"sentence_classes": 2}, ["sentence_classes=2", "pooler=True"]),
    ({"token_types": -1}, ["token_types=-1", "negative"]),
    ({"activaton": "gelu"}, ["model.activaton", "activation"]),
  ],
)
def test_make_transformer_rejects_invalid_values_in_one_line(change, words):
  with pytest.raises(ConfigError) as error:
    make_transformer(**{"vocab_size": 8, "d_model": 64, "decoder_layers": 1, "num_heads": 4, "max_len": 8, **change})
  assert "\n" not in str(error.value)
  for word in words:
    assert word in str(error.value)

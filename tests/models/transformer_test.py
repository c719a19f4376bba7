"""Parts of the model against independent references in NumPy, and values that its config rejects."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from llmjax.config import ConfigError
from llmjax.config.model import TransformerConfig
from llmjax.models import layers
from llmjax.models.attention.kernels import xla_attention
from llmjax.models.attention.masks import AttentionSettings, attention_mask, relative_buckets
from llmjax.models.rotary import angles, frequencies, rotate
from llmjax.models.transformer import Transformer, make_transformer
from llmjax.types import Batch, Tokens
from tests.support.cases import parameters


def packed_rows(length, seed, prefix=False):
  """Two rows of several documents each, one padded on the right and one on the left."""
  rng = np.random.default_rng(seed)
  segments, positions = np.zeros((2, length), int), np.zeros((2, length), int)
  for row, start, cuts in ((0, 0, rng.integers(1, length - 3, 2)), (1, 2, rng.integers(3, length, 2))):
    ends = sorted({*cuts.tolist(), length - 2 * (1 - row)})
    for i, (a, b) in enumerate(zip([start, *ends], ends), 1):
      segments[row, a:b], positions[row, a:b] = i, np.arange(b - a)
  marks = (positions < 3) * 1 if prefix else None
  return jax.tree.map(jnp.asarray, Tokens(np.zeros_like(segments), positions, segments, marks))


MASKS = {  # name: (settings of attention_mask, whether a query at position p attends to a key at k, with a prefix of 3)
  "causal": ({"causal": True}, lambda p, k: k <= p),
  "prefix": ({"causal": True}, lambda p, k: k <= p or k < 3),
  "causal window": ({"causal": True, "window": 4}, lambda p, k: 0 <= p - k < 4),
  "prefix window": ({"causal": True, "window": 4}, lambda p, k: (k <= p or k < 3) and abs(p - k) < 4),
  "both ways": ({"causal": False}, lambda p, k: True),
  "local": ({"causal": False, "window": 5}, lambda p, k: abs(p - k) <= 2),
}


@jax.jit
def attention_variants(query, key, value, biases, queries, keys, mask):
  """Attention with biases and a scale, with neither, and with a softcap."""
  settings = (
    AttentionSettings(0.3, buckets=8, max_distance=16),
    AttentionSettings(8**-0.5),
    AttentionSettings(8**-0.5, softcap=0.7),
  )
  return [xla_attention(query, key, value, queries, keys, mask, s, biases if s.buckets else None) for s in settings]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", [*MASKS, "cross"])
def test_xla_attention_equals_softmax_of_masked_scores_in_float64(kind, kv_heads):
  """With the definition of the mask for each query and key; scores with bias and scale, without, and with softcap."""
  rng = np.random.default_rng(0)
  queries = keys = packed_rows(12, 0, prefix="prefix" in kind)
  rule = (lambda p, k: True) if kind == "cross" else MASKS[kind][1]
  if kind == "cross":
    keys = packed_rows(9, 1)
    mask = np.asarray(attention_mask(queries, keys, causal=False))
  else:
    mask = np.asarray(attention_mask(queries, keys, **MASKS[kind][0]))
  L, S = queries.ids.shape[1], keys.ids.shape[1]
  (query_segments, query_positions), (key_segments, key_positions) = (
    (np.asarray(tokens.segments), np.asarray(tokens.positions)) for tokens in (queries, keys)
  )
  for b, i, j in np.ndindex(2, L, S):
    same = query_segments[b, i] == key_segments[b, j] > 0
    assert bool(mask[b, i, j]) == (same and bool(rule(query_positions[b, i], key_positions[b, j])))

  query, table = rng.normal(size=(2, L, 4, 8)), rng.normal(size=(8, 4))
  key, value = rng.normal(size=(2, 2, S, kv_heads, 8))
  *arrays, biases = (x.astype(np.float32) for x in (query, key, value, table))
  relative = {"num_buckets": 8, "max_distance": 16}
  bias = table[np.asarray(relative_buckets(queries.positions, keys.positions, bidirectional=True, **relative))]
  biased, plain, capped = jax.device_get(attention_variants(*arrays, biases, queries, keys, mask))
  attends = mask.any(-1)
  for head in range(4):
    shared = head // (4 // kv_heads)
    dots = np.einsum("bld,bsd->bls", query[:, :, head], key[:, :, shared])
    scaled = dots / np.sqrt(8)
    for out, scores in (
      (biased, 0.3 * dots + bias[..., head]),
      (plain, scaled),
      (capped, 0.7 * np.tanh(scaled / 0.7)),
    ):
      weights = np.where(mask, np.exp(scores), 0)
      want = (weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)) @ value[:, :, shared]
      np.testing.assert_allclose(out[:, :, head][attends], want[attends], atol=2e-6)


@pytest.mark.parametrize(
  "bidirectional, buckets, reach", [(True, 32, 128), (False, 32, 128), (True, 12, 24), (False, 8, 16)]
)
def test_relative_buckets_equal_the_formula_of_t5(bidirectional, buckets, reach):

  def bucket(ahead):
    number, count = 0, buckets
    if bidirectional:
      count //= 2
      number += count * (ahead > 0)
      distance = abs(ahead)
    else:
      distance = max(-ahead, 0)
    exact = count // 2
    if distance < exact:
      return number + distance
    return number + min(
      exact + int(np.log(distance / exact) / np.log(reach / exact) * (count - exact) + 1e-6), count - 1
    )

  positions = jnp.arange(reach + 20)[None]
  got = np.asarray(
    relative_buckets(positions, positions, bidirectional=bidirectional, num_buckets=buckets, max_distance=reach)
  )[0]
  for i in range(0, reach + 20, 7):
    assert got[i].tolist() == [bucket(j - i) for j in range(reach + 20)]
  assert got.max() == buckets - 1 and got.min() == 0


def test_attention_of_a_query_without_keys_is_finite():
  x, zeros = jnp.ones((1, 2, 2, 4)), jnp.zeros((1, 2), jnp.int32)
  padding = Tokens(zeros, zeros, zeros)
  assert jnp.isfinite(
    xla_attention(x, x, x, padding, padding, jnp.zeros((1, 2, 2), bool), AttentionSettings(1.0))
  ).all()


@jax.jit
def rotate_at(x, positions):
  return rotate(x, *angles(positions, frequencies(8, 100.0, 128)))


def test_rotary_embedding_equals_complex_rotation():
  x = np.random.default_rng(0).normal(size=(1, 6, 1, 8)).astype(np.float32)
  positions = np.array([[0, 1, 2, 7, 30, 100]])
  pairs = x[..., :4] + 1j * x[..., 4:]
  rotated = pairs * np.exp(1j * positions[:, :, None, None] * 100.0 ** (-np.arange(4) / 4))
  np.testing.assert_allclose(rotate_at(x, positions), np.concatenate([rotated.real, rotated.imag], -1), atol=1e-5)


def test_rotary_dot_products_depend_on_distances_only():
  x = np.random.default_rng(0).normal(size=(1, 2, 1, 8)).astype(np.float32)
  near, far = (np.asarray(rotate_at(x, np.array([pair]))) for pair in ((3, 9), (13, 19)))
  np.testing.assert_allclose(np.vdot(near[0, 0], near[0, 1]), np.vdot(far[0, 0], far[0, 1]), atol=1e-5)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norm_equals_its_formula(kind):
  x = np.random.default_rng(0).normal(2.0, 3.0, (2, 3, 16))
  module = layers.Norm(kind, 1e-5, kind == "layernorm", False, "float32", "float32")
  variables = nn.unbox(jax.jit(module.init)(jax.random.key(0), x.astype(np.float32)))
  centred = x - x.mean(-1, keepdims=True) if kind == "layernorm" else x
  want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(module.apply(variables, jnp.asarray(x, jnp.float32)), want, atol=1e-5)


def test_dropout_keeps_the_mean_and_depends_on_the_key_of_a_row():
  keys = layers.row_keys(jax.random.key(0), jnp.arange(4))
  x = jnp.ones((4, 1000))
  dropped = layers.dropout(x, 0.25, keys)
  assert abs(float(dropped.mean()) - 1) < 0.05 and set(np.unique(dropped.round(4))) == {0.0, np.float32(1.3333)}
  np.testing.assert_array_equal(layers.dropout(x[2:], 0.25, keys[2:]), dropped[2:])
  assert (dropped[0] != dropped[1]).any()
  assert (layers.dropout(x, 0.25, layers.fold_in_rows(keys, 1)) != dropped).any()
  np.testing.assert_array_equal(layers.dropout(x, 0.25, None), x)


def test_bfloat16_model_has_float32_logits_close_to_float32():
  cfg = TransformerConfig(32, 64, 2, 4, 16, init_stddev=0.1)
  batch, (params, _) = Batch.from_tokens(np.arange(16)[None]), parameters(cfg)
  models = [Transformer(cfg), Transformer(dataclasses.replace(cfg, dtype="bfloat16"))]
  want, got = jax.device_get(jax.jit(lambda params: [m.apply({"params": params}, batch) for m in models])(params))
  assert got.hidden.dtype == jnp.bfloat16 and got.logits.dtype == jnp.float32
  assert np.abs(got.logits - want.logits).max() < 0.05 * np.abs(want.logits).max()


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

"""Masks, relative positions and scores of attention against NumPy, by way of the kernel "xla"."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.models.attention.masks import AttentionSettings, attention_mask, relative_buckets
from llmjax.models.attention.xla import xla_attention
from llmjax.types import Tokens

HEADS, WIDTH, BUCKETS, MAX_DISTANCE = 4, 8, 8, 16

# {name: (settings of attention_mask, whether a query at position q attends to a key at k if the prefix has 3 tokens)}
MASKS = {
  "causal": ({"causal": True}, lambda q, k: k <= q),
  "prefix": ({"causal": True}, lambda q, k: k <= q or k < 3),
  "causal window": ({"causal": True, "window": 4}, lambda q, k: 0 <= q - k < 4),
  "prefix window": ({"causal": True, "window": 4}, lambda q, k: (k <= q or k < 3) and abs(q - k) < 4),
  "bidirectional": ({"causal": False}, lambda q, k: True),
  "local": ({"causal": False, "window": 5}, lambda q, k: abs(q - k) <= 2),
  "cross": ({"causal": False}, lambda q, k: True),
}


def packed_rows(length, seed, prefix=False):
  """Return two rows of several documents each, one padded on the right and one on the left."""
  rng = np.random.default_rng(seed)
  segments, positions = np.zeros((2, length), int), np.zeros((2, length), int)
  for row, first, cuts in ((0, 0, rng.integers(1, length - 3, 2)), (1, 2, rng.integers(3, length, 2))):
    ends = sorted({*cuts.tolist(), length - 2 * (1 - row)})
    for i, (start, end) in enumerate(zip([first, *ends], ends), 1):
      segments[row, start:end], positions[row, start:end] = i, np.arange(end - start)
  in_prefix = (positions < 3) * 1 if prefix else None
  return jax.tree.map(jnp.asarray, Tokens(np.zeros_like(segments), positions, segments, in_prefix))


def query_and_key_tokens(kind):
  """Return the tokens of queries and keys for an entry of MASKS."""
  queries = packed_rows(12, 0, prefix="prefix" in kind)
  return queries, packed_rows(9, 1) if kind == "cross" else queries


@pytest.mark.parametrize("kind", MASKS)
def test_attention_mask_equals_its_definition(kind):
  settings, is_visible = MASKS[kind]
  queries, keys = query_and_key_tokens(kind)
  mask = np.asarray(attention_mask(queries, keys, **settings))
  queries, keys = jax.device_get((queries, keys))
  for row, i, j in np.ndindex(mask.shape):
    same_document = queries.segments[row, i] == keys.segments[row, j] > 0
    visible = same_document and is_visible(queries.positions[row, i], keys.positions[row, j])
    assert bool(mask[row, i, j]) == bool(visible)


@jax.jit
def attention_variants(query, key, value, table, query_tokens, key_tokens, mask):
  """Return attention with a scale and relative biases, with neither, and with a softcap."""
  variants = (
    AttentionSettings(0.3, buckets=BUCKETS, max_distance=MAX_DISTANCE),
    AttentionSettings(WIDTH**-0.5),
    AttentionSettings(WIDTH**-0.5, softcap=0.7),
  )
  return [
    xla_attention(query, key, value, query_tokens, key_tokens, mask, settings, table if settings.buckets else None)
    for settings in variants
  ]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", MASKS)
def test_xla_attention_equals_softmax_of_masked_scores_in_float64(kind, kv_heads):
  queries, keys = query_and_key_tokens(kind)
  mask = np.asarray(attention_mask(queries, keys, **MASKS[kind][0]))
  length, source = mask.shape[1:]
  rng = np.random.default_rng(0)
  query, table = rng.normal(size=(2, length, HEADS, WIDTH)), rng.normal(size=(BUCKETS, HEADS))
  key, value = rng.normal(size=(2, 2, source, kv_heads, WIDTH))
  arrays = (x.astype(np.float32) for x in (query, key, value, table))
  outputs = jax.device_get(attention_variants(*arrays, queries, keys, mask))

  sizes = {"num_buckets": BUCKETS, "max_distance": MAX_DISTANCE}
  bias = table[np.asarray(relative_buckets(queries.positions, keys.positions, bidirectional=True, **sizes))]
  attends = mask.any(-1)
  for head in range(HEADS):
    kv_head = head // (HEADS // kv_heads)
    products = np.einsum("bld,bsd->bls", query[:, :, head], key[:, :, kv_head])
    scaled = products / np.sqrt(WIDTH)
    for out, scores in zip(outputs, (0.3 * products + bias[..., head], scaled, 0.7 * np.tanh(scaled / 0.7))):
      weights = np.where(mask, np.exp(scores), 0)
      expected = (weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)) @ value[:, :, kv_head]
      np.testing.assert_allclose(out[:, :, head][attends], expected[attends], atol=2e-6)


def test_attention_of_a_query_without_keys_is_finite():
  x, zeros = jnp.ones((1, 2, 2, 4)), jnp.zeros((1, 2), jnp.int32)
  padding = Tokens(zeros, zeros, zeros)
  out = xla_attention(x, x, x, padding, padding, jnp.zeros((1, 2, 2), bool), AttentionSettings(1.0))
  assert np.isfinite(jax.device_get(out)).all()


def t5_bucket(ahead, bidirectional, num_buckets, max_distance):
  """Return the bucket of a key `ahead` tokens after the query, by the formula of T5."""
  bucket = 0
  if bidirectional:
    num_buckets //= 2
    bucket += num_buckets * (ahead > 0)
    distance = abs(ahead)
  else:
    distance = max(-ahead, 0)
  exact = num_buckets // 2
  if distance < exact:
    return bucket + distance
  log_ratio = np.log(distance / exact) / np.log(max_distance / exact)
  return bucket + min(exact + int(log_ratio * (num_buckets - exact) + 1e-6), num_buckets - 1)


@pytest.mark.parametrize(
  "bidirectional, num_buckets, max_distance", [(True, 32, 128), (False, 32, 128), (True, 12, 24), (False, 8, 16)]
)
def test_relative_buckets_equal_the_formula_of_t5(bidirectional, num_buckets, max_distance):
  settings = {"bidirectional": bidirectional, "num_buckets": num_buckets, "max_distance": max_distance}
  length = max_distance + 20
  positions = jnp.arange(length)[None]
  buckets = np.asarray(relative_buckets(positions, positions, **settings))[0]
  for i in range(0, length, 7):
    assert buckets[i].tolist() == [t5_bucket(j - i, **settings) for j in range(length)]
  assert buckets.max() == num_buckets - 1 and buckets.min() == 0

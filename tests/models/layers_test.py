"""Norms and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from llmjax.models import layers


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norm_equals_its_formula(kind):
  x = np.random.default_rng(0).normal(2.0, 3.0, (2, 3, 16))
  module = layers.Norm(kind, 1e-5, kind == "layernorm", False, "float32", "float32")
  variables = nn.unbox(jax.jit(module.init)(jax.random.key(0), x.astype(np.float32)))
  centred = x - x.mean(-1, keepdims=True) if kind == "layernorm" else x
  expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(jax.jit(module.apply)(variables, x.astype(np.float32)), expected, atol=1e-5)


@pytest.fixture(scope="module")
def dropped():
  """Ones [4 1000] after dropout at a rate of 0.25: with keys of rows 0 to 3, of rows 2 and 3, and with other keys."""

  @jax.jit
  def drop():
    ones, keys = jnp.ones((4, 1000)), layers.row_keys(jax.random.key(0), jnp.arange(4))
    parts = ((ones, keys), (ones[2:], keys[2:]), (ones, layers.fold_in_rows(keys, 1)))
    return [layers.dropout(x, 0.25, row_keys) for x, row_keys in parts]

  return jax.device_get(drop())


def test_dropout_keeps_the_mean(dropped):
  assert abs(float(dropped[0].mean()) - 1) < 0.05
  assert set(np.unique(dropped[0].round(4))) == {0.0, np.float32(1.3333)}


def test_dropout_depends_on_the_key_of_a_row_only(dropped):
  all_rows, last_rows, other_keys = dropped
  np.testing.assert_array_equal(last_rows, all_rows[2:])
  assert (all_rows[0] != all_rows[1]).any()
  assert (other_keys != all_rows).any()


def test_dropout_without_keys_is_the_identity():
  x = jnp.ones((4, 10))
  assert layers.dropout(x, 0.25, None) is x

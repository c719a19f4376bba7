"""Comparisons of trees of arrays, in NumPy: an eager jax.numpy call per leaf would compile a program per shape."""

import jax
import numpy as np


def norm(x) -> float:
  """L2 norm in float64."""
  return float(np.linalg.norm(np.asarray(x, np.float64).ravel()))


def assert_trees_close(got, want, tolerance=1e-5, floor=1e-3):
  """Check `want` leaf by leaf: |got - want| <= tolerance * max(|leaf|, floor * |whole tree|), in the L2 norm.

  The floor is for leaves whose true value is zero, such as the gradient of a key bias.
  """
  got, want = jax.device_get((got, want))
  whole = np.sqrt(sum(norm(leaf) ** 2 for leaf in jax.tree.leaves(want)))
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
    assert np.shape(a) == np.shape(b), f"{jax.tree_util.keystr(path)}: {np.shape(a)} != {np.shape(b)}"
    difference = norm(np.asarray(a, np.float64) - np.asarray(b, np.float64))
    bound = tolerance * max(norm(b), floor * whole)
    assert difference <= bound, f"{jax.tree_util.keystr(path)}: {difference:.2e} > {bound:.2e}"


def assert_trees_identical(got, want):
  """Check that all leaves are equal bit by bit."""
  got, want = jax.device_get((got, want))
  jax.tree.map(np.testing.assert_array_equal, got, want)

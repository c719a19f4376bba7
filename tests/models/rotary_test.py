"""Rotary positions against complex rotations in NumPy; tests/interop compares their scalings with Transformers."""

import jax
import numpy as np

from llmjax.models.rotary import apply_rotary, rotary_angles, rotary_frequencies


@jax.jit
def rotate_at(x, positions):
  return apply_rotary(x, *rotary_angles(positions, rotary_frequencies(8, 100.0, 128)))


def test_rotary_embedding_equals_complex_rotation():
  x = np.random.default_rng(0).normal(size=(1, 6, 1, 8)).astype(np.float32)
  positions = np.array([[0, 1, 2, 7, 30, 100]])
  pairs = x[..., :4] + 1j * x[..., 4:]
  rotated = pairs * np.exp(1j * positions[:, :, None, None] * 100.0 ** (-np.arange(4) / 4))
  np.testing.assert_allclose(rotate_at(x, positions), np.concatenate([rotated.real, rotated.imag], -1), atol=1e-5)


def test_rotary_dot_products_depend_on_distances_only():
  x = np.random.default_rng(0).normal(size=(1, 2, 1, 8)).astype(np.float32)
  near, far = (np.asarray(rotate_at(x, np.array([positions]))) for positions in ((3, 9), (13, 19)))
  np.testing.assert_allclose(np.vdot(near[0, 0], near[0, 1]), np.vdot(far[0, 0], far[0, 1]), atol=1e-5)

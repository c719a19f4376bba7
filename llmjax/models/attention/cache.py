"""The tokens in the decoding cache, as Linen modules with variables in the collection "cache".

Keys and values themselves are cached by each layer's `Attention`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Int

from llmjax.types import Tokens


class CachedTokens(nn.Module):
  """Positions, segments and prefix of all tokens in the cache; unwritten slots are padding (segment 0)."""

  @nn.compact
  def __call__(self, new: Tokens, length: int) -> tuple[Tokens, Int[Array, ""]]:
    """Append tokens to the cache.

    Args:
      new: tokens of this call, [B L].
      length: S, number of slots of the cache.

    Returns:
      The tokens of all slots, [B S], and the slot of the first new token.
    """
    index = self.variable("cache", "index", jnp.zeros, (), jnp.int32)
    start = index.value

    def append(name: str, values: Array) -> Array:
      cached = self.variable("cache", name, jnp.zeros, (new.ids.shape[0], length), jnp.int32)
      cached.value = jax.lax.dynamic_update_slice(cached.value, values.astype(jnp.int32), (0, start))
      return cached.value

    positions, segments = append("positions", new.positions), append("segments", new.segments)
    prefix = None
    if new.prefix is not None or self.has_variable("cache", "prefix"):
      prefix = append("prefix", jnp.zeros_like(new.ids) if new.prefix is None else new.prefix)
    index.value = start + new.ids.shape[1]
    return Tokens(ids=segments, positions=positions, segments=segments, prefix=prefix), start


class CachedMemory(nn.Module):
  """The encoder's tokens, of which cross-attention reads the segments; saved by the first call."""

  @nn.compact
  def __call__(self, tokens: Tokens | None) -> Tokens:
    """Return the tokens of the first call, [B S]; further calls pass None."""
    segments = self.variable("cache", "segments", lambda: None if tokens is None else tokens.segments).value
    return Tokens(ids=segments, positions=segments, segments=segments)

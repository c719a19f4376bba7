"""Flash attention of NVIDIA's cuDNN, for GPUs."""

from __future__ import annotations

import jax
from jaxtyping import Array, Bool, Float

from llmjax.models.attention import masks
from llmjax.models.attention.masks import AttentionSettings
from llmjax.types import Tokens


def cudnn_attention(
  query: Float[Array, "B L H A"],
  key: Float[Array, "B S K A"],
  value: Float[Array, "B S K A"],
  query_tokens: Tokens,
  key_tokens: Tokens,
  mask: Bool[Array, "B L S"],
  settings: AttentionSettings,
  relative: Float[Array, "R H"] | None = None,
) -> Float[Array, "B L H A"]:
  """Return softmax(scores) value; see `select.dot_product_attention` for the arguments."""
  bias = None
  if relative is not None:
    bias = masks.relative_bias(relative, query_tokens, key_tokens, settings).astype(query.dtype)
  return jax.nn.dot_product_attention(
    query, key, value, bias, mask[:, None], scale=settings.scale, implementation="cudnn"
  )

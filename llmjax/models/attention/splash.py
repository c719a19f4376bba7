"""Block-sparse flash attention of JAX for TPUs ("splash attention")."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmjax.distributed import sharding
from llmjax.models.attention.blocks import RESIDUAL_NAME, repeat_kv_for_sharding
from llmjax.models.attention.masks import AttentionSettings
from llmjax.types import Tokens

INTERPRET = False  # True: run the TPU kernel on any device, slowly; for tests


def splash_attention(
  query: Float[Array, "B L H A"],
  key: Float[Array, "B S K A"],
  value: Float[Array, "B S K A"],
  query_tokens: Tokens,
  key_tokens: Tokens,
  settings: AttentionSettings,
) -> Float[Array, "B L H A"]:
  """Return softmax(scores) value; see `select.dot_product_attention` for the arguments.

  Causal masks and windows compare indices in a row. Inside a document this is the same as comparing positions.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

  shape = query.shape[1], key.shape[1]
  mask: splash_mask.Mask = splash_mask.FullMask(shape)
  if settings.window is not None:
    half = settings.window // 2
    mask = splash_mask.LocalMask(shape, (settings.window - 1, 0) if settings.causal else (half, half), 0)
  elif settings.causal:
    mask = splash_mask.CausalMask(shape)
  # The largest block that divides the length; lengths are multiples of 128.
  size_q, size_kv = (next(size for size in (512, 256, 128) if length % size == 0) for length in shape)
  sizes = splash_kernel.BlockSizes(
    block_q=size_q,
    block_kv=size_kv,
    block_q_dkv=size_q,
    block_kv_dkv=size_kv,
    block_q_dq=size_q,
    block_kv_dq=size_kv,
  )

  def local_attention(
    query: Array, key: Array, value: Array, query_segments: Array, key_segments: Array
  ) -> Float[Array, "B L H A"]:
    kernel = splash_kernel.make_splash_mha(
      mask=splash_mask.MultiHeadMask([mask] * query.shape[2]),
      block_sizes=sizes,
      attn_logits_soft_cap=settings.softcap,
      head_shards=1,
      q_seq_shards=1,
      residual_checkpoint_name=RESIDUAL_NAME,
      interpret=INTERPRET,
    )
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (query * settings.scale, key, value))
    out = jax.vmap(kernel)(*heads_first, splash_kernel.SegmentIds(query_segments, key_segments))
    return jnp.swapaxes(out, 1, 2)

  batch_axis, head_axis, key, value = repeat_kv_for_sharding(query, key, value)
  vectors, tokens = (batch_axis, None, head_axis, None), (batch_axis, None)
  sharded_attention = sharding.per_device(local_attention, [vectors, vectors, vectors, tokens, tokens], vectors)
  return sharded_attention(query, key, value, query_tokens.segments, key_tokens.segments)

"""Attention in blocks of queries and keys with a running softmax: the kernels "chunked" and "ring".

Memory grows with the length, not with its square (Rabe & Staats 2021, arXiv:2112.05682; Dao et al. 2022,
FlashAttention, arXiv:2205.14135). Only the output and the log sum exp of each query's scores are saved, and the
backward pass computes the blocks again. A block in which no query attends to a key is skipped.

"ring" is the same on sharded sequences: keys and values travel around the devices, in the backward pass together with
their gradients, so that no device ever holds all of them. See `blocks.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from llmjax.distributed import sharding
from llmjax.distributed.sharding import LogicalAxes
from llmjax.models.attention import masks
from llmjax.models.attention.blocks import (
  RESIDUAL_NAME,
  BlockLayout,
  merge_blocks,
  pad_length,
  repeat_kv_for_sharding,
  scan_ring,
  split_blocks,
)
from llmjax.models.attention.masks import MASK_VALUE, AttentionSettings
from llmjax.trees import PyTree
from llmjax.types import Tokens

BLOCK_SIZE = 512  # most queries, and most keys, of a block

QueryBlock = tuple[Array, Tokens]  # query, its tokens
KeyBlock = tuple[Array, Array, Tokens]  # key, value, their tokens
SoftmaxState = tuple[Array, Array, Array]  # unscaled output [B K G L A], maximum and sum of exp of scores [B K G L]
QueryBlockGradients = tuple[Array, Tokens, Array, Array, Array]  # query, its tokens, d_out, logsumexp, delta
Gradients = tuple[Array, Array | None, Array, Array]  # of the query, the relative table, the key, the value


class AttentionInputs(NamedTuple):
  """The arrays that an attention reads, on all devices or on one."""

  query: Float[Array, "B L H A"]
  key: Float[Array, "B S K A"]
  value: Float[Array, "B S K A"]
  relative: Float[Array, "R H"] | None  # table of relative biases
  query_tokens: Tokens  # ids are indices in the row
  key_tokens: Tokens
  heads: Int[Array, " H"]  # numbers of the query heads
  dropout_keys: Key[Array, " B"] | None


class ArrayAxes(NamedTuple):
  """Logical axes of each kind of array."""

  vectors: LogicalAxes  # [B L H A]
  tokens: LogicalAxes  # [B L]
  sums: LogicalAxes  # [B L H]
  table: LogicalAxes  # [R H]
  heads: LogicalAxes  # [H]
  rows: LogicalAxes  # [B]

  @property
  def inputs(self) -> list[LogicalAxes]:
    """Axes of `AttentionInputs`, in their order."""
    return [self.vectors, self.vectors, self.vectors, self.table, self.tokens, self.tokens, self.heads, self.rows]


def blockwise_attention(
  query: Float[Array, "B L H A"],
  key: Float[Array, "B S K A"],
  value: Float[Array, "B S K A"],
  query_tokens: Tokens,
  key_tokens: Tokens,
  settings: AttentionSettings,
  relative: Float[Array, "R H"] | None = None,
  dropout_keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B L H A"]:
  """Return softmax(scores) value, and zeros for queries without keys; a ring if the current mesh shards sequences.

  See `select.dot_product_attention` for the arguments.
  """
  length, heads = query.shape[1:3]
  ring = sharding.mesh_axes_of("act_len")
  zigzag = bool(ring) and settings.causal and length == key.shape[1]
  batch_axis, head_axis, key, value = repeat_kv_for_sharding(query, key, value)
  layout = BlockLayout((batch_axis, "act_len" if ring else None, head_axis), ring, zigzag, BLOCK_SIZE)
  if not settings.causal:
    key_tokens = dataclasses.replace(key_tokens, prefix=None)
  multiple = 2 * sharding.num_shards("act_len") if ring else 1  # each device has two halves, see `exchange_halves`
  query, query_tokens = pad_length((query, masks.with_row_indices(query_tokens)), multiple)
  key, value, key_tokens = pad_length((key, value, masks.with_row_indices(key_tokens)), multiple)
  # Flax computes what is equal in all layers before the scan over layers, and would hold the masks of all blocks there.
  # The barrier makes the tokens depend on the layer's queries.
  query, query_tokens, key_tokens = lax.optimization_barrier((query, query_tokens, key_tokens))
  inputs = AttentionInputs(query, key, value, relative, query_tokens, key_tokens, jnp.arange(heads), dropout_keys)
  return _attention(settings, layout, inputs)[:, :length]


def _array_axes(layout: BlockLayout) -> ArrayAxes:
  batch, length, heads = layout.axes
  return ArrayAxes(
    vectors=(batch, length, heads, None),
    tokens=(batch, length),
    sums=(batch, length, heads),
    table=(None, heads),
    heads=(heads,),
    rows=(batch,),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(settings: AttentionSettings, layout: BlockLayout, inputs: AttentionInputs) -> Array:
  return _attention_forward(settings, layout, inputs)[0]


def _attention_forward(
  settings: AttentionSettings, layout: BlockLayout, inputs: AttentionInputs
) -> tuple[Array, tuple[AttentionInputs, Array, Array]]:
  """Return the output and what the backward pass needs: the inputs, the output, and the log sum exp of scores."""
  axes = _array_axes(layout)

  def forward(*arrays: PyTree) -> tuple[Array, Array]:
    return _local_forward(settings, layout, AttentionInputs(*arrays))

  out, logsumexp = sharding.per_device(forward, axes.inputs, (axes.vectors, axes.sums))(*inputs)
  out, logsumexp = (checkpoint_name(x, RESIDUAL_NAME) for x in (out, logsumexp))
  return out, (inputs, out, logsumexp)


def _attention_backward(
  settings: AttentionSettings,
  layout: BlockLayout,
  residuals: tuple[AttentionInputs, Array, Array],
  d_out: Float[Array, "B L H A"],
) -> tuple[PyTree]:
  """Return the gradients of the inputs, given that of the output; tokens, heads and dropout keys have none."""
  inputs, out, logsumexp = residuals
  axes = _array_axes(layout)

  def backward(*arrays: PyTree) -> tuple[Array, Array, Array, Array | None]:
    *local_inputs, d_out, out, logsumexp = arrays
    return _local_backward(settings, layout, AttentionInputs(*local_inputs), d_out, out, logsumexp)

  arguments = [*axes.inputs, axes.vectors, axes.vectors, axes.sums]
  results = (axes.vectors, axes.vectors, axes.vectors, axes.table)
  no_gradients: list[PyTree] = [None] * 4
  gradients = sharding.per_device(backward, arguments, results)(*inputs, d_out, out, logsumexp)
  return (AttentionInputs(*gradients, *no_gradients),)


_attention.defvjp(_attention_forward, _attention_backward)


def _local_forward(
  settings: AttentionSettings, layout: BlockLayout, inputs: AttentionInputs
) -> tuple[Float[Array, "B L H A"], Float[Array, "B L H"]]:
  """Return one device's part of the output, and of the log sum exp of each query's scores."""
  batch, length, heads, width = inputs.query.shape
  kv_heads = inputs.key.shape[2]
  query_blocks = split_blocks(layout, (inputs.query, inputs.query_tokens))
  key_blocks = split_blocks(layout, (inputs.key, inputs.value, inputs.key_tokens))
  num_blocks, block_length = query_blocks[0].shape[0], query_blocks[0].shape[2]
  shape = (num_blocks, batch, kv_heads, heads // kv_heads, block_length)
  start = (jnp.zeros((*shape, width), jnp.float32), jnp.full(shape, MASK_VALUE), jnp.zeros(shape))

  def visit_keys(states: SoftmaxState, key_blocks: KeyBlock) -> tuple[SoftmaxState, KeyBlock]:
    def visit_query_block(block: tuple[QueryBlock, SoftmaxState]) -> SoftmaxState:
      query_block, state = block

      def visit_key_block(state: SoftmaxState, key_block: KeyBlock) -> tuple[SoftmaxState, None]:
        return _add_key_block(settings, inputs, state, query_block, key_block), None

      return lax.scan(visit_key_block, state, key_blocks)[0]

    return cast(SoftmaxState, lax.map(visit_query_block, (query_blocks, states))), key_blocks

  (out, score_max, total), _ = scan_ring(layout, visit_keys, start, key_blocks)
  safe_total = jnp.where(total > 0, total, 1.0)  # a query without keys gets zeros, not 0 / 0
  out = jnp.moveaxis(out / safe_total[..., None], 4, 2).reshape(num_blocks, batch, block_length, heads, width)
  logsumexp = jnp.moveaxis(score_max + jnp.log(safe_total), 4, 2).reshape(num_blocks, batch, block_length, heads)
  return merge_blocks(layout, (out.astype(inputs.query.dtype), logsumexp), length)


def _add_key_block(
  settings: AttentionSettings,
  inputs: AttentionInputs,
  state: SoftmaxState,
  query_block: QueryBlock,
  key_block: KeyBlock,
) -> SoftmaxState:
  """Return the running softmax of a block of queries after one more block of keys."""
  (query, query_tokens), (key, value, key_tokens) = query_block, key_block
  mask = masks.attention_mask(query_tokens, key_tokens, causal=settings.causal, window=settings.window)

  def add() -> SoftmaxState:
    out, score_max, total = state
    scores = masks.attention_scores(query, key, inputs.relative, query_tokens, key_tokens, mask, settings)
    new_max = jnp.maximum(score_max, jnp.max(scores, axis=-1))
    weights = jnp.where(mask[:, None, None], jnp.exp(scores - new_max[..., None]), 0.0)
    rescale = jnp.exp(score_max - new_max)  # earlier weights were relative to the earlier maximum
    total = rescale * total + jnp.sum(weights, axis=-1)
    weights = weights * _dropout_scale(settings, inputs, weights, query_tokens, key_tokens)
    new_out = jnp.einsum("BKGLS,BSKA->BKGLA", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return rescale[..., None] * out + new_out, new_max, total

  return cast(SoftmaxState, lax.cond(jnp.any(mask), add, lambda: state))


def _local_backward(
  settings: AttentionSettings,
  layout: BlockLayout,
  inputs: AttentionInputs,
  d_out: Float[Array, "B L H A"],
  out: Float[Array, "B L H A"],
  logsumexp: Float[Array, "B L H"],
) -> tuple[Array, Array, Array, Array | None]:
  """Return one device's part of the gradients of query, key, value and relative table, given that of the output."""
  query, key, relative = inputs.query, inputs.key, inputs.relative
  # The sum over keys of each weight times its gradient, [B L H].
  delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
  query_blocks = split_blocks(layout, (query, inputs.query_tokens, d_out, logsumexp, delta))
  key_blocks = split_blocks(layout, (key, inputs.value, inputs.key_tokens))
  zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, jnp.float32))

  def visit_keys(state: PyTree, rotating: PyTree) -> tuple[PyTree, PyTree]:
    key_blocks, d_key_blocks = rotating

    def visit_query_block(carry: PyTree, block: PyTree) -> tuple[PyTree, PyTree]:
      d_key_blocks, d_table = carry
      query_block, d_query = block

      def visit_key_block(carry: PyTree, block: PyTree) -> tuple[PyTree, PyTree]:
        key_block, d_key_block = block
        d_query, d_table, *d_key_block = _add_block_gradients(
          settings, inputs, (*carry, *d_key_block), query_block, key_block
        )
        return (d_query, d_table), tuple(d_key_block)

      (d_query, d_table), d_key_blocks = lax.scan(visit_key_block, (d_query, d_table), (key_blocks, d_key_blocks))
      return (d_key_blocks, d_table), d_query

    d_queries, d_table = state
    (d_key_blocks, d_table), d_queries = lax.scan(visit_query_block, (d_key_blocks, d_table), (query_blocks, d_queries))
    return (d_queries, d_table), (key_blocks, d_key_blocks)

  start = zeros(query_blocks[0]), zeros(relative)
  (d_queries, d_table), (_, d_key_blocks) = scan_ring(layout, visit_keys, start, (key_blocks, zeros(key_blocks[:2])))
  d_query = merge_blocks(layout, d_queries, query.shape[1]).astype(query.dtype)
  d_key, d_value = (d.astype(key.dtype) for d in merge_blocks(layout, d_key_blocks, key.shape[1]))
  if relative is not None:
    d_table = lax.psum(d_table, layout.replicated).astype(relative.dtype)
  return d_query, d_key, d_value, d_table


def _add_block_gradients(
  settings: AttentionSettings,
  inputs: AttentionInputs,
  gradients: Gradients,
  query_block: QueryBlockGradients,
  key_block: KeyBlock,
) -> Gradients:
  """Return the gradients with those from one block of queries and one block of keys added."""
  (query, query_tokens, d_out, logsumexp, delta), (key, value, key_tokens) = query_block, key_block
  mask = masks.attention_mask(query_tokens, key_tokens, causal=settings.causal, window=settings.window)

  def score(query: Array, key: Array, relative: Array | None) -> Array:
    return masks.attention_scores(query, key, relative, query_tokens, key_tokens, mask, settings)

  def add() -> Gradients:
    scores, pull = jax.vjp(score, query, key, inputs.relative)
    per_score = functools.partial(_like_scores, scores)
    grouped = d_out.reshape(*d_out.shape[:2], key.shape[2], -1, d_out.shape[-1])
    weights = jnp.where(mask[:, None, None], jnp.exp(scores - per_score(logsumexp)), 0.0)
    d_weights = jnp.einsum("BLKGA,BSKA->BKGLS", grouped, value, preferred_element_type=jnp.float32)
    keep = _dropout_scale(settings, inputs, weights, query_tokens, key_tokens)
    new_value = jnp.einsum(
      "BKGLS,BLKGA->BSKA", (weights * keep).astype(d_out.dtype), grouped, preferred_element_type=jnp.float32
    )
    # The gradient of a softmax: weight * (its gradient - the sum over keys of weight * gradient).
    new_query, new_key, new_table = pull(weights * (d_weights * keep - per_score(delta)))
    return cast(Gradients, jax.tree.map(jnp.add, gradients, (new_query, new_table, new_key, new_value)))

  return cast(Gradients, lax.cond(jnp.any(mask), add, lambda: gradients))


def _dropout_scale(
  settings: AttentionSettings, inputs: AttentionInputs, weights: Array, query_tokens: Tokens, key_tokens: Tokens
) -> Float[Array, "B K G L S"] | float:
  """Return the factor of each weight: 0 if it is dropped, else 1 / (1 - rate)."""
  if inputs.dropout_keys is None or settings.dropout == 0.0:
    return 1.0
  keep = masks.dropout_keep_mask(inputs.dropout_keys, inputs.heads, query_tokens.ids, key_tokens.ids, settings.dropout)
  return keep.reshape(weights.shape) / (1.0 - settings.dropout)


def _like_scores(scores: Float[Array, "B K G L S"], x: Float[Array, "B L H"]) -> Float[Array, "B K G L 1"]:
  """Return a value per query and head, shaped so that it broadcasts with the scores."""
  return jnp.moveaxis(x, 1, 2).reshape(*scores.shape[:4], 1)

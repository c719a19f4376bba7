"""Attention in blocks of queries and keys with a running softmax (Rabe & Staats 2021, Dao et al. 2022).

Memory grows with the length and not with its square: only the output and the logarithm of each softmax's denominator
are kept, and the backward pass computes the blocks again. A block in which no query sees a key is skipped.

Where the length is cut over devices, keys and values travel round them (Liu et al. 2023, Ring Attention), in the
backward pass together with their gradients, so that no device ever holds all of them. Under a causal mask each device
works on one early and one late half of a part, which gives all of them the same number of blocks (Brandon et al. 2023).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from llmjax.distributed import sharding
from llmjax.models.attention import masks
from llmjax.models.attention.masks import MASK_VALUE, AttentionSettings
from llmjax.types import Tokens

BLOCK_SIZE = 512  # queries, and keys, of a block at most
RESIDUAL_NAME = "attention"  # of what rematerialisation may keep


@dataclasses.dataclass(frozen=True)
class BlockLayout:
  """How an attention is cut.

  Attributes:
    names: logical ones of the dimensions of rows, lengths and heads; None where one is whole on every device.
    ring: the mesh axes that lengths are cut over, none where they are whole.
    zigzag: each device takes an early and a late half of a part.
    block: tokens of a block at most.
  """

  names: tuple[str | None, str | None, str | None]
  ring: tuple[str, ...]
  zigzag: bool
  block: int

  @property
  def replicated(self) -> tuple[str, ...]:
    """The mesh axes that see a table of biases whole, and different rows or queries."""
    batch = () if self.names[0] is None else sharding.mesh_axes_of(self.names[0])
    return (*batch, *self.ring)


def blockwise_attention(
  query: Float[Array, "B L H A"],
  key: Float[Array, "B S K A"],
  value: Float[Array, "B S K A"],
  queries: Tokens,
  keys: Tokens,
  settings: AttentionSettings,
  relative: Float[Array, "R H"] | None = None,
  dropout_keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B L H A"]:
  """softmax(scores) value; a query that sees nothing gets zeros. The mesh in use says whether keys go round a ring."""
  length, heads = query.shape[1:3]
  ring = sharding.mesh_axes_of("act_len")
  zigzag = bool(ring) and settings.causal and length == key.shape[1]
  batch, cut_heads, key, value = repeat_kv_for_sharding(query, key, value)
  layout = BlockLayout((batch, "act_len" if ring else None, cut_heads), ring, zigzag, BLOCK_SIZE)
  if not settings.causal:
    keys = dataclasses.replace(keys, prefix=None)
  multiple = 2 * sharding.num_shards("act_len") if ring else 1
  query, queries = _padded((query, masks.with_row_indices(queries)), multiple)
  key, value, keys = _padded((key, value, masks.with_row_indices(keys)), multiple)
  # A scan over layers computes what does not differ between them beforehand: the masks of all blocks, in full. Tokens
  # that come out together with queries are known no earlier than these.
  query, queries, keys = lax.optimization_barrier((query, queries, keys))
  out = _attention(settings, layout, query, key, value, relative, queries, keys, jnp.arange(heads), dropout_keys)
  return out[:, :length]


def repeat_kv_for_sharding(
  query: Float[Array, "B L H A"], key: Array, value: Array
) -> tuple[str | None, str | None, Array, Array]:
  """The logical names of rows and heads where they divide over devices, else None; and keys and values with each head
  as many times as lets every device hold those of its own query heads."""
  heads, shared = query.shape[2], key.shape[2]
  batch = sharding.axis_if_divisible("act_batch", query.shape[0])
  parts = sharding.num_shards("act_heads")
  if heads % parts:
    return batch, None, key, value
  times = next(n for n in range(1, heads + 1) if shared * n % parts == 0 and heads % (shared * n) == 0)
  if times > 1:
    key, value = (jnp.repeat(x, times, axis=2) for x in (key, value))
  return batch, "act_heads", key, value


def _padded(tree: Any, multiple: int) -> Any:
  """Lengths, the second dimension, filled up with zeros: tokens of segment 0."""

  def one(x: Array) -> Array:
    missing = -x.shape[1] % multiple
    return jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)]) if missing else x

  return jax.tree.map(one, tree)


# Of the arguments: query, key, value, the table, tokens of queries and of keys, head numbers, dropout keys.
ARGUMENTS = ("vectors", "vectors", "vectors", "table", "tokens", "tokens", "heads", "rows")


def _names(layout: BlockLayout) -> dict[str, tuple[str | None, ...]]:
  """Logical names of the dimensions of each kind of array."""
  batch, length, heads = layout.names
  return {
    "vectors": (batch, length, heads, None),
    "tokens": (batch, length),
    "sums": (batch, length, heads),
    "table": (None, heads),
    "heads": (heads,),
    "rows": (batch,),
  }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(settings, layout, query, key, value, relative, queries, keys, heads, dropout_keys):
  return _attention_forward(settings, layout, query, key, value, relative, queries, keys, heads, dropout_keys)[0]


def _attention_forward(settings, layout, *arguments):
  names = _names(layout)
  local = functools.partial(_forward, settings, layout)
  out, logsumexp = sharding.per_device(local, [names[kind] for kind in ARGUMENTS], (names["vectors"], names["sums"]))(
    *arguments
  )
  out, logsumexp = checkpoint_name(out, RESIDUAL_NAME), checkpoint_name(logsumexp, RESIDUAL_NAME)
  return out, (arguments, out, logsumexp)


def _attention_backward(settings, layout, saved, d_out):
  arguments, out, logsumexp = saved
  names = _names(layout)
  kinds = (*ARGUMENTS, "vectors", "vectors", "sums")
  local = functools.partial(_backward, settings, layout)
  results = (names["vectors"], names["vectors"], names["vectors"], names["table"])
  gradients = sharding.per_device(local, [names[kind] for kind in kinds], results)(*arguments, d_out, out, logsumexp)
  return (*gradients, None, None, None, None)


_attention.defvjp(_attention_forward, _attention_backward)


def _forward(settings, layout, query, key, value, relative, queries, keys, heads, dropout_keys):
  """What one device holds of the output, as `query`, and of log sum exp of the scores [B L H]."""
  batch, length, count, width = query.shape
  shared = key.shape[2]
  cut = functools.partial(_cut, layout)
  query_blocks, source = cut((query, queries)), cut((key, value, keys))
  blocks, size = query_blocks[0].shape[0], query_blocks[0].shape[2]
  sums = (blocks, batch, shared, count // shared, size)
  start = (jnp.zeros((*sums, width), jnp.float32), jnp.full(sums, MASK_VALUE), jnp.zeros(sums))

  def see(state, source):
    def query_block(each):
      (query, queries), state = each

      def key_block(state, source):
        key, value, keys = source
        mask = masks.attention_mask(queries, keys, causal=settings.causal, window=settings.window)

        def add():
          out, greatest, total = state
          values = masks.attention_scores(query, key, relative, queries, keys, mask, settings)
          new = jnp.maximum(greatest, jnp.max(values, axis=-1))
          weights = jnp.where(mask[:, None, None], jnp.exp(values - new[..., None]), 0.0)
          shrink = jnp.exp(greatest - new)
          total = shrink * total + jnp.sum(weights, axis=-1)
          weights = weights * _dropout(settings, weights, queries, keys, heads, dropout_keys)
          new_out = jnp.einsum(
            "BKGLS,BSKA->BKGLA", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
          )
          return shrink[..., None] * out + new_out, new, total

        return lax.cond(jnp.any(mask), add, lambda: state), None

      return lax.scan(key_block, state, source)[0]

    return lax.map(query_block, (query_blocks, state)), source

  (out, greatest, total), _ = _go_round(layout, see, start, source)
  safe = jnp.where(total > 0, total, 1.0)
  out = jnp.moveaxis(out / safe[..., None], 4, 2).reshape(blocks, batch, size, count, width)
  logsumexp = jnp.moveaxis(greatest + jnp.log(safe), 4, 2).reshape(blocks, batch, size, count)
  return _joined(layout, (out.astype(query.dtype), logsumexp), length)


def _backward(settings, layout, query, key, value, relative, queries, keys, heads, dropout_keys, d_out, out, logsumexp):
  """What one device holds of the gradients of query, key, value and the table."""
  length, source_length = query.shape[1], key.shape[1]
  delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # [B L H]: weights times their gradient
  query_blocks = _cut(layout, (query, queries, d_out, logsumexp, delta))
  source = _cut(layout, (key, value, keys))
  zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, jnp.float32))

  def see(state, travelling):
    source, d_source = travelling

    def query_block(carry, each):
      d_source, d_table = carry
      (query, queries, d_out, logsumexp, delta), d_query = each

      def key_block(carry, each):
        (key, value, keys), (d_key, d_value) = each
        mask = masks.attention_mask(queries, keys, causal=settings.causal, window=settings.window)

        def add():
          def score(query, key, relative):
            return masks.attention_scores(query, key, relative, queries, keys, mask, settings)

          values, pull = jax.vjp(score, query, key, relative)
          grouped = d_out.reshape(*d_out.shape[:2], key.shape[2], -1, d_out.shape[-1])
          row = functools.partial(_per_score, values)
          weights = jnp.where(mask[:, None, None], jnp.exp(values - row(logsumexp)), 0.0)
          d_weights = jnp.einsum("BLKGA,BSKA->BKGLS", grouped, value, preferred_element_type=jnp.float32)
          keep = _dropout(settings, weights, queries, keys, heads, dropout_keys)
          new_value = jnp.einsum(
            "BKGLS,BLKGA->BSKA", (weights * keep).astype(d_out.dtype), grouped, preferred_element_type=jnp.float32
          )
          new_query, new_key, new_table = pull(weights * (d_weights * keep - row(delta)))
          return jax.tree.map(jnp.add, (*carry, d_key, d_value), (new_query, new_table, new_key, new_value))

        d_query, d_table, *d_source = lax.cond(jnp.any(mask), add, lambda: (*carry, d_key, d_value))
        return (d_query, d_table), tuple(d_source)

      (d_query, d_table), d_source = lax.scan(key_block, (d_query, d_table), (source, d_source))
      return (d_source, d_table), d_query

    d_queries, d_table = state
    (d_source, d_table), d_queries = lax.scan(query_block, (d_source, d_table), (query_blocks, d_queries))
    return (d_queries, d_table), (source, d_source)

  start = zeros(query_blocks[0]), zeros(relative)
  (d_queries, d_table), (_, d_source) = _go_round(layout, see, start, (source, zeros(source[:2])))
  d_query = _joined(layout, d_queries, length).astype(query.dtype)
  d_key, d_value = (d.astype(key.dtype) for d in _joined(layout, d_source, source_length))
  if relative is not None:
    d_table = lax.psum(d_table, layout.replicated).astype(relative.dtype)
  return d_query, d_key, d_value, d_table


def _dropout(settings, weights, queries, keys, heads, dropout_keys):
  """What multiplies the weights [B K G L S]: 0 where they are dropped."""
  if dropout_keys is None or settings.dropout == 0.0:
    return 1.0
  kept = masks.dropout_keep_mask(dropout_keys, heads, queries.ids, keys.ids, settings.dropout)
  return kept.reshape(weights.shape) / (1.0 - settings.dropout)


def _per_score(values: Array, x: Array) -> Array:
  """[B L H] -> [B K G L 1], to stand beside scores."""
  return jnp.moveaxis(x, 1, 2).reshape(*values.shape[:4], 1)


def _cut(layout: BlockLayout, tree: Any) -> Any:
  """[B L ...] -> [blocks B block ...], lengths filled up with zeros."""

  def one(x: Array) -> Array:
    x = _exchanged(layout, x) if layout.zigzag else x
    halves = 2 if layout.zigzag else 1
    count = halves * -(-x.shape[1] // (halves * layout.block))
    x = _padded(x, count)
    return jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0)

  return jax.tree.map(one, tree)


def _joined(layout: BlockLayout, tree: Any, length: int) -> Any:
  """The reverse of `_cut`."""

  def one(x: Array) -> Array:
    x = jnp.moveaxis(x, 0, 1)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
    return _exchanged(layout, x, back=True) if layout.zigzag else x

  return jax.tree.map(one, tree)


def _exchanged(layout: BlockLayout, x: Array, back: bool = False) -> Array:
  """Of 2 C halves in order, device i's 2i and 2i + 1 become i and 2 C - 1 - i, the one with the even number first."""
  count = lax.axis_size(layout.ring)
  halves = jnp.split(x, 2, axis=1)
  for which in (0, 1):
    numbers = range(which, 2 * count, 2)
    pairs = [(i, number if number < count else 2 * count - 1 - number) for i, number in enumerate(numbers)]
    halves[which] = lax.ppermute(halves[which], layout.ring, [pair[::-1] for pair in pairs] if back else pairs)
  return jnp.concatenate(halves, axis=1)


def _go_round(layout: BlockLayout, see: Callable[[Any, Any], tuple[Any, Any]], state: Any, travelling: Any) -> Any:
  """`see` of the state and what travels, on every device once; in the end all that travels is back where it began."""
  if not layout.ring:
    return see(state, travelling)
  count = lax.axis_size(layout.ring)

  def step(carry: Any, _: None) -> tuple[Any, None]:
    state, travelling = see(*carry)
    send = functools.partial(lax.ppermute, axis_name=layout.ring, perm=[(i, (i + 1) % count) for i in range(count)])
    return (state, jax.tree.map(send, travelling)), None

  return lax.scan(step, (state, travelling), length=count)[0]

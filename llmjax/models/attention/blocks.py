"""How sequences are divided into blocks, and over the devices of a ring.

On a mesh with sharded sequences, keys and values travel around the devices (Liu et al. 2023, Ring Attention,
arXiv:2310.01889). Under a causal mask, contiguous pieces would give the last device the most work (Brandon et al. 2023,
Striped Attention, arXiv:2311.09431). In zigzag order each device has one early and one late piece, and all compute
equally many blocks (Grattafiori et al. 2024, arXiv:2407.21783, section 3.3.2).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from llmjax.distributed import sharding

RESIDUAL_NAME = "attention"  # name of a kernel's outputs in rematerialisation policies, see `models/remat.py`

State = TypeVar("State")
Rotating = TypeVar("Rotating")
Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class BlockLayout:
  """How the rows, sequences and heads of an attention are divided.

  Attributes:
    axes: logical axes of rows, sequences and heads; None where an axis is not sharded.
    ring: mesh axes that shard sequences; () where they are not sharded.
    zigzag: whether each device holds one early and one late piece of the sequence.
    block_size: most tokens of a block.
  """

  axes: tuple[str | None, str | None, str | None]
  ring: tuple[str, ...]
  zigzag: bool
  block_size: int

  @property
  def replicated(self) -> tuple[str, ...]:
    """Mesh axes over which the table of relative biases is replicated, while rows or queries differ."""
    batch = () if self.axes[0] is None else sharding.mesh_axes_of(self.axes[0])
    return (*batch, *self.ring)


def repeat_kv_for_sharding(
  query: Float[Array, "B L H A"], key: Float[Array, "B S K A"], value: Float[Array, "B S K A"]
) -> tuple[str | None, str | None, Float[Array, "B S M A"], Float[Array, "B S M A"]]:
  """Repeat key heads so that each device holds those of its own query heads.

  Args:
    query: queries.
    key: keys.
    value: values.

  Returns:
    The logical axes of rows and of heads, each None if the mesh does not divide it; keys and values with M heads, the
    smallest multiple of K that the mesh divides.
  """
  heads, kv_heads = query.shape[2], key.shape[2]
  batch_axis = sharding.axis_if_divisible("act_batch", query.shape[0])
  shards = sharding.num_shards("act_heads")
  if heads % shards:
    return batch_axis, None, key, value
  repeats = next(n for n in range(1, heads + 1) if kv_heads * n % shards == 0 and heads % (kv_heads * n) == 0)
  if repeats > 1:
    key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
  return batch_axis, "act_heads", key, value


def pad_length(tree: Tree, multiple: int) -> Tree:
  """Pad the second dimension of all leaves [B L ...] with zeros, which are tokens of segment 0, to a multiple."""

  def pad_leaf(x: Array) -> Array:
    missing = -x.shape[1] % multiple
    return jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)]) if missing else x

  return cast(Tree, jax.tree.map(pad_leaf, tree))


def split_blocks(layout: BlockLayout, tree: Tree) -> Tree:
  """Divide leaves [B L ...] into blocks [blocks B block ...] of equal length, padded with zeros."""

  def split_leaf(x: Array) -> Array:
    x = exchange_halves(layout, x) if layout.zigzag else x
    halves = 2 if layout.zigzag else 1
    num_blocks = halves * -(-x.shape[1] // (halves * layout.block_size))
    x = pad_length(x, num_blocks)
    return jnp.moveaxis(x.reshape(x.shape[0], num_blocks, -1, *x.shape[2:]), 1, 0)

  return cast(Tree, jax.tree.map(split_leaf, tree))


def merge_blocks(layout: BlockLayout, tree: Tree, length: int) -> Tree:
  """Join blocks [blocks B block ...] to [B length ...]; the inverse of `split_blocks`."""

  def merge_leaf(x: Array) -> Array:
    x = jnp.moveaxis(x, 0, 1)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
    return exchange_halves(layout, x, inverse=True) if layout.zigzag else x

  return cast(Tree, jax.tree.map(merge_leaf, tree))


def exchange_halves(layout: BlockLayout, x: Array, inverse: bool = False) -> Array:
  """Exchange halves of [B L ...] between the C devices of a ring, from contiguous to zigzag order.

  In contiguous order, device i holds the halves 2 i and 2 i + 1 of the 2 C halves of the sequence. In zigzag order, it
  holds the halves i and 2 C - 1 - i, the even one first.

  Args:
    layout: its `ring` names the mesh axes.
    x: the device's part, whose length is even.
    inverse: from zigzag to contiguous order.
  """
  devices = lax.axis_size(layout.ring)
  halves = jnp.split(x, 2, axis=1)
  for parity in (0, 1):  # device i sends its half 2 i + parity
    numbers = range(parity, 2 * devices, 2)
    routes = [(i, number if number < devices else 2 * devices - 1 - number) for i, number in enumerate(numbers)]
    routes = [route[::-1] for route in routes] if inverse else routes
    halves[parity] = lax.ppermute(halves[parity], layout.ring, routes)
  return jnp.concatenate(halves, axis=1)


def scan_ring(
  layout: BlockLayout,
  visit: Callable[[State, Rotating], tuple[State, Rotating]],
  state: State,
  rotating: Rotating,
) -> tuple[State, Rotating]:
  """Call `visit` on each device with the state and with the blocks of every device in turn.

  Args:
    layout: its `ring` names the mesh axes; without a ring, `visit` is called once.
    visit: returns both of its arguments, updated.
    state: tree that stays on its device.
    rotating: tree that travels around the ring and returns to its device at the end.
  """
  if not layout.ring:
    return visit(state, rotating)
  devices = lax.axis_size(layout.ring)

  def step(carry: tuple[State, Rotating], _: None) -> tuple[tuple[State, Rotating], None]:
    state, rotating = visit(*carry)
    perm = [(i, (i + 1) % devices) for i in range(devices)]
    send = functools.partial(lax.ppermute, axis_name=layout.ring, perm=perm)
    return (state, jax.tree.map(send, rotating)), None

  return lax.scan(step, (state, rotating), length=devices)[0]

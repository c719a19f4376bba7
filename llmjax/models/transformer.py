"""The Transformer: one Block, stacked to an encoder, a decoder, or both; `llmjax.models.config` names every choice.

Parameters, with V, D, ... as in `llmjax.types` and N the layers of a stack:
  embedding/table [V D]      positions/table [P D] (learned)      token_types/table [Y D]      embedding_norm
  {encoder,decoder}/layers/{attention_norm, attention/{query,key,value,out}, cross_norm, cross_attention/..., mlp_norm,
                            mlp/{gate,up,down}} [N ...]
  {encoder,decoder}/{final_norm, relative/table [R H]}
  head_transform, head_norm, head/kernel [D V] (untied), head_bias [V]      pooler, sentence_head
Which of them there are, the config says. Where layers differ, `layers` holds one period of them, `slot_0`, `slot_1`,
..., each stacked [N / period ...], between the odd ones `first` and `last_0`, `last_1`, ...
Unrolled (`scan=False`), all of these become `layers_0`, `layers_1`, ... without a leading N; see `models/layout.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from llmjax.config import ConfigError, nearest
from llmjax.models import layers
from llmjax.models.attention import (
  Attention,
  CachedMemory,
  CachedTokens,
  Context,
  attention_mask,
  cross_mask,
  rotary_angles,
)
from llmjax.models.config import REMAT, TransformerConfig
from llmjax.sharding import constrain
from llmjax.types import Batch, Outputs, Tokens


class Block(nn.Module):
  """Self-attention, in a decoder behind an encoder cross-attention, and the MLP, each added to the residual stream."""

  cfg: TransformerConfig
  kind: str = "global"
  cross: bool = False
  attention_norm: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"], ctx: Context, layer: Int[Array, ""]) -> tuple[Array, Array]:
    keys = layers.fold(ctx.dropout_keys, layer)
    x = constrain(x, "act_batch", "act_len", "act_embed")
    attention = Attention(self.cfg, self.kind, name="attention")
    x = self.add(x, "attention_norm", lambda h: attention(h, ctx, layers.fold(keys, 0)), layers.fold(keys, 1))
    if self.cross:
      cross = Attention(self.cfg, cross=True, name="cross_attention")
      x = self.add(x, "cross_norm", lambda h: cross(h, ctx, layers.fold(keys, 3)), layers.fold(keys, 4))
    mlp = layers.Mlp(self.cfg, name="mlp")
    x = self.add(x, "mlp_norm", lambda h: mlp(h, layers.fold(keys, 5)), layers.fold(keys, 2))
    return x, x

  def add(self, x: Array, name: str, part: Any, keys: Key[Array, " B"] | None) -> Array:
    """x + part(norm(x)), or norm(x + part(x))."""
    c = self.cfg
    norm = layers.norm(c, name) if self.attention_norm or name != "attention_norm" else lambda h: h
    if c.norm_placement == "pre":
      return x + layers.dropout(part(norm(x)), c.dropout, keys)
    return norm(x + layers.dropout(part(x), c.dropout, keys))


class Period(nn.Module):
  """Layers of different kinds, the unit that a stack repeats."""

  cfg: TransformerConfig
  kinds: tuple[str, ...]
  make: Any  # (kind, name) -> Block

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"], ctx: Context, layer: Int[Array, ""]) -> tuple[Array, Array]:
    outputs = []
    for i, kind in enumerate(self.kinds):
      x, _ = self.make(kind=kind, name=f"slot_{i}")(x, ctx, layer + i)
      outputs.append(x)
    return x, jnp.stack(outputs)


class Stack(nn.Module):
  """N Blocks and the final norm. Returns Float[B L D] and every Block's output, Float[N B L D]."""

  cfg: TransformerConfig
  depth: int
  cross: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"], ctx: Context) -> tuple[Array, Array]:
    c = self.cfg
    block = Block
    if c.remat != "none":
      policy = getattr(jax.checkpoint_policies, str(REMAT[c.remat]))
      block = nn.remat(Block, prevent_cse=not c.scan, policy=policy)
    make = functools.partial(block, c, cross=self.cross)
    if c.positions == "relative":
      table = layers.Embedding(
        c.relative_buckets, c.num_heads, ("buckets", "heads"), c.bias_stddev, c.dtype, c.param_dtype, name="relative"
      )
      ctx = dataclasses.replace(ctx, relative=table.table)

    outputs = []

    def single(x: Array, i: int, name: str) -> Array:
      x, out = make(kind=c.kind(i), name=name, attention_norm=c.first_attention_norm or i > 0)(x, ctx, jnp.asarray(i))
      outputs.append(out[None])
      return x

    first, period, repeats = c.layout(self.depth) if c.scan else (self.depth, 1, 0)
    for i in range(first):
      x = single(x, i, "first" if c.scan else f"layers_{i}")
    if repeats:
      kinds = tuple(c.kind(first + i) for i in range(period))
      scanned = nn.scan(
        block if period == 1 else Period,
        variable_axes={"params": 0, "cache": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=repeats,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      settings: tuple[Any, ...] = (kinds[0], self.cross) if period == 1 else (kinds, make)
      x, each = scanned(c, *settings, name="layers")(x, ctx, first + period * jnp.arange(repeats))
      outputs.append(each.reshape(-1, *x.shape))
    for i in range(first + period * repeats, self.depth):
      x = single(x, i, f"last_{i - first - period * repeats}")
    x = layers.norm(c, "final_norm")(x) if c.norm_placement == "pre" else x
    return x, jnp.concatenate(outputs)


class Transformer(nn.Module):
  """An encoder, a decoder or both: `model.apply({"params": params}, batch) -> Outputs`.

  Dropout runs iff `rngs={"dropout": key}` is given. Decoding: `cache_length=S, mutable=["cache"]`; the first call
  makes the cache and fills it with the prompt, each further call appends its tokens. The first call of an
  encoder–decoder runs the encoder; a further batch has no `inputs`.
  """

  cfg: TransformerConfig

  def setup(self) -> None:
    c = self.cfg
    table = functools.partial(layers.Embedding, stddev=c.table_stddev, dtype=c.dtype, param_dtype=c.param_dtype)
    self.embedding = table(c.vocab_size, c.d_model, ("vocab", "embed"))
    if c.positions == "learned":
      self.positions = table(c.max_len, c.d_model, ("positions", "embed"))
    if c.token_types:
      self.token_types = table(c.token_types, c.d_model, ("token_types", "embed"))
    if c.embedding_norm:
      self.embedding_norm = layers.norm(c, None)
    if c.encoder_layers:
      self.encoder = Stack(c, c.encoder_layers)
    if c.decoder_layers:
      self.decoder = Stack(c, c.decoder_layers, cross=bool(c.encoder_layers))
    self.seen, self.read = CachedTokens(), CachedMemory()
    if c.head_transform:
      self.head_transform = layers.projection(c, None, (c.d_model,), ("embed", "head"), c.mlp_bias)
      self.head_norm = layers.norm(c, None)
    if not c.tie_embeddings:
      self.head = layers.projection(c, None, (c.vocab_size,), ("embed", "vocab"), False)
    if c.head_bias:
      self.head_bias = layers.Bias(c.vocab_size, "vocab", c.param_dtype)
    if c.pooler:
      self.pooler = layers.projection(c, None, (c.d_model,), ("embed", "head"), True)
    if c.sentence_classes:
      self.sentence_head = layers.projection(c, None, (c.sentence_classes,), ("embed", "classes"), True)

  def __call__(
    self, batch: Batch, *, cache_length: int | None = None, logits: bool = True, all_hidden: bool = False
  ) -> Outputs:
    """Logits Float[B L V] (None if not asked for), hidden states Float[B L D] and what else the config has."""
    c, batch = self.cfg, jax.tree.map(jnp.asarray, batch)
    keys = layers.row_keys(self.make_rng("dropout"), batch.rows) if self.has_rng("dropout") else None
    memory: Any = None
    memory_each: Any = None
    x: Any = None
    each: Any = None
    if c.encoder_layers and batch.inputs is not None:  # while decoding, caches hold what it gave
      x, each = self.run(self.encoder, batch.inputs, layers.fold(keys, 2))
    if c.decoder_layers:
      memory, memory_each = x, each
      tokens = batch.inputs if c.stacks == "decoder" else batch.targets
      if tokens is None:
        raise ValueError("an encoder–decoder reads batch.targets as well: what its decoder sees, already shifted")
      x, each = self.run(self.decoder, tokens, keys, memory, batch.inputs if c.encoder_layers else None, cache_length)
    if self.is_initializing() and c.sentence_classes:
      self.sentence_logits(x)
    return Outputs(
      logits=self.unembed(x) if logits else None,
      hidden=x,
      pooled=self.pool_first(x, batch.inputs) if c.pooler else None,
      all_hidden=each if all_hidden else None,
      encoder_hidden=memory,
      encoder_all_hidden=memory_each if all_hidden else None,
    )

  def run(
    self,
    stack: Stack,
    tokens: Tokens,
    keys: Key[Array, " B"] | None,
    memory: Float[Array, "B S D"] | None = None,
    memory_tokens: Tokens | None = None,
    cache_length: int | None = None,
  ) -> tuple[Array, Array]:
    """Tokens through one stack: Float[B L D], and every layer's hidden states, the embeddings first, [N+1 B L D]."""
    c, causal = self.cfg, stack.cross or self.cfg.stacks == "decoder"
    key, index = (tokens, None) if cache_length is None else self.seen(tokens, cache_length)
    if stack.cross and cache_length is not None:
      memory_tokens = self.read(memory_tokens)
    kinds = {c.kind(i) for i in range(stack.depth)}
    windows = {kind: c.window if kind == "local" else None for kind in sorted(kinds)}
    bases = {"global": c.rotary_base, "local": c.local_rotary_base or c.rotary_base}
    ctx = Context(
      query=tokens,
      key=key,
      masks={kind: attention_mask(tokens, key, causal=causal, window=window) for kind, window in windows.items()},
      rotary={kind: rotary_angles(tokens.positions, c.head_width, bases[kind]) for kind in windows}
      if c.positions == "rotary"
      else {},
      dropout_keys=layers.fold(keys, 0),
      memory=memory,
      memory_mask=cross_mask(tokens, memory_tokens) if memory_tokens is not None else None,
      cache_index=index,
      cache_length=cache_length,
      causal=causal,
    )
    x = embedded = self.embed(tokens, layers.fold(keys, 1))
    x, each = stack(x, ctx)
    return x, jnp.concatenate([embedded[None], each])

  def embed(self, tokens: Tokens, keys: Key[Array, " B"] | None) -> Float[Array, "B L D"]:
    """The sum of a token's embeddings."""
    c = self.cfg
    x = self.embedding(tokens.ids)
    if c.positions == "learned":
      x = x + self.positions(tokens.positions)
    if c.token_types:
      x = x + self.token_types(jnp.zeros_like(tokens.ids) if tokens.token_types is None else tokens.token_types)
    if c.embedding_norm:
      x = self.embedding_norm(x)
    return layers.dropout(x, c.dropout, keys)

  def unembed(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
    """Hidden states to logits, float32."""
    c = self.cfg
    if c.head_transform:
      hidden = self.head_norm(layers.ACTIVATIONS[c.activation](self.head_transform(hidden)))
    if c.scale_tied_logits:
      hidden = hidden * c.d_model**-0.5
    logits = self.embedding.attend(hidden) if c.tie_embeddings else self.head(hidden)
    logits = constrain(logits.astype(jnp.float32), "act_batch", "act_len", "act_vocab")
    return self.head_bias(logits) if c.head_bias else logits

  def pool(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """The pooler; it means something for the first token of an example."""
    return jnp.tanh(self.pooler(hidden))

  def pool_first(self, hidden: Float[Array, "B L D"], tokens: Tokens) -> Float[Array, "B D"]:
    """The pooler's output for the first real token of every row."""
    first = jnp.argmax(tokens.segments > 0, axis=1)
    return self.pool(jnp.take_along_axis(hidden, first[:, None, None], axis=1))[:, 0]

  def sentence_logits(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L C"]:
    """What the sentence head says of every position, float32; it means something for the first token of an example."""
    return self.sentence_head(self.pool(hidden)).astype(jnp.float32)


MODELS = {"transformer": "llmjax.models.transformer:make_transformer"}


def make_transformer(*, vocab_size: int, **fields: Any) -> Transformer:
  """A Transformer from config keys."""
  known = {f.name for f in dataclasses.fields(TransformerConfig)}
  for key in fields:
    if key not in known:
      raise ConfigError(f"model.{key} is no such key; {nearest(key, known)}")
  return Transformer(TransformerConfig(vocab_size=vocab_size, **fields))

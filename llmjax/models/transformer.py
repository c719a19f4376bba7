"""The Transformer: one Block, stacked to an encoder, a decoder, or both; `llmjax.config.model` names every choice.

Parameters, with V, D, ... as in `llmjax.types` and N the layers of a stack:
  embedding/table [V D]      positions/table [P D] (learned)      token_types/table [Y D]      embedding_norm
  project_in, project_out (where tables have a width of their own)
  {encoder,decoder}/layers/{attention_norm, attention/{query,key,value,out}, cross_norm, cross_attention/..., mlp_norm,
                            mlp/{gate,up,down}} [N ...]; attention_post_norm, mlp_post_norm (sandwich);
    experts: mlp/{router/kernel [D E], gate, up [E D F], down [E F D], shared, shared_gate}
  {encoder,decoder}/{final_norm, relative/table [R H]}
  head_transform, head_norm, head/kernel [D V] (untied) or [D C], head_bias [V]      pooler, sentence_head
  crf/{start [C], matrix [C C], end [C]}
  beside any kernel [I O] with an adapter: lora_a [I r], lora_b [r O]
Which of them there are, the config says. Where layers differ, `layers` holds one period of them, `slot_0`, `slot_1`,
..., each stacked [N / period ...], between the odd ones `first` and `last_0`, `last_1`, ...
Unrolled (`scan=False`), all of these become `layers_0`, `layers_1`, ... without a leading N; see `models/layout.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int, Key

from llmjax.config import ConfigError, suggest_name
from llmjax.config.model import TransformerConfig
from llmjax.config.rotary_scaling import make_rotary_scaling
from llmjax.distributed.sharding import constrain
from llmjax.models import layers
from llmjax.models.attention import kernels
from llmjax.models.attention.masks import attention_mask
from llmjax.models.attention.module import Attention, CachedMemory, CachedTokens, Context
from llmjax.models.moe import MixtureMlp, Routing
from llmjax.models.mup import kernel_input_multiplier
from llmjax.models.remat import REMAT
from llmjax.models.rotary import angles, frequencies
from llmjax.types import Batch, Outputs, Tokens


@struct.dataclass
class LayerOutputs:
  """What is kept of every layer; leaves are [N ...] behind a stack."""

  hidden: Array  # Float[B L D]
  routing: Routing | None = None


class Block(nn.Module):
  """Self-attention, in a decoder behind an encoder cross-attention, and the MLP, each added to the residual stream.

  Returns the stream, and what is kept of every layer: the stream again and, with experts, their `Routing`.
  """

  cfg: TransformerConfig
  kind: str = "global"
  cross: bool = False
  attention_norm: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"], ctx: Context, layer: Int[Array, ""]) -> tuple[Array, LayerOutputs]:
    c, keys = self.cfg, layers.fold_in_rows(ctx.dropout_keys, layer)
    routing = None
    x = constrain(x, "act_batch", "act_len", "act_embed")

    def mlp(h):
      nonlocal routing
      if not c.num_experts:
        return layers.Mlp(c, c.ff_width, name="mlp")(h, layers.fold_in_rows(keys, 5))
      h, routing = MixtureMlp(c, name="mlp")(h, layers.fold_in_rows(keys, 5), ctx.query.segments)
      return h

    attention = Attention(c, self.kind, name="attention")
    attended = self.branch(
      x, "attention", lambda h: attention(h, ctx, layers.fold_in_rows(keys, 0)), layers.fold_in_rows(keys, 1)
    )
    if c.parallel_residual:
      x = x + attended + self.branch(x, "mlp", mlp, layers.fold_in_rows(keys, 2))
      return x, LayerOutputs(x, routing)
    x = self.add(x, "attention", attended)
    if self.cross:
      cross = Attention(c, cross=True, name="cross_attention")
      crossed = self.branch(
        x, "cross", lambda h: cross(h, ctx, layers.fold_in_rows(keys, 3)), layers.fold_in_rows(keys, 4)
      )
      x = self.add(x, "cross", crossed)
    x = self.add(x, "mlp", self.branch(x, "mlp", mlp, layers.fold_in_rows(keys, 2)))
    return x, LayerOutputs(x, routing)

  def branch(self, x: Array, name: str, part: Callable[[Array], Array], keys: Key[Array, " B"] | None) -> Array:
    """What a part of the Block adds to the residual stream."""
    c = self.cfg
    if c.norm_placement != "post" and (self.attention_norm or name != "attention"):
      y = part(layers.make_norm(c, f"{name}_norm")(x))
    else:
      y = part(x)
    y = layers.make_norm(c, f"{name}_post_norm")(y) if c.norm_placement == "sandwich" else y
    return layers.dropout(y, c.dropout, keys)

  def add(self, x: Array, name: str, branch: Array) -> Array:
    return layers.make_norm(self.cfg, f"{name}_norm")(x + branch) if self.cfg.norm_placement == "post" else x + branch


class LayerGroup(nn.Module):
  """Layers of different kinds, the unit that a stack repeats."""

  cfg: TransformerConfig
  kinds: tuple[str, ...]
  make: Any  # (kind, name) -> Block

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"], ctx: Context, layer: Int[Array, ""]) -> tuple[Array, LayerOutputs]:
    outputs = []
    for i, kind in enumerate(self.kinds):
      x, out = self.make(kind=kind, name=f"slot_{i}")(x, ctx, layer + i)
      outputs.append(out)
    return x, jax.tree.map(lambda *each: jnp.stack(each), *outputs)


class Stack(nn.Module):
  """N Blocks and the final norm. Returns Float[B L D] and every Block's outputs, [N ...]."""

  cfg: TransformerConfig
  depth: int
  cross: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"], ctx: Context) -> tuple[Array, LayerOutputs]:
    c = self.cfg
    block = Block
    if c.remat != "none":
      block = nn.remat(Block, prevent_cse=not c.scan, policy=REMAT[c.remat])
    make = functools.partial(block, c, cross=self.cross)
    if c.positions == "relative":
      table = layers.Embedding(
        c.relative_buckets, c.num_heads, ("buckets", "heads"), c.bias_stddev, c.dtype, c.param_dtype, name="relative"
      )
      ctx = dataclasses.replace(ctx, relative=table.table)

    outputs = []

    def single(x: Array, i: int, name: str) -> Array:
      x, out = make(kind=c.kind(i), name=name, attention_norm=c.first_attention_norm or i > 0)(x, ctx, jnp.asarray(i))
      outputs.append(jax.tree.map(lambda y: y[None], out))
      return x

    first, period, repeats = c.layout(self.depth) if c.scan else (self.depth, 1, 0)
    for i in range(first):
      x = single(x, i, "first" if c.scan else f"layers_{i}")
    if repeats:
      kinds = tuple(c.kind(first + i) for i in range(period))
      scanned = nn.scan(
        block if period == 1 else LayerGroup,
        variable_axes={"params": 0, "cache": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=repeats,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      settings: tuple[Any, ...] = (kinds[0], self.cross) if period == 1 else (kinds, make)
      x, each = scanned(c, *settings, name="layers")(x, ctx, first + period * jnp.arange(repeats))
      if period > 1:  # [periods slots ...]
        each = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), each)
      outputs.append(each)
    for i in range(first + period * repeats, self.depth):
      x = single(x, i, f"last_{i - first - period * repeats}")
    x = layers.make_norm(c, "final_norm")(x) if c.norm_placement != "post" else x
    return x, jax.tree.map(lambda *each: jnp.concatenate(each), *outputs)


class Crf(nn.Module):
  """Scores of a tag at a sentence's beginning and end, and of one after another: Float[C], Float[C], Float[C C]."""

  cfg: TransformerConfig

  @nn.compact
  def __call__(self) -> dict[str, Array]:
    classes = self.cfg.num_classes
    shapes = {"start": (classes,), "matrix": (classes, classes), "end": (classes,)}

    def one(name: str, shape: tuple[int, ...]) -> Array:
      axes = ("classes", "classes")[: len(shape)]
      return layers.declare_parameter(self, name, nn.initializers.zeros, axes, shape, self.cfg.param_dtype)

    return {name: one(name, shape) for name, shape in shapes.items()}


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
    self.embedding = table(c.vocab_size, c.table_width, ("vocab", "embed"))
    if c.embedding_width is not None:
      self.project_in = layers.make_projection(c, None, (c.d_model,), ("head", "embed"), False)
      if c.head == "lm":
        self.project_out = layers.make_projection(c, None, (c.table_width,), ("embed", "head"), False)
    if c.positions == "learned":
      self.positions = table(c.max_len, c.d_model, ("positions", "embed"))
    if c.token_types:
      self.token_types = table(c.token_types, c.d_model, ("token_types", "embed"))
    if c.embedding_norm:
      self.embedding_norm = layers.make_norm(c, None)
    if c.encoder_layers:
      self.encoder = Stack(c, c.encoder_layers)
    if c.decoder_layers:
      self.decoder = Stack(c, c.decoder_layers, cross=bool(c.encoder_layers))
    self.seen, self.read = CachedTokens(), CachedMemory()
    if c.head_transform:
      self.head_transform = layers.make_projection(c, None, (c.d_model,), ("embed", "head"), c.mlp_bias)
      self.head_norm = layers.make_norm(c, None)
    if c.head != "lm":
      self.head = layers.make_projection(c, None, (c.num_classes,), ("embed", "classes"), c.head_bias)
    else:
      if not c.tie_embeddings:
        self.head = layers.make_projection(c, None, (c.vocab_size,), ("embed", "vocab"), False)
      if c.head_bias:
        self.head_bias = layers.Bias(c.vocab_size, "vocab", c.param_dtype)
    if c.pooler:
      self.pooler = layers.make_projection(c, None, (c.d_model,), ("embed", "head"), True)
    if c.crf:
      self.crf = Crf(c)
    if c.sentence_classes:
      self.sentence_head = layers.make_projection(c, None, (c.sentence_classes,), ("embed", "classes"), True)

  def __call__(
    self, batch: Batch, *, cache_length: int | None = None, logits: bool = True, all_hidden: bool = False
  ) -> Outputs:
    """Logits as `cfg.head` says (None if not asked for), hidden states Float[B L D] and what else the config has."""
    c, batch = self.cfg, jax.tree.map(jnp.asarray, batch)
    keys = layers.row_keys(self.make_rng("dropout"), batch.rows) if self.has_rng("dropout") else None
    memory: Any = None
    memory_each: Any = None
    x: Any = None
    each: Any = None
    if c.encoder_layers and batch.inputs is not None:  # while decoding, caches hold what it gave
      x, each = self.run(self.encoder, batch.inputs, layers.fold_in_rows(keys, 2))
    if c.decoder_layers:
      memory, memory_each = x, each
      tokens = batch.inputs if c.stacks == "decoder" else batch.targets
      if tokens is None:
        raise ValueError("an encoder–decoder reads batch.targets as well: what its decoder sees, already shifted")
      x, each = self.run(self.decoder, tokens, keys, memory, batch.inputs if c.encoder_layers else None, cache_length)
    if self.is_initializing() and c.sentence_classes:
      self.sentence_logits(x)
    scores = self.unembed(x) if c.head == "lm" else self.classify(x, batch.inputs, layers.fold_in_rows(keys, 3))
    return Outputs(
      logits=scores if logits else None,
      hidden=x,
      pooled=self.pool(batch.inputs.select(x, "first")) if c.pooler else None,
      transitions=self.crf() if c.crf else None,
      all_hidden=each.hidden if all_hidden else None,
      encoder_hidden=memory,
      encoder_all_hidden=memory_each.hidden if all_hidden and memory_each is not None else None,
      routing=[out.routing for out in (memory_each, each) if out is not None and out.routing is not None],
    )

  def run(
    self,
    stack: Stack,
    tokens: Tokens,
    keys: Key[Array, " B"] | None,
    memory: Float[Array, "B S D"] | None = None,
    memory_tokens: Tokens | None = None,
    cache_length: int | None = None,
  ) -> tuple[Array, LayerOutputs]:
    """Tokens through one stack: Float[B L D], and every layer's outputs, hidden states with the embeddings first."""
    c, causal = self.cfg, stack.cross or self.cfg.stacks == "decoder"
    key, index = (tokens, None) if cache_length is None else self.seen(tokens, cache_length)
    if stack.cross and cache_length is not None:
      memory_tokens = self.read(memory_tokens)
    kinds = sorted({c.kind(i) for i in range(stack.depth)})
    kernel = cross_kernel = "xla"
    if cache_length is None and not self.is_initializing():
      choose = functools.partial(kernels.choose_kernel, c, tokens, training=keys is not None)
      kernel = choose(key, causal=causal)
      cross_kernel = kernel if memory_tokens is None else choose(memory_tokens, cross=True)
    masks = {}
    if kernel in kernels.MASKED:
      windows = {kind: c.window if kind == "local" else None for kind in kinds}
      masks = {kind: attention_mask(tokens, key, causal=causal, window=windows[kind]) for kind in kinds}
    if memory_tokens is not None and cross_kernel in kernels.MASKED:
      masks["cross"] = attention_mask(tokens, memory_tokens, causal=False)
    ctx = Context(
      query=tokens,
      key=key,
      masks=masks,
      rotary={kind: self.rotary(tokens, kind) for kind in kinds} if c.positions == "rotary" else {},
      dropout_keys=layers.fold_in_rows(keys, 0),
      memory=memory,
      memory_tokens=memory_tokens,
      cache_index=index,
      cache_length=cache_length,
      causal=causal,
      kernel=kernel,
      cross_kernel=cross_kernel,
    )
    x = embedded = self.embed(tokens, layers.fold_in_rows(keys, 1))
    x, each = stack(x, ctx)
    return x, dataclasses.replace(each, hidden=jnp.concatenate([embedded[None], each.hidden]))

  def rotary(self, tokens: Tokens, kind: str) -> tuple[Array, Array]:
    """sin and cos of the angles in layers of a kind."""
    c = self.cfg
    base, scaling = c.rotary_base, c.rotary_scaling
    if kind == "local" and c.local_rotary_base is not None:
      base, scaling = c.local_rotary_base, None
    rates = frequencies(c.rotary_width, base, c.max_len, scaling)
    return angles(tokens.positions, rates, 1.0 if scaling is None else scaling.amplitude)

  def embed(self, tokens: Tokens, keys: Key[Array, " B"] | None) -> Float[Array, "B L D"]:
    """The sum of a token's embeddings."""
    c = self.cfg
    x = self.embedding(tokens.ids)
    if c.embedding_width is not None:
      x = self.project_in(x)
    if c.scale_embeddings:
      x = x * jnp.asarray(c.base_d_model**0.5, x.dtype)
    if c.positions == "learned":
      x = x + self.positions(tokens.positions)
    if c.token_types:
      types = jnp.zeros_like(tokens.ids) if tokens.token_types is None else tokens.token_types
      x = x + self.token_types(jnp.minimum(types, c.token_types - 1))  # RoBERTa knows one type alone
    if c.embedding_norm:
      x = self.embedding_norm(x)
    return layers.dropout(x, c.dropout, keys)

  def unembed(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
    """Hidden states to logits, float32."""
    c = self.cfg
    hidden = self.transform(hidden)
    if c.scale_tied_logits:
      hidden = hidden * c.base_d_model**-0.5
    if c.embedding_width is not None:
      hidden = self.project_out(hidden)
    if c.tie_embeddings:
      logits = self.embedding.attend(layers.scale(hidden, kernel_input_multiplier(c, ("embed", "vocab"))))
    else:
      logits = self.head(hidden)
    logits = constrain(logits.astype(jnp.float32), "act_batch", "act_len", "act_vocab")
    logits = self.head_bias(logits) if c.head_bias else logits
    return logits if c.logit_softcap is None else c.logit_softcap * jnp.tanh(logits / c.logit_softcap)

  def classify(self, hidden: Float[Array, "B L D"], tokens: Tokens, keys: Key[Array, " B"] | None) -> Array:
    """Hidden states to the logits of a head on sequences, Float[B C], tokens, Float[B L C], or spans, Float[B L 2]."""
    c = self.cfg
    if c.head == "sequence":
      hidden = tokens.select(hidden, c.pooling).astype(hidden.dtype)
      hidden = self.pool(hidden) if c.pooler else hidden
    hidden = layers.dropout(hidden, c.dropout, keys)
    return self.head(self.transform(hidden)).astype(jnp.float32)

  def transform(self, hidden: Array) -> Array:
    """What stands between the last layer and the output projection, if anything does."""
    c = self.cfg
    return self.head_norm(layers.ACTIVATIONS[c.activation](self.head_transform(hidden))) if c.head_transform else hidden

  def pool(self, hidden: Array) -> Array:
    """The pooler; it means something for the first token of an example."""
    name = self.cfg.pooler_activation
    return (jnp.tanh if name == "tanh" else layers.ACTIVATIONS[name])(self.pooler(hidden))

  def sentence_logits(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L C"]:
    """What the sentence head says of every position, float32; it means something for the first token of an example."""
    return self.sentence_head(self.pool(hidden)).astype(jnp.float32)


MODELS = {"transformer": "llmjax.models.transformer:make_transformer"}


def make_transformer(*, vocab_size: int, **fields: Any) -> Transformer:
  """A Transformer from config keys."""
  known = {f.name for f in dataclasses.fields(TransformerConfig)}
  for key in fields:
    if key not in known:
      raise ConfigError(f"model.{key} is no such key; {suggest_name(key, known)}")
  scaling = fields.get("rotary_scaling")
  if isinstance(scaling, Mapping):  # {} is none
    fields["rotary_scaling"] = make_rotary_scaling(scaling) if scaling else None
  return Transformer(TransformerConfig(vocab_size=vocab_size, **fields))

"""The Transformer: one Block, stacked to an encoder, a decoder, or both. `TransformerConfig` names every choice.

Parameters, with V, D, ... as in `llmjax.types` and N the layers of a stack:
  embedding/table [V D]      positions/table [P D] (learned)      token_types/table [Y D]      embedding_norm
  {encoder,decoder}/layers/{attention_norm, attention/{query,key,value,out}, cross_norm, cross_attention/..., mlp_norm,
                            mlp/{gate,up,down}} [N ...]
  {encoder,decoder}/{final_norm, relative/table [R H]}
  head_transform, head_norm, head/kernel [D V] (untied), head_bias [V]      pooler, sentence_head
Which of them there are, the config says. Where layers differ, `layers` holds one period of them, `slot_0`, `slot_1`,
..., each stacked [N / period ...], between the odd ones `first` and `last_0`, `last_1`, ...
Unrolled (`scan=False`), all of these become `layers_0`, `layers_1`, ... without a leading N; see `locations`.
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
from llmjax.sharding import constrain
from llmjax.types import Batch, Outputs, Tokens

# What a rematerialised layer keeps for the backward pass; everything else is computed again.
REMAT = {
  "none": None,  # keep all: no rematerialisation
  "full": "nothing_saveable",
  "dots": "dots_saveable",
  "weight_dots": "dots_with_no_batch_dims_saveable",
}

CHOICES = {
  "norm": ("layernorm", "rmsnorm"),
  "norm_placement": ("pre", "post"),
  "positions": ("learned", "rotary", "relative", "none"),
  "activation": tuple(layers.ACTIVATIONS),
  "residual_init": ("scaled", "plain", "zeros"),
  "remat": tuple(REMAT),
  "dtype": ("float32", "bfloat16", "float16"),
  "param_dtype": ("float32", "bfloat16", "float16"),
}

KINDS = ("global", "local")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """A Transformer, in full.

  Attributes:
    vocab_size: V.
    d_model: D, the width of the residual stream.
    decoder_layers, encoder_layers: N of each stack. An encoder sees both ways, a decoder back; with both, the decoder
      also attends to the encoder's output.
    num_heads: H; `num_kv_heads`: K, None = H (1 is multi-query, Shazeer 2019; between is grouped, Ainslie et al. 2023).
    head_dim: A, None = D / H.
    d_ff: F, None = 4 D.
    max_len: rows of the learned position table, and the longest context that generation uses.
    norm: "layernorm" or "rmsnorm"; `norm_placement`: "pre", before each part and after the last, or "post", after each
      sum with the residual stream (Vaswani et al. 2017, BERT).
    embedding_norm: also normalise the embeddings (BERT, ModernBERT). `first_attention_norm`: False leaves out the norm
      before the first layer's attention (ModernBERT, where the embeddings' stands right before it).
    positions: "learned", "rotary", "relative" (T5's biases, a table for each stack) or "none".
    rotary_base: theta of the rotary frequencies; `local_rotary_base`: of local layers, None = the same.
    relative_buckets, relative_max_distance: R, and from where on all distances are one; see `relative_buckets`.
    attention_pattern: "global" or "local" for each layer, repeated over the stack. `window`: what a local layer sees,
      the latest keys in a decoder, half as many on either side in an encoder; see `attention_mask`.
    attention_scale: of query-key products, None = 1 / sqrt(A).
    token_types: entries of the table of token types (BERT's sentences A and B), 0 = none.
    activation: a name in `layers.ACTIVATIONS`; `gated` multiplies it with a second projection (SwiGLU and kin).
    qk_norm: normalise queries and keys per head (Dehghani et al. 2023).
    tie_embeddings: the output projection is the embedding table; `scale_tied_logits` then multiplies by 1 / sqrt(D)
      (T5 v1.0).
    head_transform: a projection, the activation and a norm before the output projection; `head_bias`: a bias after it.
    pooler: tanh of a projection of the first token (Devlin et al. 2019); `sentence_classes`: C of a head on it.
    bidirectional_prompt: generation reads its prompt as a prefix, seen both ways: for models trained as prefix LM.
    dropout: on embeddings and on what each part adds to the residual stream.
    attention_dropout, mlp_dropout: on attention weights, and inside the MLP.
    init_stddev: of kernels, None = 1/sqrt(fan-in); `embedding_stddev`: of tables, None = that of kernels.
    residual_init: projections back into the residual stream: "scaled" by 1/sqrt(2 N) (GPT-2), "plain" or "zeros".
    dtype: compute type; softmax, norm statistics and logits are float32 always. `param_dtype`: of the parameters.
    scan: one compiled layer, looped over stacked parameters; False unrolls.
    remat: a name in `REMAT`.
  """

  vocab_size: int
  d_model: int
  decoder_layers: int
  num_heads: int
  max_len: int
  encoder_layers: int = 0
  num_kv_heads: int | None = None
  head_dim: int | None = None
  d_ff: int | None = None
  norm: str = "layernorm"
  norm_epsilon: float = 1e-5
  norm_bias: bool = True
  norm_placement: str = "pre"
  embedding_norm: bool = False
  first_attention_norm: bool = True
  positions: str = "learned"
  rotary_base: float = 10_000.0
  local_rotary_base: float | None = None
  relative_buckets: int = 32
  relative_max_distance: int = 128
  attention_pattern: tuple[str, ...] = ("global",)
  window: int | None = None
  attention_scale: float | None = None
  token_types: int = 0
  activation: str = "gelu"
  gated: bool = False
  qkv_bias: bool = True
  attention_out_bias: bool = True
  mlp_bias: bool = True
  qk_norm: bool = False
  tie_embeddings: bool = True
  scale_tied_logits: bool = False
  head_transform: bool = False
  head_bias: bool = False
  pooler: bool = False
  sentence_classes: int = 0
  bidirectional_prompt: bool = False
  dropout: float = 0.0
  attention_dropout: float = 0.0
  mlp_dropout: float = 0.0
  init_stddev: float | None = 0.02
  embedding_stddev: float | None = None
  residual_init: str = "scaled"
  dtype: str = "float32"
  param_dtype: str = "float32"
  scan: bool = True
  remat: str = "none"

  def __post_init__(self) -> None:
    for field, allowed in CHOICES.items():
      value = getattr(self, field)
      if value not in allowed:
        raise ConfigError(f"model.{field}={value!r}: allowed are {', '.join(allowed)}; {nearest(str(value), allowed)}")
    for field in ("vocab_size", "d_model", "num_heads", "max_len"):
      if getattr(self, field) < 1:
        raise ConfigError(f"model.{field}={getattr(self, field)} must be at least 1")
    for field in ("decoder_layers", "encoder_layers", "token_types", "sentence_classes"):
      if getattr(self, field) < 0:
        raise ConfigError(f"model.{field}={getattr(self, field)} must not be negative")
    if not self.decoder_layers + self.encoder_layers:
      raise ConfigError("model.decoder_layers and model.encoder_layers are both 0; give at least one stack layers")
    for field in ("num_kv_heads", "head_dim", "d_ff", "window"):
      if getattr(self, field) is not None and getattr(self, field) < 1:
        raise ConfigError(f"model.{field}={getattr(self, field)} must be at least 1, or none")
    for field in ("init_stddev", "embedding_stddev"):
      if getattr(self, field) is not None and not getattr(self, field) >= 0:  # nan is not either
        raise ConfigError(f"model.{field}={getattr(self, field)} must not be negative")
    for field in ("dropout", "attention_dropout", "mlp_dropout"):
      if not 0 <= getattr(self, field) < 1:
        raise ConfigError(f"model.{field}={getattr(self, field)} must be in [0, 1)")
    if self.head_dim is None and self.d_model % self.num_heads:
      raise ConfigError(
        f"model.d_model={self.d_model} is not divisible by model.num_heads={self.num_heads}; set model.head_dim"
      )
    if self.num_heads % self.kv_heads:
      raise ConfigError(f"model.num_kv_heads={self.kv_heads} must divide model.num_heads={self.num_heads}")
    if self.positions == "rotary" and self.head_width % 2:
      raise ConfigError(f"model.head_dim={self.head_width} must be even for rotary positions")
    if self.positions == "relative" and not 4 <= self.relative_buckets < self.relative_max_distance:
      raise ConfigError(
        f"model.relative_buckets={self.relative_buckets} must be at least 4 and less than "
        f"model.relative_max_distance={self.relative_max_distance}"
      )
    object.__setattr__(self, "attention_pattern", tuple(self.attention_pattern))  # a list, where it comes from JSON
    for kind in self.attention_pattern or ("",):
      if kind not in KINDS:
        raise ConfigError(f"model.attention_pattern: {kind!r} is not allowed; each layer is one of {', '.join(KINDS)}")
    if "local" in self.attention_pattern and self.window is None:
      raise ConfigError("model.attention_pattern has local layers, so model.window must say how many keys they see")
    if self.norm_placement == "post" and not self.first_attention_norm:
      raise ConfigError("model.first_attention_norm=False leaves out a norm that norm_placement='post' does not have")
    if self.scale_tied_logits and not self.tie_embeddings:
      raise ConfigError("model.scale_tied_logits=True needs model.tie_embeddings=True")
    if self.pooler and self.stacks != "encoder":
      raise ConfigError("model.pooler=True needs a model of encoder_layers alone: only its first token has seen a text")
    if self.bidirectional_prompt and self.stacks == "encoder":
      raise ConfigError(
        "model.bidirectional_prompt=True says how a decoder reads a prompt, and there is none; unset it"
      )
    if self.window is not None and "local" not in self.attention_pattern:
      raise ConfigError(f"model.window={self.window} is for local layers, and model.attention_pattern has none")
    if self.local_rotary_base is not None and not ("local" in self.attention_pattern and self.positions == "rotary"):
      raise ConfigError(
        f"model.local_rotary_base={self.local_rotary_base} is for rotary positions in local layers, and there are none"
      )
    if self.sentence_classes and not self.pooler:
      raise ConfigError(
        f"model.sentence_classes={self.sentence_classes} needs model.pooler=True, which feeds that head"
      )

  @property
  def kv_heads(self) -> int:
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

  @property
  def head_width(self) -> int:
    return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

  @property
  def ff_width(self) -> int:
    return 4 * self.d_model if self.d_ff is None else self.d_ff

  @property
  def table_stddev(self) -> float:
    stddev = self.init_stddev if self.embedding_stddev is None else self.embedding_stddev
    return self.d_model**-0.5 if stddev is None else stddev

  @property
  def bias_stddev(self) -> float:
    """Of the relative biases."""
    return self.d_model**-0.5 if self.init_stddev is None else self.init_stddev

  @property
  def residual_scale(self) -> float:
    depth = max(self.decoder_layers, self.encoder_layers)
    return {"scaled": (2 * depth) ** -0.5, "plain": 1.0, "zeros": 0.0}[self.residual_init]

  @property
  def query_scale(self) -> float:
    """Of the initial query kernel: so that scores begin alike, whatever `attention_scale`."""
    return 1.0 if self.attention_scale is None else self.head_width**-0.5 / self.attention_scale

  @property
  def stacks(self) -> str:
    """ "encoder", "decoder" or "both"."""
    return "decoder" if not self.encoder_layers else "both" if self.decoder_layers else "encoder"

  def kind(self, layer: int) -> str:
    """ "global" or "local"."""
    return self.attention_pattern[layer % len(self.attention_pattern)]

  def layout(self, depth: int) -> tuple[int, int, int]:
    """(odd layers in front, layers of a period, periods) of a stack; what is left over stands behind."""
    period = len(self.attention_pattern)
    first = 0 if self.first_attention_norm else min(1, depth)
    return first, period, (depth - first) // period


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


Location = tuple[tuple[str, ...], int | None]


def locations(cfg: TransformerConfig, depth: int) -> list[Location]:
  """Where the parameters of every layer of a scanned stack are: (path, index in the leading dimension or None)."""
  first, period, repeats = cfg.layout(depth)
  slots: list[tuple[str, ...]] = [("layers",)] if period == 1 else [("layers", f"slot_{i}") for i in range(period)]
  middle: list[Location] = [(slots[i % period], i // period) for i in range(period * repeats)]
  last: list[Location] = [((f"last_{i}",), None) for i in range(depth - first - period * repeats)]
  return [*[(("first",), None)] * first, *middle, *last]


def unstack(params: Any, cfg: TransformerConfig) -> Any:
  """Scanned parameters [N ...] -> unrolled: `layers` becomes `layers_0` ... `layers_{N-1}`, in each stack."""

  def one(stack: Any, depth: int) -> Any:
    found = locations(cfg, depth)
    out = {k: v for k, v in stack.items() if k not in {path[0] for path, _ in found}}
    for i, (path, index) in enumerate(found):
      part = functools.reduce(lambda tree, name: tree[name], path, stack)
      out[f"layers_{i}"] = part if index is None else jax.tree.map(lambda x, index=index: x[index], part)
    return out

  return _each_stack(one, params, cfg)


def stack(params: Any, cfg: TransformerConfig) -> Any:
  """Unrolled parameters -> scanned; the inverse of `unstack`."""

  def one(stack: Any, depth: int) -> Any:
    out = {k: v for k, v in stack.items() if not k.startswith("layers_")}
    parts: dict[tuple[str, ...], list[Any]] = {}
    for i, (path, _) in enumerate(locations(cfg, depth)):
      parts.setdefault(path, []).append(stack[f"layers_{i}"])
    stacked = {path for path, index in locations(cfg, depth) if index is not None}
    for path, each in parts.items():
      holder = out if len(path) == 1 else out.setdefault(path[0], {})
      holder[path[-1]] = jax.tree.map(lambda *xs: jnp.stack(xs), *each) if path in stacked else each[0]
    return out

  return _each_stack(one, params, cfg)


def _each_stack(function: Any, params: Any, cfg: TransformerConfig) -> Any:
  depths = {"encoder": cfg.encoder_layers, "decoder": cfg.decoder_layers}
  return {**params, **{name: function(params[name], depth) for name, depth in depths.items() if depth}}


MODELS = {"transformer": "llmjax.models.transformer:make_transformer"}


def make_transformer(*, vocab_size: int, **fields: Any) -> Transformer:
  """A Transformer from config keys."""
  known = {f.name for f in dataclasses.fields(TransformerConfig)}
  for key in fields:
    if key not in known:
      raise ConfigError(f"model.{key} is no such key; {nearest(key, known)}")
  return Transformer(TransformerConfig(vocab_size=vocab_size, **fields))

"""The Transformer: one Block, stacked. `TransformerConfig` names every architectural choice in the field's words.

Parameters, with N the layers of a stack:
  embedding/table [V D]      positions/table [P D] (learned positions only)      head/kernel [D V] (untied only)
  decoder/layers/{attention_norm, attention/{query,key,value,out}, mlp_norm, mlp/{gate,up,down}} [N ...]
  decoder/final_norm
Unrolled (`scan=False`), `layers` becomes `layers_0`, `layers_1`, ... without the leading N.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from llmjax.config import ConfigError, nearest
from llmjax.models import layers
from llmjax.models.attention import Attention, CachedTokens, Context, causal_mask, rotary_angles
from llmjax.sharding import constrain
from llmjax.types import Batch, Outputs

# What a rematerialised layer keeps for the backward pass; everything else is computed again.
REMAT = {
  "none": None,  # keep all: no rematerialisation
  "full": "nothing_saveable",
  "dots": "dots_saveable",
  "weight_dots": "dots_with_no_batch_dims_saveable",
}

CHOICES = {
  "norm": ("layernorm", "rmsnorm"),
  "positions": ("learned", "rotary", "none"),
  "activation": tuple(layers.ACTIVATIONS),
  "residual_init": ("scaled", "plain", "zeros"),
  "remat": tuple(REMAT),
  "dtype": ("float32", "bfloat16", "float16"),
  "param_dtype": ("float32", "bfloat16", "float16"),
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """A decoder Transformer, in full.

  Attributes:
    vocab_size: V.
    d_model: D, the width of the residual stream.
    decoder_layers: N.
    num_heads: H; `num_kv_heads`: K, None = H (1 is multi-query, Shazeer 2019; between is grouped, Ainslie et al. 2023).
    head_dim: A, None = D / H.
    d_ff: F, None = 4 D.
    max_len: rows of the learned position table, and the longest context that generation uses.
    norm: "layernorm" or "rmsnorm", before each part and after the last (pre-norm).
    positions: "learned", "rotary" or "none".
    rotary_base: theta of the rotary frequencies.
    activation: a name in `layers.ACTIVATIONS`; `gated` multiplies it with a second projection (SwiGLU and kin).
    qk_norm: normalise queries and keys per head (Dehghani et al. 2023).
    tie_embeddings: the output projection is the embedding table.
    dropout: on embeddings and on what each part adds to the residual stream.
    attention_dropout: on attention weights.
    init_stddev: of kernels, None = 1/sqrt(D); `embedding_stddev`: of both tables, None = that of kernels.
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
  num_kv_heads: int | None = None
  head_dim: int | None = None
  d_ff: int | None = None
  norm: str = "layernorm"
  norm_epsilon: float = 1e-5
  norm_bias: bool = True
  positions: str = "learned"
  rotary_base: float = 10_000.0
  activation: str = "gelu"
  gated: bool = False
  qkv_bias: bool = True
  attention_out_bias: bool = True
  mlp_bias: bool = True
  qk_norm: bool = False
  tie_embeddings: bool = True
  dropout: float = 0.0
  attention_dropout: float = 0.0
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
    for field in ("vocab_size", "d_model", "decoder_layers", "num_heads", "max_len"):
      if getattr(self, field) < 1:
        raise ConfigError(f"model.{field}={getattr(self, field)} must be at least 1")
    for field in ("num_kv_heads", "head_dim", "d_ff"):
      if getattr(self, field) is not None and getattr(self, field) < 1:
        raise ConfigError(f"model.{field}={getattr(self, field)} must be at least 1, or none")
    for field in ("init_stddev", "embedding_stddev"):
      if getattr(self, field) is not None and not getattr(self, field) >= 0:  # nan is not either
        raise ConfigError(f"model.{field}={getattr(self, field)} must not be negative")
    for field in ("dropout", "attention_dropout"):
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
  def kernel_stddev(self) -> float:
    return self.d_model**-0.5 if self.init_stddev is None else self.init_stddev

  @property
  def residual_stddev(self) -> float:
    scale = {"scaled": (2 * self.decoder_layers) ** -0.5, "plain": 1.0, "zeros": 0.0}
    return self.kernel_stddev * scale[self.residual_init]


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  cfg: TransformerConfig

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"], ctx: Context, layer: Int[Array, ""]) -> tuple[Array, Array]:
    c = self.cfg
    keys = layers.fold(ctx.dropout_keys, layer)
    x = constrain(x, "act_batch", "act_len", "act_embed")
    h = Attention(c, name="attention")(layers.norm(c, "attention_norm")(x), ctx, layers.fold(keys, 0))
    x = x + layers.dropout(h, c.dropout, layers.fold(keys, 1))
    h = layers.Mlp(c, name="mlp")(layers.norm(c, "mlp_norm")(x))
    x = x + layers.dropout(h, c.dropout, layers.fold(keys, 2))
    return x, x


class Stack(nn.Module):
  """N Blocks and the final norm. Returns Float[B L D] and every Block's output, Float[N B L D]."""

  cfg: TransformerConfig
  depth: int

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"], ctx: Context) -> tuple[Array, Array]:
    c = self.cfg
    block = Block
    if c.remat != "none":
      policy = getattr(jax.checkpoint_policies, str(REMAT[c.remat]))
      block = nn.remat(Block, prevent_cse=not c.scan, policy=policy)
    if c.scan:
      x, each = nn.scan(
        block,
        variable_axes={"params": 0, "cache": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=self.depth,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )(c, name="layers")(x, ctx, jnp.arange(self.depth))
    else:
      outputs = []
      for i in range(self.depth):
        x, _ = block(c, name=f"layers_{i}")(x, ctx, jnp.asarray(i))
        outputs.append(x)
      each = jnp.stack(outputs)
    return layers.norm(c, "final_norm")(x), each


class Transformer(nn.Module):
  """A decoder language model: `model.apply({"params": params}, batch) -> Outputs`.

  Dropout runs iff `rngs={"dropout": key}` is given. Decoding: `cache_length=S, mutable=["cache"]`; the first call
  makes the cache and fills it with the prompt, each further call appends its tokens.
  """

  cfg: TransformerConfig

  def setup(self) -> None:
    c = self.cfg
    stddev = c.kernel_stddev if c.embedding_stddev is None else c.embedding_stddev
    self.embedding = layers.Embedding(c.vocab_size, c.d_model, "vocab", stddev, c.dtype, c.param_dtype)
    if c.positions == "learned":
      self.positions = layers.Embedding(c.max_len, c.d_model, "positions", stddev, c.dtype, c.param_dtype)
    self.decoder = Stack(c, c.decoder_layers)
    self.seen = CachedTokens()
    if not c.tie_embeddings:
      axes = ("embed", "vocab")
      self.head = layers.Projection((c.vocab_size,), axes, c.kernel_stddev, False, c.dtype, c.param_dtype)

  def __call__(
    self, batch: Batch, *, cache_length: int | None = None, logits: bool = True, all_hidden: bool = False
  ) -> Outputs:
    """Logits Float[B L V] (None if not asked for) and hidden states Float[B L D]."""
    c, query = self.cfg, jax.tree.map(jnp.asarray, batch.inputs)
    key, index = (query, None) if cache_length is None else self.seen(query, cache_length)
    keys = layers.row_keys(self.make_rng("dropout"), batch.rows) if self.has_rng("dropout") else None
    rotary = rotary_angles(query.positions, c.head_width, c.rotary_base) if c.positions == "rotary" else None
    ctx = Context(causal_mask(query, key), rotary, layers.fold(keys, 0), index, cache_length)

    x = self.embedding(query.ids)
    if c.positions == "learned":
      x = x + self.positions(query.positions)
    x = embedded = layers.dropout(x, c.dropout, layers.fold(keys, 1))
    x, each = self.decoder(x, ctx)
    return Outputs(
      logits=self.unembed(x) if logits else None,
      hidden=x,
      all_hidden=jnp.concatenate([embedded[None], each]) if all_hidden else None,
    )

  def unembed(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
    """Hidden states to logits, float32."""
    logits = self.embedding.attend(hidden) if self.cfg.tie_embeddings else self.head(hidden)
    return constrain(logits.astype(jnp.float32), "act_batch", "act_len", "act_vocab")


def unstack(params: Any, cfg: TransformerConfig) -> Any:
  """Scanned parameters [N ...] -> unrolled: `layers` becomes `layers_0` ... `layers_{N-1}`."""
  decoder = {k: v for k, v in params["decoder"].items() if k != "layers"}
  for i in range(cfg.decoder_layers):
    decoder[f"layers_{i}"] = jax.tree.map(lambda x, i=i: x[i], params["decoder"]["layers"])
  return {**params, "decoder": decoder}


def stack(params: Any, cfg: TransformerConfig) -> Any:
  """Unrolled parameters -> scanned; the inverse of `unstack`."""
  each = [params["decoder"][f"layers_{i}"] for i in range(cfg.decoder_layers)]
  decoder = {k: v for k, v in params["decoder"].items() if not k.startswith("layers_")}
  return {**params, "decoder": {**decoder, "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *each)}}


MODELS = {"transformer": "llmjax.models.transformer:make_transformer"}


def make_transformer(*, vocab_size: int, **fields: Any) -> Transformer:
  """A Transformer from config keys."""
  known = {f.name for f in dataclasses.fields(TransformerConfig)}
  for key in fields:
    if key not in known:
      raise ConfigError(f"model.{key} is no such key; {nearest(key, known)}")
  return Transformer(TransformerConfig(vocab_size=vocab_size, **fields))

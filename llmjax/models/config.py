"""`TransformerConfig`: every architectural choice in the field's words, checked."""

from __future__ import annotations

import dataclasses

from llmjax.config import ConfigError, nearest
from llmjax.models import layers

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

"""Fields of a model's config, with their defaults and documentation. Imports no JAX.

`ModelConfig` is what the framework asks of any model, `TransformerConfig` has every choice of llmjax's Transformer.
Dimension letters are those of `llmjax/types.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from llmjax.config.errors import ConfigError, suggest_name
from llmjax.config.rotary_scaling import RotaryScaling

ACTIVATIONS = ("gelu", "gelu_exact", "relu", "relu_squared", "silu")
ATTENTION_KERNELS = ("xla", "chunked", "ring", "cudnn", "splash")
REMAT_POLICIES = ("none", "full", "attention", "dots", "weight_dots")
LAYER_KINDS = ("global", "local")

# Allowed values of fields that are names.
CHOICES: Mapping[str, tuple[str, ...]] = {
  "norm": ("layernorm", "rmsnorm"),
  "norm_placement": ("pre", "post", "sandwich"),
  "positions": ("learned", "rotary", "relative", "none"),
  "attention": ("auto", *ATTENTION_KERNELS),
  "activation": ACTIVATIONS,
  "head": ("lm", "sequence", "token", "span"),
  "pooling": ("first", "last", "mean"),
  "pooler_activation": ("tanh", *ACTIVATIONS),
  "residual_init": ("scaled", "plain", "zeros"),
  "remat": REMAT_POLICIES,
  "dtype": ("float32", "bfloat16", "float16"),
  "param_dtype": ("float32", "bfloat16", "float16"),
}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adapters of projections (Hu et al. 2021, arXiv:2106.09685)."""

  rank: int
  alpha: float
  dropout: float  # on the adapter's input
  targets: str  # regex over the paths of projections

  @property
  def scale(self) -> float:
    """Factor of the product of the two low-rank matrices."""
    return self.alpha / self.rank


class ModelConfig:
  """What the framework asks of a model's config. The config of a model of your own inherits from it.

  A model of your own is a Linen module with its config as `cfg`, see `llmjax.types.Model`. The defaults below are those
  of a model about which the framework knows nothing: objectives are then not checked against it.
  """

  vocab_size: int
  max_len: int  # longest sequence, in tokens
  dtype: str = "float32"  # of the computation; peak FLOPs of a device depend on it

  @property
  def stacks(self) -> str | None:
    """Which stacks the model has: "encoder", "decoder" or "both"; None: unknown."""
    return None

  @property
  def layer_layout(self) -> str:
    """How parameters of layers are stored: "scanned" (stacked along a leading axis) or "unrolled"."""
    return "unrolled"

  @property
  def lora(self) -> LoraConfig | None:
    """The adapters that the model has."""
    return None

  @property
  def width_ratios(self) -> Mapping[str, float]:
    """{logical axis: its length / its length in the base model} for muP, see `models/mup.py`."""
    return {}


@dataclasses.dataclass(frozen=True)
class TransformerConfig(ModelConfig):
  """Every architectural choice of a Transformer. None means the default that the comment of the field gives."""

  vocab_size: int  # V
  d_model: int  # D, width of the residual stream
  decoder_layers: int  # N of the decoder, which sees earlier tokens only; with an encoder, it attends to its output too
  num_heads: int  # H
  max_len: int  # rows of the learned position table, and the longest context of generation
  encoder_layers: int = 0  # N of the encoder, which sees tokens on both sides
  num_kv_heads: int | None = None  # K, None: H; 1: multi-query (Shazeer 2019), else grouped (Ainslie et al. 2023)
  head_dim: int | None = None  # A, None: D / H
  d_ff: int | None = None  # F, None: 4 D

  # Norms and residual stream.
  norm: str = "layernorm"
  norm_epsilon: float = 1e-5
  norm_bias: bool = True
  norm_zero_centered: bool = False  # scales are stored minus 1 (Gemma)
  # "pre": before each sublayer and after the last; "post": after each sum with the residual stream (Vaswani et al.
  # 2017, BERT); "sandwich": before and after each sublayer (Gemma 2).
  norm_placement: str = "pre"
  parallel_residual: bool = False  # attention and MLP read the same input, and both are added to it (GPT-NeoX)

  # Embeddings and positions.
  embedding_width: int | None = None  # of the embedding tables, which are then projected to D and back; None: D
  scale_embeddings: bool = False  # multiply embeddings by sqrt(D)
  embedding_norm: bool = False  # normalise the sum of embeddings (BERT, ModernBERT)
  first_attention_norm: bool = True  # False: no norm before the first layer's attention (ModernBERT)
  positions: str = "learned"  # "learned", "rotary", "relative" (T5's biases, one table for each stack) or "none"
  rotary_base: float = 10_000.0  # theta of the rotary frequencies
  rotary_fraction: float = 1.0  # part of each head that is rotated
  rotary_scaling: RotaryScaling | None = None
  local_rotary_base: float | None = None  # theta of local layers, which are not scaled then; None: as global layers
  relative_buckets: int = 32  # R
  relative_max_distance: int = 128  # distances from here on share a bucket
  token_types: int = 0  # rows of the table of token types (sentences A and B of BERT)

  # Attention.
  attention_pattern: tuple[str, ...] = ("global",)  # "global" or "local" for each layer, repeated over the stack
  window: int | None = None  # keys that a local layer sees: the latest in a decoder, half on either side in an encoder
  # The kernel. "auto": "ring" if the sequence is sharded, else the device's own kernel if it supports the model, else
  # "xla", or "chunked" for long sequences. Decoding uses "xla".
  attention: str = "auto"
  attention_scale: float | None = None  # factor of query-key products, None: 1 / sqrt(A)
  attention_softcap: float | None = None  # bound of the scores by tanh, None: no bound
  logit_softcap: float | None = None  # bound of the logits by tanh, None: no bound
  qkv_bias: bool = True
  attention_out_bias: bool = True
  qk_norm: bool = False  # normalise queries and keys of each head (Dehghani et al. 2023)

  # MLP and mixtures of experts.
  activation: str = "gelu"
  gated: bool = False  # multiply the activation by a second projection (SwiGLU)
  mlp_bias: bool = True
  num_experts: int = 0  # E, experts that replace each MLP
  experts_per_token: int = 2
  expert_d_ff: int | None = None  # F of each expert, None: d_ff
  normalize_router: bool = True  # weights of a token's experts sum to 1
  shared_expert_d_ff: int | None = None  # F of an expert that processes all tokens (Qwen2-MoE), None: there is none
  # Capacity factor per device pair. Overflowing tokens are dropped, so results depend on the mesh. None: never dropped.
  expert_capacity: float | None = None

  # Output.
  tie_embeddings: bool = True  # the output projection is the embedding table
  scale_tied_logits: bool = False  # multiply hidden states by 1 / sqrt(D) before a tied table (T5 v1.0)
  head: str = "lm"  # shape of the logits: "lm" [B L V], "sequence" [B C], "token" [B L C], "span" [B L 2]
  num_classes: int = 0  # C
  pooling: str = "first"  # hidden state that represents a sequence: "first", "last" or "mean" of its tokens
  head_transform: bool = False  # projection, activation and norm before the output projection
  head_bias: bool = False  # bias of the output projection
  pooler: bool = False  # projection and activation of the first token, which a head on sequences reads (BERT)
  pooler_activation: str = "tanh"
  sentence_classes: int = 0  # C of a second head, which reads the pooler's output (next-sentence prediction)
  crf: bool = False  # a head on tokens also scores transitions between tags (Lafferty et al. 2001)
  bidirectional_prompt: bool = False  # generation reads its prompt with full attention (prefix language models)

  # Low-rank adapters.
  lora_rank: int = 0
  lora_alpha: float | None = None  # the product is scaled by alpha / rank, None: rank
  lora_dropout: float = 0.0
  lora_targets: str = r".*attention/(query|value)"  # regex over whole paths, such as "decoder/layers/attention/query"

  # Regularisation and initial values.
  dropout: float = 0.0  # on embeddings and on the output of each sublayer
  attention_dropout: float = 0.0  # on attention weights
  mlp_dropout: float = 0.0  # inside the MLP
  init_stddev: float | None = 0.02  # of kernels, None: 1 / sqrt(fan-in)
  embedding_stddev: float | None = None  # of tables, None: as kernels
  residual_init: str = "scaled"  # of projections into the stream: "scaled" by 1/sqrt(2 N) (GPT-2), "plain", "zeros"
  # muP: D of the narrow model that rate and initial values were tuned on; None: standard parametrisation. sqrt(D) and
  # 1/sqrt(fan-in) above are then those of that model. See `models/mup.py`.
  base_width: int | None = None
  base_head_dim: int | None = None  # A of that model, None: the same

  # Computation.
  dtype: str = "float32"  # softmax, norm statistics and logits are always float32
  param_dtype: str = "float32"
  scan: bool = True  # compile one layer and loop over stacked parameters; False: unroll
  remat: str = "none"  # what the backward pass keeps: all ("none"), nothing ("full"), or what the policy names

  def __post_init__(self) -> None:
    object.__setattr__(self, "attention_pattern", tuple(self.attention_pattern))  # JSON gives a list
    if self.head == "span" and self.num_classes == 0:
      object.__setattr__(self, "num_classes", 2)
    self._check_choices()
    self._check_ranges()
    self._check_heads()
    self._check_positions()
    self._check_attention_pattern()
    self._check_output()
    self._check_lora()
    self._check_combinations()

  def _check_choices(self) -> None:
    for field, allowed in CHOICES.items():
      value = getattr(self, field)
      if value not in allowed:
        hint = suggest_name(str(value), allowed)
        raise ConfigError(f"model.{field}={value!r}: allowed are {', '.join(allowed)}; {hint}")

  def _check_ranges(self) -> None:
    for field in ("vocab_size", "d_model", "num_heads", "max_len"):
      if getattr(self, field) < 1:
        raise ConfigError(f"model.{field}={getattr(self, field)} must be at least 1")
    counts = ("decoder_layers", "encoder_layers", "token_types", "sentence_classes", "num_experts", "num_classes")
    for field in (*counts, "lora_rank"):
      if getattr(self, field) < 0:
        raise ConfigError(f"model.{field}={getattr(self, field)} must not be negative")
    if not self.decoder_layers + self.encoder_layers:
      raise ConfigError("model.decoder_layers and model.encoder_layers are both 0; give at least one stack layers")
    widths = ("head_dim", "d_ff", "embedding_width", "expert_d_ff", "shared_expert_d_ff", "base_width", "base_head_dim")
    for field in ("num_kv_heads", "window", *widths):
      if getattr(self, field) is not None and getattr(self, field) < 1:
        raise ConfigError(f"model.{field}={getattr(self, field)} must be at least 1, or none")
    for field in ("init_stddev", "embedding_stddev"):
      if getattr(self, field) is not None and not getattr(self, field) >= 0:  # also refuses NaN
        raise ConfigError(f"model.{field}={getattr(self, field)} must not be negative")
    for field in ("attention_softcap", "logit_softcap", "expert_capacity"):
      if getattr(self, field) is not None and not getattr(self, field) > 0:
        raise ConfigError(f"model.{field}={getattr(self, field)} must be positive, or none")
    for field in ("dropout", "attention_dropout", "mlp_dropout", "lora_dropout"):
      if not 0 <= getattr(self, field) < 1:
        raise ConfigError(f"model.{field}={getattr(self, field)} must be in [0, 1)")

  def _check_heads(self) -> None:
    if self.head_dim is None and self.d_model % self.num_heads:
      raise ConfigError(
        f"model.d_model={self.d_model} is not divisible by model.num_heads={self.num_heads}; set model.head_dim"
      )
    if self.num_heads % self.kv_heads:
      raise ConfigError(f"model.num_kv_heads={self.kv_heads} must divide model.num_heads={self.num_heads}")

  def _check_positions(self) -> None:
    if self.positions == "rotary":
      if not 0 < self.rotary_fraction <= 1 or self.rotary_width < 2 or self.rotary_width % 2:
        raise ConfigError(
          f"model.rotary_fraction={self.rotary_fraction} of model.head_dim={self.head_width} is {self.rotary_width} "
          "rotated dimensions; they must be even, and at least 2"
        )
      if self.rotary_scaling is not None:
        self.rotary_scaling.check_width(self.rotary_width)
    elif self.rotary_scaling is not None or self.rotary_fraction != 1:
      raise ConfigError(f"model.rotary_* is for model.positions='rotary', got {self.positions!r}")
    if self.positions == "relative" and not 4 <= self.relative_buckets < self.relative_max_distance:
      raise ConfigError(
        f"model.relative_buckets={self.relative_buckets} must be at least 4 and less than "
        f"model.relative_max_distance={self.relative_max_distance}"
      )

  def _check_attention_pattern(self) -> None:
    for kind in self.attention_pattern or ("",):
      if kind not in LAYER_KINDS:
        allowed = ", ".join(LAYER_KINDS)
        raise ConfigError(f"model.attention_pattern: {kind!r} is not allowed; each layer is one of {allowed}")
    if "local" in self.attention_pattern and self.window is None:
      raise ConfigError("model.attention_pattern has local layers, so model.window must give the number of their keys")

  def _check_output(self) -> None:
    if (self.head == "lm") != (self.num_classes == 0) or (self.head == "span" and self.num_classes != 2):
      raise ConfigError(
        f"model.head={self.head!r} and model.num_classes={self.num_classes}: 'lm' has 0, 'span' 2, others at least 1"
      )
    if self.head != "lm" and self.stacks == "both":
      raise ConfigError(
        f"model.head={self.head!r} needs a model of one stack; set model.encoder_layers=0, or head='lm'"
      )

  def _check_lora(self) -> None:
    try:
      re.compile(self.lora_targets)
    except re.error as error:
      raise ConfigError(f"model.lora_targets={self.lora_targets!r} is not a regular expression: {error}") from None

  def _check_combinations(self) -> None:
    """Raise ConfigError for fields that contradict each other."""
    has_local, is_encoder = "local" in self.attention_pattern, self.stacks == "encoder"
    if self.norm_placement == "post" and not self.first_attention_norm:
      raise ConfigError("model.first_attention_norm=False removes a norm that norm_placement='post' does not have")
    if self.parallel_residual and (self.norm_placement != "pre" or self.stacks == "both"):
      raise ConfigError("model.parallel_residual=True needs norm_placement='pre', and no cross-attention")
    if self.scale_tied_logits and not self.tie_embeddings:
      raise ConfigError("model.scale_tied_logits=True needs model.tie_embeddings=True")
    if self.pooler and not is_encoder:
      raise ConfigError(
        "model.pooler=True needs a model with encoder_layers only: in a decoder the first token sees nothing else"
      )
    if self.head == "sequence" and self.pooling == "first" and not is_encoder:
      raise ConfigError("model.pooling='first' of a decoder: only its last token has seen a text; set it to 'last'")
    if self.bidirectional_prompt and is_encoder:
      raise ConfigError("model.bidirectional_prompt=True is for decoders, and this model has none; set it to False")
    if self.window is not None and not has_local:
      raise ConfigError(f"model.window={self.window} is for local layers, and model.attention_pattern has none")
    if self.local_rotary_base is not None and not (has_local and self.positions == "rotary"):
      raise ConfigError(
        f"model.local_rotary_base={self.local_rotary_base} needs local layers with rotary positions; set it to none"
      )
    if self.sentence_classes > 0 and not (self.pooler and self.head == "lm"):
      raise ConfigError(
        f"model.sentence_classes={self.sentence_classes} needs model.pooler=True, which feeds that head, and head='lm'"
      )
    if self.num_experts > 0 and not 1 <= self.experts_per_token <= self.num_experts:
      raise ConfigError(
        f"model.experts_per_token={self.experts_per_token} must be from 1 to model.num_experts={self.num_experts}"
      )
    if self.num_experts > 0 and self.mlp_bias:
      raise ConfigError("model.mlp_bias=True is not supported by experts; set it to False")
    if self.base_head_dim is not None and self.base_width is None:
      raise ConfigError(f"model.base_head_dim={self.base_head_dim} needs model.base_width, of the same model")
    if self.base_width is not None and (
      self.num_heads * self.head_width * self.base_d_model % (self.d_model * self.base_head_width)
    ):
      raise ConfigError(
        f"model.base_width={self.base_width}: {self.num_heads} heads of {self.head_width} at d_model={self.d_model} "
        f"are not a whole number of heads of {self.base_head_width} there; set model.base_head_dim to its value there, "
        "or model.num_heads in proportion to d_model"
      )
    if self.crf and self.head != "token":
      raise ConfigError("model.crf=True is for a head on tokens, model.head='token'")

  @property
  def stacks(self) -> str:
    """Which stacks there are: "encoder", "decoder" or "both"."""
    return "decoder" if not self.encoder_layers else "both" if self.decoder_layers else "encoder"

  @property
  def layer_layout(self) -> str:
    """How parameters of layers are stored: "scanned" or "unrolled"."""
    return "scanned" if self.scan else "unrolled"

  @property
  def lora(self) -> LoraConfig | None:
    """The adapters, None if `lora_rank` is 0."""
    if not self.lora_rank:
      return None
    alpha = self.lora_rank if self.lora_alpha is None else self.lora_alpha
    return LoraConfig(self.lora_rank, float(alpha), self.lora_dropout, self.lora_targets)

  @property
  def kv_heads(self) -> int:
    """K."""
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

  @property
  def head_width(self) -> int:
    """A."""
    return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

  @property
  def ff_width(self) -> int:
    """F of an MLP."""
    return 4 * self.d_model if self.d_ff is None else self.d_ff

  @property
  def expert_width(self) -> int:
    """F of an expert."""
    return self.ff_width if self.expert_d_ff is None else self.expert_d_ff

  @property
  def rotary_width(self) -> int:
    """Number of rotated dimensions of a head."""
    return int(self.head_width * self.rotary_fraction)

  @property
  def table_width(self) -> int:
    """Width of the embedding tables."""
    return self.d_model if self.embedding_width is None else self.embedding_width

  @property
  def table_stddev(self) -> float:
    """Initial standard deviation of the embedding tables."""
    stddev = self.init_stddev if self.embedding_stddev is None else self.embedding_stddev
    return self.base_d_model**-0.5 if stddev is None else stddev

  @property
  def bias_stddev(self) -> float:
    """Initial standard deviation of the relative biases."""
    return self.base_d_model**-0.5 if self.init_stddev is None else self.init_stddev

  @property
  def residual_scale(self) -> float:
    """Factor of the initial values of projections into the residual stream."""
    depth = max(self.decoder_layers, self.encoder_layers)
    return {"scaled": (2 * depth) ** -0.5, "plain": 1.0, "zeros": 0.0}[self.residual_init]

  @property
  def query_scale(self) -> float:
    """Factor of the initial query kernel, so that initial scores do not depend on `attention_scale`."""
    return 1.0 if self.attention_scale is None else self.base_head_width**-0.5 / self.attention_scale

  @property
  def score_scale(self) -> float:
    """Factor of query-key products."""
    base = self.base_head_width**-0.5 if self.attention_scale is None else self.attention_scale
    return base / self.width_ratios["head_dim"]

  @property
  def base_d_model(self) -> int:
    """D of the base model of muP."""
    return self.d_model if self.base_width is None else self.base_width

  @property
  def base_head_width(self) -> int:
    """A of the base model of muP."""
    return self.head_width if self.base_head_dim is None else self.base_head_dim

  @property
  def width_ratios(self) -> dict[str, float]:
    """{logical axis: its length / its length in the base model}, of axes that grow with the width."""
    width, head = self.d_model / self.base_d_model, self.head_width / self.base_head_width
    heads = {"heads": width / head, "kv_heads": width / head, "head_dim": head}
    return {"embed": width, "mlp": width, "norm": width, "head": width, **heads}

  def kind(self, layer: int) -> str:
    """Return "global" or "local" for a layer of a stack."""
    return self.attention_pattern[layer % len(self.attention_pattern)]

  def layout(self, depth: int) -> tuple[int, int, int]:
    """Return how a scanned stack of `depth` layers is divided; layers that remain come after the groups.

    Returns:
      (layers before the groups, layers of a group, number of groups).
    """
    period = len(self.attention_pattern)
    first = 0 if self.first_attention_norm else min(1, depth)
    return first, period, (depth - first) // period

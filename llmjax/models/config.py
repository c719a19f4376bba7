"""`TransformerConfig`: every architectural choice in the field's words, checked."""

from __future__ import annotations

import dataclasses
import re

from jax import checkpoint_policies

from llmjax.config import ConfigError, suggest_name
from llmjax.models import layers, mup
from llmjax.models.attention import blockwise, kernels
from llmjax.models.rotary import RotaryScaling

# What a rematerialised layer keeps for the backward pass; everything else is computed again.
REMAT = {
  "none": None,  # keep all: no rematerialisation
  "full": checkpoint_policies.nothing_saveable,
  "attention": checkpoint_policies.save_only_these_names(
    blockwise.RESIDUAL_NAME
  ),  # what "ring", "chunked" and "splash" name
  "dots": checkpoint_policies.dots_saveable,
  "weight_dots": checkpoint_policies.dots_with_no_batch_dims_saveable,
}

CHOICES = {
  "norm": ("layernorm", "rmsnorm"),
  "norm_placement": ("pre", "post", "sandwich"),
  "positions": ("learned", "rotary", "relative", "none"),
  "attention": ("auto", *kernels.KERNELS),
  "activation": tuple(layers.ACTIVATIONS),
  "head": ("lm", "sequence", "token", "span"),
  "pooling": ("first", "last", "mean"),
  "pooler_activation": ("tanh", *layers.ACTIVATIONS),
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
    norm: "layernorm" or "rmsnorm"; `norm_zero_centered`: scales are stored minus 1 (Gemma); `norm_placement`: "pre",
      before each part and after the last, "post", after each sum with the residual stream (Vaswani et al. 2017, BERT),
      or "sandwich", before and after each part (Gemma 2).
    parallel_residual: attention and MLP read the same, and both are added to it (GPT-NeoX).
    embedding_width: of the embedding tables, projected to D and back; None = D. `scale_embeddings`: times sqrt(D).
    embedding_norm: also normalise the embeddings (BERT, ModernBERT). `first_attention_norm`: False leaves out the norm
      before the first layer's attention (ModernBERT, where the embeddings' stands right before it).
    positions: "learned", "rotary", "relative" (T5's biases, a table for each stack) or "none".
    rotary_base: theta of the rotary frequencies; `rotary_fraction`: of each head that is rotated; `rotary_scaling`: see
      there. `local_rotary_base`: local layers have rotary positions of their own, without scaling; None = the same.
    relative_buckets, relative_max_distance: R, and from where on all distances are one; see `relative_buckets`.
    attention_pattern: "global" or "local" for each layer, repeated over the stack. `window`: what a local layer sees,
      the latest keys in a decoder, half as many on either side in an encoder; see `attention_mask`.
    attention: the kernel, a name in `kernels.KERNELS`; "auto" takes "ring" where lengths are cut over devices, else the
      device's own where that supports the model, else "xla", or "chunked" for long sequences. Decoding is "xla".
    attention_scale: of query-key products, None = 1 / sqrt(A); `attention_softcap`: of the scores, None = no bound;
      `logit_softcap`: of the logits, likewise.
    token_types: entries of the table of token types (BERT's sentences A and B), 0 = none.
    activation: a name in `layers.ACTIVATIONS`; `gated` multiplies it with a second projection (SwiGLU and kin).
    qk_norm: normalise queries and keys per head (Dehghani et al. 2023).
    tie_embeddings: the output projection is the embedding table; `scale_tied_logits` then multiplies by 1 / sqrt(D)
      (T5 v1.0).
    num_experts: E of a mixture in the place of each MLP, 0 = none; `experts_per_token`: how many of them a token goes
      through; `expert_d_ff`: F of each, None = d_ff; `normalize_router`: whether the weights of those sum to 1;
      `shared_expert_d_ff`: of one that all tokens go through besides (Qwen2-MoE), None = there is none;
      `expert_capacity`: a device sends each other at most so many times its fair share of tokens, and the rest skip
      that expert, which saves memory and makes results depend on the mesh; None = none is ever lost.
    head: what logits are of: "lm", the vocabulary, Float[B L V]; `num_classes` C of a "sequence", Float[B C], or of a
      "token", Float[B L C]; the beginning and the end of a "span", Float[B L 2].
    pooling: which hidden state stands for a sequence: the first, the last or the mean of its real tokens.
    head_transform: a projection, the activation and a norm before the output projection; `head_bias`: a bias after it.
    pooler: an activation (`pooler_activation`) of a projection of the first token (Devlin et al. 2019), which a head on
      sequences then reads; `sentence_classes`: C of a second head on it, beside "lm".
    crf: a head on tokens has scores of one tag after another besides (Lafferty et al. 2001).
    lora_rank: of low-rank adapters of projections (Hu et al. 2021), 0 = none; `lora_targets`: a regex that the paths of
      theirs match, such as "decoder/layers/attention/query"; `lora_alpha`: their products are scaled by alpha / rank,
      None = rank; `lora_dropout`: on what they read.
    bidirectional_prompt: generation reads its prompt as a prefix, seen both ways: for models trained as prefix LM.
    dropout: on embeddings and on what each part adds to the residual stream.
    attention_dropout, mlp_dropout: on attention weights, and inside the MLP.
    init_stddev: of kernels, None = 1/sqrt(fan-in); `embedding_stddev`: of tables, None = that of kernels.
    residual_init: projections back into the residual stream: "scaled" by 1/sqrt(2 N) (GPT-2), "plain" or "zeros".
    base_width: D of a narrow model that learning rate and initialisation were tuned on; those of this one then follow
      its width, see `models/width.py`, and where sqrt(D) or 1/sqrt(fan-in) is said here, that is the base's. All widths
      but A are taken to grow with D. `base_head_dim`: A there, None = the same; scores are scaled by 1/A beyond it.
      None = the standard parametrisation.
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
  norm_zero_centered: bool = False
  norm_placement: str = "pre"
  parallel_residual: bool = False
  embedding_width: int | None = None
  scale_embeddings: bool = False
  embedding_norm: bool = False
  first_attention_norm: bool = True
  positions: str = "learned"
  rotary_base: float = 10_000.0
  rotary_fraction: float = 1.0
  rotary_scaling: RotaryScaling | None = None
  local_rotary_base: float | None = None
  relative_buckets: int = 32
  relative_max_distance: int = 128
  attention_pattern: tuple[str, ...] = ("global",)
  window: int | None = None
  attention: str = "auto"
  attention_scale: float | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  token_types: int = 0
  activation: str = "gelu"
  gated: bool = False
  qkv_bias: bool = True
  attention_out_bias: bool = True
  mlp_bias: bool = True
  qk_norm: bool = False
  num_experts: int = 0
  experts_per_token: int = 2
  expert_d_ff: int | None = None
  normalize_router: bool = True
  shared_expert_d_ff: int | None = None
  expert_capacity: float | None = None
  tie_embeddings: bool = True
  scale_tied_logits: bool = False
  head: str = "lm"
  num_classes: int = 0
  pooling: str = "first"
  head_transform: bool = False
  head_bias: bool = False
  pooler: bool = False
  pooler_activation: str = "tanh"
  sentence_classes: int = 0
  crf: bool = False
  lora_rank: int = 0
  lora_alpha: float | None = None
  lora_dropout: float = 0.0
  lora_targets: str = r".*attention/(query|value)"
  bidirectional_prompt: bool = False
  dropout: float = 0.0
  attention_dropout: float = 0.0
  mlp_dropout: float = 0.0
  init_stddev: float | None = 0.02
  embedding_stddev: float | None = None
  residual_init: str = "scaled"
  base_width: int | None = None
  base_head_dim: int | None = None
  dtype: str = "float32"
  param_dtype: str = "float32"
  scan: bool = True
  remat: str = "none"

  def __post_init__(self) -> None:
    for field, allowed in CHOICES.items():
      value = getattr(self, field)
      if value not in allowed:
        raise ConfigError(
          f"model.{field}={value!r}: allowed are {', '.join(allowed)}; {suggest_name(str(value), allowed)}"
        )
    for field in ("vocab_size", "d_model", "num_heads", "max_len"):
      if getattr(self, field) < 1:
        raise ConfigError(f"model.{field}={getattr(self, field)} must be at least 1")
    for field in (
      "decoder_layers",
      "encoder_layers",
      "token_types",
      "sentence_classes",
      "num_experts",
      "num_classes",
      "lora_rank",
    ):
      if getattr(self, field) < 0:
        raise ConfigError(f"model.{field}={getattr(self, field)} must not be negative")
    if not self.decoder_layers + self.encoder_layers:
      raise ConfigError("model.decoder_layers and model.encoder_layers are both 0; give at least one stack layers")
    widths = ("head_dim", "d_ff", "embedding_width", "expert_d_ff", "shared_expert_d_ff", "base_width", "base_head_dim")
    for field in ("num_kv_heads", "window", *widths):
      if getattr(self, field) is not None and getattr(self, field) < 1:
        raise ConfigError(f"model.{field}={getattr(self, field)} must be at least 1, or none")
    for field in ("init_stddev", "embedding_stddev"):
      if getattr(self, field) is not None and not getattr(self, field) >= 0:  # nan is not either
        raise ConfigError(f"model.{field}={getattr(self, field)} must not be negative")
    for field in ("attention_softcap", "logit_softcap", "expert_capacity"):
      if getattr(self, field) is not None and not getattr(self, field) > 0:
        raise ConfigError(f"model.{field}={getattr(self, field)} must be positive, or none")
    for field in ("dropout", "attention_dropout", "mlp_dropout", "lora_dropout"):
      if not 0 <= getattr(self, field) < 1:
        raise ConfigError(f"model.{field}={getattr(self, field)} must be in [0, 1)")
    if self.head_dim is None and self.d_model % self.num_heads:
      raise ConfigError(
        f"model.d_model={self.d_model} is not divisible by model.num_heads={self.num_heads}; set model.head_dim"
      )
    if self.num_heads % self.kv_heads:
      raise ConfigError(f"model.num_kv_heads={self.kv_heads} must divide model.num_heads={self.num_heads}")
    if self.positions == "rotary":
      if not 0 < self.rotary_fraction <= 1 or self.rotary_width < 2 or self.rotary_width % 2:
        raise ConfigError(
          f"model.rotary_fraction={self.rotary_fraction} of model.head_dim={self.head_width} is {self.rotary_width} "
          "rotated dimensions; they must be even, and at least 2"
        )
      if self.rotary_scaling is not None:
        self.rotary_scaling.check_width(self.rotary_width)
    elif self.rotary_scaling is not None or self.rotary_fraction != 1:
      raise ConfigError(f"model.rotary_* is for model.positions='rotary', not {self.positions!r}")
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
    self._check_head()
    try:
      re.compile(self.lora_targets)
    except re.error as error:
      raise ConfigError(f"model.lora_targets={self.lora_targets!r} is not a regular expression: {error}") from None
    for what, wrong in self._contradictions.items():
      if wrong:
        raise ConfigError(what)

  def _check_head(self) -> None:
    """What is behind the last layer."""
    if self.head == "span" and self.num_classes == 0:
      object.__setattr__(self, "num_classes", 2)
    if (self.head == "lm") != (self.num_classes == 0) or (self.head == "span" and self.num_classes != 2):
      raise ConfigError(
        f"model.head={self.head!r} and model.num_classes={self.num_classes}: 'lm' has 0, 'span' 2, others at least 1"
      )
    if self.head != "lm" and self.stacks == "both":
      raise ConfigError(
        f"model.head={self.head!r} needs a model of one stack; set model.encoder_layers=0, or head='lm'"
      )

  @property
  def _contradictions(self) -> dict[str, bool]:
    local, encoder = "local" in self.attention_pattern, self.stacks == "encoder"
    return {
      "model.first_attention_norm=False leaves out a norm that norm_placement='post' does not have": (
        self.norm_placement == "post" and not self.first_attention_norm
      ),
      "model.parallel_residual=True needs norm_placement='pre', and no cross-attention": (
        self.parallel_residual and (self.norm_placement != "pre" or self.stacks == "both")
      ),
      "model.scale_tied_logits=True needs model.tie_embeddings=True": (
        self.scale_tied_logits and not self.tie_embeddings
      ),
      "model.pooler=True needs a model of encoder_layers alone: only its first token has seen a text": (
        self.pooler and not encoder
      ),
      "model.pooling='first' of a decoder: only its last token has seen a text; set model.pooling='last'": (
        self.head == "sequence" and self.pooling == "first" and not encoder
      ),
      "model.bidirectional_prompt=True says how a decoder reads a prompt, and there is none; unset it": (
        self.bidirectional_prompt and encoder
      ),
      f"model.window={self.window} is for local layers, and model.attention_pattern has none": (
        self.window is not None and not local
      ),
      f"model.local_rotary_base={self.local_rotary_base} is for rotary positions in local layers, and there are none": (
        self.local_rotary_base is not None and not (local and self.positions == "rotary")
      ),
      f"model.sentence_classes={self.sentence_classes} needs model.pooler=True, which feeds that head, and head='lm'": (
        self.sentence_classes > 0 and not (self.pooler and self.head == "lm")
      ),
      f"model.experts_per_token={self.experts_per_token} must be from 1 to model.num_experts={self.num_experts}": (
        self.num_experts > 0 and not 1 <= self.experts_per_token <= self.num_experts
      ),
      f"model.base_head_dim={self.base_head_dim} needs model.base_width, of the same model": (
        self.base_head_dim is not None and self.base_width is None
      ),
      f"model.base_width={self.base_width}: {self.num_heads} heads of {self.head_width} at d_model={self.d_model} "
      f"are no whole number of heads of {self.base_head_width} there; set model.base_head_dim to what it is there, or "
      "model.num_heads in proportion to d_model": (
        self.num_heads * self.head_width * self.base_d_model % (self.d_model * self.base_head_width) != 0
        and self.base_width is not None
      ),
      "model.crf=True is for a head on tokens, model.head='token'": self.crf and self.head != "token",
      "model.mlp_bias=True is not for experts, which have none; set it to False": self.num_experts > 0
      and self.mlp_bias,
    }

  @property
  def lora(self) -> layers.LoraConfig | None:
    if not self.lora_rank:
      return None
    alpha = self.lora_rank if self.lora_alpha is None else self.lora_alpha
    return layers.LoraConfig(self.lora_rank, float(alpha), self.lora_dropout, self.lora_targets)

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
  def expert_width(self) -> int:
    return self.ff_width if self.expert_d_ff is None else self.expert_d_ff

  @property
  def rotary_width(self) -> int:
    """How many dimensions of a head are rotated."""
    return int(self.head_width * self.rotary_fraction)

  @property
  def table_width(self) -> int:
    """Of the embedding tables."""
    return self.d_model if self.embedding_width is None else self.embedding_width

  @property
  def table_stddev(self) -> float:
    stddev = self.init_stddev if self.embedding_stddev is None else self.embedding_stddev
    return self.base_d_model**-0.5 if stddev is None else stddev

  @property
  def bias_stddev(self) -> float:
    """Of the relative biases."""
    return self.base_d_model**-0.5 if self.init_stddev is None else self.init_stddev

  @property
  def residual_scale(self) -> float:
    depth = max(self.decoder_layers, self.encoder_layers)
    return {"scaled": (2 * depth) ** -0.5, "plain": 1.0, "zeros": 0.0}[self.residual_init]

  @property
  def query_scale(self) -> float:
    """Of the initial query kernel: so that scores begin alike, whatever `attention_scale`."""
    return 1.0 if self.attention_scale is None else self.base_head_width**-0.5 / self.attention_scale

  @property
  def score_scale(self) -> float:
    """Of query-key products."""
    base = self.base_head_width**-0.5 if self.attention_scale is None else self.attention_scale
    return base / self.width_ratios["head_dim"]

  @property
  def base_d_model(self) -> int:
    return self.d_model if self.base_width is None else self.base_width

  @property
  def base_head_width(self) -> int:
    return self.head_width if self.base_head_dim is None else self.base_head_dim

  @property
  def width_ratios(self) -> dict[str, float]:
    """{logical axis: its length over the base model's}, of those that grow."""
    wider, longer = self.d_model / self.base_d_model, self.head_width / self.base_head_width
    heads = {"heads": wider / longer, "kv_heads": wider / longer, "head_dim": longer}
    return {"embed": wider, "mlp": wider, "norm": wider, "head": wider, **heads}

  def init_scale(self, axes: mup.Axes) -> float:
    """Of the initial standard deviation of a kernel, beside `init_stddev`."""
    axes = mup.unstacked(axes)
    scale = mup.init_scale(axes, self.width_ratios)
    if self.init_stddev is None:  # it follows the fan-in by itself
      scale *= mup.width_multiplier(mup.input_axes(axes), self.width_ratios) ** 0.5
    return scale

  def multiplier(self, axes: mup.Axes) -> float:
    """Of what a kernel reads."""
    return mup.input_multiplier(mup.unstacked(axes), self.width_ratios)

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

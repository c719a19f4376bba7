"""The choice of the attention kernel: what each supports, what a model and its batches need, and the call.

`check_attention_kernel` checks what a config needs before anything is built. Some needs are known only from a batch,
such as a prefix or a length. `choose_kernel` checks them while a program is traced, which is before it is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Array, Bool, Float, Key

from llmjax.config import ConfigError
from llmjax.config.model import TransformerConfig
from llmjax.distributed import sharding
from llmjax.models.attention import blockwise, masks, splash
from llmjax.models.attention.cudnn import cudnn_attention
from llmjax.models.attention.masks import AttentionSettings
from llmjax.models.attention.xla import xla_attention
from llmjax.types import Tokens

# {feature that some kernel does not support: config key or condition that needs it}, for messages.
FEATURES: Mapping[str, str] = {
  "cpu devices": "the mesh",
  "gpu devices": "the mesh",
  "tpu devices": "the mesh",
  "float32": "model.dtype",
  "bfloat16": "model.dtype",
  "float16": "model.dtype",
  "causal masks": "model.decoder_layers",
  "windows": "model.attention_pattern",
  "prefixes": "a batch with a prefix",
  "softcaps": "model.attention_softcap",
  "grouped heads": "model.num_kv_heads",
  "relative biases": "model.positions",
  "dropout": "model.attention_dropout",
  "sharded sequences": "mesh.context",
  "lengths that are not a multiple of 128": "of this batch",
  "odd lengths": "of this batch",
  "heads wider than 128 or not a multiple of 8": "model.head_dim",
}
ALL_FEATURES = frozenset(FEATURES)
FLASH_FEATURES = frozenset({"causal masks", "windows", "grouped heads"})

# {kernel: features that it supports}. All kernels support documents that share a row.
KERNELS: Mapping[str, frozenset[str]] = {
  "xla": ALL_FEATURES,
  "chunked": ALL_FEATURES - {"sharded sequences"},
  "ring": ALL_FEATURES,
  "cudnn": FLASH_FEATURES
  | {"gpu devices", "bfloat16", "float16", "prefixes", "relative biases", "lengths that are not a multiple of 128"},
  "splash": FLASH_FEATURES
  | {"tpu devices", "float32", "bfloat16", "float16", "softcaps", "heads wider than 128 or not a multiple of 8"}
  | {"odd lengths"},
}
ACCELERATOR_KERNELS = tuple(name for name, features in KERNELS.items() if "cpu devices" not in features)
MASK_KERNELS = ("xla", "cudnn")  # these read a mask [B L S], computed once for all layers

# Number of query-key pairs from which "auto" chooses "chunked" over "xla", which holds all scores at once.
CHUNKED_MIN_PAIRS = 1024 * 1024


def check_attention_kernel(cfg: TransformerConfig) -> None:
  """Check that the kernel of a config supports what the config and the current mesh need.

  Raises:
    ConfigError: it does not; the message names the kernels that do.
  """
  if cfg.attention != "auto":
    _check_support(cfg.attention, _required_features(cfg, causal=cfg.stacks != "encoder", training=True))


def choose_kernel(
  cfg: TransformerConfig,
  query: Tokens,
  key: Tokens,
  *,
  cross: bool = False,
  causal: bool = False,
  training: bool = False,
) -> str:
  """Return the name of the kernel for these tokens.

  A model whose kernel is for other devices gets the choice of "auto", such as one trained on a TPU and used on a CPU.

  Args:
    cfg: the model's config.
    query: tokens of the queries.
    key: tokens of the keys.
    cross: whether keys are of another stack; cross-attention has neither windows nor relative biases.
    causal: whether masks are causal.
    training: whether there is dropout, if the config has it.

  Raises:
    ConfigError: the kernel of the config does not support what these tokens need.
  """
  required = _required_features(cfg, cross=cross, causal=causal, training=training)
  if causal and key.prefix is not None:
    required |= {"prefixes"}
  lengths = query.segments.shape[1], key.segments.shape[1]
  if any(length % 128 for length in lengths):
    required |= {"lengths that are not a multiple of 128"}
  if any(length % 2 for length in lengths):
    required |= {"odd lengths"}
  if cfg.attention != "auto" and _device_feature() in KERNELS[cfg.attention]:
    _check_support(cfg.attention, required)
    return cfg.attention
  if "sharded sequences" in required:
    return "ring"
  for name in ("splash", "cudnn"):
    if required <= KERNELS[name]:
      return name
  return "chunked" if lengths[0] * lengths[1] >= CHUNKED_MIN_PAIRS else "xla"


def _required_features(cfg: TransformerConfig, *, cross: bool = False, causal: bool, training: bool) -> set[str]:
  is_required = {
    "causal masks": causal,
    "windows": "local" in cfg.attention_pattern and not cross,
    "softcaps": cfg.attention_softcap is not None,
    "grouped heads": cfg.kv_heads != cfg.num_heads,
    "relative biases": cfg.positions == "relative" and not cross,
    "dropout": training and cfg.attention_dropout > 0,
    "sharded sequences": sharding.num_shards("act_len") > 1,
    "heads wider than 128 or not a multiple of 8": cfg.head_width > 128 or cfg.head_width % 8 > 0,
  }
  return {_device_feature(), cfg.dtype} | {feature for feature, required in is_required.items() if required}


def _device_feature() -> str:
  return "tpu devices" if splash.INTERPRET else f"{sharding.mesh_platform()} devices"


def _check_support(name: str, required: set[str]) -> None:
  for feature in FEATURES:
    if feature in required - KERNELS[name]:
      able = ", ".join(repr(other) for other, features in KERNELS.items() if required <= features)
      raise ConfigError(
        f"model.attention={name!r} does not support {feature} ({FEATURES[feature]}); set it to 'auto', or to one of "
        f"{able}"
      )


def dot_product_attention(
  kernel: str,
  query: Float[Array, "B L H A"],
  key: Float[Array, "B S K A"],
  value: Float[Array, "B S K A"],
  query_tokens: Tokens,
  key_tokens: Tokens,
  settings: AttentionSettings,
  *,
  mask: Bool[Array, "B L S"] | None = None,
  relative: Float[Array, "R H"] | None = None,
  dropout_keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B L H A"]:
  """Return softmax(scale query key^T + bias) value (Vaswani et al. 2017, arXiv:1706.03762).

  Scores and softmax are float32. A query that attends to no key (padding) gets a finite value without a meaning.

  Args:
    kernel: a name in `KERNELS`.
    query: queries.
    key: keys; each of the K heads is shared by H / K consecutive query heads.
    value: values.
    query_tokens: tokens of the queries, from which masks are computed.
    key_tokens: tokens of the keys.
    settings: static settings.
    mask: True where the query attends to the key; only for kernels in `MASK_KERNELS`. None: computed here.
    relative: table of relative biases.
    dropout_keys: a random key for each row; None: no dropout.
  """
  if kernel in ("chunked", "ring"):
    return blockwise.blockwise_attention(query, key, value, query_tokens, key_tokens, settings, relative, dropout_keys)
  if kernel == "splash":
    return splash.splash_attention(query, key, value, query_tokens, key_tokens, settings)
  if mask is None:
    mask = masks.attention_mask(query_tokens, key_tokens, causal=settings.causal, window=settings.window)
  # Queries stay sharded by length, and each of them needs keys of the whole length: gather keys and values.
  key, value = (sharding.constrain(x, "act_batch", None, "act_kv_heads", "act_head_dim") for x in (key, value))
  if kernel == "cudnn":
    return cudnn_attention(query, key, value, query_tokens, key_tokens, mask, settings, relative)
  return xla_attention(query, key, value, query_tokens, key_tokens, mask, settings, relative, dropout_keys)

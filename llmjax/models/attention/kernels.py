"""Attention kernels behind one function: which there are, what each can do, and which of them a model uses where.

`KERNELS` says what each can do. What a config asks for is checked before anything is built (`check`), what only a
batch shows, such as a prefix or a length, while a program is traced (`choose`), which is before it is compiled.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from llmjax.config import ConfigError
from llmjax.config.model import TransformerConfig
from llmjax.distributed import sharding
from llmjax.models.attention import blockwise, masks
from llmjax.models.attention.masks import AttentionSettings
from llmjax.types import Tokens

FEATURES = {  # what a kernel may not support: what asks for it
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
  "lengths cut over devices": "mesh.context",
  "lengths that are no multiple of 128": "of this batch",
  "odd lengths": "of this batch",
  "heads wider than 128 or no multiple of 8": "model.head_dim",
}
ALL = frozenset(FEATURES)
SOFTMAX = {"causal masks", "windows", "grouped heads"}

KERNELS = {  # what each supports; all know segments
  "xla": ALL,
  "chunked": ALL - {"lengths cut over devices"},
  "ring": ALL,
  "cudnn": SOFTMAX
  | {"gpu devices", "bfloat16", "float16", "prefixes", "relative biases", "lengths that are no multiple of 128"},
  "splash": SOFTMAX
  | {"tpu devices", "float32", "bfloat16", "float16", "softcaps", "heads wider than 128 or no multiple of 8"}
  | {"odd lengths"},
}
FOR_DEVICES = tuple(name for name, able in KERNELS.items() if "cpu devices" not in able)
MASKED = ("xla", "cudnn")  # these read a mask [B L S], made once for all layers

LONG = 1024 * 1024  # so many pairs of a query and a key are not held at once, where a device has no kernel of its own
INTERPRET = False  # True runs TPU kernels on any device, slowly


def check_attention_kernel(cfg: TransformerConfig) -> None:
  """Whether the kernel that a config names supports what the config and the mesh in use ask for.

  Raises:
    ConfigError: it does not; names the kernels that do.
  """
  if getattr(cfg, "attention", "auto") != "auto":  # a model of one's own may have none to choose
    _refuse(cfg.attention, _needs(cfg, causal=cfg.stacks != "encoder", training=True))


def choose_kernel(
  cfg: TransformerConfig,
  query: Tokens,
  key: Tokens,
  *,
  cross: bool = False,
  causal: bool = False,
  training: bool = False,
) -> str:
  """The name of the kernel for these tokens.

  Args:
    cross: keys are of another stack, which have neither windows nor biases.
    training: there is dropout, where the config has it.
  Raises:
    ConfigError: the kernel that the config names does not support what these tokens ask for.
  """
  needs = _needs(cfg, cross=cross, causal=causal, training=training)
  if causal and key.prefix is not None:
    needs |= {"prefixes"}
  lengths = query.segments.shape[1], key.segments.shape[1]
  if any(length % 128 for length in lengths):
    needs |= {"lengths that are no multiple of 128"}
  if any(length % 2 for length in lengths):
    needs |= {"odd lengths"}
  # A model that learned on another kind of device is used with a kernel of this one.
  if cfg.attention != "auto" and _device() in KERNELS[cfg.attention]:
    _refuse(cfg.attention, needs)
    return cfg.attention
  if "lengths cut over devices" in needs:
    return "ring"
  for name in ("splash", "cudnn"):
    if needs <= KERNELS[name]:
      return name
  return "chunked" if lengths[0] * lengths[1] >= LONG else "xla"


def _needs(cfg: TransformerConfig, *, cross: bool = False, causal: bool, training: bool) -> set[str]:
  asked = {
    "causal masks": causal,
    "windows": "local" in cfg.attention_pattern and not cross,
    "softcaps": cfg.attention_softcap is not None,
    "grouped heads": cfg.kv_heads != cfg.num_heads,
    "relative biases": cfg.positions == "relative" and not cross,
    "dropout": training and cfg.attention_dropout > 0,
    "lengths cut over devices": sharding.num_shards("act_len") > 1,
    "heads wider than 128 or no multiple of 8": cfg.head_width > 128 or cfg.head_width % 8 > 0,
  }
  return {_device(), cfg.dtype} | {feature for feature, is_asked in asked.items() if is_asked}


def _device() -> str:
  return "tpu devices" if INTERPRET else f"{sharding.mesh_platform()} devices"


def _refuse(name: str, needs: set[str]) -> None:
  for feature in FEATURES:
    if feature in needs - KERNELS[name]:
      able = ", ".join(repr(other) for other, features in KERNELS.items() if needs <= features)
      raise ConfigError(
        f"model.attention={name!r} does not support {feature} ({FEATURES[feature]}); set it to 'auto', or one of {able}"
      )


def dot_product_attention(
  kernel: str,
  query: Float[Array, "B L H A"],
  key: Float[Array, "B S K A"],
  value: Float[Array, "B S K A"],
  queries: Tokens,
  keys: Tokens,
  settings: AttentionSettings,
  *,
  mask: Bool[Array, "B L S"] | None = None,
  relative: Float[Array, "R H"] | None = None,
  dropout_keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B L H A"]:
  """softmax(scale query key^T + bias) value (Vaswani et al. 2017); H query heads share K key/value heads.

  Scores and softmax are float32. A query that may attend to nothing (padding) gets a finite, meaningless value.

  Args:
    kernel: a name in `KERNELS`.
    queries, keys: their tokens, of which masks are made.
    mask: that of the tokens, where the kernel is in `MASKED`; made here if it is None.
    relative: the table of relative biases.
    dropout_keys: one a row; None is no dropout.
  """
  if kernel in ("chunked", "ring"):
    return blockwise.blockwise_attention(query, key, value, queries, keys, settings, relative, dropout_keys)
  if kernel == "splash":
    return splash_attention(query, key, value, queries, keys, settings)
  if mask is None:
    mask = masks.attention_mask(queries, keys, causal=settings.causal, window=settings.window)
  # A query sees keys of all the length, so each device that has a part of it needs all of them.
  key, value = (sharding.constrain(x, "act_batch", None, "act_kv_heads", "act_head_dim") for x in (key, value))
  if kernel == "cudnn":
    return cudnn_attention(query, key, value, queries, keys, mask, settings, relative)
  return xla_attention(query, key, value, queries, keys, mask, settings, relative, dropout_keys)


def xla_attention(
  query: Float[Array, "B L H A"],
  key: Float[Array, "B S K A"],
  value: Float[Array, "B S K A"],
  queries: Tokens,
  keys: Tokens,
  mask: Bool[Array, "B L S"],
  settings: AttentionSettings,
  relative: Float[Array, "R H"] | None = None,
  dropout_keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B L H A"]:
  """The reference, by its formula."""
  weights = jax.nn.softmax(masks.attention_scores(query, key, relative, queries, keys, mask, settings), axis=-1)
  if dropout_keys is not None and settings.dropout > 0.0:
    places = masks.with_row_indices(queries).ids, masks.with_row_indices(keys).ids
    keep = masks.dropout_keep_mask(dropout_keys, jnp.arange(query.shape[2]), *places, rate=settings.dropout)
    weights = jnp.where(keep.reshape(weights.shape), weights / (1.0 - settings.dropout), 0.0)
  out = jnp.einsum("BKGLS,BSKA->BLKGA", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
  return out.astype(value.dtype).reshape(query.shape)


def cudnn_attention(
  query: Float[Array, "B L H A"],
  key: Float[Array, "B S K A"],
  value: Float[Array, "B S K A"],
  queries: Tokens,
  keys: Tokens,
  mask: Bool[Array, "B L S"],
  settings: AttentionSettings,
  relative: Float[Array, "R H"] | None = None,
) -> Float[Array, "B L H A"]:
  """Flash attention of NVIDIA's library."""
  bias = None
  if relative is not None:
    bias = masks.relative_bias(relative, queries, keys, settings).astype(query.dtype)
  return jax.nn.dot_product_attention(
    query, key, value, bias, mask[:, None], scale=settings.scale, implementation="cudnn"
  )


def splash_attention(
  query: Float[Array, "B L H A"],
  key: Float[Array, "B S K A"],
  value: Float[Array, "B S K A"],
  queries: Tokens,
  keys: Tokens,
  settings: AttentionSettings,
) -> Float[Array, "B L H A"]:
  """Block-sparse flash attention on a TPU.

  Causal masks and windows go by the place in a row, which inside a document is the same as by the position.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

  shape = query.shape[1], key.shape[1]
  mask: splash_mask.Mask = splash_mask.FullMask(shape)
  if settings.window is not None:
    both = settings.window // 2
    mask = splash_mask.LocalMask(shape, (settings.window - 1, 0) if settings.causal else (both, both), 0)
  elif settings.causal:
    mask = splash_mask.CausalMask(shape)
  size_q, size_kv = (next(size for size in (512, 256, 128) if length % size == 0) for length in shape)
  sizes = splash_kernel.BlockSizes(
    block_q=size_q,
    block_kv=size_kv,
    block_q_dkv=size_q,
    block_kv_dkv=size_kv,
    block_q_dq=size_q,
    block_kv_dq=size_kv,
  )

  def local(query: Array, key: Array, value: Array, queries: Array, keys: Array) -> Array:
    kernel = splash_kernel.make_splash_mha(
      mask=splash_mask.MultiHeadMask([mask] * query.shape[2]),
      block_sizes=sizes,
      attn_logits_soft_cap=settings.softcap,
      head_shards=1,
      q_seq_shards=1,
      residual_checkpoint_name=blockwise.RESIDUAL_NAME,
      interpret=INTERPRET,
    )
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (query * settings.scale, key, value))
    out = jax.vmap(kernel)(*heads_first, splash_kernel.SegmentIds(queries, keys))
    return jnp.swapaxes(out, 1, 2)

  batch, heads, key, value = blockwise.repeat_kv_for_sharding(query, key, value)
  vectors, tokens = (batch, None, heads, None), (batch, None)
  run = sharding.per_device(local, [vectors, vectors, vectors, tokens, tokens], vectors)
  return run(query, key, value, queries.segments, keys.segments)

"""Mixtral (Jiang et al. 2024), Qwen2-MoE and Qwen3-MoE (Yang et al. 2024, 2025).

Llama's decoder with a mixture of experts in place of each MLP. The weights of a token's experts sum to 1 in Mixtral,
and in the others if `norm_topk_prob` says so. Qwen2-MoE adds an expert that processes all tokens, with a gate of its
own.
"""

from __future__ import annotations

from llmjax.config import Json
from llmjax.config.model import TransformerConfig
from llmjax.interop.families import llama
from llmjax.interop.families.base import HfConfig, JsonField, ModelFields
from llmjax.interop.families.layer_types import write_layer_types
from llmjax.interop.families.llama import (
  llama_family,
  llama_heads,
  read_late_sliding_window,
  read_llama_fields,
  read_sliding_window,
)
from llmjax.interop.families.rotary import read_rotary_fields, write_rotary_fields
from llmjax.interop.families.tensor_names import CLASSES, DOWN, UP, linear_tensors

ROUTER = "E D -> D E"

# Mixtral

MIXTRAL_MLP = {
  **linear_tensors("block_sparse_moe.gate", "mlp/router", ROUTER),
  "block_sparse_moe.experts.{e}.w1.weight": [("mlp/gate", UP)],
  "block_sparse_moe.experts.{e}.w3.weight": [("mlp/up", UP)],
  "block_sparse_moe.experts.{e}.w2.weight": [("mlp/down", DOWN)],
}

MIXTRAL = llama_family(
  "mixtral",
  llama_heads("Mixtral", span_prefix="model."),
  {**llama.ATTENTION, **llama.MLP_NORM, **MIXTRAL_MLP},
  fields={
    "d_ff": JsonField("intermediate_size", 14336),
    "num_kv_heads": JsonField("num_key_value_heads", 8),
    "max_len": JsonField("max_position_embeddings", 131072),
    "norm_epsilon": JsonField("rms_norm_eps", 1e-5),
    "num_experts": JsonField("num_local_experts", 8),
    "experts_per_token": JsonField("num_experts_per_tok", 2),
  },
  constants={"normalize_router": True},
  read_fields=lambda config: {
    **read_rotary_fields(config, 1e6),
    **read_sliding_window({"sliding_window": None, **config}),
  },
  write_fields=lambda cfg: {**write_rotary_fields(cfg), "sliding_window": cfg.window},
)


# Qwen2-MoE and Qwen3-MoE

QWEN_MLP = {
  **linear_tensors("mlp.gate", "mlp/router", ROUTER),
  "mlp.experts.{e}.gate_proj.weight": [("mlp/gate", UP)],
  "mlp.experts.{e}.up_proj.weight": [("mlp/up", UP)],
  "mlp.experts.{e}.down_proj.weight": [("mlp/down", DOWN)],
  **linear_tensors("mlp.shared_expert.gate_proj", "mlp/shared/gate", UP),
  **linear_tensors("mlp.shared_expert.up_proj", "mlp/shared/up", UP),
  **linear_tensors("mlp.shared_expert.down_proj", "mlp/shared/down", DOWN),
  **linear_tensors("mlp.shared_expert_gate", "mlp/shared_gate", CLASSES),
}
QWEN_BLOCK = {**llama.ATTENTION, **llama.MLP_NORM, **QWEN_MLP}
QWEN_FIELDS = {
  **llama.QWEN_FIELDS,
  "num_experts": JsonField("num_local_experts", legacy_name="num_experts"),
  "experts_per_token": JsonField("num_experts_per_tok"),
  "expert_d_ff": JsonField("moe_intermediate_size"),
  "normalize_router": JsonField("norm_topk_prob", False),
}
# Models in which some layers have experts and others an MLP are not supported.
ALLOWED_VALUES: dict[str, tuple[Json, ...]] = {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}


def read_qwen2_moe_fields(config: HfConfig) -> ModelFields:
  """Return the fields; without `layer_types`, every other layer below `max_window_layers` has the window."""
  has_window = config.get("use_sliding_window")
  types = config.get("layer_types")
  if types is None and has_window:
    num_local, num_layers = config.get("max_window_layers", 28), config["num_hidden_layers"]
    types = ["sliding_attention" if i % 2 == 0 and i < num_local else "full_attention" for i in range(num_layers)]
  return {
    **read_rotary_fields(config),
    **read_late_sliding_window({**config, "use_sliding_window": has_window, "layer_types": types}),
    "qkv_bias": config.get("qkv_bias", True),
  }


def write_qwen2_moe_fields(cfg: TransformerConfig) -> dict[str, Json]:
  return {
    **write_rotary_fields(cfg),
    "use_sliding_window": cfg.window is not None,
    "sliding_window": cfg.window,
    "layer_types": write_layer_types(cfg),
    "qkv_bias": cfg.qkv_bias,
  }


QWEN2_MOE = llama_family(
  "qwen2_moe",
  llama_heads("Qwen2Moe", span_prefix="model."),
  QWEN_BLOCK,
  fields={
    **QWEN_FIELDS,
    "num_kv_heads": JsonField("num_key_value_heads", 16),
    "shared_expert_d_ff": JsonField("shared_expert_intermediate_size", 5632),
  },
  allowed_values=ALLOWED_VALUES,
  read_fields=read_qwen2_moe_fields,
  write_fields=write_qwen2_moe_fields,
)


def read_qwen3_moe_fields(config: HfConfig) -> ModelFields:
  window = config.get("sliding_window") if config.get("use_sliding_window") else None
  return {**read_llama_fields(config), **read_sliding_window({**config, "sliding_window": window})}


def write_qwen3_moe_fields(cfg: TransformerConfig) -> dict[str, Json]:
  return {
    **write_rotary_fields(cfg),
    "use_sliding_window": cfg.window is not None,
    "sliding_window": cfg.window,
    "attention_bias": cfg.qkv_bias,
  }


QWEN3_MOE = llama_family(
  "qwen3_moe",
  llama_heads("Qwen3Moe"),
  QWEN_BLOCK,
  fields={
    **QWEN_FIELDS,
    "num_kv_heads": JsonField("num_key_value_heads", 4),
    "d_ff": JsonField("intermediate_size", 6144),
  },
  constants={"qk_norm": True},
  allowed_values=ALLOWED_VALUES,
  read_fields=read_qwen3_moe_fields,
  write_fields=write_qwen3_moe_fields,
)

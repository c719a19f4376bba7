"""Gemma 1, 2 and 3 (Gemma Team 2024, 2024, 2025), the text models.

Llama's decoder with embeddings that are multiplied by sqrt(D), tied embeddings and scales of norms that are stored
minus 1. Gemma 2 has norms before and after each sublayer, soft caps and alternating local and global layers. Gemma 3
has norms of queries and keys instead of soft caps, five local layers for each global one, and a rotary base for local
layers.
"""

from __future__ import annotations

from llmjax.config import Json
from llmjax.config.model import TransformerConfig
from llmjax.interop.families.base import GEMMA_ACTIVATIONS, HfConfig, JsonField, ModelFields
from llmjax.interop.families.layer_types import read_layer_types, write_layer_types
from llmjax.interop.families.llama import ATTENTION, MLP, llama_family, llama_heads, read_llama_fields
from llmjax.interop.families.rotary import read_rotary_fields, write_rotary_fields
from llmjax.interop.families.tensor_names import norm_tensors

FIELDS = {
  "vocab_size": JsonField("vocab_size", 256000),
  "num_kv_heads": JsonField("num_key_value_heads", 4),
  "head_dim": JsonField("head_dim", 256),
  "max_len": JsonField("max_position_embeddings", 8192),
  "tie_embeddings": JsonField("tie_word_embeddings", True),
}
CONSTANTS = {"norm_zero_centered": True, "scale_embeddings": True}
ALLOWED_VALUES = {"use_bidirectional_attention": (None, False)}
ACTIVATION = JsonField("hidden_act", "gelu_pytorch_tanh", GEMMA_ACTIVATIONS)


# Gemma


def read_gemma_fields(config: HfConfig) -> ModelFields:
  name = config.get("hidden_activation") or config.get("hidden_act", "gelu_pytorch_tanh")
  activation = ACTIVATION.read_value({"hidden_act": name})
  # The first configs name the exact gelu, but Transformers has always computed its tanh approximation.
  return {**read_llama_fields(config), "activation": "gelu" if activation == "gelu_exact" else activation}


def write_gemma_fields(cfg: TransformerConfig) -> dict[str, Json]:
  activation = ACTIVATION.json_value(cfg.activation)
  return {
    **write_rotary_fields(cfg),
    "attention_bias": cfg.qkv_bias,
    "hidden_act": activation,
    "hidden_activation": activation,
  }


GEMMA = llama_family(
  "gemma",
  llama_heads("Gemma", span_prefix=None),
  fields={
    **FIELDS,
    "d_model": JsonField("hidden_size", 3072),
    "decoder_layers": JsonField("num_hidden_layers", 28),
    "num_heads": JsonField("num_attention_heads", 16),
    "num_kv_heads": JsonField("num_key_value_heads", 16),
    "d_ff": JsonField("intermediate_size", 24576),
    "activation": ACTIVATION,
  },
  constants=CONSTANTS,
  allowed_values=ALLOWED_VALUES,
  read_fields=read_gemma_fields,
  write_fields=write_gemma_fields,
)


# Gemma 2 and 3

SANDWICH_BLOCK = {
  **ATTENTION,
  **norm_tensors("post_attention_layernorm", "attention_post_norm"),
  **MLP,
  **norm_tensors("pre_feedforward_layernorm", "mlp_norm"),
  **norm_tensors("post_feedforward_layernorm", "mlp_post_norm"),
}
SANDWICH_CONSTANTS = {**CONSTANTS, "norm_placement": "sandwich"}
SANDWICH_FIELDS = {
  **FIELDS,
  "d_model": JsonField("hidden_size", 2304),
  "decoder_layers": JsonField("num_hidden_layers", 26),
  "num_heads": JsonField("num_attention_heads", 8),
  "d_ff": JsonField("intermediate_size", 9216),
  "activation": JsonField("hidden_activation", "gelu_pytorch_tanh", GEMMA_ACTIVATIONS),
  "attention_softcap": JsonField("attn_logit_softcapping", None),
  "logit_softcap": JsonField("final_logit_softcapping", None),
}


def read_sandwich_fields(config: HfConfig, period: int) -> ModelFields:
  """Return fields that Gemma 2 and 3 share; every `period`-th layer is global unless the file says otherwise."""
  period = config.get("sliding_window_pattern") or period
  num_layers = config["num_hidden_layers"]
  types = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(num_layers)]
  has_bias = config.get("attention_bias", False)
  return {
    "qkv_bias": has_bias,
    "attention_out_bias": has_bias,
    "attention_scale": config.get("query_pre_attn_scalar", 256) ** -0.5,
    **read_layer_types(config.get("layer_types") or types, config.get("sliding_window", 4096), num_layers),
  }


def write_sandwich_fields(cfg: TransformerConfig) -> dict[str, Json]:
  scale = cfg.head_width**-0.5 if cfg.attention_scale is None else cfg.attention_scale
  scalar = scale**-2
  return {
    **write_rotary_fields(cfg),
    "attention_bias": cfg.qkv_bias,
    "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
    "layer_types": write_layer_types(cfg),
    "sliding_window": cfg.window or 4096,
  }


def read_gemma3_fields(config: HfConfig) -> ModelFields:
  """Return the fields; the rotary base of local layers is not scaled."""
  fields = {**read_sandwich_fields(config, 6), **read_rotary_fields(config, 1e6)}
  local_config = {
    "rope_theta": config.get("rope_local_base_freq"),
    "rope_parameters": (config.get("rope_parameters") or {}).get("sliding_attention"),
  }
  local_base = read_rotary_fields(local_config, 1e4)["rotary_base"]
  return {**fields, "local_rotary_base": local_base if fields["window"] else None}


def write_gemma3_fields(cfg: TransformerConfig) -> dict[str, Json]:
  return {**write_sandwich_fields(cfg), "rope_local_base_freq": cfg.local_rotary_base or cfg.rotary_base}


GEMMA2 = llama_family(
  "gemma2",
  llama_heads("Gemma2", span_prefix=None),
  SANDWICH_BLOCK,
  fields={
    **SANDWICH_FIELDS,
    "attention_softcap": JsonField("attn_logit_softcapping", 50.0),
    "logit_softcap": JsonField("final_logit_softcapping", 30.0),
  },
  constants=SANDWICH_CONSTANTS,
  allowed_values=ALLOWED_VALUES,
  read_fields=lambda config: {**read_sandwich_fields(config, 2), **read_rotary_fields(config)},
  write_fields=write_sandwich_fields,
)

_GEMMA3_HEADS = llama_heads("Gemma3")

GEMMA3 = llama_family(
  "gemma3_text",
  {
    "Gemma3ForCausalLM": _GEMMA3_HEADS["Gemma3ForCausalLM"],
    "Gemma3TextModel": _GEMMA3_HEADS["Gemma3Model"],
    "Gemma3TextForSequenceClassification": _GEMMA3_HEADS["Gemma3ForSequenceClassification"],
  },
  SANDWICH_BLOCK,
  fields={
    **SANDWICH_FIELDS,
    "vocab_size": JsonField("vocab_size", 262208),
    "max_len": JsonField("max_position_embeddings", 131072),
  },
  constants={**SANDWICH_CONSTANTS, "qk_norm": True},
  allowed_values=ALLOWED_VALUES,
  read_fields=read_gemma3_fields,
  write_fields=write_gemma3_fields,
)

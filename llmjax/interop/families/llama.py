"""Llama 1 to 3 (Touvron et al. 2023, Grattafiori et al. 2024), Mistral (Jiang et al. 2023), Qwen2 and Qwen3 (Yang et
al. 2024, 2025).

Decoders with RMSNorm before each sublayer, rotary positions, a gated MLP and no biases. Mistral adds grouped queries
and a sliding window in every layer, Qwen2 biases of query, key and value and a sliding window in its last layers, Qwen3
norms of queries and keys. Other families are built from the parts below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from llmjax.config import Json
from llmjax.config.model import TransformerConfig
from llmjax.interop.families.base import ACTIVATIONS, Family, Head, HfConfig, JsonField, ModelFields, TensorNames
from llmjax.interop.families.layer_types import read_layer_types, write_layer_types
from llmjax.interop.families.rotary import read_rotary_fields, write_rotary_fields
from llmjax.interop.families.tensor_names import (
  DOWN,
  LAST_TOKEN_HEAD,
  UP,
  attention_tensors,
  layer_tensors,
  linear_tensors,
  lm_head,
  norm_tensors,
  span_head,
  table_tensors,
  token_head,
)

PROJECTIONS = {part: f"self_attn.{part[0]}_proj" for part in ("query", "key", "value")}
ATTENTION = {
  **norm_tensors("input_layernorm", "attention_norm"),
  **attention_tensors({**PROJECTIONS, "out": "self_attn.o_proj"}),
  "self_attn.q_norm.weight": [("attention/query_norm/scale", "A -> A")],
  "self_attn.k_norm.weight": [("attention/key_norm/scale", "A -> A")],
}
MLP_NORM = norm_tensors("post_attention_layernorm", "mlp_norm")
MLP = {
  **linear_tensors("mlp.gate_proj", "mlp/gate", UP),
  **linear_tensors("mlp.up_proj", "mlp/up", UP),
  **linear_tensors("mlp.down_proj", "mlp/down", DOWN),
}
BLOCK = {**ATTENTION, **MLP_NORM, **MLP}

FIELDS = {
  "vocab_size": JsonField("vocab_size", 32000),
  "d_model": JsonField("hidden_size", 4096),
  "decoder_layers": JsonField("num_hidden_layers", 32),
  "num_heads": JsonField("num_attention_heads", 32),
  "num_kv_heads": JsonField("num_key_value_heads", None),
  "head_dim": JsonField("head_dim", None),
  "d_ff": JsonField("intermediate_size", 11008),
  "max_len": JsonField("max_position_embeddings", 2048),
  "norm_epsilon": JsonField("rms_norm_eps", 1e-6),
  "activation": JsonField("hidden_act", "silu", ACTIVATIONS),
  "tie_embeddings": JsonField("tie_word_embeddings", False),
  "init_stddev": JsonField("initializer_range", 0.02),
  "attention_dropout": JsonField("attention_dropout", 0.0),
}
CONSTANTS: Mapping[str, Json] = {
  "norm": "rmsnorm",
  "norm_bias": False,
  "positions": "rotary",
  "gated": True,
  **dict.fromkeys(("qkv_bias", "attention_out_bias", "mlp_bias"), False),
}


def llama_heads(name: str, span_prefix: str | None = "transformer.") -> dict[str, Head]:
  """Return the architectures of a family.

  Args:
    name: start of the names of the architectures.
    span_prefix: prefix of the body's tensors in NAMEForQuestionAnswering; None: there is no such architecture.
  """
  heads = {
    f"{name}ForCausalLM": lm_head("lm_head"),
    f"{name}Model": Head({"tie_embeddings": True}),
    f"{name}ForSequenceClassification": LAST_TOKEN_HEAD,
    f"{name}ForTokenClassification": token_head("score"),
  }
  return heads if span_prefix is None else {**heads, f"{name}ForQuestionAnswering": span_head(span_prefix)}


def llama_family(
  model_type: str,
  heads: Mapping[str, Head],
  block: TensorNames = BLOCK,
  fields: Mapping[str, JsonField] | None = None,
  constants: Mapping[str, Json] | None = None,
  *,
  allowed_values: Mapping[str, Sequence[Json]] | None = None,
  read_fields: Callable[[HfConfig], Mapping[str, Json]] = read_rotary_fields,
  write_fields: Callable[[TransformerConfig], Mapping[str, Json]] = write_rotary_fields,
) -> Family:
  """Return a family that is built like Llama. `fields` and `constants` are the differences; see `Family`.

  Args:
    block: tensors of one layer.
  """
  return Family(
    model_type=model_type,
    fields={**FIELDS, **(fields or {})},
    constants={**CONSTANTS, **(constants or {})},
    heads=heads,
    tensors={
      **table_tensors("embed_tokens", "embedding"),
      **layer_tensors("layers", "decoder", block),
      **norm_tensors("norm", "decoder/final_norm"),
    },
    prefix="model.",
    tied=("lm_head.weight",),
    ignored_suffixes=(".rotary_emb.inv_freq",),
    objective={"name": "causal_lm"},
    allowed_values=allowed_values or {},
    read_fields=read_fields,
    write_fields=write_fields,
  )


# Llama


def read_llama_fields(config: HfConfig) -> ModelFields:
  has_bias = config.get("attention_bias", False)
  return {**read_rotary_fields(config), "qkv_bias": has_bias, "attention_out_bias": has_bias}


LLAMA = llama_family(
  "llama",
  llama_heads("Llama"),
  fields={"mlp_bias": JsonField("mlp_bias", False)},
  allowed_values={"pretraining_tp": (1, 2, 4, 8)},  # tensor parallelism of pretraining; the result is the same
  read_fields=read_llama_fields,
  write_fields=lambda cfg: {**write_rotary_fields(cfg), "attention_bias": cfg.qkv_bias},
)


# Mistral


def read_sliding_window(config: HfConfig) -> ModelFields:
  """Return attention_pattern and window of a family with the same window in all layers, or none."""
  window, num_layers = config.get("sliding_window", 4096), config["num_hidden_layers"]
  types = config.get("layer_types") or ["sliding_attention" if window else "full_attention"] * num_layers
  return read_layer_types(types, window, num_layers)


MISTRAL = llama_family(
  "mistral",
  llama_heads("Mistral", span_prefix="model."),
  fields={
    "num_kv_heads": JsonField("num_key_value_heads", 8),
    "d_ff": JsonField("intermediate_size", 14336),
    "max_len": JsonField("max_position_embeddings", 131072),
  },
  read_fields=lambda config: {**read_rotary_fields(config), **read_sliding_window(config)},
  write_fields=lambda cfg: {**write_rotary_fields(cfg), "sliding_window": cfg.window},
)


# Qwen2 and Qwen3


def read_late_sliding_window(config: HfConfig) -> ModelFields:
  """Return attention_pattern and window of a family with a window from layer `max_window_layers` on."""
  num_layers, window = config["num_hidden_layers"], config.get("sliding_window", 4096)
  has_window = config.get("use_sliding_window") and window
  first_local = config.get("max_window_layers", 28) if has_window else num_layers
  types = ["sliding_attention" if i >= first_local else "full_attention" for i in range(num_layers)]
  return read_layer_types(config.get("layer_types") or types, window, num_layers)


def write_late_sliding_window(cfg: TransformerConfig) -> dict[str, Json]:
  local_layers = [i for i in range(cfg.decoder_layers) if cfg.kind(i) == "local"]
  return {
    "use_sliding_window": cfg.window is not None,
    "sliding_window": cfg.window,
    "max_window_layers": min(local_layers, default=cfg.decoder_layers),
    "layer_types": write_layer_types(cfg),
  }


QWEN_FIELDS = {
  "vocab_size": JsonField("vocab_size", 151936),
  "d_ff": JsonField("intermediate_size", 22016),
  "num_kv_heads": JsonField("num_key_value_heads", 32),
  "max_len": JsonField("max_position_embeddings", 32768),
}

QWEN2 = llama_family(
  "qwen2",
  llama_heads("Qwen2"),
  fields=QWEN_FIELDS,
  constants={"qkv_bias": True},
  allowed_values={"use_mrope": (False, None)},
  read_fields=lambda config: {**read_rotary_fields(config), **read_late_sliding_window(config)},
  write_fields=lambda cfg: {**write_rotary_fields(cfg), **write_late_sliding_window(cfg)},
)

QWEN3 = llama_family(
  "qwen3",
  llama_heads("Qwen3"),
  fields={**QWEN_FIELDS, "head_dim": JsonField("head_dim", 128)},
  constants={"qk_norm": True},
  read_fields=lambda config: {**read_llama_fields(config), **read_late_sliding_window(config)},
  write_fields=lambda cfg: {
    **write_rotary_fields(cfg),
    **write_late_sliding_window(cfg),
    "attention_bias": cfg.qkv_bias,
  },
)

"""Phi-3 and Phi-4-mini (Abdin et al. 2024).

Llama's decoder with query, key and value fused in one matrix, gate and up projection in another, an optional sliding
window, and LongRoPE for long contexts.
"""

from __future__ import annotations

from llmjax.config import Json
from llmjax.config.model import TransformerConfig
from llmjax.interop.families.base import HfConfig, JsonField, ModelFields
from llmjax.interop.families.llama import llama_family, llama_heads, read_sliding_window
from llmjax.interop.families.rotary import read_rotary_fields, write_rotary_fields
from llmjax.interop.families.tensor_names import DOWN, OUT, fused_tensors, linear_tensors, norm_tensors

QKV = [
  ("attention/query", "[H A] D -> D H A"),
  ("attention/key", "[K A] D -> D K A"),
  ("attention/value", "[K A] D -> D K A"),
]
BLOCK = {
  **norm_tensors("input_layernorm", "attention_norm"),
  **fused_tensors("self_attn.qkv_proj", QKV),
  **linear_tensors("self_attn.o_proj", "attention/out", OUT),
  **norm_tensors("post_attention_layernorm", "mlp_norm"),
  **fused_tensors("mlp.gate_up_proj", [("mlp/gate", "[F] D -> D F"), ("mlp/up", "[F] D -> D F")]),
  **linear_tensors("mlp.down_proj", "mlp/down", DOWN),
}


def read_phi3_fields(config: HfConfig) -> ModelFields:
  rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
  if rope.get("rope_type", rope.get("type")) == "yarn":  # the first configs call LongRoPE so
    rope = {**rope, "rope_type": "longrope"}
  original = config.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", 4096))
  config = {**config, "rope_parameters": {**rope, "original_max_position_embeddings": original}}
  return {**read_rotary_fields(config), **read_sliding_window({"sliding_window": None, **config})}


def write_phi3_fields(cfg: TransformerConfig) -> dict[str, Json]:
  scaling = cfg.rotary_scaling
  return {
    **write_rotary_fields(cfg),
    "original_max_position_embeddings": cfg.max_len if scaling is None else scaling.original_max_len,
    "sliding_window": cfg.window,
    "embd_pdrop": cfg.dropout,
  }


PHI3 = llama_family(
  "phi3",
  llama_heads("Phi3", span_prefix=None),
  BLOCK,
  fields={
    "vocab_size": JsonField("vocab_size", 32064),
    "d_model": JsonField("hidden_size", 3072),
    "d_ff": JsonField("intermediate_size", 8192),
    "max_len": JsonField("max_position_embeddings", 4096),
    "norm_epsilon": JsonField("rms_norm_eps", 1e-5),
    "dropout": JsonField("resid_pdrop", 0.0),
  },
  read_fields=read_phi3_fields,
  write_fields=write_phi3_fields,
)

"""GPT-NeoX (Black et al. 2022) and Pythia (Biderman et al. 2023).

A decoder with LayerNorm, rotary positions in a part of each head, and attention and MLP in parallel. Query, key and
value are fused in one matrix, in which they alternate head by head.
"""

from llmjax.config import Json
from llmjax.config.model import TransformerConfig
from llmjax.interop.families.base import ACTIVATIONS, Family, Head, HfConfig, JsonField, ModelFields
from llmjax.interop.families.rotary import read_rotary_fields, write_rotary_fields
from llmjax.interop.families.tensor_names import (
  DOWN,
  LAST_TOKEN_HEAD,
  OUT,
  UP,
  fused_tensors,
  layer_tensors,
  linear_tensors,
  lm_head,
  norm_tensors,
  span_head,
  table_tensors,
  token_head,
)

BLOCK = {
  **norm_tensors("input_layernorm", "attention_norm"),
  **fused_tensors(
    "attention.query_key_value", [(f"attention/{part}", "(H [A]) D -> D H A") for part in ("query", "key", "value")]
  ),
  **linear_tensors("attention.dense", "attention/out", OUT),
  **norm_tensors("post_attention_layernorm", "mlp_norm"),
  **linear_tensors("mlp.dense_h_to_4h", "mlp/up", UP),
  **linear_tensors("mlp.dense_4h_to_h", "mlp/down", DOWN),
}


def read_gpt_neox_fields(config: HfConfig) -> ModelFields:
  legacy = {
    "rope_theta": config.get("rotary_emb_base", 10_000.0),
    "partial_rotary_factor": config.get("rotary_pct", 0.25),
  }
  has_bias = config.get("attention_bias", True)
  return {**read_rotary_fields({**legacy, **config}), "qkv_bias": has_bias, "attention_out_bias": has_bias}


def write_gpt_neox_fields(cfg: TransformerConfig) -> dict[str, Json]:
  rotary = write_rotary_fields(cfg)
  rotary["rotary_emb_base"], rotary["rotary_pct"] = rotary.pop("rope_theta"), cfg.rotary_fraction
  rotary.pop("partial_rotary_factor", None)
  return {**rotary, "attention_bias": cfg.qkv_bias}


GPT_NEOX = Family(
  model_type="gpt_neox",
  fields={
    "vocab_size": JsonField("vocab_size", 50432),
    "d_model": JsonField("hidden_size", 6144),
    "decoder_layers": JsonField("num_hidden_layers", 44),
    "num_heads": JsonField("num_attention_heads", 64),
    "d_ff": JsonField("intermediate_size", 24576),
    "max_len": JsonField("max_position_embeddings", 2048),
    "norm_epsilon": JsonField("layer_norm_eps", 1e-5),
    "activation": JsonField("hidden_act", "gelu", ACTIVATIONS),
    "parallel_residual": JsonField("use_parallel_residual", True),
    "tie_embeddings": JsonField("tie_word_embeddings", False),
    "init_stddev": JsonField("initializer_range", 0.02),
    "dropout": JsonField("hidden_dropout", 0.0),
    "attention_dropout": JsonField("attention_dropout", 0.0),
  },
  constants={"norm": "layernorm", "positions": "rotary"},
  heads={
    "GPTNeoXForCausalLM": lm_head("embed_out"),
    "GPTNeoXModel": Head({"tie_embeddings": True}),
    "GPTNeoXForSequenceClassification": LAST_TOKEN_HEAD,
    "GPTNeoXForTokenClassification": token_head("classifier"),
    "GPTNeoXForQuestionAnswering": span_head(),
  },
  tensors={
    **table_tensors("embed_in", "embedding"),
    **layer_tensors("layers", "decoder", BLOCK),
    **norm_tensors("final_layer_norm", "decoder/final_norm"),
  },
  prefix="gpt_neox.",
  tied=("embed_out.weight",),
  ignored_suffixes=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
  objective={"name": "causal_lm"},
  read_fields=read_gpt_neox_fields,
  write_fields=write_gpt_neox_fields,
)

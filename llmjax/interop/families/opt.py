"""OPT (Zhang et al. 2022).

A decoder with LayerNorm, learned positions and tied embeddings. The position table starts with two rows that are never
read. The 350M model has norms after each sum, and narrow embedding tables with projections to the model's width.
"""

from llmjax.interop.families.base import ACTIVATIONS, Family, Head, HfConfig, JsonField, ModelFields
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
)

PARTS = {part: f"self_attn.{part[0]}_proj" for part in ("query", "key", "value")}
BLOCK = {
  **attention_tensors({**PARTS, "out": "self_attn.out_proj"}),
  **norm_tensors("self_attn_layer_norm", "attention_norm"),
  **linear_tensors("fc1", "mlp/up", UP),
  **linear_tensors("fc2", "mlp/down", DOWN),
  **norm_tensors("final_layer_norm", "mlp_norm"),
}


def read_opt_fields(config: HfConfig) -> ModelFields:
  has_bias = config.get("enable_bias", True)
  width = config.get("word_embed_proj_dim")
  return {
    "embedding_width": None if width in (None, config["hidden_size"]) else width,
    **dict.fromkeys(("qkv_bias", "attention_out_bias", "mlp_bias"), has_bias),
  }


OPT = Family(
  model_type="opt",
  fields={
    "vocab_size": JsonField("vocab_size", 50272),
    "d_model": JsonField("hidden_size", 768),
    "decoder_layers": JsonField("num_hidden_layers", 12),
    "num_heads": JsonField("num_attention_heads", 12),
    "d_ff": JsonField("ffn_dim", 3072),
    "max_len": JsonField("max_position_embeddings", 2048),
    "norm_placement": JsonField("do_layer_norm_before", True, {True: "pre", False: "post"}),
    "activation": JsonField("activation_function", "relu", ACTIVATIONS),
    "tie_embeddings": JsonField("tie_word_embeddings", True),
    "init_stddev": JsonField("init_std", 0.02),
    "dropout": JsonField("dropout", 0.1),
    "attention_dropout": JsonField("attention_dropout", 0.0),
  },
  constants={"norm": "layernorm", "positions": "learned"},
  allowed_values={"_remove_final_layer_norm": (False,), "layer_norm_elementwise_affine": (True,)},
  heads={
    "OPTForCausalLM": lm_head("lm_head"),
    "OPTModel": Head(),
    "OPTForSequenceClassification": LAST_TOKEN_HEAD,
    "OPTForQuestionAnswering": span_head(),
  },
  tensors={
    **table_tensors("decoder.embed_tokens", "embedding", "V E -> V E"),
    **table_tensors("decoder.embed_positions", "positions", "2+P D -> P D"),
    "decoder.project_in.weight": [("project_in/kernel", "D E -> E D")],
    "decoder.project_out.weight": [("project_out/kernel", "E D -> D E")],
    **layer_tensors("decoder.layers", "decoder", BLOCK),
    **norm_tensors("decoder.final_layer_norm", "decoder/final_norm"),
  },
  prefix="model.",
  tied=("lm_head.weight",),
  objective={"name": "causal_lm"},
  read_fields=read_opt_fields,
  write_fields=lambda cfg: {"word_embed_proj_dim": cfg.table_width, "enable_bias": cfg.qkv_bias},
)

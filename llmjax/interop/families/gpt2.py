"""GPT-2 (Radford et al. 2019).

A decoder with LayerNorm before each sublayer, learned positions and tied embeddings. Query, key and value are fused in
one matrix. Unlike elsewhere, matrices are stored as [inputs outputs].
"""

from llmjax.interop.families.base import ACTIVATIONS, Family, Head, JsonField
from llmjax.interop.families.tensor_names import (
  LAST_TOKEN_HEAD,
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
  **norm_tensors("ln_1", "attention_norm"),
  **fused_tensors("attn.c_attn", [(f"attention/{part}", "D [H A] -> D H A") for part in ("query", "key", "value")], 1),
  **linear_tensors("attn.c_proj", "attention/out", "(H A) D -> H A D", 1),
  **norm_tensors("ln_2", "mlp_norm"),
  **linear_tensors("mlp.c_fc", "mlp/up", "D F -> D F", 1),
  **linear_tensors("mlp.c_proj", "mlp/down", "F D -> F D", 1),
}

GPT2 = Family(
  model_type="gpt2",
  fields={
    "vocab_size": JsonField("vocab_size", 50257),
    "d_model": JsonField("n_embd", 768),
    "decoder_layers": JsonField("n_layer", 12),
    "num_heads": JsonField("n_head", 12),
    "d_ff": JsonField("n_inner", None),
    "max_len": JsonField("n_positions", 1024),
    "norm_epsilon": JsonField("layer_norm_epsilon", 1e-5),
    "activation": JsonField("activation_function", "gelu_new", ACTIVATIONS),
    "tie_embeddings": JsonField("tie_word_embeddings", True),
    "init_stddev": JsonField("initializer_range", 0.02),
    "dropout": JsonField("resid_pdrop", 0.1),
    "attention_dropout": JsonField("attn_pdrop", 0.1),
  },
  constants={"norm": "layernorm", "positions": "learned"},
  allowed_values={
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
  },
  heads={
    "GPT2LMHeadModel": lm_head("lm_head"),
    "GPT2Model": Head({"tie_embeddings": True}),
    "GPT2ForSequenceClassification": LAST_TOKEN_HEAD,
    "GPT2ForTokenClassification": token_head("classifier"),
    "GPT2ForQuestionAnswering": span_head(),
  },
  tensors={
    **table_tensors("wte", "embedding"),
    **table_tensors("wpe", "positions", "P D -> P D"),
    **layer_tensors("h", "decoder", BLOCK),
    **norm_tensors("ln_f", "decoder/final_norm"),
  },
  prefix="transformer.",
  tied=("lm_head.weight",),
  ignored_suffixes=(".attn.bias", ".attn.masked_bias"),
  objective={"name": "causal_lm"},
  write_fields=lambda cfg: {"embd_pdrop": cfg.dropout},
)

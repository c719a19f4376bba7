"""GPT-2 (Radford et al. 2019). Its matrices are stored input first."""

from llmjax.interop import family
from llmjax.interop.family import ACTIVATIONS, Family, Field, Head

BLOCK = {
  **family.norm("ln_1", "attention_norm"),
  **family.fused("attn.c_attn", [(f"attention/{part}", "D [H A] -> D H A") for part in ("query", "key", "value")], 1),
  **family.linear("attn.c_proj", "attention/out", "(H A) D -> H A D", 1),
  **family.norm("ln_2", "mlp_norm"),
  **family.linear("mlp.c_fc", "mlp/up", "D F -> D F", 1),
  **family.linear("mlp.c_proj", "mlp/down", "F D -> F D", 1),
}

GPT2 = Family(
  model_type="gpt2",
  fields={
    "vocab_size": Field("vocab_size", 50257),
    "d_model": Field("n_embd", 768),
    "decoder_layers": Field("n_layer", 12),
    "num_heads": Field("n_head", 12),
    "d_ff": Field("n_inner", None),
    "max_len": Field("n_positions", 1024),
    "norm_epsilon": Field("layer_norm_epsilon", 1e-5),
    "activation": Field("activation_function", "gelu_new", ACTIVATIONS),
    "tie_embeddings": Field("tie_word_embeddings", True),
    "init_stddev": Field("initializer_range", 0.02),
    "dropout": Field("resid_pdrop", 0.1),
    "attention_dropout": Field("attn_pdrop", 0.1),
  },
  constants={"norm": "layernorm", "positions": "learned"},
  supported={
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
  },
  heads={
    "GPT2LMHeadModel": family.lm("lm_head"),
    "GPT2Model": Head({"tie_embeddings": True}),
    "GPT2ForSequenceClassification": family.LAST_TOKEN,
    "GPT2ForTokenClassification": family.tagger("classifier"),
    "GPT2ForQuestionAnswering": family.spans(),
  },
  names={
    **family.table("wte", "embedding"),
    **family.table("wpe", "positions", "P D -> P D"),
    **family.layers("h", "decoder", BLOCK),
    **family.norm("ln_f", "decoder/final_norm"),
  },
  prefix="transformer.",
  tied=("lm_head.weight",),
  ignored=(".attn.bias", ".attn.masked_bias"),
  objective={"name": "causal_lm"},
  write=lambda cfg: {"embd_pdrop": cfg.dropout},
)

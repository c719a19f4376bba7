"""GPT-NeoX and Pythia (Black et al. 2022, Biderman et al. 2023). Queries, keys and values alternate head by head."""

from llmjax.interop import family
from llmjax.interop.family import ACTIVATIONS, Family, Field, Head

BLOCK = {
  **family.norm("input_layernorm", "attention_norm"),
  **family.fused(
    "attention.query_key_value", [(f"attention/{part}", "(H [A]) D -> D H A") for part in ("query", "key", "value")]
  ),
  **family.linear("attention.dense", "attention/out", family.OUT),
  **family.norm("post_attention_layernorm", "mlp_norm"),
  **family.linear("mlp.dense_h_to_4h", "mlp/up", family.UP),
  **family.linear("mlp.dense_4h_to_h", "mlp/down", family.DOWN),
}


def read(config):
  older = {
    "rope_theta": config.get("rotary_emb_base", 10_000.0),
    "partial_rotary_factor": config.get("rotary_pct", 0.25),
  }
  biased = config.get("attention_bias", True)
  return {**family.read_rotary({**older, **config}), "qkv_bias": biased, "attention_out_bias": biased}


def write(cfg):
  rotary = family.write_rotary(cfg)
  rotary["rotary_emb_base"], rotary["rotary_pct"] = rotary.pop("rope_theta"), cfg.rotary_fraction
  rotary.pop("partial_rotary_factor", None)
  return {**rotary, "attention_bias": cfg.qkv_bias}


GPT_NEOX = Family(
  model_type="gpt_neox",
  fields={
    "vocab_size": Field("vocab_size", 50432),
    "d_model": Field("hidden_size", 6144),
    "decoder_layers": Field("num_hidden_layers", 44),
    "num_heads": Field("num_attention_heads", 64),
    "d_ff": Field("intermediate_size", 24576),
    "max_len": Field("max_position_embeddings", 2048),
    "norm_epsilon": Field("layer_norm_eps", 1e-5),
    "activation": Field("hidden_act", "gelu", ACTIVATIONS),
    "parallel_residual": Field("use_parallel_residual", True),
    "tie_embeddings": Field("tie_word_embeddings", False),
    "init_stddev": Field("initializer_range", 0.02),
    "dropout": Field("hidden_dropout", 0.0),
    "attention_dropout": Field("attention_dropout", 0.0),
  },
  constants={"norm": "layernorm", "positions": "rotary"},
  heads={
    "GPTNeoXForCausalLM": family.lm("embed_out"),
    "GPTNeoXModel": Head({"tie_embeddings": True}),
    "GPTNeoXForSequenceClassification": family.LAST_TOKEN,
    "GPTNeoXForTokenClassification": family.tagger("classifier"),
    "GPTNeoXForQuestionAnswering": family.spans(),
  },
  names={
    **family.table("embed_in", "embedding"),
    **family.layers("layers", "decoder", BLOCK),
    **family.norm("final_layer_norm", "decoder/final_norm"),
  },
  prefix="gpt_neox.",
  tied=("embed_out.weight",),
  ignored=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
  objective={"name": "causal_lm"},
  read=read,
  write=write,
)

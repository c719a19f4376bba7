"""OPT (Zhang et al. 2022). The first two rows of its position table are never read."""

from llmjax.interop import family
from llmjax.interop.family import ACTIVATIONS, Family, Field, Head

PARTS = {part: f"self_attn.{part[0]}_proj" for part in ("query", "key", "value")}
BLOCK = {
  **family.attention({**PARTS, "out": "self_attn.out_proj"}),
  **family.norm("self_attn_layer_norm", "attention_norm"),
  **family.linear("fc1", "mlp/up", family.UP),
  **family.linear("fc2", "mlp/down", family.DOWN),
  **family.norm("final_layer_norm", "mlp_norm"),
}


def read(config):
  biased = config.get("enable_bias", True)
  width = config.get("word_embed_proj_dim")
  return {
    "embedding_width": None if width in (None, config["hidden_size"]) else width,
    **dict.fromkeys(("qkv_bias", "attention_out_bias", "mlp_bias"), biased),
  }


OPT = Family(
  model_type="opt",
  fields={
    "vocab_size": Field("vocab_size", 50272),
    "d_model": Field("hidden_size", 768),
    "decoder_layers": Field("num_hidden_layers", 12),
    "num_heads": Field("num_attention_heads", 12),
    "d_ff": Field("ffn_dim", 3072),
    "max_len": Field("max_position_embeddings", 2048),
    "norm_placement": Field("do_layer_norm_before", True, {True: "pre", False: "post"}),
    "activation": Field("activation_function", "relu", ACTIVATIONS),
    "tie_embeddings": Field("tie_word_embeddings", True),
    "init_stddev": Field("init_std", 0.02),
    "dropout": Field("dropout", 0.1),
    "attention_dropout": Field("attention_dropout", 0.0),
  },
  constants={"norm": "layernorm", "positions": "learned"},
  supported={"_remove_final_layer_norm": (False,), "layer_norm_elementwise_affine": (True,)},
  heads={
    "OPTForCausalLM": family.lm("lm_head"),
    "OPTModel": Head(),
    "OPTForSequenceClassification": family.LAST_TOKEN,
    "OPTForQuestionAnswering": family.spans(),
  },
  names={
    **family.table("decoder.embed_tokens", "embedding", "V E -> V E"),
    **family.table("decoder.embed_positions", "positions", "2+P D -> P D"),
    "decoder.project_in.weight": [("project_in/kernel", "D E -> E D")],
    "decoder.project_out.weight": [("project_out/kernel", "E D -> D E")],
    **family.layers("decoder.layers", "decoder", BLOCK),
    **family.norm("decoder.final_layer_norm", "decoder/final_norm"),
  },
  prefix="model.",
  tied=("lm_head.weight",),
  objective={"name": "causal_lm"},
  read=read,
  write=lambda cfg: {"word_embed_proj_dim": cfg.table_width, "enable_bias": cfg.qkv_bias},
)

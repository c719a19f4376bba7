"""Gemma 1, 2 and 3 (Gemma Team 2024, 2024, 2025), the text models. Scales of norms are stored minus 1."""

from llmjax.interop import family, llama
from llmjax.interop.family import GEMMA_ACTIVATIONS, Field

FIELDS = {
  "vocab_size": Field("vocab_size", 256000),
  "num_kv_heads": Field("num_key_value_heads", 4),
  "head_dim": Field("head_dim", 256),
  "max_len": Field("max_position_embeddings", 8192),
  "tie_embeddings": Field("tie_word_embeddings", True),
}
CONSTANTS = {"norm_zero_centered": True, "scale_embeddings": True}
SUPPORTED = {"use_bidirectional_attention": (None, False)}


def read_gemma(config):
  """Its first configs say gelu for the tanh approximation, which the model has always computed."""
  said = config.get("hidden_activation") or config.get("hidden_act", "gelu_pytorch_tanh")
  exact = family.GEMMA_ACTIVATIONS.get(said) == "gelu_exact"
  return {
    **llama.read_llama(config),
    "activation": "gelu" if exact else Field("hidden_act", None, GEMMA_ACTIVATIONS).read({"hidden_act": said}),
  }


def write_gemma(cfg):
  said = Field("hidden_act", None, GEMMA_ACTIVATIONS).write(cfg.activation)
  return {
    **family.write_rotary(cfg),
    "attention_bias": cfg.qkv_bias,
    "hidden_act": said,
    "hidden_activation": said,
  }


GEMMA = llama.like(
  "gemma",
  llama.heads("Gemma", None),
  {**llama.ATTENTION, **llama.MLP},
  {
    **FIELDS,
    "d_model": Field("hidden_size", 3072),
    "decoder_layers": Field("num_hidden_layers", 28),
    "num_heads": Field("num_attention_heads", 16),
    "num_kv_heads": Field("num_key_value_heads", 16),
    "d_ff": Field("intermediate_size", 24576),
    "activation": Field("hidden_act", "gelu_pytorch_tanh", GEMMA_ACTIVATIONS),
  },
  CONSTANTS,
  supported=SUPPORTED,
  read=read_gemma,
  write=write_gemma,
)

BLOCK = {
  **llama.ATTENTION,
  **family.norm("post_attention_layernorm", "attention_post_norm"),
  **{name: parts for name, parts in llama.MLP.items() if not name.startswith("post_attention_layernorm")},
  **family.norm("pre_feedforward_layernorm", "mlp_norm"),
  **family.norm("post_feedforward_layernorm", "mlp_post_norm"),
}
SANDWICH = {**CONSTANTS, "norm_placement": "sandwich"}


def read_gemma2(config):
  return {**_read_sandwich(config, 2), **family.read_rotary(config)}


def read_gemma3(config):
  """Local layers have rotary positions of their own, without the scaling."""
  fields = {**_read_sandwich(config, 6), **family.read_rotary(config, 1e6)}
  theirs = family.read_rotary({"rope_theta": config.get("rope_local_base_freq"), **_local(config)}, 1e4)
  return {**fields, "local_rotary_base": theirs["rotary_base"] if fields["window"] else None}


def _local(config):
  return {"rope_parameters": (config.get("rope_parameters") or {}).get("sliding_attention")}


def _read_sandwich(config, period):
  """Every `period`-th layer sees all."""
  every = config.get("sliding_window_pattern") or period
  kinds = [
    "full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(config["num_hidden_layers"])
  ]
  biased = config.get("attention_bias", False)
  return {
    "qkv_bias": biased,
    "attention_out_bias": biased,
    "attention_scale": config.get("query_pre_attn_scalar", 256) ** -0.5,
    **family.read_pattern(config.get("layer_types") or kinds, config.get("sliding_window", 4096), len(kinds)),
  }


def write_sandwich(cfg):
  scale = cfg.head_width**-0.5 if cfg.attention_scale is None else cfg.attention_scale
  inverse = scale**-2
  return {
    **family.write_rotary(cfg),
    "attention_bias": cfg.qkv_bias,
    "query_pre_attn_scalar": round(inverse) if abs(inverse - round(inverse)) < 1e-6 else inverse,
    "layer_types": family.write_pattern(cfg),
    "sliding_window": cfg.window or 4096,
  }


SANDWICH_FIELDS = {
  **FIELDS,
  "d_model": Field("hidden_size", 2304),
  "decoder_layers": Field("num_hidden_layers", 26),
  "num_heads": Field("num_attention_heads", 8),
  "d_ff": Field("intermediate_size", 9216),
  "activation": Field("hidden_activation", "gelu_pytorch_tanh", GEMMA_ACTIVATIONS),
  "attention_softcap": Field("attn_logit_softcapping", None),
  "logit_softcap": Field("final_logit_softcapping", None),
}

GEMMA2 = llama.like(
  "gemma2",
  llama.heads("Gemma2", None),
  BLOCK,
  {
    **SANDWICH_FIELDS,
    "attention_softcap": Field("attn_logit_softcapping", 50.0),
    "logit_softcap": Field("final_logit_softcapping", 30.0),
  },
  SANDWICH,
  supported=SUPPORTED,
  read=read_gemma2,
  write=write_sandwich,
)

GEMMA3 = llama.like(
  "gemma3_text",
  {
    "Gemma3ForCausalLM": llama.heads("Gemma3")["Gemma3ForCausalLM"],
    "Gemma3TextModel": llama.heads("Gemma3")["Gemma3Model"],
    "Gemma3TextForSequenceClassification": llama.heads("Gemma3")["Gemma3ForSequenceClassification"],
  },
  BLOCK,
  {
    **SANDWICH_FIELDS,
    "vocab_size": Field("vocab_size", 262208),
    "max_len": Field("max_position_embeddings", 131072),
  },
  {**SANDWICH, "qk_norm": True},
  supported=SUPPORTED,
  read=read_gemma3,
  write=lambda cfg: {**write_sandwich(cfg), "rope_local_base_freq": cfg.local_rotary_base or cfg.rotary_base},
)

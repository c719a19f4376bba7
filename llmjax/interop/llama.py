"""Llama 1 to 3 (Touvron et al. 2023, Grattafiori et al. 2024), and those built like it: Mistral (Jiang et al. 2023),
Qwen2 and Qwen3 (Yang et al. 2024, 2025)."""

from llmjax.interop import family
from llmjax.interop.family import ACTIVATIONS, Family, Field, Head

PARTS = {part: f"self_attn.{part[0]}_proj" for part in ("query", "key", "value")}
ATTENTION = {
  **family.norm("input_layernorm", "attention_norm"),
  **family.attention({**PARTS, "out": "self_attn.o_proj"}),
  "self_attn.q_norm.weight": [("attention/query_norm/scale", "A -> A")],
  "self_attn.k_norm.weight": [("attention/key_norm/scale", "A -> A")],
}
MLP = {
  **family.norm("post_attention_layernorm", "mlp_norm"),
  **family.linear("mlp.gate_proj", "mlp/gate", family.UP),
  **family.linear("mlp.up_proj", "mlp/up", family.UP),
  **family.linear("mlp.down_proj", "mlp/down", family.DOWN),
}

FIELDS = {
  "vocab_size": Field("vocab_size", 32000),
  "d_model": Field("hidden_size", 4096),
  "decoder_layers": Field("num_hidden_layers", 32),
  "num_heads": Field("num_attention_heads", 32),
  "num_kv_heads": Field("num_key_value_heads", None),
  "head_dim": Field("head_dim", None),
  "d_ff": Field("intermediate_size", 11008),
  "max_len": Field("max_position_embeddings", 2048),
  "norm_epsilon": Field("rms_norm_eps", 1e-6),
  "activation": Field("hidden_act", "silu", ACTIVATIONS),
  "tie_embeddings": Field("tie_word_embeddings", False),
  "init_stddev": Field("initializer_range", 0.02),
  "attention_dropout": Field("attention_dropout", 0.0),
}
CONSTANTS = {
  "norm": "rmsnorm",
  "norm_bias": False,
  "positions": "rotary",
  "gated": True,
  **dict.fromkeys(("qkv_bias", "attention_out_bias", "mlp_bias"), False),
}


def names(block, final="norm"):
  """Of a decoder's tensors."""
  return {
    **family.table("embed_tokens", "embedding"),
    **family.layers("layers", "decoder", block),
    **family.norm(final, "decoder/final_norm"),
  }


def heads(name, spans="transformer."):
  """The architectures of such a family, by the beginning of their names.

  `spans` is the prefix of the tensors before a head on spans, None where there is no such architecture.
  """
  found = {
    f"{name}ForCausalLM": family.lm("lm_head"),
    f"{name}Model": Head({"tie_embeddings": True}),
    f"{name}ForSequenceClassification": family.LAST_TOKEN,
    f"{name}ForTokenClassification": family.tagger("score"),
    f"{name}ForQuestionAnswering": family.spans(spans),
  }
  if spans is None:
    del found[f"{name}ForQuestionAnswering"]
  return found


def like(model_type, heads, block, fields=None, constants=None, read=None, write=None, **more):
  """A family of this kind, told by what differs."""
  return Family(
    model_type=model_type,
    fields={**FIELDS, **(fields or {})},
    constants={**CONSTANTS, **(constants or {})},
    heads=heads,
    names=names(block),
    prefix="model.",
    tied=("lm_head.weight",),
    ignored=(".rotary_emb.inv_freq",),
    objective={"name": "causal_lm"},
    read=read or family.read_rotary,
    write=write or family.write_rotary,
    **more,
  )


def read_llama(config):
  biased = config.get("attention_bias", False)
  return {**family.read_rotary(config), "qkv_bias": biased, "attention_out_bias": biased}


LLAMA = like(
  "llama",
  heads("Llama"),
  {**ATTENTION, **MLP},
  {"mlp_bias": Field("mlp_bias", False)},
  supported={"pretraining_tp": (1, 2, 4, 8)},  # how it was trained; it computes the same
  read=read_llama,
  write=lambda cfg: {**family.write_rotary(cfg), "attention_bias": cfg.qkv_bias},
)


def read_window(config):
  """One for every layer, or none."""
  window, depth = config.get("sliding_window", 4096), config["num_hidden_layers"]
  kinds = config.get("layer_types") or ["sliding_attention" if window else "full_attention"] * depth
  return family.read_pattern(kinds, window, depth)


MISTRAL = like(
  "mistral",
  heads("Mistral", "model."),
  {**ATTENTION, **MLP},
  {
    "num_kv_heads": Field("num_key_value_heads", 8),
    "d_ff": Field("intermediate_size", 14336),
    "max_len": Field("max_position_embeddings", 131072),
  },
  read=lambda config: {**family.read_rotary(config), **read_window(config)},
  write=lambda cfg: {**family.write_rotary(cfg), "sliding_window": cfg.window},
)


def read_late_window(config):
  """From layer `max_window_layers` on, where it is used at all."""
  depth, window = config["num_hidden_layers"], config.get("sliding_window", 4096)
  first = config.get("max_window_layers", 28) if config.get("use_sliding_window") and window else depth
  kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(depth)]
  return family.read_pattern(config.get("layer_types") or kinds, window, depth)


def write_late_window(cfg):
  return {
    "use_sliding_window": cfg.window is not None,
    "sliding_window": cfg.window,
    "max_window_layers": next((i for i in range(cfg.decoder_layers) if cfg.kind(i) == "local"), cfg.decoder_layers),
    "layer_types": family.write_pattern(cfg),
  }


QWEN_FIELDS = {
  "vocab_size": Field("vocab_size", 151936),
  "d_ff": Field("intermediate_size", 22016),
  "num_kv_heads": Field("num_key_value_heads", 32),
  "max_len": Field("max_position_embeddings", 32768),
}

QWEN2 = like(
  "qwen2",
  heads("Qwen2"),
  {**ATTENTION, **MLP},
  QWEN_FIELDS,
  {"qkv_bias": True},
  supported={"use_mrope": (False, None)},
  read=lambda config: {**family.read_rotary(config), **read_late_window(config)},
  write=lambda cfg: {**family.write_rotary(cfg), **write_late_window(cfg)},
)

QWEN3 = like(
  "qwen3",
  heads("Qwen3"),
  {**ATTENTION, **MLP},
  {**QWEN_FIELDS, "head_dim": Field("head_dim", 128)},
  {"qk_norm": True},
  read=lambda config: {**read_llama(config), **read_late_window(config)},
  write=lambda cfg: {**family.write_rotary(cfg), **write_late_window(cfg), "attention_bias": cfg.qkv_bias},
)

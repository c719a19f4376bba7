"""Mixtures of experts built on Llama's decoder: Mixtral (Jiang et al. 2024), Qwen2-MoE and Qwen3-MoE."""

from typing import Any

from llmjax.interop import family, llama
from llmjax.interop.family import Field

NORM = family.norm("post_attention_layernorm", "mlp_norm")
MIXTRAL_MLP = {
  **NORM,
  **family.linear("block_sparse_moe.gate", "mlp/router", "E D -> D E"),
  "block_sparse_moe.experts.{e}.w1.weight": [("mlp/gate", family.UP)],
  "block_sparse_moe.experts.{e}.w3.weight": [("mlp/up", family.UP)],
  "block_sparse_moe.experts.{e}.w2.weight": [("mlp/down", family.DOWN)],
}
QWEN_MLP = {
  **NORM,
  **family.linear("mlp.gate", "mlp/router", "E D -> D E"),
  "mlp.experts.{e}.gate_proj.weight": [("mlp/gate", family.UP)],
  "mlp.experts.{e}.up_proj.weight": [("mlp/up", family.UP)],
  "mlp.experts.{e}.down_proj.weight": [("mlp/down", family.DOWN)],
  **family.linear("mlp.shared_expert.gate_proj", "mlp/shared/gate", family.UP),
  **family.linear("mlp.shared_expert.up_proj", "mlp/shared/up", family.UP),
  **family.linear("mlp.shared_expert.down_proj", "mlp/shared/down", family.DOWN),
  **family.linear("mlp.shared_expert_gate", "mlp/shared_gate", family.CLASSES),
}

MIXTRAL = llama.like(
  "mixtral",
  llama.heads("Mixtral", "model."),
  {**llama.ATTENTION, **MIXTRAL_MLP},
  {
    "d_ff": Field("intermediate_size", 14336),
    "num_kv_heads": Field("num_key_value_heads", 8),
    "max_len": Field("max_position_embeddings", 131072),
    "norm_epsilon": Field("rms_norm_eps", 1e-5),
    "num_experts": Field("num_local_experts", 8),
    "experts_per_token": Field("num_experts_per_tok", 2),
  },
  {"normalize_router": True},
  read=lambda config: {
    **family.read_rotary(config, 1e6),
    **llama.read_window({"sliding_window": None, **config}),
  },
  write=lambda cfg: {**family.write_rotary(cfg), "sliding_window": cfg.window},
)

QWEN_FIELDS = {
  **llama.QWEN_FIELDS,
  "num_experts": Field("num_local_experts", older="num_experts"),
  "experts_per_token": Field("num_experts_per_tok"),
  "expert_d_ff": Field("moe_intermediate_size"),
  "normalize_router": Field("norm_topk_prob", False),
}
SUPPORTED: dict[str, tuple[Any, ...]] = {  # others have layers without experts among those with some
  "decoder_sparse_step": (1,),
  "mlp_only_layers": ([], None),
}


def read_qwen2_moe(config):
  window = {"use_sliding_window": config.get("use_sliding_window")}
  kinds = config.get("layer_types")
  if kinds is None and config.get("use_sliding_window"):
    first = config.get("max_window_layers", 28)
    kinds = [
      "sliding_attention" if i % 2 == 0 and i < first else "full_attention" for i in range(config["num_hidden_layers"])
    ]
  return {
    **family.read_rotary(config),
    **llama.read_late_window({**config, **window, "layer_types": kinds}),
    "qkv_bias": config.get("qkv_bias", True),
  }


QWEN2_MOE = llama.like(
  "qwen2_moe",
  llama.heads("Qwen2Moe", "model."),
  {**llama.ATTENTION, **QWEN_MLP},
  {
    **QWEN_FIELDS,
    "num_kv_heads": Field("num_key_value_heads", 16),
    "shared_expert_d_ff": Field("shared_expert_intermediate_size", 5632),
  },
  supported=SUPPORTED,
  read=read_qwen2_moe,
  write=lambda cfg: {
    **family.write_rotary(cfg),
    "use_sliding_window": cfg.window is not None,
    "sliding_window": cfg.window,
    "layer_types": family.write_pattern(cfg),
    "qkv_bias": cfg.qkv_bias,
  },
)

QWEN3_MOE = llama.like(
  "qwen3_moe",
  llama.heads("Qwen3Moe"),
  {**llama.ATTENTION, **QWEN_MLP},
  {**QWEN_FIELDS, "num_kv_heads": Field("num_key_value_heads", 4), "d_ff": Field("intermediate_size", 6144)},
  {"qk_norm": True},
  supported=SUPPORTED,
  read=lambda config: {
    **llama.read_llama(config),
    **llama.read_window(
      {**config, "sliding_window": config.get("sliding_window") if config.get("use_sliding_window") else None}
    ),
  },
  write=lambda cfg: {
    **family.write_rotary(cfg),
    "use_sliding_window": cfg.window is not None,
    "sliding_window": cfg.window,
    "attention_bias": cfg.qkv_bias,
  },
)

"""Phi-3 and Phi-4-mini (Abdin et al. 2024). Queries, keys and values are one matrix, gate and up another."""

from llmjax.interop import family, llama
from llmjax.interop.family import Field

BLOCK = {
  **family.norm("input_layernorm", "attention_norm"),
  **family.fused(
    "self_attn.qkv_proj",
    [
      ("attention/query", "[H A] D -> D H A"),
      ("attention/key", "[K A] D -> D K A"),
      ("attention/value", "[K A] D -> D K A"),
    ],
  ),
  **family.linear("self_attn.o_proj", "attention/out", family.OUT),
  **family.norm("post_attention_layernorm", "mlp_norm"),
  **family.fused("mlp.gate_up_proj", [("mlp/gate", "[F] D -> D F"), ("mlp/up", "[F] D -> D F")]),
  **family.linear("mlp.down_proj", "mlp/down", family.DOWN),
}


def read(config):
  rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
  if rope.get("rope_type", rope.get("type")) == "yarn":  # what its first configs call longrope
    rope = {**rope, "rope_type": "longrope"}
  original = config.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", 4096))
  config = {**config, "rope_parameters": {**rope, "original_max_position_embeddings": original}}
  window = {"sliding_window": None, **config}
  return {**family.read_rotary(config), **llama.read_window(window)}


def write(cfg):
  scaling = cfg.rotary_scaling
  return {
    **family.write_rotary(cfg),
    "original_max_position_embeddings": cfg.max_len if scaling is None else scaling.original_max_len,
    "sliding_window": cfg.window,
    "embd_pdrop": cfg.dropout,
  }


PHI3 = llama.like(
  "phi3",
  llama.heads("Phi3", None),
  BLOCK,
  {
    "vocab_size": Field("vocab_size", 32064),
    "d_model": Field("hidden_size", 3072),
    "d_ff": Field("intermediate_size", 8192),
    "max_len": Field("max_position_embeddings", 4096),
    "norm_epsilon": Field("rms_norm_eps", 1e-5),
    "dropout": Field("resid_pdrop", 0.0),
  },
  read=read,
  write=write,
)

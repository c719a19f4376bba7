"""Model shapes by name: `SIZES[name]` holds the model's keys and the recipe that was published with them.

Sources: GPT-2 (Radford et al. 2019, and the released configs), GPT-3 (Brown et al. 2020, table 2.1), Llama 2
(Touvron et al. 2023), Llama 3 (Grattafiori et al. 2024, and the released configs of 3.2 for 1B and 3B).
Where the GPT-3 table contradicts itself: XL lists 24 heads of 128 at width 2048; 16 x 128 = 2048 is taken. 13B lists
width 5140 with 40 heads of 128; 40 x 128 = 5120 is taken.
"""

from typing import Any


def gpt(layers: int, width: int, heads: int, context: int, **recipe: Any) -> dict[str, Any]:
  """GPT-2's and GPT-3's choices: pre-norm LayerNorm, learned positions, GELU, biases, tied embeddings."""
  model = {
    "vocab_size": 50257,
    "d_model": width,
    "decoder_layers": layers,
    "num_heads": heads,
    "max_len": context,
    "norm": "layernorm",
    "positions": "learned",
    "activation": "gelu",
    "embedding_stddev": 0.02,
  }
  return {"model": model, "seq_len": context, **recipe}


def llama(
  layers: int,
  width: int,
  heads: int,
  kv_heads: int,
  ff: int,
  *,
  vocab: int,
  context: int,
  base: float,
  head_dim: int | None = None,
  tied: bool = False,
  **recipe: Any,
) -> dict[str, Any]:
  """Llama's choices: RMSNorm, rotary positions, SwiGLU, no biases, grouped heads."""
  model = {
    "vocab_size": vocab,
    "d_model": width,
    "decoder_layers": layers,
    "num_heads": heads,
    "num_kv_heads": kv_heads,
    "head_dim": head_dim,
    "d_ff": ff,
    "max_len": context,
    "norm": "rmsnorm",
    "norm_bias": False,
    "positions": "rotary",
    "rotary_base": base,
    "activation": "silu",
    "gated": True,
    "qkv_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
    "tie_embeddings": tied,
  }
  return {"model": model, "seq_len": context, **recipe}


def small(layers: int, width: int, heads: int, context: int, **recipe: Any) -> dict[str, Any]:
  """Llama's choices with query-key norms and tied embeddings, for small models trained with Muon."""
  size = llama(layers, width, heads, heads, 8 * width // 3 // 8 * 8, vocab=1, context=context, base=10_000.0, tied=True)
  size["model"] |= {"vocab_size": None, "qk_norm": True, "residual_init": "zeros", "init_stddev": None}
  size["model"]["embedding_stddev"] = 0.02  # tied to the output: 1/sqrt(D) would begin with a loss above uniform's
  return {**size, "optim": "muon", **recipe}


LLAMA2 = {"vocab": 32000, "context": 4096, "base": 10_000.0, "batch_tokens": 2**22}
LLAMA3 = {"vocab": 128256, "context": 8192, "base": 500_000.0, "batch_tokens": 2**22}

SIZES: dict[str, dict[str, Any]] = {
  # for the machine at hand
  "debug": small(2, 32, 2, 32, lr=0.02, batch_tokens=256),
  "nano": small(4, 256, 4, 256, lr=0.02, batch_tokens=2**11),
  # GPT-2 publishes no learning rate; that of GPT-3 at the same size is taken
  "gpt2_124m": gpt(12, 768, 12, 1024, lr=6e-4, batch_tokens=2**19),
  "gpt2_355m": gpt(24, 1024, 16, 1024, lr=3e-4, batch_tokens=2**19),
  "gpt2_774m": gpt(36, 1280, 20, 1024, lr=2.5e-4, batch_tokens=2**19),
  "gpt2_1.5b": gpt(48, 1600, 25, 1024, lr=2e-4, batch_tokens=2**19),
  "gpt3_125m": gpt(12, 768, 12, 2048, lr=6e-4, batch_tokens=2**19),
  "gpt3_350m": gpt(24, 1024, 16, 2048, lr=3e-4, batch_tokens=2**19),
  "gpt3_760m": gpt(24, 1536, 16, 2048, lr=2.5e-4, batch_tokens=2**19),
  "gpt3_1.3b": gpt(24, 2048, 16, 2048, lr=2e-4, batch_tokens=2**20),
  "gpt3_2.7b": gpt(32, 2560, 32, 2048, lr=1.6e-4, batch_tokens=2**20),
  "gpt3_6.7b": gpt(32, 4096, 32, 2048, lr=1.2e-4, batch_tokens=2**21),
  "gpt3_13b": gpt(40, 5120, 40, 2048, lr=1e-4, batch_tokens=2**21),
  "gpt3_175b": gpt(96, 12288, 96, 2048, lr=6e-5, batch_tokens=3 * 2**20),
  "llama2_7b": llama(32, 4096, 32, 32, 11008, lr=3e-4, **LLAMA2),
  "llama2_13b": llama(40, 5120, 40, 40, 13824, lr=3e-4, **LLAMA2),
  "llama2_70b": llama(80, 8192, 64, 8, 28672, lr=1.5e-4, **LLAMA2),
  "llama3_1b": llama(16, 2048, 32, 8, 8192, tied=True, lr=3e-4, **LLAMA3),
  "llama3_3b": llama(28, 3072, 24, 8, 8192, tied=True, lr=3e-4, **LLAMA3),
  "llama3_8b": llama(32, 4096, 32, 8, 14336, lr=3e-4, **LLAMA3),
  "llama3_70b": llama(80, 8192, 64, 8, 28672, lr=1.5e-4, **LLAMA3),
  "llama3_405b": llama(126, 16384, 128, 8, 53248, lr=8e-5, **LLAMA3),
}

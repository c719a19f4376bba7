"""Model shapes by name: `SIZES[stacks][name]` has the model's keys and its published recipe.

`stacks` is "decoder", "encoder" or "both". A recipe has "seq_len", "batch_tokens" (input tokens per update) and "lr"
(peak learning rate), and if known "total_steps", "optim", "schedule" and "objective".

Sources of decoders: GPT-2 (Radford et al. 2019, and the released configs), GPT-3 (Brown et al. 2020, table 2.1), Llama
2 (Touvron et al. 2023), Llama 3 (Grattafiori et al. 2024, and the released configs of 3.2 for 1B and 3B).
The GPT-3 table contradicts itself twice. XL lists 24 heads of 128 at width 2048; here it has 16 heads. 13B lists width
5140 with 40 heads of 128; here it has width 5120.

Sources of encoders: BERT (Devlin et al. 2019; its small sizes are Turc et al. 2019; uncased vocabulary), RoBERTa (Liu
et al. 2019, table 9), ModernBERT (Warner et al. 2024, and its released pretraining config), all with the released
configs. BERT's first 90 % of steps had sequences of 128 tokens; here all have 512. RoBERTa's released checkpoints have
514 positions, the first two of which are never used; here there are 512. ModernBERT has its final shape: until
sequences grew from 1,024 to 8,192 tokens, after 1.7 of 2 trillion tokens, its rotary base was 10,000 in all layers.

Sources of encoder-decoders: T5 (Raffel et al. 2020) and T5 v1.1 (Shazeer 2020), with the released configs. Version 1.0
was trained on supervised tasks as well. Its learning rate is constant for 10,000 steps; here it is warmed up over them.
"""

from typing import Any

Size = dict[str, Any]

NO_BIASES = {"norm_bias": False, "qkv_bias": False, "attention_out_bias": False, "mlp_bias": False}


def gpt(layers: int, width: int, heads: int, context: int, **recipe: Any) -> Size:
  """Return GPT-2's and GPT-3's choices: pre-norm LayerNorm, learned positions, GELU, biases, tied embeddings."""
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
  tied: bool = False,
  **recipe: Any,
) -> Size:
  """Return Llama's choices: RMSNorm, rotary positions, SwiGLU, no biases, grouped heads."""
  model = {
    "vocab_size": vocab,
    "d_model": width,
    "decoder_layers": layers,
    "num_heads": heads,
    "num_kv_heads": kv_heads,
    "d_ff": ff,
    "max_len": context,
    "norm": "rmsnorm",
    "positions": "rotary",
    "rotary_base": base,
    "activation": "silu",
    "gated": True,
    "tie_embeddings": tied,
    **NO_BIASES,
  }
  return {"model": model, "seq_len": context, **recipe}


def bert(layers: int, width: int, **recipe: Any) -> Size:
  """Return BERT's choices: post-norm LayerNorm, learned positions, GELU, biases, dropout, two heads."""
  model = {
    "vocab_size": 30522,
    "d_model": width,
    "decoder_layers": 0,
    "encoder_layers": layers,
    "num_heads": width // 64,
    "max_len": 512,
    "norm": "layernorm",
    "norm_epsilon": 1e-12,
    "norm_placement": "post",
    "embedding_norm": True,
    "positions": "learned",
    "token_types": 2,
    "activation": "gelu_exact",
    "head_transform": True,
    "head_bias": True,
    "pooler": True,
    "sentence_classes": 2,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "residual_init": "plain",
  }
  return {"model": model, "seq_len": 512, **recipe}


def roberta(layers: int, width: int, **recipe: Any) -> Size:
  """Return BERT's choices without sentence pairs, and with GPT-2's vocabulary."""
  size = bert(layers, width, **recipe)
  size["model"] |= {"vocab_size": 50265, "norm_epsilon": 1e-5, "token_types": 1}
  size["model"] |= {"pooler": False, "sentence_classes": 0}
  return size


def modernbert(layers: int, width: int, ff: int, **recipe: Any) -> Size:
  """Return ModernBERT's choices: pre-norm, rotary positions, GeGLU, no biases; two of three layers are local."""
  model = {
    "vocab_size": 50368,
    "d_model": width,
    "decoder_layers": 0,
    "encoder_layers": layers,
    "num_heads": width // 64,
    "d_ff": ff,
    "max_len": 8192,
    "norm": "layernorm",
    "embedding_norm": True,
    "first_attention_norm": False,
    "positions": "rotary",
    "rotary_base": 160_000.0,
    "local_rotary_base": 10_000.0,
    "attention_pattern": ("global", "local", "local"),
    "window": 128,
    "activation": "gelu_exact",
    "gated": True,
    "head_transform": True,
    "head_bias": True,
    **NO_BIASES,
  }
  return {"model": model, "seq_len": 1024, **recipe}


def t5(layers: int, width: int, heads: int, ff: int, head_dim: int = 64) -> Size:
  """Return T5 v1.0's choices: RMSNorm, relative positions, unscaled scores, no biases, ReLU, tied embeddings."""
  model = {
    "vocab_size": 32128,
    "d_model": width,
    "decoder_layers": layers,
    "encoder_layers": layers,
    "num_heads": heads,
    "head_dim": head_dim,
    "d_ff": ff,
    "max_len": 512,
    "norm": "rmsnorm",
    "norm_epsilon": 1e-6,
    "positions": "relative",
    "relative_buckets": 32,
    "relative_max_distance": 128,
    "attention_scale": 1.0,
    "activation": "relu",
    "scale_tied_logits": True,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "mlp_dropout": 0.1,
    "init_stddev": None,
    "embedding_stddev": 1.0,
    "residual_init": "plain",
    **NO_BIASES,
  }
  return {"model": model, "seq_len": 512, **T5}


def t5_v1_1(layers: int, width: int, heads: int, ff: int) -> Size:
  """Return T5 v1.1's choices: gated GELU, untied output projection, no dropout before fine-tuning."""
  size = t5(layers, width, heads, ff)
  size["model"] |= {"activation": "gelu", "gated": True, "tie_embeddings": False, "scale_tied_logits": False}
  size["model"] |= dict.fromkeys(("dropout", "attention_dropout", "mlp_dropout"), 0.0)
  return size


def small(
  width: int,
  heads: int,
  context: int,
  *,
  decoder_layers: int = 0,
  encoder_layers: int = 0,
  experts: int = 0,
  **recipe: Any,
) -> Size:
  """Return Llama's choices with query-key norms and tied embeddings, for small models trained with Muon.

  With `experts`, each is half as wide as the MLP that they replace, and each token uses two.
  """
  ff = 8 * width // 3 // 8 * 8
  size = llama(decoder_layers, width, heads, heads, ff, vocab=1, context=context, base=10_000.0, tied=True)
  size["model"] |= {"vocab_size": None, "encoder_layers": encoder_layers, "qk_norm": True}
  size["model"] |= {"residual_init": "zeros", "init_stddev": None}
  if experts:
    size["model"] |= {"num_experts": experts, "experts_per_token": 2, "expert_d_ff": ff // 2}
    recipe["objective"] = {"balance": 0.01}
  # The table is tied to the output: with 1/sqrt(D), the initial loss is above that of a uniform prediction.
  size["model"]["embedding_stddev"] = 0.02
  return {**size, "lr": 0.02, "optim": {"name": "muon"}, **recipe}


LLAMA2 = {"vocab": 32000, "context": 4096, "base": 10_000.0, "batch_tokens": 2**22}
LLAMA3 = {"vocab": 128256, "context": 8192, "base": 500_000.0, "batch_tokens": 2**22}
BERT = {
  "lr": 1e-4,
  "batch_tokens": 2**17,
  "total_steps": 1_000_000,
  "optim": {"name": "adamw", "b2": 0.999, "eps": 1e-6, "weight_decay": 0.01},
  "schedule": {"name": "linear", "warmup": "1%", "final": 0.0},
  "objective": {"sentence_pairs": "next"},
}
ROBERTA = {
  "batch_tokens": 2**22,
  "total_steps": 500_000,
  "optim": {"name": "adamw", "b2": 0.98, "eps": 1e-6, "weight_decay": 0.01, "clip_norm": None},
}
# AdamW with clipped gradients replaces its StableAdamW, which bounds the step of each parameter. Its learning rate
# decays in the last 50 billion tokens.
MODERNBERT = {
  "total_steps": "1719B tokens",
  "optim": {"name": "adamw", "b2": 0.98, "eps": 1e-6, "weight_decay": 1e-5},
  "schedule": {"name": "wsd", "warmup": "0.2%", "decay": "3%", "shape": "sqrt", "final": 0.0},
  "objective": {"rate": 0.3},
}
T5 = {
  "lr": 0.01,  # relative to the root mean square of each parameter
  "batch_tokens": 2**20,
  "total_steps": 1_000_000,
  "optim": {"name": "adafactor", "parameter_scale": True, "weight_decay": 0.0, "clip_norm": None},
  "schedule": {"name": "inverse_sqrt", "warmup": "1%"},
  "objective": {"z_loss": 1e-4},
}

DECODERS = {
  # chosen for two CPU cores, not published
  "debug": small(32, 2, 32, decoder_layers=2, batch_tokens=2**8, total_steps=2),
  "nano": small(256, 4, 256, decoder_layers=4, batch_tokens=2**11, total_steps=600),
  "nano_moe": small(256, 4, 256, decoder_layers=4, experts=8, batch_tokens=2**11, total_steps=600),
  # GPT-2 publishes no learning rate; this is that of GPT-3 at the same size
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

ENCODERS = {
  "debug": small(32, 2, 32, encoder_layers=2, batch_tokens=2**8, total_steps=2),
  "nano": small(256, 4, 256, encoder_layers=4, batch_tokens=2**11, total_steps=500, objective={"rate": 0.3}),
  "bert_tiny": bert(2, 128, **BERT),
  "bert_mini": bert(4, 256, **BERT),
  "bert_small": bert(4, 512, **BERT),
  "bert_medium": bert(8, 512, **BERT),
  "bert_base": bert(12, 768, **BERT),
  "bert_large": bert(24, 1024, **BERT),
  "roberta_base": roberta(12, 768, lr=6e-4, schedule={"name": "linear", "warmup": "4.8%", "final": 0.0}, **ROBERTA),
  "roberta_large": roberta(24, 1024, lr=4e-4, schedule={"name": "linear", "warmup": "6%", "final": 0.0}, **ROBERTA),
  "modernbert_base": modernbert(22, 768, 1152, lr=8e-4, batch_tokens=4608 * 1024, **MODERNBERT),
  "modernbert_large": modernbert(28, 1024, 2624, lr=5e-4, batch_tokens=4928 * 1024, **MODERNBERT),
}

ENCODER_DECODERS = {
  "debug": small(32, 2, 32, encoder_layers=2, decoder_layers=2, batch_tokens=2**8, total_steps=2),
  "nano": small(256, 4, 256, encoder_layers=3, decoder_layers=3, batch_tokens=2**11, total_steps=400),
  "t5_small": t5(6, 512, 8, 2048),
  "t5_base": t5(12, 768, 12, 3072),
  "t5_large": t5(24, 1024, 16, 4096),
  "t5_3b": t5(24, 1024, 32, 16384, head_dim=128),
  "t5_11b": t5(24, 1024, 128, 65536, head_dim=128),
  "t5_v1.1_small": t5_v1_1(8, 512, 6, 1024),
  "t5_v1.1_base": t5_v1_1(12, 768, 12, 2048),
  "t5_v1.1_large": t5_v1_1(24, 1024, 16, 2816),
  "t5_v1.1_xl": t5_v1_1(24, 2048, 32, 5120),
  "t5_v1.1_xxl": t5_v1_1(24, 4096, 64, 10240),
}

SIZES: dict[str, dict[str, Size]] = {"decoder": DECODERS, "encoder": ENCODERS, "both": ENCODER_DECODERS}

"""T5 v1.0 (Raffel et al. 2020) and v1.1 (Shazeer 2020).

Encoder and decoder with RMSNorm, no biases, and relative position biases whose table the first layer of each stack
holds. v1.0 has a plain MLP and scales its logits, v1.1 has a gated MLP and an output projection of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmjax.config import ConfigError, Json
from llmjax.config.model import TransformerConfig
from llmjax.interop.families.base import ACTIVATIONS, Family, Head, HfConfig, JsonField, ModelFields, TensorNames
from llmjax.interop.families.tensor_names import (
  DOWN,
  OUTPUT_PROJECTION,
  UP,
  attention_tensors,
  layer_tensors,
  table_tensors,
)

PARTS = ("query", "key", "value", "out")
SELF_ATTENTION = {
  "layer.0.layer_norm.weight": [("attention_norm/scale", "D -> D")],
  **attention_tensors({part: f"layer.0.SelfAttention.{part[0]}" for part in PARTS}),
}
CROSS_ATTENTION = {
  "layer.1.layer_norm.weight": [("cross_norm/scale", "D -> D")],
  **attention_tensors({part: f"layer.1.EncDecAttention.{part[0]}" for part in PARTS}, "cross_attention"),
}


def t5_mlp_tensors(name: str, up_projections: Mapping[str, str]) -> TensorNames:
  """Return norm and MLP of a layer; `up_projections` is {tensor name: path of the parameters}."""
  return {
    f"{name}.layer_norm.weight": [("mlp_norm/scale", "D -> D")],
    **{f"{name}.DenseReluDense.{up}.weight": [(f"{path}/kernel", UP)] for up, path in up_projections.items()},
    f"{name}.DenseReluDense.wo.weight": [("mlp/down/kernel", DOWN)],
  }


def t5_stack_tensors(stack: str) -> TensorNames:
  """Return the tensors of a stack outside its layers: relative position biases and final norm."""
  biases = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
  return {
    biases: [(f"{stack}/relative/table", "R H -> R H")],
    f"{stack}.final_layer_norm.weight": [(f"{stack}/final_norm/scale", "D -> D")],
  }


def t5_tensors(cfg: TransformerConfig) -> TensorNames:
  up = {"wi_0": "mlp/gate", "wi_1": "mlp/up"} if cfg.gated else {"wi": "mlp/up"}
  encoder_block = {**SELF_ATTENTION, **t5_mlp_tensors("layer.1", up)}
  decoder_block = {**SELF_ATTENTION, **CROSS_ATTENTION, **t5_mlp_tensors("layer.2", up)}
  return {
    **table_tensors("shared", "embedding"),
    **layer_tensors("encoder.block", "encoder", encoder_block),
    **layer_tensors("decoder.block", "decoder", decoder_block),
    **t5_stack_tensors("encoder"),
    **t5_stack_tensors("decoder"),
    "lm_head.weight": [("head/kernel", OUTPUT_PROJECTION)],
  }


def read_t5_fields(config: HfConfig) -> ModelFields:
  """Return the fields.

  `feed_forward_proj` is ACTIVATION or gated-ACTIVATION; with gated-gelu, gelu is the tanh approximation. Whether logits
  are scaled is in `tie_word_embeddings` (Transformers 4) or `scale_decoder_outputs` (Transformers 5).
  """
  feed_forward = config.get("feed_forward_proj", "relu")
  is_gated, name = feed_forward.startswith("gated-"), feed_forward.removeprefix("gated-")
  if name not in ACTIVATIONS:
    allowed = ", ".join(ACTIVATIONS)
    raise ConfigError(f"feed_forward_proj={feed_forward!r} is not supported; allowed are (gated-) {allowed}")
  is_tied = config.get("tie_word_embeddings", True) is not False
  depth, dropout = config.get("num_layers", 6), config.get("dropout_rate", 0.1)
  return {
    "decoder_layers": depth if config.get("num_decoder_layers") is None else config["num_decoder_layers"],
    "activation": "gelu" if feed_forward == "gated-gelu" else ACTIVATIONS[name],
    "gated": is_gated,
    "tie_embeddings": is_tied,
    "scale_tied_logits": bool(config.get("scale_decoder_outputs", is_tied)),
    **dict.fromkeys(("dropout", "attention_dropout", "mlp_dropout"), dropout),
  }


def write_t5_fields(cfg: TransformerConfig) -> dict[str, Json]:
  name = JsonField("", None, ACTIVATIONS).json_value(cfg.activation)
  if cfg.gated:
    name = "gated-gelu" if cfg.activation == "gelu" else f"gated-{name}"
  return {
    "num_decoder_layers": cfg.decoder_layers,
    "feed_forward_proj": name,
    "tie_word_embeddings": cfg.tie_embeddings,
    "scale_decoder_outputs": cfg.scale_tied_logits,
    "dropout_rate": cfg.dropout,
    "is_encoder_decoder": True,
    "decoder_start_token_id": 0,
  }


T5 = Family(
  model_type="t5",
  fields={
    "vocab_size": JsonField("vocab_size", 32128),
    "d_model": JsonField("d_model", 512),
    "encoder_layers": JsonField("num_layers", 6),
    "num_heads": JsonField("num_heads", 8),
    "head_dim": JsonField("d_kv", 64),
    "d_ff": JsonField("d_ff", 2048),
    "max_len": JsonField("n_positions", 512),
    "norm_epsilon": JsonField("layer_norm_epsilon", 1e-6),
    "relative_buckets": JsonField("relative_attention_num_buckets", 32),
    "relative_max_distance": JsonField("relative_attention_max_distance", 128),
  },
  constants={
    "norm": "rmsnorm",
    "norm_bias": False,
    "positions": "relative",
    "attention_scale": 1.0,
    **dict.fromkeys(("qkv_bias", "attention_out_bias", "mlp_bias"), False),
  },
  allowed_values={"is_encoder_decoder": (True,)},
  heads={"T5ForConditionalGeneration": Head(), "T5WithLMHeadModel": Head(), "T5Model": Head({"tie_embeddings": True})},
  tensors=t5_tensors,
  always_tied=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
  tied=("lm_head.weight",),
  untied_by="lm_head.weight",
  ignored_suffixes=("EncDecAttention.relative_attention_bias.weight",),
  objective={"name": "span_corruption"},
  read_fields=read_t5_fields,
  write_fields=write_t5_fields,
)

"""ModernBERT (Warner et al. 2024).

An encoder with norms before each sublayer but the first attention, rotary positions, a gated MLP and alternating local
and global attention, whose rotary bases differ. Query, key and value are fused in one matrix, gate and up projection in
another.
"""

from llmjax.config import ConfigError, Json
from llmjax.config.model import TransformerConfig
from llmjax.interop.families.base import ACTIVATIONS, Family, Head, HfConfig, JsonField, ModelFields
from llmjax.interop.families.layer_types import read_layer_types, write_layer_types
from llmjax.interop.families.rotary import read_rotary_fields
from llmjax.interop.families.tensor_names import (
  CLASSES,
  DOWN,
  OUT,
  SQUARE,
  fused_tensors,
  layer_tensors,
  linear_tensors,
  norm_tensors,
  table_tensors,
)

BLOCK = {
  **norm_tensors("attn_norm", "attention_norm"),
  **fused_tensors("attn.Wqkv", [(f"attention/{part}", "[H A] D -> D H A") for part in ("query", "key", "value")]),
  **linear_tensors("attn.Wo", "attention/out", OUT),
  **norm_tensors("mlp_norm", "mlp_norm"),
  **fused_tensors("mlp.Wi", [("mlp/gate", "[F] D -> D F"), ("mlp/up", "[F] D -> D F")]),
  **linear_tensors("mlp.Wo", "mlp/down", DOWN),
}
TRANSFORM = {**linear_tensors("head.dense", "head_transform", SQUARE), **norm_tensors("head.norm", "head_norm")}
CLASSIFIER = {**TRANSFORM, **linear_tensors("classifier", "head", CLASSES)}
HEAD_FIELDS = {"head_transform": True, "head_bias": True}


def read_modernbert_fields(config: HfConfig) -> ModelFields:
  every = config.get("global_attn_every_n_layers", 3)
  types = ["sliding_attention" if i % every else "full_attention" for i in range(config["num_hidden_layers"])]
  fields = {
    **read_layer_types(config.get("layer_types") or types, config.get("local_attention", 128), len(types)),
    **read_rotary_fields({"rope_theta": config.get("global_rope_theta"), **config}, 160_000.0),
  }
  local_config = {"rope_theta": config.get("local_rope_theta"), **config}
  local_fields = read_rotary_fields(local_config, 10_000.0, "sliding_attention")
  if local_fields["rotary_scaling"] is not None:
    raise ConfigError("rope_parameters.sliding_attention: a scaling of local layers is not supported")
  classifier_activation, activation = (config.get(f"{part}_activation", "gelu") for part in ("classifier", "hidden"))
  if classifier_activation != activation:
    raise ConfigError(
      f"classifier_activation={classifier_activation!r} is not supported; it must be hidden_activation={activation!r}"
    )
  has_bias = config.get("attention_bias", False)
  pooling = {"cls": "first", "mean": "mean"}[config.get("classifier_pooling", "cls")]
  return {
    **fields,
    "local_rotary_base": local_fields["rotary_base"] if fields["window"] else None,
    "qkv_bias": has_bias,
    "attention_out_bias": has_bias,
    "pooling": pooling,
  }


def write_modernbert_fields(cfg: TransformerConfig) -> dict[str, Json]:
  activation = JsonField("hidden_activation", None, ACTIVATIONS).json_value(cfg.activation)
  global_layers = [i for i in range(1, cfg.encoder_layers) if cfg.kind(i) == "global"]
  return {
    "global_rope_theta": cfg.rotary_base,
    "local_rope_theta": cfg.local_rotary_base or cfg.rotary_base,
    "global_attn_every_n_layers": global_layers[0] if global_layers else cfg.encoder_layers,
    "layer_types": write_layer_types(cfg),
    "local_attention": cfg.window or 128,
    "attention_bias": cfg.qkv_bias,
    "classifier_activation": activation,
    "classifier_pooling": "mean" if cfg.pooling == "mean" else "cls",
    "classifier_bias": False,
    "embedding_dropout": cfg.dropout,
  }


MODERNBERT = Family(
  model_type="modernbert",
  fields={
    "vocab_size": JsonField("vocab_size", 50368),
    "d_model": JsonField("hidden_size", 768),
    "encoder_layers": JsonField("num_hidden_layers", 22),
    "num_heads": JsonField("num_attention_heads", 12),
    "d_ff": JsonField("intermediate_size", 1152),
    "max_len": JsonField("max_position_embeddings", 8192),
    "norm_epsilon": JsonField("norm_eps", 1e-5),
    "norm_bias": JsonField("norm_bias", False),
    "activation": JsonField("hidden_activation", "gelu", ACTIVATIONS),
    "mlp_bias": JsonField("mlp_bias", False),
    "init_stddev": JsonField("initializer_range", 0.02),
    "attention_dropout": JsonField("attention_dropout", 0.0),
    "mlp_dropout": JsonField("mlp_dropout", 0.0),
  },
  constants={
    "decoder_layers": 0,
    "norm": "layernorm",
    "embedding_norm": True,
    "first_attention_norm": False,
    "positions": "rotary",
    "gated": True,
    "tie_embeddings": True,
  },
  allowed_values={"classifier_bias": (False,), "tie_word_embeddings": (True,), "decoder_bias": (True,)},
  heads={
    "ModernBertForMaskedLM": Head(HEAD_FIELDS, {**TRANSFORM, "decoder.bias": [("head_bias/bias", "V -> V")]}),
    "ModernBertModel": Head(),
    "ModernBertForSequenceClassification": Head({**HEAD_FIELDS, "head": "sequence"}, CLASSIFIER),
    "ModernBertForTokenClassification": Head({**HEAD_FIELDS, "head": "token"}, CLASSIFIER),
    "ModernBertForQuestionAnswering": Head({**HEAD_FIELDS, "head": "span"}, CLASSIFIER),
  },
  tensors={
    **table_tensors("embeddings.tok_embeddings", "embedding"),
    **norm_tensors("embeddings.norm", "embedding_norm"),
    **layer_tensors("layers", "encoder", BLOCK),
    **norm_tensors("final_norm", "encoder/final_norm"),
  },
  prefix="model.",
  tied=("decoder.weight",),
  objective={"name": "masked_lm"},
  read_fields=read_modernbert_fields,
  write_fields=write_modernbert_fields,
)

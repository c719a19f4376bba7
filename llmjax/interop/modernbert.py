"""ModernBERT (Warner et al. 2024). Its gate is the first half of a matrix, what it multiplies the second."""

from llmjax.config import ConfigError
from llmjax.interop import family
from llmjax.interop.bert import DENSE
from llmjax.interop.family import ACTIVATIONS, Family, Field, Head

BLOCK = {
  **family.norm("attn_norm", "attention_norm"),
  **family.fused("attn.Wqkv", [(f"attention/{part}", "[H A] D -> D H A") for part in ("query", "key", "value")]),
  **family.linear("attn.Wo", "attention/out", family.OUT),
  **family.norm("mlp_norm", "mlp_norm"),
  **family.fused("mlp.Wi", [("mlp/gate", "[F] D -> D F"), ("mlp/up", "[F] D -> D F")]),
  **family.linear("mlp.Wo", "mlp/down", family.DOWN),
}
HEAD = {**family.linear("head.dense", "head_transform", DENSE), **family.norm("head.norm", "head_norm")}
CLASSIFIER = {**HEAD, **family.linear("classifier", "head", family.CLASSES)}
CLASSES = {"head_transform": True, "head_bias": True}


def read(config):
  every = config.get("global_attn_every_n_layers", 3)
  kinds = ["sliding_attention" if i % every else "full_attention" for i in range(config["num_hidden_layers"])]
  fields = {
    **family.read_pattern(config.get("layer_types") or kinds, config.get("local_attention", 128), len(kinds)),
    **family.read_rotary({"rope_theta": config.get("global_rope_theta"), **config}, 160_000.0),
  }
  local = {"rope_theta": config.get("local_rope_theta"), **config}
  own = family.read_rotary(local, 10_000.0, which="sliding_attention")
  if own["rotary_scaling"] is not None:
    raise ConfigError("rope_parameters.sliding_attention: a scaling of local layers is not supported")
  if config.get("classifier_activation", "gelu") != config.get("hidden_activation", "gelu"):
    raise ConfigError("classifier_activation: another one than hidden_activation is not supported")
  biased = config.get("attention_bias", False)
  pooling = {"cls": "first", "mean": "mean"}[config.get("classifier_pooling", "cls")]
  return {
    **fields,
    "local_rotary_base": own["rotary_base"] if fields["window"] else None,
    "qkv_bias": biased,
    "attention_out_bias": biased,
    "pooling": pooling,
  }


def write(cfg):
  activation = Field("hidden_activation", None, ACTIVATIONS).write(cfg.activation)
  first = [i for i in range(1, cfg.encoder_layers) if cfg.kind(i) == "global"]
  return {
    "global_rope_theta": cfg.rotary_base,
    "local_rope_theta": cfg.local_rotary_base or cfg.rotary_base,
    "global_attn_every_n_layers": first[0] if first else cfg.encoder_layers,
    "layer_types": family.write_pattern(cfg),
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
    "vocab_size": Field("vocab_size", 50368),
    "d_model": Field("hidden_size", 768),
    "encoder_layers": Field("num_hidden_layers", 22),
    "num_heads": Field("num_attention_heads", 12),
    "d_ff": Field("intermediate_size", 1152),
    "max_len": Field("max_position_embeddings", 8192),
    "norm_epsilon": Field("norm_eps", 1e-5),
    "norm_bias": Field("norm_bias", False),
    "activation": Field("hidden_activation", "gelu", ACTIVATIONS),
    "mlp_bias": Field("mlp_bias", False),
    "init_stddev": Field("initializer_range", 0.02),
    "attention_dropout": Field("attention_dropout", 0.0),
    "mlp_dropout": Field("mlp_dropout", 0.0),
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
  supported={"classifier_bias": (False,), "tie_word_embeddings": (True,), "decoder_bias": (True,)},
  heads={
    "ModernBertForMaskedLM": Head(CLASSES, {**HEAD, "decoder.bias": [("head_bias/bias", "V -> V")]}),
    "ModernBertModel": Head(),
    "ModernBertForSequenceClassification": Head({**CLASSES, "head": "sequence"}, CLASSIFIER),
    "ModernBertForTokenClassification": Head({**CLASSES, "head": "token"}, CLASSIFIER),
    "ModernBertForQuestionAnswering": Head({**CLASSES, "head": "span"}, CLASSIFIER),
  },
  names={
    **family.table("embeddings.tok_embeddings", "embedding"),
    **family.norm("embeddings.norm", "embedding_norm"),
    **family.layers("layers", "encoder", BLOCK),
    **family.norm("final_norm", "encoder/final_norm"),
  },
  prefix="model.",
  tied=("decoder.weight",),
  objective={"name": "masked_lm"},
  read=read,
  write=write,
)

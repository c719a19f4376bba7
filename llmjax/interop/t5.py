"""T5 v1.0 and v1.1 (Raffel et al. 2020, Shazeer 2020). Only the first layer of a stack has the table of biases."""

from llmjax.config import ConfigError
from llmjax.interop import family
from llmjax.interop.family import ACTIVATIONS, Family, Field, Head


def attention(theirs, ours):
  return family.attention({part: f"{theirs}.{part[0]}" for part in ("query", "key", "value", "out")}, ours)


def mlp(theirs, up):
  return {
    f"{theirs}.layer_norm.weight": [("mlp_norm/scale", "D -> D")],
    **{f"{theirs}.DenseReluDense.{name}.weight": [(f"{ours}/kernel", family.UP)] for name, ours in up.items()},
    f"{theirs}.DenseReluDense.wo.weight": [("mlp/down/kernel", family.DOWN)],
  }


SELF = {
  "layer.0.layer_norm.weight": [("attention_norm/scale", "D -> D")],
  **attention("layer.0.SelfAttention", "attention"),
}
CROSS = {
  "layer.1.layer_norm.weight": [("cross_norm/scale", "D -> D")],
  **attention("layer.1.EncDecAttention", "cross_attention"),
}


def names(cfg):
  up = {"wi_0": "mlp/gate", "wi_1": "mlp/up"} if cfg.gated else {"wi": "mlp/up"}
  return {
    **family.table("shared", "embedding"),
    **family.layers("encoder.block", "encoder", {**SELF, **mlp("layer.1", up)}),
    **family.layers("decoder.block", "decoder", {**SELF, **CROSS, **mlp("layer.2", up)}),
    **{name: parts for stack in ("encoder", "decoder") for name, parts in ends(stack).items()},
    "lm_head.weight": [("head/kernel", "V D -> D V")],
  }


def ends(stack):
  return {
    f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": [
      (f"{stack}/relative/table", "R H -> R H")
    ],
    f"{stack}.final_layer_norm.weight": [(f"{stack}/final_norm/scale", "D -> D")],
  }


def read(config):
  """`feed_forward_proj` is ACTIVATION or gated-ACTIVATION; with gated-gelu, gelu is the tanh approximation.

  v1.0 scales its logits, v1.1 does not: Transformers 4 says so in `tie_word_embeddings`, 5 in `scale_decoder_outputs`.
  """
  said = config.get("feed_forward_proj", "relu")
  gated, name = said.startswith("gated-"), said.removeprefix("gated-")
  if name not in ACTIVATIONS:
    raise ConfigError(f"feed_forward_proj={said!r} is not supported; known are (gated-) {', '.join(ACTIVATIONS)}")
  tied = config.get("tie_word_embeddings", True) is not False
  depth, dropout = config.get("num_layers", 6), config.get("dropout_rate", 0.1)
  return {
    "decoder_layers": depth if config.get("num_decoder_layers") is None else config["num_decoder_layers"],
    "activation": "gelu" if said == "gated-gelu" else ACTIVATIONS[name],
    "gated": gated,
    "tie_embeddings": tied,
    "scale_tied_logits": bool(config.get("scale_decoder_outputs", tied)),
    **dict.fromkeys(("dropout", "attention_dropout", "mlp_dropout"), dropout),
  }


def write(cfg):
  said = Field("", None, ACTIVATIONS).write(cfg.activation)
  return {
    "num_decoder_layers": cfg.decoder_layers,
    "feed_forward_proj": "gated-gelu" if cfg.gated and cfg.activation == "gelu" else f"{'gated-' * cfg.gated}{said}",
    "tie_word_embeddings": cfg.tie_embeddings,
    "scale_decoder_outputs": cfg.scale_tied_logits,
    "dropout_rate": cfg.dropout,
    "is_encoder_decoder": True,
    "decoder_start_token_id": 0,
  }


T5 = Family(
  model_type="t5",
  fields={
    "vocab_size": Field("vocab_size", 32128),
    "d_model": Field("d_model", 512),
    "encoder_layers": Field("num_layers", 6),
    "num_heads": Field("num_heads", 8),
    "head_dim": Field("d_kv", 64),
    "d_ff": Field("d_ff", 2048),
    "max_len": Field("n_positions", 512),
    "norm_epsilon": Field("layer_norm_epsilon", 1e-6),
    "relative_buckets": Field("relative_attention_num_buckets", 32),
    "relative_max_distance": Field("relative_attention_max_distance", 128),
  },
  constants={
    "norm": "rmsnorm",
    "norm_bias": False,
    "positions": "relative",
    "attention_scale": 1.0,
    **dict.fromkeys(("qkv_bias", "attention_out_bias", "mlp_bias"), False),
  },
  supported={"is_encoder_decoder": (True,)},
  heads={"T5ForConditionalGeneration": Head(), "T5WithLMHeadModel": Head(), "T5Model": Head({"tie_embeddings": True})},
  names=names,
  copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
  tied=("lm_head.weight",),
  untied_by="lm_head.weight",
  ignored=("EncDecAttention.relative_attention_bias.weight",),
  objective={"name": "span_corruption"},
  read=read,
  write=write,
)

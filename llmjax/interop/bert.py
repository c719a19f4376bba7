"""BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019) and DistilBERT (Sanh et al. 2019)."""

from llmjax.interop import family
from llmjax.interop.family import ACTIVATIONS, Family, Field, Head

BLOCK = {
  **family.attention(
    {part: f"attention.self.{part}" for part in ("query", "key", "value")} | {"out": "attention.output.dense"}
  ),
  **family.norm("attention.output.LayerNorm", "attention_norm"),
  **family.linear("intermediate.dense", "mlp/up", family.UP),
  **family.linear("output.dense", "mlp/down", family.DOWN),
  **family.norm("output.LayerNorm", "mlp_norm"),
}

FIELDS = {
  "vocab_size": Field("vocab_size", 30522),
  "d_model": Field("hidden_size", 768),
  "encoder_layers": Field("num_hidden_layers", 12),
  "num_heads": Field("num_attention_heads", 12),
  "d_ff": Field("intermediate_size", 3072),
  "norm_epsilon": Field("layer_norm_eps", 1e-12),
  "token_types": Field("type_vocab_size", 2),
  "activation": Field("hidden_act", "gelu", ACTIVATIONS),
  "init_stddev": Field("initializer_range", 0.02),
  "dropout": Field("hidden_dropout_prob", 0.1),
  "attention_dropout": Field("attention_probs_dropout_prob", 0.1),
}
CONSTANTS = {
  "decoder_layers": 0,
  "norm": "layernorm",
  "norm_placement": "post",
  "embedding_norm": True,
  "positions": "learned",
  "tie_embeddings": True,
}
SUPPORTED = {
  "position_embedding_type": ("absolute", None),
  "is_decoder": (False,),
  "add_cross_attention": (False,),
  "tie_word_embeddings": (True,),
}
CLASSIFIER = family.linear("classifier", "head", family.CLASSES)
MLM = {"head_transform": True, "head_bias": True}
DENSE = "D1 D -> D D1"  # a square matrix


def embeddings(positions, norm="embeddings.LayerNorm"):
  return {
    **family.table("embeddings.word_embeddings", "embedding"),
    **family.table("embeddings.position_embeddings", "positions", positions),
    **family.table("embeddings.token_type_embeddings", "token_types", "Y D -> Y D"),
    **family.norm(norm, "embedding_norm"),
  }


BERT_MLM = {
  **family.linear("cls.predictions.transform.dense", "head_transform", DENSE),
  **family.norm("cls.predictions.transform.LayerNorm", "head_norm"),
  "cls.predictions.bias": [("head_bias/bias", "V -> V")],
}

BERT = Family(
  model_type="bert",
  fields={**FIELDS, "max_len": Field("max_position_embeddings", 512)},
  constants=CONSTANTS,
  supported=SUPPORTED,
  heads={
    "BertForMaskedLM": Head(MLM, BERT_MLM),
    "BertForPreTraining": Head(
      {**MLM, "pooler": True, "sentence_classes": 2},
      {**BERT_MLM, **family.linear("cls.seq_relationship", "sentence_head", family.CLASSES)},
    ),
    "BertModel": Head({"pooler": True}),
    "BertForSequenceClassification": Head({"head": "sequence", "head_bias": True, "pooler": True}, CLASSIFIER),
    "BertForTokenClassification": family.tagger("classifier"),
    "BertForQuestionAnswering": family.spans(),
  },
  names={
    **embeddings("P D -> P D"),
    **family.layers("encoder.layer", "encoder", BLOCK),
    **family.linear("pooler.dense", "pooler", DENSE),
  },
  prefix="bert.",
  tied=("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
  ignored=("embeddings.position_ids", "embeddings.token_type_ids"),
  objective={"name": "masked_lm"},
)

ROBERTA = Family(
  model_type="roberta",
  fields={**FIELDS, "vocab_size": Field("vocab_size", 50265)},
  constants=CONSTANTS,
  supported=SUPPORTED,
  heads={
    "RobertaForMaskedLM": Head(
      MLM,
      {
        **family.linear("lm_head.dense", "head_transform", DENSE),
        **family.norm("lm_head.layer_norm", "head_norm"),
        "lm_head.bias": [("head_bias/bias", "V -> V")],
      },
    ),
    "RobertaModel": Head({"pooler": True}),
    "RobertaForSequenceClassification": Head(
      {"head": "sequence", "head_bias": True, "pooler": True},
      {
        **family.linear("classifier.dense", "pooler", DENSE),
        **family.linear("classifier.out_proj", "head", family.CLASSES),
      },
    ),
    "RobertaForTokenClassification": family.tagger("classifier"),
    "RobertaForQuestionAnswering": family.spans(),
  },
  names={
    **embeddings("2+P D -> P D"),  # positions count from 2
    **family.layers("encoder.layer", "encoder", BLOCK),
    **family.linear("pooler.dense", "pooler", DENSE),
  },
  prefix="roberta.",
  tied=("lm_head.decoder.weight", "lm_head.decoder.bias"),
  ignored=("embeddings.position_ids", "embeddings.token_type_ids"),
  objective={"name": "masked_lm"},
  read=lambda config: {"max_len": config.get("max_position_embeddings", 512) - 2},
  write=lambda cfg: {"max_position_embeddings": cfg.max_len + 2},
)

DISTILBERT_BLOCK = {
  **family.attention(
    {part: f"attention.{part[0]}_lin" for part in ("query", "key", "value")} | {"out": "attention.out_lin"}
  ),
  **family.norm("sa_layer_norm", "attention_norm"),
  **family.linear("ffn.lin1", "mlp/up", family.UP),
  **family.linear("ffn.lin2", "mlp/down", family.DOWN),
  **family.norm("output_layer_norm", "mlp_norm"),
}

DISTILBERT = Family(
  model_type="distilbert",
  fields={
    "vocab_size": Field("vocab_size", 30522),
    "d_model": Field("dim", 768),
    "encoder_layers": Field("n_layers", 6),
    "num_heads": Field("n_heads", 12),
    "d_ff": Field("hidden_dim", 3072),
    "max_len": Field("max_position_embeddings", 512),
    "activation": Field("activation", "gelu", ACTIVATIONS),
    "init_stddev": Field("initializer_range", 0.02),
    "dropout": Field("dropout", 0.1),
    "attention_dropout": Field("attention_dropout", 0.1),
  },
  constants={**CONSTANTS, "norm_epsilon": 1e-12},
  supported={"tie_word_embeddings": (True,)},
  heads={
    "DistilBertForMaskedLM": Head(
      MLM,
      {
        **family.linear("vocab_transform", "head_transform", DENSE),
        **family.norm("vocab_layer_norm", "head_norm"),
        "vocab_projector.bias": [("head_bias/bias", "V -> V")],
      },
    ),
    "DistilBertModel": Head(),
    "DistilBertForSequenceClassification": Head(
      {"head": "sequence", "head_bias": True, "pooler": True, "pooler_activation": "relu"},
      {**family.linear("pre_classifier", "pooler", DENSE), **CLASSIFIER},
    ),
    "DistilBertForTokenClassification": family.tagger("classifier"),
    "DistilBertForQuestionAnswering": family.spans(),
  },
  names={**embeddings("P D -> P D"), **family.layers("transformer.layer", "encoder", DISTILBERT_BLOCK)},
  prefix="distilbert.",
  tied=("vocab_projector.weight",),
  ignored=("embeddings.position_ids",),
  objective={"name": "masked_lm"},
)

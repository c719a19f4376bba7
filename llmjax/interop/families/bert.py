"""BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019) and DistilBERT (Sanh et al. 2019).

Encoders with norms after each sum (post-norm), learned positions, token types and tied embeddings. The pretraining head
is a projection, activation and norm before the tied table, which has a bias of its own. DistilBERT has neither token
types nor a pooler, and calls its layers differently. RoBERTa counts positions from 2.
"""

from llmjax.interop.families.base import ACTIVATIONS, Family, Head, JsonField, TensorNames
from llmjax.interop.families.tensor_names import (
  CLASSES,
  DOWN,
  SQUARE,
  UP,
  attention_tensors,
  layer_tensors,
  linear_tensors,
  norm_tensors,
  span_head,
  table_tensors,
  token_head,
)

BLOCK = {
  **attention_tensors(
    {part: f"attention.self.{part}" for part in ("query", "key", "value")} | {"out": "attention.output.dense"}
  ),
  **norm_tensors("attention.output.LayerNorm", "attention_norm"),
  **linear_tensors("intermediate.dense", "mlp/up", UP),
  **linear_tensors("output.dense", "mlp/down", DOWN),
  **norm_tensors("output.LayerNorm", "mlp_norm"),
}

FIELDS = {
  "vocab_size": JsonField("vocab_size", 30522),
  "d_model": JsonField("hidden_size", 768),
  "encoder_layers": JsonField("num_hidden_layers", 12),
  "num_heads": JsonField("num_attention_heads", 12),
  "d_ff": JsonField("intermediate_size", 3072),
  "norm_epsilon": JsonField("layer_norm_eps", 1e-12),
  "token_types": JsonField("type_vocab_size", 2),
  "activation": JsonField("hidden_act", "gelu", ACTIVATIONS),
  "init_stddev": JsonField("initializer_range", 0.02),
  "dropout": JsonField("hidden_dropout_prob", 0.1),
  "attention_dropout": JsonField("attention_probs_dropout_prob", 0.1),
}
CONSTANTS = {
  "decoder_layers": 0,
  "norm": "layernorm",
  "norm_placement": "post",
  "embedding_norm": True,
  "positions": "learned",
  "tie_embeddings": True,
}
ALLOWED_VALUES = {
  "position_embedding_type": ("absolute", None),
  "is_decoder": (False,),
  "add_cross_attention": (False,),
  "tie_word_embeddings": (True,),
}
CLASSIFIER = linear_tensors("classifier", "head", CLASSES)
MLM_FIELDS = {"head_transform": True, "head_bias": True}


def bert_embedding_tensors(positions: str) -> TensorNames:
  """Return the tensors of the embeddings; `positions` is the pattern of the position table."""
  return {
    **table_tensors("embeddings.word_embeddings", "embedding"),
    **table_tensors("embeddings.position_embeddings", "positions", positions),
    **table_tensors("embeddings.token_type_embeddings", "token_types", "Y D -> Y D"),
    **norm_tensors("embeddings.LayerNorm", "embedding_norm"),
  }


BERT_MLM_TENSORS = {
  **linear_tensors("cls.predictions.transform.dense", "head_transform", SQUARE),
  **norm_tensors("cls.predictions.transform.LayerNorm", "head_norm"),
  "cls.predictions.bias": [("head_bias/bias", "V -> V")],
}

BERT = Family(
  model_type="bert",
  fields={**FIELDS, "max_len": JsonField("max_position_embeddings", 512)},
  constants=CONSTANTS,
  allowed_values=ALLOWED_VALUES,
  heads={
    "BertForMaskedLM": Head(MLM_FIELDS, BERT_MLM_TENSORS),
    "BertForPreTraining": Head(
      {**MLM_FIELDS, "pooler": True, "sentence_classes": 2},
      {**BERT_MLM_TENSORS, **linear_tensors("cls.seq_relationship", "sentence_head", CLASSES)},
    ),
    "BertModel": Head({"pooler": True}),
    "BertForSequenceClassification": Head({"head": "sequence", "head_bias": True, "pooler": True}, CLASSIFIER),
    "BertForTokenClassification": token_head("classifier"),
    "BertForQuestionAnswering": span_head(),
  },
  tensors={
    **bert_embedding_tensors("P D -> P D"),
    **layer_tensors("encoder.layer", "encoder", BLOCK),
    **linear_tensors("pooler.dense", "pooler", SQUARE),
  },
  prefix="bert.",
  tied=("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
  ignored_suffixes=("embeddings.position_ids", "embeddings.token_type_ids"),
  objective={"name": "masked_lm"},
)

ROBERTA = Family(
  model_type="roberta",
  fields={**FIELDS, "vocab_size": JsonField("vocab_size", 50265)},
  constants=CONSTANTS,
  allowed_values=ALLOWED_VALUES,
  heads={
    "RobertaForMaskedLM": Head(
      MLM_FIELDS,
      {
        **linear_tensors("lm_head.dense", "head_transform", SQUARE),
        **norm_tensors("lm_head.layer_norm", "head_norm"),
        "lm_head.bias": [("head_bias/bias", "V -> V")],
      },
    ),
    "RobertaModel": Head({"pooler": True}),
    "RobertaForSequenceClassification": Head(
      {"head": "sequence", "head_bias": True, "pooler": True},
      {
        **linear_tensors("classifier.dense", "pooler", SQUARE),
        **linear_tensors("classifier.out_proj", "head", CLASSES),
      },
    ),
    "RobertaForTokenClassification": token_head("classifier"),
    "RobertaForQuestionAnswering": span_head(),
  },
  tensors={
    **bert_embedding_tensors("2+P D -> P D"),  # positions count from 2
    **layer_tensors("encoder.layer", "encoder", BLOCK),
    **linear_tensors("pooler.dense", "pooler", SQUARE),
  },
  prefix="roberta.",
  tied=("lm_head.decoder.weight", "lm_head.decoder.bias"),
  ignored_suffixes=("embeddings.position_ids", "embeddings.token_type_ids"),
  objective={"name": "masked_lm"},
  read_fields=lambda config: {"max_len": config.get("max_position_embeddings", 512) - 2},
  write_fields=lambda cfg: {"max_position_embeddings": cfg.max_len + 2},
)

DISTILBERT_BLOCK = {
  **attention_tensors(
    {part: f"attention.{part[0]}_lin" for part in ("query", "key", "value")} | {"out": "attention.out_lin"}
  ),
  **norm_tensors("sa_layer_norm", "attention_norm"),
  **linear_tensors("ffn.lin1", "mlp/up", UP),
  **linear_tensors("ffn.lin2", "mlp/down", DOWN),
  **norm_tensors("output_layer_norm", "mlp_norm"),
}

DISTILBERT = Family(
  model_type="distilbert",
  fields={
    "vocab_size": JsonField("vocab_size", 30522),
    "d_model": JsonField("dim", 768),
    "encoder_layers": JsonField("n_layers", 6),
    "num_heads": JsonField("n_heads", 12),
    "d_ff": JsonField("hidden_dim", 3072),
    "max_len": JsonField("max_position_embeddings", 512),
    "activation": JsonField("activation", "gelu", ACTIVATIONS),
    "init_stddev": JsonField("initializer_range", 0.02),
    "dropout": JsonField("dropout", 0.1),
    "attention_dropout": JsonField("attention_dropout", 0.1),
  },
  constants={**CONSTANTS, "norm_epsilon": 1e-12},
  allowed_values={"tie_word_embeddings": (True,)},
  heads={
    "DistilBertForMaskedLM": Head(
      MLM_FIELDS,
      {
        **linear_tensors("vocab_transform", "head_transform", SQUARE),
        **norm_tensors("vocab_layer_norm", "head_norm"),
        "vocab_projector.bias": [("head_bias/bias", "V -> V")],
      },
    ),
    "DistilBertModel": Head(),
    "DistilBertForSequenceClassification": Head(
      {"head": "sequence", "head_bias": True, "pooler": True, "pooler_activation": "relu"},
      {**linear_tensors("pre_classifier", "pooler", SQUARE), **CLASSIFIER},
    ),
    "DistilBertForTokenClassification": token_head("classifier"),
    "DistilBertForQuestionAnswering": span_head(),
  },
  tensors={
    **bert_embedding_tensors("P D -> P D"),
    **layer_tensors("transformer.layer", "encoder", DISTILBERT_BLOCK),
  },
  prefix="distilbert.",
  tied=("vocab_projector.weight",),
  ignored_suffixes=("embeddings.position_ids",),
  objective={"name": "masked_lm"},
)

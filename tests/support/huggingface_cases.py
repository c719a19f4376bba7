"""Configs of the reference models of make_huggingface.py. All widths of a model differ, if its family allows that."""

import dataclasses
import functools

from tests.support.huggingface_records import (
  record_beams,
  record_causal,
  record_long_text,
  record_masked_lm,
  record_masked_lm_pairs,
  record_routing,
  record_seq2seq,
  record_sequence_head,
  record_span_head,
  record_token_head,
)


@dataclasses.dataclass(frozen=True)
class Case:
  """A reference model.

  Attributes:
    model: class of transformers.
    config: arguments of its config.
    recorders: functions whose records are stored.
    hub: fields with the names of configs on the Hub; None: no config_hub.json.
    not_hub: fields of config.json that configs on the Hub do not have.
  """

  model: str
  config: dict
  recorders: tuple
  hub: dict | None = None
  not_hub: tuple = ()


HUB = {"torch_dtype": "float32"}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 40, "bos_token_id": 1}
GPT2 |= {"eos_token_id": 1, "layer_norm_epsilon": 1e-3}
OPT = {"vocab_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 24, "max_position_embeddings": 40}
OPT_HUB = {**HUB, "prefix": "</s>"}
NOT_OPT_HUB = ("enable_bias", "layer_norm_elementwise_affine", "_remove_final_layer_norm")
NEOX = {
  "vocab_size": 48,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 24,
  "max_position_embeddings": 64,
  "layer_norm_eps": 1e-3,
}
NEOX_HUB = {**HUB, "rotary_emb_base": 50}
LLAMA = {
  "vocab_size": 48,
  "hidden_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 20,
  "max_position_embeddings": 128,
  "rms_norm_eps": 1e-3,
  **ENDS,
}
WIDE = {**LLAMA, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}  # heads of width 8


def rope_parameters(base, kind="default", **fields):
  return {"rope_parameters": {"rope_type": kind, "rope_theta": base, **fields}}


def hub_rope(base, **fields):
  return {**HUB, "rope_theta": base, **fields}


EXPERTS = {**LLAMA, "num_experts_per_tok": 2}
QWEN_EXPERTS = {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 12}
GEMMA = {**LLAMA, "hidden_size": 16, "head_dim": 6, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
GEMMA_HUB = {**HUB, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
NOT_GEMMA_HUB = ("use_bidirectional_attention",)
LONGROPE = {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.2, 2.5, 4.5, 7.0]}
LONGROPE_PARTIAL = {name: factors[:3] for name, factors in LONGROPE.items()}
PHI3 = {**WIDE, "original_max_position_embeddings": 24, "pad_token_id": 0}

BERT = {
  "vocab_size": 48,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "intermediate_size": 24,
  "max_position_embeddings": 32,
}
ROBERTA = {**BERT, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
DISTILBERT = {"vocab_size": 48, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 32}
MODERNBERT = {
  "vocab_size": 48,
  "hidden_size": 16,
  "num_hidden_layers": 4,
  "num_attention_heads": 2,
  "intermediate_size": 20,
  "max_position_embeddings": 64,
  "norm_eps": 1e-3,
  "local_attention": 8,
  "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
  "rope_parameters": {
    "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
  },
  "pad_token_id": 0,
  "bos_token_id": 1,
  "cls_token_id": 1,
  "eos_token_id": 2,
  "sep_token_id": 2,
}
MODERNBERT_HUB = {
  **HUB,
  "global_rope_theta": 1000.0,
  "local_rope_theta": 50.0,
  "global_attn_every_n_layers": 3,
  "position_embedding_type": "absolute",
}
T5 = {
  "vocab_size": 48,
  "d_model": 16,
  "d_kv": 6,
  "d_ff": 24,
  "num_heads": 4,
  "relative_attention_num_buckets": 8,
  "decoder_start_token_id": 0,
}
NOT_T5_HUB = ("classifier_dropout", "dense_act_fn", "is_gated_act", "is_decoder", "scale_decoder_outputs")
THREE = {"num_labels": 3}

MIXTURE = (record_causal, record_routing)
LONG = (record_causal, record_long_text)
T5_RECORDERS = (record_seq2seq, record_beams)

CASES = {
  "gpt2": Case("GPT2LMHeadModel", GPT2, (record_causal, record_beams)),
  "llama": Case(
    "LlamaForCausalLM",
    {**LLAMA, **rope_parameters(5000.0)},
    (record_causal, record_beams),
    hub_rope(5000.0, rope_scaling=None),
    ("head_dim",),
  ),
  "bert": Case("BertForPreTraining", BERT, (record_masked_lm_pairs,)),
  "t5": Case(
    "T5ForConditionalGeneration",
    {**T5, "num_layers": 2},
    T5_RECORDERS,
    {"n_positions": 512},
    (
      *NOT_T5_HUB,
      "feed_forward_proj",
      "num_decoder_layers",
      "relative_attention_max_distance",
      "tie_word_embeddings",
    ),
  ),
  "t5_v1_1": Case(
    "T5ForConditionalGeneration",
    {
      **T5,
      "num_layers": 3,  # Transformers 5.24 cannot generate if the decoder has more layers than the encoder
      "num_decoder_layers": 2,
      "relative_attention_max_distance": 12,
      "feed_forward_proj": "gated-gelu",
      "layer_norm_epsilon": 1e-3,
      "tie_word_embeddings": False,
    },
    T5_RECORDERS,
    {"tie_word_embeddings": False},
    NOT_T5_HUB,
  ),
  "opt": Case(
    "OPTForCausalLM",
    {**OPT, "hidden_size": 16},
    (record_causal,),
    OPT_HUB,
    NOT_OPT_HUB,
  ),
  "opt_350m_like": Case(
    "OPTForCausalLM",
    {**OPT, "hidden_size": 16, "word_embed_proj_dim": 12, "do_layer_norm_before": False},
    (record_causal,),
    OPT_HUB,
    NOT_OPT_HUB,
  ),
  "gpt_neox": Case(
    "GPTNeoXForCausalLM",
    {**NEOX, **rope_parameters(50.0, partial_rotary_factor=0.25)},
    (record_causal,),
    {**NEOX_HUB, "rotary_pct": 0.25},
    ("attention_bias",),
  ),
  "gpt_neox_sequential": Case(
    "GPTNeoXForCausalLM",
    {**NEOX, **rope_parameters(50.0, partial_rotary_factor=0.5), "hidden_size": 16, "use_parallel_residual": False},
    (record_causal,),
    {**NEOX_HUB, "rotary_pct": 0.5},
    ("attention_bias",),
  ),
  "llama_linear": Case(
    "LlamaForCausalLM",
    {**WIDE, **rope_parameters(100.0, "linear", factor=4.0)},
    (record_causal,),
    hub_rope(100.0, rope_scaling={"type": "linear", "factor": 4.0}),
    ("head_dim",),
  ),
  "llama_dynamic": Case(
    "LlamaForCausalLM",
    {**WIDE, **rope_parameters(100.0, "dynamic", factor=3.0), "max_position_embeddings": 24},
    LONG,
    hub_rope(100.0, rope_scaling={"type": "dynamic", "factor": 3.0}),
    ("head_dim",),
  ),
  "llama_yarn": Case(
    "LlamaForCausalLM",
    {**WIDE, **rope_parameters(100.0, "yarn", factor=4.0, original_max_position_embeddings=32)},
    (record_causal,),
    hub_rope(100.0, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    ("head_dim",),
  ),
  "llama3": Case(
    "LlamaForCausalLM",
    {
      **WIDE,
      **rope_parameters(
        500.0,
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
      ),
    },
    (record_causal,),
    hub_rope(
      500.0,
      rope_scaling={
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 32,
        "rope_type": "llama3",
      },
    ),
    ("head_dim",),
  ),
  "mistral": Case(
    "MistralForCausalLM",
    {**LLAMA, **rope_parameters(5000.0), "sliding_window": 8},
    (functools.partial(record_causal, length=28),),
    hub_rope(5000.0),
    ("head_dim",),
  ),
  "mixtral": Case(
    "MixtralForCausalLM",
    {**EXPERTS, **rope_parameters(5000.0), "num_local_experts": 4, "intermediate_size": 12},
    MIXTURE,
    hub_rope(5000.0),
    ("head_dim",),
  ),
  "qwen2": Case(
    "Qwen2ForCausalLM",
    {**LLAMA, **rope_parameters(5000.0), "sliding_window": 8, "max_window_layers": 1},
    (record_causal,),
    hub_rope(5000.0, sliding_window=8, max_window_layers=1),
  ),
  "qwen2_moe": Case(
    "Qwen2MoeForCausalLM",
    {**QWEN_EXPERTS, **rope_parameters(5000.0), "shared_expert_intermediate_size": 16},
    MIXTURE,
    hub_rope(5000.0, sliding_window=8),
    ("mlp_only_layers", "qkv_bias"),
  ),
  "qwen3": Case(
    "Qwen3ForCausalLM",
    {**LLAMA, **rope_parameters(5000.0), "hidden_size": 16, "head_dim": 6, "tie_word_embeddings": True},
    (record_causal,),
    hub_rope(5000.0, rope_scaling=None),
  ),
  "qwen3_moe": Case(
    "Qwen3MoeForCausalLM",
    {**QWEN_EXPERTS, **rope_parameters(5000.0), "hidden_size": 16, "head_dim": 6, "norm_topk_prob": True},
    MIXTURE,
    hub_rope(5000.0, rope_scaling=None, max_window_layers=48, num_experts=4),
    ("num_local_experts",),
  ),
  "gemma": Case(
    "GemmaForCausalLM",
    {**GEMMA, **rope_parameters(5000.0), "num_key_value_heads": 1},
    (record_causal,),
    hub_rope(5000.0, rope_scaling=None, hidden_act="gelu", hidden_activation=None),
    NOT_GEMMA_HUB,
  ),
  "gemma2": Case(
    "Gemma2ForCausalLM",
    {
      **GEMMA,
      **rope_parameters(5000.0),
      "sliding_window": 8,
      "query_pre_attn_scalar": 9,
      "attn_logit_softcapping": 5.0,
      "final_logit_softcapping": 6.0,
    },
    (record_causal,),
    {**GEMMA_HUB, **hub_rope(5000.0), "cache_implementation": "hybrid"},
    NOT_GEMMA_HUB,
  ),
  "gemma3": Case(
    "Gemma3ForCausalLM",
    {
      **GEMMA,
      "num_hidden_layers": 4,
      "sliding_window": 8,
      "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
      "query_pre_attn_scalar": 9,
      "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
      },
    },
    (record_causal,),
    {
      **HUB,
      "rope_theta": 5000.0,
      "rope_local_base_freq": 100.0,
      "rope_scaling": {"factor": 4.0, "rope_type": "linear"},
      "sliding_window_pattern": 3,
      "cache_implementation": "hybrid",
    },
    NOT_GEMMA_HUB,
  ),
  "phi3": Case(
    "Phi3ForCausalLM",
    {**PHI3, **rope_parameters(100.0, "longrope", **LONGROPE), "sliding_window": 12},
    LONG,
    hub_rope(100.0, rope_scaling={**LONGROPE, "type": "longrope"}),
  ),
  "phi3_partial": Case(
    "Phi3ForCausalLM",
    {**PHI3, **rope_parameters(100.0, "longrope", **LONGROPE_PARTIAL, partial_rotary_factor=0.75)},
    LONG,
    hub_rope(100.0, rope_scaling={**LONGROPE_PARTIAL, "type": "longrope"}, partial_rotary_factor=0.75),
  ),
  "roberta": Case("RobertaForMaskedLM", ROBERTA, (record_masked_lm,)),
  "distilbert": Case("DistilBertForMaskedLM", DISTILBERT, (record_masked_lm,)),
  "modernbert": Case("ModernBertForMaskedLM", MODERNBERT, (record_masked_lm,), MODERNBERT_HUB),
}

RECORDERS = {
  "SequenceClassification": record_sequence_head,
  "TokenClassification": record_token_head,
  "QuestionAnswering": record_span_head,
}
PADDED = {"pad_token_id": 0}  # without it, Transformers does not find the last token of a row
SMALL_LLAMA = {**LLAMA, **PADDED, **rope_parameters(5000.0), "hidden_size": 16, "intermediate_size": 12}
SMALL_MODERNBERT = {**MODERNBERT, "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}
HEADS = {
  "bert_sequence": ("BertForSequenceClassification", {**BERT, **THREE}),
  "bert_regression": ("BertForSequenceClassification", {**BERT, "num_labels": 1}),
  "bert_token": ("BertForTokenClassification", {**BERT, **THREE}),
  "bert_qa": ("BertForQuestionAnswering", BERT),
  "roberta_sequence": ("RobertaForSequenceClassification", {**ROBERTA, **THREE}),
  "roberta_token": ("RobertaForTokenClassification", {**ROBERTA, **THREE}),
  "roberta_qa": ("RobertaForQuestionAnswering", ROBERTA),
  "distilbert_sequence": ("DistilBertForSequenceClassification", {**DISTILBERT, **THREE}),
  "distilbert_token": ("DistilBertForTokenClassification", {**DISTILBERT, **THREE}),
  "distilbert_qa": ("DistilBertForQuestionAnswering", DISTILBERT),
  "modernbert_sequence": ("ModernBertForSequenceClassification", {**SMALL_MODERNBERT, **THREE}),
  "modernbert_sequence_mean": (
    "ModernBertForSequenceClassification",
    {**SMALL_MODERNBERT, **THREE, "classifier_pooling": "mean"},
  ),
  "modernbert_token": ("ModernBertForTokenClassification", {**SMALL_MODERNBERT, **THREE}),
  "modernbert_qa": ("ModernBertForQuestionAnswering", SMALL_MODERNBERT),
  "gpt2_sequence": ("GPT2ForSequenceClassification", {**GPT2, **PADDED, **THREE}),
  "gpt2_token": ("GPT2ForTokenClassification", {**GPT2, **PADDED, **THREE}),
  "llama_sequence": ("LlamaForSequenceClassification", {**SMALL_LLAMA, **THREE}),
  "llama_token": ("LlamaForTokenClassification", {**SMALL_LLAMA, **THREE}),
  "llama_qa": ("LlamaForQuestionAnswering", SMALL_LLAMA),
  "mistral_sequence": ("MistralForSequenceClassification", {**SMALL_LLAMA, **THREE, "sliding_window": 8}),
  "qwen2_sequence": ("Qwen2ForSequenceClassification", {**SMALL_LLAMA, **THREE}),
}
CASES |= {name: Case(model, config, (RECORDERS[model.partition("For")[2]],)) for name, (model, config) in HEADS.items()}

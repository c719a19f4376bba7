"""Training objectives, one per file, with their host and device halves side by side."""

OBJECTIVES = {
  "causal_lm": "llmjax.objectives.causal_lm:CausalLM",
  "classification": "llmjax.objectives.classification:classification",
  "contrastive": "llmjax.objectives.contrastive:Contrastive",
  "masked_lm": "llmjax.objectives.masked_lm:MaskedLM",
  "preference": "llmjax.objectives.preference:Preference",
  "prefix_lm": "llmjax.objectives.prefix_lm:PrefixLM",
  "seq2seq": "llmjax.objectives.seq2seq:Seq2Seq",
  "sft": "llmjax.objectives.sft:InstructionTuning",
  "span_qa": "llmjax.objectives.span_qa:SpanQA",
  "span_corruption": "llmjax.objectives.span_corruption:SpanCorruption",
  "tagging": "llmjax.objectives.tagging:tagging",
  "weighted_sum": "llmjax.objectives.weighted_sum:weighted_sum",
}

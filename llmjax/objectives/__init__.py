"""What can be learned: one file an objective, its host and device halves side by side."""

OBJECTIVES = {
  "causal_lm": "llmjax.objectives.causal_lm:CausalLM",
  "contrastive": "llmjax.objectives.contrastive:Contrastive",
  "masked_lm": "llmjax.objectives.masked_lm:MaskedLM",
  "prefix_lm": "llmjax.objectives.prefix_lm:PrefixLM",
  "span_corruption": "llmjax.objectives.span_corruption:SpanCorruption",
  "weighted_sum": "llmjax.objectives.weighted_sum:weighted_sum",
}

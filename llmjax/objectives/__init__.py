"""What can be learned: one file an objective, its host and device halves side by side."""

OBJECTIVES = {"causal_lm": "llmjax.objectives.causal_lm:CausalLM"}

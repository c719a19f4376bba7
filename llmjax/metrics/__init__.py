"""Metrics: quality of predictions, baselines without a model, and the sums that means are computed from. No JAX."""

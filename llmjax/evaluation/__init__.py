"""Evaluators of a model during and after training."""

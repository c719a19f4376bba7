"""Evaluators, which measure a model during and after training, and their baselines."""

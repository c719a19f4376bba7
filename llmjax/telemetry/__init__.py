"""Metric writers, progress, and FLOPs."""

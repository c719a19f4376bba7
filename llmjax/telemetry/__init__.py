"""Metric writers and readers, the progress line, and FLOPs."""

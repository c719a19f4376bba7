"""Checkpoints: written, read, and converted."""

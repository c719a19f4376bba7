"""Transformers as pure-functional Linen modules."""

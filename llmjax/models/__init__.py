"""Transformer models as pure-functional Linen modules."""

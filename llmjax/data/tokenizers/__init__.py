"""Tokenizers, one module for each kind."""

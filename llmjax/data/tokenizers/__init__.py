"""Tokenizers; `registry` lists their kinds by the names in configs."""

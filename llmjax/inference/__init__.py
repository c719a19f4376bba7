"""Inference: generation of text, embeddings, and predictions of fine-tuned models."""

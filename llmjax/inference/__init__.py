"""Generation, embeddings, and predictions."""

"""Text to batches: sources of records, tokenizers, packing, and the row streams that join them."""

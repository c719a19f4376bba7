"""Training data: sources of records, tokenizers, packing into rows, and the pipeline that makes batches."""

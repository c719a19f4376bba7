"""From sources of records to batches."""

"""Sources of records with random access."""

"""Paths in buckets, the cache directory, and content digests."""

"""Paths in buckets, the cache folder, and content digests."""

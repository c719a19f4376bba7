"""Checks of a config: invariance of results, a dry run, and the coordinate check of muP."""

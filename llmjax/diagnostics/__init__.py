"""Diagnostics of a config: `verify` on many meshes, a dry run, and the coordinate check of muP."""

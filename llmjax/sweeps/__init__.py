"""Sweeps: trials, their execution, and their results."""

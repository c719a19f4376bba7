"""Attention: masks and scores, the kernels, the choice of a kernel, and the Linen module."""

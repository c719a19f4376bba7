"""Attention: the module, the masks, and its kernels."""

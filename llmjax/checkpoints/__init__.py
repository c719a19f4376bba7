"""Checkpoints: written, read and converted; and PATHs, which refer to any pretrained model."""

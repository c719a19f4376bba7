"""Hugging Face and PEFT folders, read and written."""

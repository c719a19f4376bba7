"""The kinds of pretrained models that a PATH refers to: runs, Hugging Face folders, adapters. One class for each."""

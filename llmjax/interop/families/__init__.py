"""Families of Hugging Face models, one data sheet for each: fields of config.json, architectures, tensors."""

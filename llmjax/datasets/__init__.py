"""Datasets that llmjax makes itself."""

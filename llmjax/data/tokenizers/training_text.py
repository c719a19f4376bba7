"""Text that vocabularies are trained on."""

from __future__ import annotations

from collections.abc import Iterator

from llmjax.config import ConfigError
from llmjax.data.sources.base import Source, subsample_bytes, text_of

MAX_TRAINING_BYTES = 1 << 24


def sample_training_texts(source: Source, max_bytes: int = MAX_TRAINING_BYTES) -> Iterator[str]:
  """Yield the texts of evenly spaced records, about `max_bytes` in total; all texts of a smaller source."""
  return map(text_of, subsample_bytes(source, max_bytes))


def require_training_text(source: Source | None, kind: str) -> Source:
  if source is None:
    raise ConfigError(f"data.tokenizer.name: is trained on the training text, which is not given, got {kind!r}")
  return source

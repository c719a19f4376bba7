"""The kinds of tokenizers by their names in configs (`data.tokenizer.name`), and their construction.

`make_tokenizer` builds a tokenizer from a config, and trains it if needed. A checkpoint saves `Tokenizer.spec` and
`Tokenizer.to_files`, from which `tokenizer_from_files` builds the same tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmjax.config import ConfigError, build, resolve_callable
from llmjax.data.sources.base import Source
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.data.tokenizers.extra_tokens import EXTRA_FILE, extend_vocabulary
from llmjax.storage.cache import cache_dir

TOKENIZERS = {
  "sentencepiece": "llmjax.data.tokenizers.sentencepiece:sentencepiece_tokenizer",
  "hf": "llmjax.data.tokenizers.huggingface:huggingface_tokenizer",
  "bytes": "llmjax.data.tokenizers.characters:bytes_tokenizer",
  "characters": "llmjax.data.tokenizers.characters:characters_tokenizer",
}

# Functions from `Tokenizer.files` to the tokenizer.
LOADERS = {
  "sentencepiece": "llmjax.data.tokenizers.sentencepiece:sentencepiece_from_files",
  "hf": "llmjax.data.tokenizers.huggingface:huggingface_from_files",
  "bytes": "llmjax.data.tokenizers.characters:bytes_from_files",
  "characters": "llmjax.data.tokenizers.characters:characters_from_files",
}


def make_tokenizer(spec: Mapping[str, Any], source: Source | None = None, cache: Path | None = None) -> Tokenizer:
  """Return the tokenizer of a config.

  Args:
    spec: value of data.tokenizer, {"name": key of TOKENIZERS, ...}. All kinds also have the keys "mask" (default False)
      and "sentinels" (default 0), see `extend_vocabulary`.
    source: training text, for kinds that are trained.
    cache: directory of trained vocabularies; None: that of the user. File names depend on text and settings.

  Raises:
    ConfigError: a setting is not valid, `source` is missing, or the vocabulary has fewer sentinels.
  """
  spec = dict(spec)
  mask, sentinels = spec.pop("mask", False), spec.pop("sentinels", 0)
  if not isinstance(mask, bool):
    raise ConfigError(f"data.tokenizer.mask: must be True or False, got {mask!r}")
  if isinstance(sentinels, bool) or not isinstance(sentinels, int) or sentinels < 0:
    raise ConfigError(f"data.tokenizer.sentinels: must be a number of tokens, 0 or more, got {sentinels!r}")
  cache = cache or cache_dir() / "tokenizers"
  own = build(spec, TOKENIZERS, "data.tokenizer", source=source, cache=cache, extra=mask + sentinels)
  return extend_vocabulary(own, mask, sentinels)


def tokenizer_from_files(spec: Mapping[str, Any], files: Mapping[str, bytes], *, trust: bool = False) -> Tokenizer:
  """Return the tokenizer that gave `spec()` and `to_files()`; a loader outside llmjax needs `trust`."""
  own = {name: content for name, content in files.items() if name != EXTRA_FILE}
  tokenizer = resolve_callable(spec["name"], LOADERS, "tokenizer", trust=trust)(own)
  extra = json.loads(files.get(EXTRA_FILE, b"{}"))
  return extend_vocabulary(tokenizer, extra.get("mask", False), extra.get("sentinels", 0))

"""llmjax: encoder, decoder and encoder-decoder Transformers in JAX, from one Block.

Importing this package imports no JAX: the names below are loaded on first use.
"""

import importlib

__version__ = "0.1.0"

_LAZY = {
  "load": "llmjax.checkpoints.paths",
  "run": "llmjax.training.loop",
  "generate": "llmjax.inference.generation",
  "embed": "llmjax.inference.embeddings",
}
_MODULES = ("types",)

__all__ = [*_LAZY, *_MODULES, "__version__"]


def __getattr__(name: str) -> object:
  if name in _MODULES:
    return importlib.import_module(f"llmjax.{name}")
  if name in _LAZY:
    return getattr(importlib.import_module(_LAZY[name]), name)
  raise AttributeError(f"module 'llmjax' has no attribute {name!r}")

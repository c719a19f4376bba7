"""The field `layer_types` of config.json: which layers have sliding-window attention."""

from __future__ import annotations

from collections.abc import Sequence

from llmjax.config import ConfigError
from llmjax.config.model import TransformerConfig
from llmjax.interop.families.base import ModelFields

LAYER_TYPES = {"full_attention": "global", "sliding_attention": "local"}  # {layer type: TransformerConfig.kind}


def read_layer_types(layer_types: Sequence[str], window: int | None, num_layers: int) -> ModelFields:
  """Return attention_pattern (the shortest that repeats to these types) and window.

  Args:
    layer_types: the type of every layer.
    window: sliding window, in tokens.
    num_layers: layers of the model.
  """
  if len(layer_types) != num_layers:
    raise ConfigError(f"layer_types has {len(layer_types)} entries for {num_layers} layers; give one for each layer")
  unknown = [layer_type for layer_type in layer_types if layer_type not in LAYER_TYPES]
  if unknown:
    raise ConfigError(f"layer_types: {unknown[0]!r} is not supported; allowed are {', '.join(LAYER_TYPES)}")
  kinds = tuple(LAYER_TYPES[layer_type] for layer_type in layer_types)
  if "local" not in kinds:
    return {"attention_pattern": ("global",), "window": None}
  lengths = range(1, len(kinds) + 1)
  period = next(n for n in lengths if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))
  return {"attention_pattern": kinds[:period], "window": window}


def write_layer_types(cfg: TransformerConfig) -> list[str]:
  """Return `layer_types`."""
  hf_names = {kind: layer_type for layer_type, kind in LAYER_TYPES.items()}
  return [hf_names[cfg.kind(i)] for i in range(max(cfg.decoder_layers, cfg.encoder_layers))]

"""Rotary positions in config.json: base, rotated fraction and scaling, in the fields of Transformers 4 and 5."""

from __future__ import annotations

import dataclasses
import math

from llmjax.config import ConfigError, Json
from llmjax.config.model import TransformerConfig
from llmjax.config.rotary_scaling import RotaryScaling, make_rotary_scaling
from llmjax.interop.families.base import HfConfig, ModelFields

# {field of rope_scaling: field of RotaryScaling}
SCALING_FIELDS = {
  "factor": "factor",
  "original_max_position_embeddings": "original_max_len",
  "attention_factor": "attention_factor",
  "beta_fast": "beta_fast",
  "beta_slow": "beta_slow",
  "truncate": "truncate",
  "low_freq_factor": "low_frequency_factor",
  "high_freq_factor": "high_frequency_factor",
  "short_factor": "short_factors",
  "long_factor": "long_factors",
}
# {rope_type: the fields of RotaryScaling that it reads}
FIELDS_OF_TYPE = {
  "linear": ("factor",),
  "dynamic": ("factor", "original_max_len"),
  "yarn": ("factor", "original_max_len", "attention_factor", "beta_fast", "beta_slow", "truncate"),
  "llama3": ("factor", "original_max_len", "low_frequency_factor", "high_frequency_factor"),
  "longrope": ("factor", "original_max_len", "attention_factor", "short_factors", "long_factors"),
}
LEGACY_TYPES = {"su": "longrope"}


def read_rotary_fields(
  config: HfConfig, default_base: float = 10_000.0, layer_type: str = "full_attention"
) -> ModelFields:
  """Return rotary_base, rotary_fraction and rotary_scaling.

  Transformers 5 has them in `rope_parameters`, in some families once for each type of layer. Transformers 4 has them in
  `rope_theta`, `partial_rotary_factor` and `rope_scaling`.

  Args:
    default_base: base if the file does not have it.
    layer_type: key in `rope_parameters`, if that depends on the type of layer.
  """
  parameters = dict(config.get("rope_parameters") or {})
  if {"full_attention", "sliding_attention"} & set(parameters):
    parameters = dict(parameters.get(layer_type) or {})
  rope = {**(config.get("rope_scaling") or {}), **parameters}
  fraction = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
  return {
    "rotary_base": float(rope.get("rope_theta") or config.get("rope_theta") or default_base),
    "rotary_fraction": 1.0 if fraction is None else float(fraction),
    "rotary_scaling": _read_scaling(rope, config),
  }


def _read_scaling(rope: HfConfig, config: HfConfig) -> RotaryScaling | None:
  name = rope.get("rope_type", rope.get("type", "default"))
  name = LEGACY_TYPES.get(name, name)
  if name in (None, "default"):
    return None
  if name not in FIELDS_OF_TYPE:
    raise ConfigError(f"rope_type={name!r} is not supported; allowed are default, {', '.join(FIELDS_OF_TYPE)}")
  max_len = config["max_position_embeddings"]
  scaling = {
    "original_max_position_embeddings": config.get("original_max_position_embeddings"),
    **{key: value for key, value in rope.items() if value is not None},
  }
  fields = {name: scaling[hf_name] for hf_name, name in SCALING_FIELDS.items() if scaling.get(hf_name) is not None}
  fields["original_max_len"] = max_len if name == "dynamic" else fields.get("original_max_len", max_len)
  if name == "longrope":
    fields.setdefault("factor", max_len / fields["original_max_len"])
  if name == "yarn" and rope.get("mscale") and rope.get("mscale_all_dim"):
    # DeepSeek's fields: the attention factor is a quotient of two of YaRN's scales.
    scale, scale_all = (0.1 * rope[key] * math.log(fields["factor"]) + 1 for key in ("mscale", "mscale_all_dim"))
    fields.setdefault("attention_factor", scale / scale_all)
  fields = {field: fields[field] for field in FIELDS_OF_TYPE[name] if field in fields}
  if "factor" in fields:
    fields["factor"] = float(fields["factor"])
  return make_rotary_scaling({"name": name, **fields})


def write_rotary_fields(cfg: TransformerConfig) -> dict[str, Json]:
  """Return the fields of Transformers 4, which Transformers 5 reads as well."""
  fields: dict[str, Json] = {"rope_theta": cfg.rotary_base}
  if cfg.rotary_fraction != 1:
    fields["partial_rotary_factor"] = cfg.rotary_fraction
  if cfg.rotary_scaling is not None:
    scaling = dataclasses.asdict(cfg.rotary_scaling)
    name = scaling["name"]
    hf_names = {name: hf_name for hf_name, name in SCALING_FIELDS.items()}
    used = {hf_names[field]: scaling[field] for field in FIELDS_OF_TYPE[name] if scaling[field] is not None}
    fields["rope_scaling"] = {"rope_type": name, "type": name, **used}
  return fields

"""config.json to `TransformerConfig` and back, by the fields of its family, and comparison of architectures."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from llmjax.config import ConfigError, Json
from llmjax.config.model import TransformerConfig
from llmjax.interop.families.base import REQUIRED, Family, HfConfig, ModelFields

# Fields that do not change what a model computes at evaluation in float32.
NON_ARCHITECTURE_FIELDS = (
  *("dropout", "attention_dropout", "mlp_dropout", "init_stddev", "embedding_stddev", "residual_init"),
  *("dtype", "param_dtype", "scan", "remat", "attention", "bidirectional_prompt"),
  "expert_capacity",
  *("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"),
)

ALLOWED_VALUES: Mapping[str, Sequence[Json]] = {"quantization_config": (None,)}  # in every family


def read_model_config(
  family: Family, architecture: str, config: HfConfig, path: str, tensor_names: Collection[str] | None = None
) -> TransformerConfig:
  """Return the TransformerConfig of a config.json.

  Args:
    config: the content of the file.
    path: the file, for messages.
    tensor_names: names of the tensors beside it, which decide about tied embeddings and poolers; None: unknown.

  Raises:
    ConfigError: a missing field, or a value that is not supported.
  """
  for name, values in {**ALLOWED_VALUES, **family.allowed_values}.items():
    if config.get(name, values[0]) not in values:
      allowed = " or ".join(map(repr, values))
      raise ConfigError(f"{path}: {name}={config[name]!r} is not supported; it must be {allowed}")
  head = family.heads[architecture]
  head_fields = dict(head.fields)
  try:
    config = {**_default_values(family, config), **config}
    fields = {name: field.read_value(config) for name, field in family.fields.items()}
    fields = {**family.constants, **fields, **family.read_fields(config)}
    if family.untied_by is not None and tensor_names is not None:
      fields["tie_embeddings"] = fields["scale_tied_logits"] or family.untied_by not in tensor_names
    if head.kind == "lm" and tensor_names is not None and not any("pooler" in name for name in tensor_names):
      head_fields["pooler"] = False  # a base model may have been saved without its pooler
    if head.kind in ("sequence", "token"):
      fields["num_classes"] = len(class_names(config))
    return TransformerConfig(**_with_field_types({**fields, **head_fields}))
  except ConfigError as error:
    raise ConfigError(f"{path}: {error}") from error
  except KeyError as error:
    raise ConfigError(f"{path} has no field {error}") from error
  except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
    raise ConfigError(f"{path}: a field has a value of the wrong type: {error}") from error


def _default_values(family: Family, config: HfConfig) -> dict[str, Json]:
  """Return {field of config.json: default} of the fields that the file does not have."""
  fields = [f for f in family.fields.values() if f.default is not None and f.default is not REQUIRED]
  return {f.name: f.default for f in fields if f.legacy_name is None or f.legacy_name not in config}


def _with_field_types(fields: ModelFields) -> ModelFields:
  """Return the fields with integers as floats where TransformerConfig has floats: JSON writes both as 0.

  Raises:
    TypeError: a value that is not an integer, of a field that is.
  """
  types = {f.name: str(f.type) for f in dataclasses.fields(TransformerConfig)}
  for name, value in fields.items():
    if types[name].startswith("int") and value is not None and not isinstance(value, int):
      raise TypeError(f"{name} is {value!r}, not an integer")
  is_float = {name for name, kind in types.items() if kind.startswith("float")}
  return {k: float(v) if k in is_float and isinstance(v, int) else v for k, v in fields.items()}


def write_model_config(family: Family, architecture: str, cfg: TransformerConfig) -> dict[str, Json]:
  """Return the config.json of a model, without class names and special tokens."""
  resolved = {"head_dim": cfg.head_width, "d_ff": cfg.ff_width, "num_kv_heads": cfg.kv_heads}
  config = {}
  for name, field in family.fields.items():
    value = getattr(cfg, name)
    if value is None and field.default is None:
      continue  # some of Transformers' models do not accept null
    if value is None:
      value = field.default if name in NON_ARCHITECTURE_FIELDS else resolved.get(name)
    config[field.legacy_name or field.name] = field.json_value(value)
  return {"architectures": [architecture], "model_type": family.model_type, **config, **family.write_fields(cfg)}


def class_names(config: HfConfig) -> list[str]:
  """Return the names of a head's classes."""
  id2label = config.get("id2label")
  if id2label:
    return [str(id2label[key]) for key in sorted(id2label, key=int)]
  return default_class_names(config.get("num_labels") or 2)


def default_class_names(count: int) -> list[str]:
  """Return the names that Transformers gives to classes without names."""
  return [f"LABEL_{i}" for i in range(count)]


def architecture_differences(cfg: TransformerConfig, other: TransformerConfig) -> dict[str, tuple[Json, Json]]:
  """Return {field: (value in `cfg`, value in `other`)} of the fields that change what a model computes."""
  first, second = _resolve_architecture(cfg), _resolve_architecture(other)
  return {name: (first.get(name), second.get(name)) for name in first | second if first.get(name) != second.get(name)}


def _resolve_architecture(cfg: TransformerConfig) -> ModelFields:
  """Return the fields with defaults resolved; those without effect in this model are None or missing."""
  names = [f.name for f in dataclasses.fields(cfg) if f.name not in NON_ARCHITECTURE_FIELDS]
  fields: ModelFields = {name: getattr(cfg, name) for name in names}
  scale = cfg.head_width**-0.5 if cfg.attention_scale is None else cfg.attention_scale
  fields |= {"num_kv_heads": cfg.kv_heads, "head_dim": cfg.head_width, "d_ff": cfg.ff_width, "attention_scale": scale}
  kinds = tuple(cfg.kind(i) for i in range(max(cfg.decoder_layers, cfg.encoder_layers)))
  fields |= {"attention_pattern": kinds, "embedding_width": cfg.table_width}
  relative = (cfg.relative_buckets, cfg.relative_max_distance)
  fields |= {
    "local_rotary_base": cfg.local_rotary_base if "local" in kinds else None,
    "relative_buckets": relative if cfg.positions == "relative" else None,
    "rotary_base": cfg.rotary_base if cfg.positions == "rotary" else None,
    "pooling": cfg.pooling if cfg.head == "sequence" else None,
    "pooler_activation": cfg.pooler_activation if cfg.pooler else None,
  }
  experts = (cfg.experts_per_token, cfg.expert_width, cfg.normalize_router)
  fields["experts_per_token"] = experts if cfg.num_experts else None
  for name in ("relative_max_distance", "expert_d_ff", "normalize_router", *(("d_ff",) if cfg.num_experts else ())):
    fields.pop(name)
  return fields

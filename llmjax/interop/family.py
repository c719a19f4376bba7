"""What a family of Hugging Face models is, and what families are written in.

A family is data: how its config.json says our `TransformerConfig`, and how its tensors hold our parameters.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from llmjax.config import ConfigError
from llmjax.config.model import TransformerConfig
from llmjax.config.rotary_scaling import RotaryScaling, make_rotary_scaling

Config = Mapping[str, Any]
Names = Mapping[str, Sequence[tuple[str, str]]]  # {their name: [(our path, pattern), ...]}, see `tensors`
REQUIRED: Any = object()

ACTIVATIONS = {  # theirs -> ours; the first of those that are the same is written
  "gelu_new": "gelu",
  "gelu_pytorch_tanh": "gelu",
  "gelu_fast": "gelu",
  "gelu": "gelu_exact",
  "relu": "relu",
  "relu2": "relu_squared",
  "silu": "silu",
  "swish": "silu",
}
GEMMA_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu", **ACTIVATIONS}


@dataclasses.dataclass(frozen=True)
class Field:
  """Where a config.json says a field of ours.

  Attributes:
    name: of theirs.
    default: what it is where the file leaves it out.
    values: theirs -> ours, where they differ.
    older: what it was called before; it is written, since Transformers reads both.
  """

  name: str
  default: Any = REQUIRED
  values: Mapping[Any, Any] | None = None
  older: str | None = None

  def read(self, config: Config) -> Any:
    value = config.get(self.name, config.get(self.older or self.name, self.default))
    if value is REQUIRED:
      raise KeyError(self.name)
    if self.values is None:
      return value
    if value not in self.values:
      raise ConfigError(f"{self.name}={value!r} is not supported; known are {', '.join(map(str, self.values))}")
    return self.values[value]

  def write(self, value: Any) -> Any:
    return value if self.values is None else next((k for k, v in self.values.items() if v == value), None)


@dataclasses.dataclass(frozen=True)
class Head:
  """What stands behind the last layer in one of a family's architectures.

  Attributes:
    fields: of our config, that say so.
    names: of its tensors, in full.
    prefix: of the tensors before it, where it differs from the family's.
  """

  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  names: Names = dataclasses.field(default_factory=dict)
  prefix: str | None = None


@dataclasses.dataclass(frozen=True)
class Family:
  """A kind of model.

  Attributes:
    model_type: as config.json says it.
    fields: {field of ours: where it stands}.
    constants: {field of ours: what it is in all of the family}.
    supported: {field of theirs: its values that we have}, the first where the file leaves it out.
    heads: {architecture: what it has behind the last layer}; the first is the default.
    names: of the tensors before that, without `prefix`.
    prefix: of them, where a head follows; a base model's have none.
    copies: tensors that always repeat the embedding table; `tied`: those that do where `tie_embeddings`.
    untied_by: the tensor that says, rather than config.json, whether they are tied.
    ignored: ends of names of tensors that are no parameters.
    read, write: what fields alone cannot say: from theirs to fields of ours, and back.
    objective: that a model of the family is trained on further.
  """

  model_type: str
  fields: Mapping[str, Field]
  constants: Mapping[str, Any]
  heads: Mapping[str, Head]
  names: Names | Callable[[TransformerConfig], Names]
  objective: Mapping[str, Any]
  prefix: str = ""
  supported: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
  copies: Sequence[str] = ()
  tied: Sequence[str] = ()
  untied_by: str | None = None
  ignored: Sequence[str] = ()
  read: Callable[[Config], Mapping[str, Any]] = lambda config: {}
  write: Callable[[TransformerConfig], Mapping[str, Any]] = lambda cfg: {}


# What is of no account for what a model computes.
TRAINING_ONLY = (
  *("dropout", "attention_dropout", "mlp_dropout", "init_stddev", "embedding_stddev", "residual_init"),
  *("dtype", "param_dtype", "scan", "remat", "attention", "bidirectional_prompt"),
  "expert_capacity",
  *("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"),
)


SUPPORTED: Mapping[str, Sequence[Any]] = {"quantization_config": (None,)}  # in every family


def read_config(
  family: Family, architecture: str, config: Config, where: str, tensors: Collection[str] | None = None
) -> TransformerConfig:
  """Our config of a config.json.

  Args:
    where: the file, for messages.
    tensors: names of those beside it.
  Raises:
    ConfigError: a field is missing, or asks for what we do not have.
  """
  for name, values in {**SUPPORTED, **family.supported}.items():
    if config.get(name, values[0]) not in values:
      allowed = " or ".join(map(repr, values))
      raise ConfigError(f"{where}: {name}={config[name]!r} is not supported; it would have to be {allowed}")
  head: Mapping[str, Any] = family.heads[architecture].fields
  try:
    config = {**_defaults(family, config), **config}
    fields = {ours: field.read(config) for ours, field in family.fields.items()}
    fields = {**family.constants, **fields, **family.read(config)}
    if family.untied_by is not None and tensors is not None:
      fields["tie_embeddings"] = fields["scale_tied_logits"] or family.untied_by not in tensors
    if not head.get("head") and tensors is not None and not any("pooler" in name for name in tensors):
      head = {**head, "pooler": False}  # base models may have been saved without
    if head.get("head") in ("sequence", "token"):
      fields["num_classes"] = len(labels(config))
    return TransformerConfig(**_numbers({**fields, **head}))
  except ConfigError as error:
    raise ConfigError(f"{where}: {error}") from error
  except KeyError as error:
    raise ConfigError(f"{where} has no field {error}") from error
  except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
    raise ConfigError(f"{where}: a field is of the wrong kind: {error}") from error


def _defaults(family: Family, config: Config) -> dict[str, Any]:
  """What the file leaves out."""
  fields = [f for f in family.fields.values() if f.default is not None and f.default is not REQUIRED]
  return {field.name: field.default for field in fields if field.older is None or field.older not in config}


def _numbers(fields: dict[str, Any]) -> dict[str, Any]:
  """Numbers of the kind that each field is: JSON does not tell 0 from 0.0."""
  wide = {f.name for f in dataclasses.fields(TransformerConfig) if str(f.type).startswith("float")}
  whole = {f.name for f in dataclasses.fields(TransformerConfig) if str(f.type).startswith("int")}
  for name in whole & set(fields):
    if not isinstance(fields[name], int) and fields[name] is not None:
      raise TypeError(f"{name} is {fields[name]!r}, not a whole number")
  return {k: float(v) if k in wide and isinstance(v, int) else v for k, v in fields.items()}


def write_config(family: Family, architecture: str, cfg: TransformerConfig) -> dict[str, Any]:
  """The config.json of a model, as far as the family's fields say it."""
  decided = {"head_dim": cfg.head_width, "d_ff": cfg.ff_width, "num_kv_heads": cfg.kv_heads}
  config = {}
  for ours, field in family.fields.items():
    value = getattr(cfg, ours)
    if value is None and field.default is None:
      continue  # left out: some of Transformers' models do not take null for it
    if value is None:
      value = field.default if ours in TRAINING_ONLY else decided.get(ours)
    config[field.older or field.name] = field.write(value)
  return {"architectures": [architecture], "model_type": family.model_type, **config, **family.write(cfg)}


def labels(config: Config) -> list[str]:
  """The names of a head's classes."""
  named = config.get("id2label")
  if named:
    return [str(named[key]) for key in sorted(named, key=int)]
  return [f"LABEL_{i}" for i in range(config.get("num_labels") or 2)]


def differences(cfg: TransformerConfig, other: TransformerConfig) -> dict[str, tuple[Any, Any]]:
  """{field: (in one, in the other)} of what changes what a model computes."""

  def resolved(c: TransformerConfig) -> dict[str, Any]:
    own = {f.name: getattr(c, f.name) for f in dataclasses.fields(c) if f.name not in TRAINING_ONLY}
    scale = c.head_width**-0.5 if c.attention_scale is None else c.attention_scale
    own |= {"num_kv_heads": c.kv_heads, "head_dim": c.head_width, "d_ff": c.ff_width, "attention_scale": scale}
    depth = max(c.decoder_layers, c.encoder_layers)
    own |= {"attention_pattern": tuple(c.kind(i) for i in range(depth)), "embedding_width": c.table_width}
    own["local_rotary_base"] = c.local_rotary_base if "local" in own["attention_pattern"] else None
    own["relative_buckets"] = (c.relative_buckets, c.relative_max_distance) if c.positions == "relative" else None
    own["rotary_base"] = c.rotary_base if c.positions == "rotary" else None
    experts = (c.experts_per_token, c.expert_width, c.normalize_router) if c.num_experts else None
    own |= {"experts_per_token": experts, "pooling": c.pooling if c.head == "sequence" else None}
    own["pooler_activation"] = c.pooler_activation if c.pooler else None
    for name in ("relative_max_distance", "expert_d_ff", "normalize_router", *(("d_ff",) if c.num_experts else ())):
      own.pop(name)
    return own

  one, two = resolved(cfg), resolved(other)
  return {name: (one.get(name), two.get(name)) for name in one | two if one.get(name) != two.get(name)}


# Names of tensors.


def linear(theirs: str, ours: str, pattern: str, output: int = 0) -> dict[str, list[tuple[str, str]]]:
  """A matrix and its bias; `output` is the matrix's output dimension."""
  return fused(theirs, [(ours, pattern)], output)


def fused(theirs: str, parts: Sequence[tuple[str, str]], output: int = 0) -> dict[str, list[tuple[str, str]]]:
  """Several matrices in one tensor, and their biases."""
  return {
    f"{theirs}.weight": [(f"{ours}/kernel", pattern) for ours, pattern in parts],
    f"{theirs}.bias": [(f"{ours}/bias", bias(pattern, output)) for ours, pattern in parts],
  }


def bias(pattern: str, output: int) -> str:
  """The pattern of the bias that goes with a matrix."""
  dimension = re.findall(r"\([^)]*\)|\[[^\]]*\]|\S+", pattern.partition(" -> ")[0])[output]
  return f"{dimension} -> {' '.join(re.sub(r'[^A-Z0-9]', ' ', dimension).split())}"


def norm(theirs: str, ours: str) -> dict[str, list[tuple[str, str]]]:
  return {f"{theirs}.weight": [(f"{ours}/scale", "D -> D")], f"{theirs}.bias": [(f"{ours}/bias", "D -> D")]}


def table(theirs: str, ours: str, pattern: str = "V D -> V D") -> dict[str, list[tuple[str, str]]]:
  return {f"{theirs}.weight": [(f"{ours}/table", pattern)]}


def layers(theirs: str, ours: str, block: Names) -> Names:
  """A block's names in every layer {i}; `ours` is the stack."""
  return {
    f"{theirs}.{{i}}.{name}": [(f"{ours}/layers_{{i}}/{path}", pattern) for path, pattern in parts]
    for name, parts in block.items()
  }


QUERY, KEY, OUT = "(H A) D -> D H A", "(K A) D -> D K A", "D (H A) -> H A D"
UP, DOWN = "F D -> D F", "D F -> F D"
CLASSES = "C D -> D C"


def attention(theirs: Mapping[str, str], ours: str = "attention") -> dict[str, list[tuple[str, str]]]:
  """The four projections; `theirs` names query, key, value and out."""
  patterns = {"query": QUERY, "key": KEY, "value": KEY, "out": OUT}
  out: dict[str, list[tuple[str, str]]] = {}
  for part, pattern in patterns.items():
    if part in theirs:
      out |= linear(theirs[part], f"{ours}/{part}", pattern)
  return out


# Heads that several families have. Decoders read a sequence by its last token.


def lm(theirs: str) -> Head:
  """The output projection of a language model, where it is not tied."""
  return Head(names={f"{theirs}.weight": [("head/kernel", "V D -> D V")]})


LAST_TOKEN = Head({"head": "sequence", "pooling": "last"}, {"score.weight": [("head/kernel", CLASSES)]})


def tagger(theirs: str) -> Head:
  return Head({"head": "token", "head_bias": True}, linear(theirs, "head", CLASSES))


def spans(prefix: str | None = None) -> Head:
  return Head({"head": "span", "head_bias": True}, linear("qa_outputs", "head", CLASSES), prefix)


# Rotary positions and patterns of layers.

_SCALING = {  # theirs -> ours
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
_SCALING_FIELDS = {
  "linear": ("factor",),
  "dynamic": ("factor", "original_max_len"),
  "yarn": ("factor", "original_max_len", "attention_factor", "beta_fast", "beta_slow", "truncate"),
  "llama3": ("factor", "original_max_len", "low_frequency_factor", "high_frequency_factor"),
  "longrope": ("factor", "original_max_len", "attention_factor", "short_factors", "long_factors"),
}


def read_rotary(config: Config, theta: float = 10_000.0, which: str = "full_attention") -> dict[str, Any]:
  """rotary_base, rotary_fraction and rotary_scaling: Transformers 5 has them in `rope_parameters`, perhaps one for each
  kind of layer, 4 in `rope_theta`, `partial_rotary_factor` and `rope_scaling`."""
  modern = dict(config.get("rope_parameters") or {})
  modern = dict(modern.get(which) or {}) if {"full_attention", "sliding_attention"} & set(modern) else modern
  rope = {**(config.get("rope_scaling") or {}), **modern}
  fraction = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
  return {
    "rotary_base": float(rope.get("rope_theta") or config.get("rope_theta") or theta),
    "rotary_fraction": 1.0 if fraction is None else float(fraction),
    "rotary_scaling": _read_scaling(rope, config),
  }


def _read_scaling(rope: Config, config: Config) -> RotaryScaling | None:
  name = rope.get("rope_type", rope.get("type", "default"))
  name = {"su": "longrope"}.get(name, name)
  if name in (None, "default"):
    return None
  if name not in _SCALING_FIELDS:
    raise ConfigError(f"rope_type={name!r} is not supported; known are default, {', '.join(_SCALING_FIELDS)}")
  max_len = config["max_position_embeddings"]
  original = config.get("original_max_position_embeddings")
  scaling = {"original_max_position_embeddings": original, **{k: v for k, v in rope.items() if v is not None}}
  found = {ours: scaling[theirs] for theirs, ours in _SCALING.items() if scaling.get(theirs) is not None}
  found["original_max_len"] = max_len if name == "dynamic" else found.get("original_max_len", max_len)
  if name == "longrope":
    found.setdefault("factor", max_len / found["original_max_len"])
  if name == "yarn" and rope.get("mscale") and rope.get("mscale_all_dim"):
    scale, whole = (0.1 * rope[key] * math.log(found["factor"]) + 1 for key in ("mscale", "mscale_all_dim"))
    found.setdefault("attention_factor", scale / whole)
  found = {field: found[field] for field in _SCALING_FIELDS[name] if field in found}
  return make_rotary_scaling({"name": name} | {k: float(v) if k == "factor" else v for k, v in found.items()})


def write_rotary(cfg: TransformerConfig) -> dict[str, Any]:
  """As Transformers 4 says it, which 5 reads as well."""
  out: dict[str, Any] = {"rope_theta": cfg.rotary_base}
  if cfg.rotary_fraction != 1:
    out["partial_rotary_factor"] = cfg.rotary_fraction
  if cfg.rotary_scaling is not None:
    ours = dataclasses.asdict(cfg.rotary_scaling)
    back = {mine: theirs for theirs, mine in _SCALING.items()}
    fields = {back[f]: ours[f] for f in _SCALING_FIELDS[ours["name"]] if ours[f] is not None}
    out["rope_scaling"] = {"rope_type": ours["name"], "type": ours["name"], **fields}
  return out


KINDS = {"full_attention": "global", "sliding_attention": "local"}


def read_pattern(kinds: Sequence[str], window: int | None, depth: int) -> dict[str, Any]:
  """attention_pattern and window of a list of every layer's kind, as `layer_types` has it."""
  if len(kinds) != depth:
    raise ConfigError(f"layer_types names {len(kinds)} layers, and there are {depth}")
  unknown = [kind for kind in kinds if kind not in KINDS]
  if unknown:
    raise ConfigError(f"layer_types: {unknown[0]!r} is not supported; known are {', '.join(KINDS)}")
  ours = tuple(KINDS[kind] for kind in kinds)
  if "local" not in ours:
    return {"attention_pattern": ("global",), "window": None}
  period = next(n for n in range(1, len(ours) + 1) if all(ours[i] == ours[i % n] for i in range(len(ours))))
  return {"attention_pattern": ours[:period], "window": window}


def write_pattern(cfg: TransformerConfig) -> list[str]:
  """`layer_types`."""
  theirs = {ours: name for name, ours in KINDS.items()}
  return [theirs[cfg.kind(i)] for i in range(max(cfg.decoder_layers, cfg.encoder_layers))]

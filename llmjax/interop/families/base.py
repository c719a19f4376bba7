"""What describes a family of Hugging Face models: `Family`, its `Head`s, and `JsonField`s of its config.json.

A family is data. It says which field of config.json is which field of `TransformerConfig`, and which tensor of the
safetensors files holds which parameter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

from llmjax.config import ConfigError, Json
from llmjax.config.model import TransformerConfig

HfConfig: TypeAlias = Mapping[str, Json]  # the content of a config.json, or fields of it
ModelFields: TypeAlias = dict[str, Json]  # {field of TransformerConfig: value}
# {tensor name: [(parameter path, pattern), ...]}. A name may contain {i} for the layer and {e} for the expert, a path
# {i}. Several parameters share a fused tensor. See `tensors.TensorPattern` for patterns.
TensorNames: TypeAlias = Mapping[str, Sequence[tuple[str, str]]]

REQUIRED: Final = object()

# {activation in config.json: TransformerConfig.activation}. The first name of a value is the one that is written.
ACTIVATIONS = {
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
class JsonField:
  """A field of config.json that holds one field of `TransformerConfig`.

  Attributes:
    name: name in config.json.
    default: value if the file does not have the field; without a default, the field is required.
    values: {value in config.json: our value}; None: the values are the same.
    legacy_name: former name in config.json. It is the one that is written: all versions of Transformers read it.
  """

  name: str
  default: Json = REQUIRED
  values: Mapping[Json, Json] | None = None
  legacy_name: str | None = None

  def read_value(self, config: HfConfig) -> Json:
    """Return our value.

    Raises:
      KeyError: the field is required, and missing.
      ConfigError: the value is not supported.
    """
    value = config.get(self.name, config.get(self.legacy_name or self.name, self.default))
    if value is REQUIRED:
      raise KeyError(self.name)
    if self.values is None:
      return value
    if value not in self.values:
      raise ConfigError(f"{self.name}={value!r} is not supported; allowed are {', '.join(map(str, self.values))}")
    return self.values[value]

  def json_value(self, value: Json) -> Json:
    """Return the value in config.json for our `value`, None if there is none."""
    return value if self.values is None else next((k for k, v in self.values.items() if v == value), None)


@dataclasses.dataclass(frozen=True)
class Head:
  """The output layers of one of a family's architectures, such as `LlamaForSequenceClassification`.

  Attributes:
    fields: fields of `TransformerConfig` that describe it; without "head", the output is that of a language model.
    tensors: its tensors, by their full names.
    prefix: prefix of the names of all other tensors; None: the family's.
  """

  fields: Mapping[str, Json] = dataclasses.field(default_factory=dict)
  tensors: TensorNames = dataclasses.field(default_factory=dict)
  prefix: str | None = None

  @property
  def kind(self) -> str:
    """`TransformerConfig.head`: "lm", "sequence", "token" or "span"."""
    return str(self.fields.get("head", "lm"))


@dataclasses.dataclass(frozen=True)
class Family:
  """A family of models, with one `model_type` in config.json.

  Attributes:
    model_type: `model_type` in config.json.
    fields: {field of TransformerConfig: the field of config.json that holds it}.
    constants: {field of TransformerConfig: its value in all models of the family}.
    heads: {architecture: its output layers}; the first is the default.
    tensors: tensors of the body without `prefix`, or a function from the model's config to them.
    objective: config of the objective that the family was pretrained on.
    prefix: prefix of the names of the body's tensors; those of a base model (`LlamaModel`) have none.
    allowed_values: {field of config.json: values that are supported}; the first is that of a file without the field.
    always_tied: tensors that repeat the embedding table in every model.
    tied: tensors that repeat the embedding table (or its bias) in models with `tie_embeddings`.
    untied_by: tensor whose presence says that the output projection is not tied, whatever config.json says.
    ignored_suffixes: ends of names of tensors that are not parameters, such as masks.
    read_fields: config.json -> further fields of TransformerConfig.
    write_fields: TransformerConfig -> further fields of config.json.
  """

  model_type: str
  fields: Mapping[str, JsonField]
  constants: Mapping[str, Json]
  heads: Mapping[str, Head]
  tensors: TensorNames | Callable[[TransformerConfig], TensorNames]
  objective: Mapping[str, Json]
  prefix: str = ""
  allowed_values: Mapping[str, Sequence[Json]] = dataclasses.field(default_factory=dict)
  always_tied: Sequence[str] = ()
  tied: Sequence[str] = ()
  untied_by: str | None = None
  ignored_suffixes: Sequence[str] = ()
  read_fields: Callable[[HfConfig], Mapping[str, Json]] = lambda config: {}
  write_fields: Callable[[TransformerConfig], Mapping[str, Json]] = lambda cfg: {}

  def body_tensors(self, cfg: TransformerConfig) -> TensorNames:
    """Return the tensors of the body, without `prefix`."""
    return self.tensors(cfg) if callable(self.tensors) else self.tensors

  @property
  def prefixes(self) -> list[str]:
    """All prefixes of the body's tensors in the family's architectures."""
    return sorted({p for p in (self.prefix, *(head.prefix for head in self.heads.values())) if p})

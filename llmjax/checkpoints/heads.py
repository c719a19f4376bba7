"""Heads of models that start from a pretrained one: the fields of their configs."""

from __future__ import annotations

from collections.abc import Mapping

from llmjax.config import Json
from llmjax.interop.families.registry import FAMILIES
from llmjax.models.transformer import MODELS

FROM_PRETRAINED = "pretrained"  # config.model.name: the model of init_from

# Fields of a model's config that describe what follows the last layer.
HEAD_FIELDS = (
  *("head", "num_classes", "pooling", "head_transform", "head_bias"),
  *("pooler", "pooler_activation", "sentence_classes", "crf"),
)


def with_head_fields(
  model: Mapping[str, Json], head: Mapping[str, Json], model_type: str | None, requested: Mapping[str, Json]
) -> dict[str, Json]:
  """Return a model's config with the head that an objective requires.

  A head of another kind than the model's has the layers that its family gives to such heads. Without a known family it
  is a linear layer.

  Args:
    model: the model's config.
    head: `Objective.head`.
    model_type: the family, None if it is unknown.
    requested: config.model; its values of HEAD_FIELDS take precedence over those of the family.
  """
  if model["name"] not in MODELS:  # a custom model knows its head
    return dict(model)
  if model.get("head", head["head"]) == head["head"]:
    return {**model, **head}
  family_heads = FAMILIES[model_type].heads.values() if model_type is not None and model_type in FAMILIES else ()
  family_fields: Mapping[str, Json] = next((h.fields for h in family_heads if h.kind == head["head"]), {})
  is_encoder = bool(model.get("encoder_layers")) and not model.get("decoder_layers")
  linear = {
    "head_transform": False,
    "head_bias": head["head"] != "lm" and not family_fields,
    "pooler": False,
    "sentence_classes": 0,
    "pooling": "first" if is_encoder else "last",
  }
  has_requests = requested["name"] == FROM_PRETRAINED
  own = {k: v for k, v in requested.items() if k in HEAD_FIELDS and v is not None and has_requests}
  return {**model, **linear, **family_fields, **own, **head}

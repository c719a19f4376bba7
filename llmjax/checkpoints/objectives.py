"""Objectives of pretrained models: built from their configs, and inferred from the heads of Hugging Face models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from llmjax.config import Json, build, resolve_callable
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.objectives import OBJECTIVES, tag_scheme
from llmjax.objectives.task import NO_HEAD
from llmjax.types import Objective

MAX_STRIDE, MAX_QUESTION = 128, 64  # of extractive question answering, in tokens


def make_objective(
  spec: Mapping[str, Json],
  tokenizer: Tokenizer,
  seq_len: int,
  model: Mapping[str, Json],
  records: Callable[[], Iterable[Mapping[str, Json]]] | None = None,
  pretrained_head: Mapping[str, Json] = NO_HEAD,
) -> Objective:
  """Build the objective of a config.

  Args:
    spec: config.objective.
    tokenizer: the model's.
    seq_len: tokens of a row.
    model: config.model; only its kinds of layers matter.
    records: opens the training split, to infer keys that the config does not set.
    pretrained_head: labels of the model that the run starts from, see `labels_of_init`.
  """
  encoder, decoder = model.get("encoder_layers"), model.get("decoder_layers")
  stacks = "both" if encoder and decoder else "encoder" if encoder else "decoder"
  objective: Objective = build(
    spec,
    OBJECTIVES,
    "objective",
    tokenizer=tokenizer,
    seq_len=seq_len,
    stacks=stacks,
    records=records,
    pretrained_head=pretrained_head,
  )
  return objective


def check_trusted_objective(spec: Json) -> None:
  """Raise ConfigError if an objective's config, or a part of it, names code outside llmjax."""
  if isinstance(spec, Mapping):
    if "name" in spec:
      resolve_callable(spec["name"], OBJECTIVES, "objective", trust=False)
    for part in spec.values():
      check_trusted_objective(part)
  elif isinstance(spec, (list, tuple)):
    for part in spec:
      check_trusted_objective(part)


def infer_head_objective(head: str, labels: Sequence[str], problem_type: str | None, seq_len: int) -> dict[str, Json]:
  """Return config.objective for a head of a Hugging Face model.

  Args:
    head: `TransformerConfig.head`, not "lm".
    labels: names of the classes.
    problem_type: field of config.json.
    seq_len: tokens of a row.
  """
  if head == "span":
    quarter = seq_len // 4
    return {"name": "span_qa", "stride": min(MAX_STRIDE, quarter), "max_question": min(MAX_QUESTION, quarter)}
  if head == "token":
    return {"name": "tagging", "labels": tuple(labels), "scheme": tag_scheme.infer_tag_scheme(labels)}
  if problem_type == "regression" or len(labels) == 1:
    return {"name": "classification", "kind": "regression", "labels": ()}
  kind = "multi" if problem_type == "multi_label_classification" else "single"
  return {"name": "classification", "kind": kind, "labels": tuple(labels)}

"""Objectives of Hugging Face heads, and new heads on pretrained models."""

from pathlib import Path

import pytest

from llmjax.checkpoints.heads import with_head_fields
from llmjax.checkpoints.paths import open_path

DATA = Path(__file__).parents[1] / "testdata" / "huggingface"
LABELS = tuple(f"LABEL_{i}" for i in range(3))


@pytest.mark.parametrize(
  ("name", "objective"),
  [
    ("bert_sequence", {"name": "classification", "kind": "single", "labels": LABELS}),
    ("bert_regression", {"name": "classification", "kind": "regression", "labels": ()}),
    ("bert_token", {"name": "tagging", "labels": LABELS, "scheme": "none"}),
    ("bert_qa", {"name": "span_qa", "stride": 8, "max_question": 8}),
    ("bert", {"name": "masked_lm"}),
  ],
)
def test_hugging_face_head_becomes_an_objective(name, objective):
  with open_path(DATA / name) as source:
    assert source.manifest["objective"] == source.config["objective"] == objective


HEADS = {
  "classes": {"head": "sequence", "num_classes": 5, "crf": False},
  "tags": {"head": "token", "num_classes": 5, "crf": True},
  "text": {"head": "lm", "num_classes": 0, "crf": False},
}


@pytest.mark.parametrize(
  ("name", "head", "requested", "expected"),
  [
    ("bert", "classes", {}, {"pooler": True, "head_transform": False, "head_bias": True, "num_classes": 5}),
    ("bert", "classes", {"pooler": False, "pooling": "mean"}, {"pooler": False, "pooling": "mean"}),
    ("roberta", "classes", {}, {"pooler": True}),
    ("modernbert", "classes", {}, {"head_transform": True}),
    ("llama", "classes", {}, {"pooling": "last", "head_bias": False}),
    ("bert_sequence", "tags", {}, {"pooler": False, "crf": True, "head_bias": True}),
    ("bert_sequence", "text", {}, {"head_transform": True, "head_bias": True, "num_classes": 0}),
    ("bert_sequence", "classes", {}, {"pooler": True, "num_classes": 5}),  # the same kind: only its size changes
  ],
)
def test_new_head_follows_the_architecture_of_its_family(name, head, requested, expected):
  with open_path(DATA / name) as source:
    family, model = source.manifest["family"], source.manifest["model"]
  config = {"name": "pretrained", "pooling": None, "pooler": None, **requested}
  fields = with_head_fields(model, HEADS[head], family, config)
  assert {key: fields[key] for key in expected} == expected

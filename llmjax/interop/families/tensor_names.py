"""Building blocks of data sheets: names and patterns of the tensors of linear layers, norms, tables, blocks and heads.

Each function returns `TensorNames`: {tensor name: [(parameter path, pattern), ...]}. PyTorch stores a linear layer's
weight as [outputs inputs]. Dimension letters are those of `llmjax/types.py`; C are classes, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llmjax.interop.families.base import Head, TensorNames
from llmjax.interop.tensors import DIMENSION

QUERY, KEY, OUT = "(H A) D -> D H A", "(K A) D -> D K A", "D (H A) -> H A D"
UP, DOWN = "F D -> D F", "D F -> F D"
CLASSES = "C D -> D C"
SQUARE = "D1 D -> D D1"
OUTPUT_PROJECTION = "V D -> D V"


def linear_tensors(name: str, path: str, pattern: str, output_dim: int = 0) -> dict[str, list[tuple[str, str]]]:
  """Return weight and bias of a linear layer.

  Args:
    name: tensor name without ".weight".
    path: path of the parameters, without "/kernel".
    pattern: pattern of the weight.
    output_dim: dimension of the tensor that is the output; 1 if weights are stored input first (GPT-2).
  """
  return fused_tensors(name, [(path, pattern)], output_dim)


def fused_tensors(name: str, parts: Sequence[tuple[str, str]], output_dim: int = 0) -> dict[str, list[tuple[str, str]]]:
  """Return weight and bias of a linear layer that holds several of our projections.

  Args:
    name: tensor name without ".weight".
    parts: (path without "/kernel", pattern) of each projection, in their order within the tensor.
    output_dim: dimension of the tensor that is the output.
  """
  return {
    f"{name}.weight": [(f"{path}/kernel", pattern) for path, pattern in parts],
    f"{name}.bias": [(f"{path}/bias", bias_pattern(pattern, output_dim)) for path, pattern in parts],
  }


def bias_pattern(pattern: str, output_dim: int) -> str:
  """Return the pattern of a bias from that of its weight: "(H A) D -> D H A" gives "(H A) -> H A"."""
  dimension = re.findall(DIMENSION, pattern.partition(" -> ")[0])[output_dim]
  return f"{dimension} -> {' '.join(re.sub(r'[^A-Z0-9]', ' ', dimension).split())}"


def norm_tensors(name: str, path: str) -> dict[str, list[tuple[str, str]]]:
  """Return weight and bias of a norm; an RMS norm has no bias in either model."""
  return {f"{name}.weight": [(f"{path}/scale", "D -> D")], f"{name}.bias": [(f"{path}/bias", "D -> D")]}


def table_tensors(name: str, path: str, pattern: str = "V D -> V D") -> dict[str, list[tuple[str, str]]]:
  """Return the weight of an embedding table."""
  return {f"{name}.weight": [(f"{path}/table", pattern)]}


def layer_tensors(name: str, stack: str, block: TensorNames) -> TensorNames:
  """Return the tensors of every layer {i} of a stack.

  Args:
    name: prefix of the layers' tensor names.
    stack: "encoder" or "decoder".
    block: tensors of one layer.
  """
  return {
    f"{name}.{{i}}.{tensor}": [(f"{stack}/layers_{{i}}/{path}", pattern) for path, pattern in parts]
    for tensor, parts in block.items()
  }


def attention_tensors(names: Mapping[str, str], path: str = "attention") -> dict[str, list[tuple[str, str]]]:
  """Return the four projections of attention.

  Args:
    names: {"query", "key", "value" or "out": tensor name without ".weight"}.
    path: path of the attention module.
  """
  patterns = {"query": QUERY, "key": KEY, "value": KEY, "out": OUT}
  tensors: dict[str, list[tuple[str, str]]] = {}
  for part, pattern in patterns.items():
    if part in names:
      tensors |= linear_tensors(names[part], f"{path}/{part}", pattern)
  return tensors


# Heads that several families share.


def lm_head(name: str) -> Head:
  """Return the output projection of a language model; models with `tie_embeddings` have no such parameter."""
  return Head(tensors={f"{name}.weight": [("head/kernel", OUTPUT_PROJECTION)]})


LAST_TOKEN_HEAD = Head({"head": "sequence", "pooling": "last"}, {"score.weight": [("head/kernel", CLASSES)]})


def token_head(name: str) -> Head:
  """Return a classifier of tokens."""
  return Head({"head": "token", "head_bias": True}, linear_tensors(name, "head", CLASSES))


def span_head(prefix: str | None = None) -> Head:
  """Return the head of extractive question answering; `prefix` is that of the body's tensors, None: the family's."""
  return Head({"head": "span", "head_bias": True}, linear_tensors("qa_outputs", "head", CLASSES), prefix)

"""Prefix language modelling: the first part of a document is seen both ways, the rest is predicted (Raffel et al. 2020,
section 3.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmjax.objectives.causal_lm import CausalLM
from llmjax.types import Features


@dataclasses.dataclass(frozen=True, eq=False)
class PrefixLM(CausalLM):
  """Negative log-likelihood of each token after a prefix, whose length is drawn uniformly.

  Settings are those of `CausalLM`. The model's `bidirectional_prompt` says that generation reads its prompt as it has
  learned to.
  """

  packing = "whole"

  @property
  def required_model_config(self) -> dict[str, Any]:
    return {"bidirectional_prompt": True}

  def features(self, example: Mapping[str, Any], rng: np.random.Generator, corpus: Any) -> Features | None:
    ids = example["ids"]
    if len(ids) < 2:
      return None
    length = int(rng.integers(1, len(ids)))  # of the prefix; the token after it is the first that is predicted
    place = np.arange(len(ids) - 1)
    return {
      "inputs": {"ids": ids[:-1], "prefix": place < length},
      "labels": {"nll": ids[1:]},
      "weights": {"nll": place >= length - 1},
    }

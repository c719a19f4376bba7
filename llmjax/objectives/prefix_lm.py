"""Prefix language modelling (Raffel et al. 2020, section 3.2).

The first part of a document has attention in both directions, the rest is predicted.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from llmjax.config import Json
from llmjax.examples import Example, RecordSource, TokenSequence, Window
from llmjax.objectives.causal_lm import CausalLM


@dataclasses.dataclass(frozen=True, eq=False)
class PrefixLM(CausalLM):
  """Negative log-likelihood of each token after a prefix whose length is drawn uniformly.

  The settings are those of `CausalLM`. The model needs `bidirectional_prompt`: generation then reads its prompt with
  the same attention as in training.
  """

  packing = "whole"

  @property
  def required_model_config(self) -> dict[str, Json]:
    return {"bidirectional_prompt": True}

  def make_example(self, window: Window, rng: np.random.Generator, corpus: RecordSource) -> Example | None:
    ids = window.ids
    if len(ids) < 2:
      return None
    prefix_length = int(rng.integers(1, len(ids)))
    position = np.arange(len(ids) - 1)
    return Example(
      TokenSequence(ids[:-1], prefix=position < prefix_length),
      labels={"nll": ids[1:]},
      weights={"nll": position >= prefix_length - 1},  # the last token of the prefix predicts the first one after it
    )

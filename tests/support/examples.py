"""Inputs for tests of objectives: random text, examples of given tokens, and a model that is a table."""

import jax
import numpy as np

from llmjax.examples import Window
from llmjax.types import Forward, Outputs


def letters(count, seed=0):
  """Return random tokens of lower-case letters."""
  return np.random.default_rng(seed).integers(97, 123, count).astype(np.int32)


def example_of(objective, ids, seed, corpus=(), **record):
  """Return the example of a window with the tokens `ids`."""
  return objective.make_example(Window({"text": "", **record}, ids), np.random.default_rng(seed), corpus)


class Lookup(Forward):
  """A model whose hidden states are rows of a table."""

  def __init__(self, table):
    self.table = table

  def __call__(self, batch, rngs, **kwargs):
    return Outputs(hidden=self.table[batch.inputs.ids])

  def unembed(self, hidden):
    raise AssertionError("no logits are needed")

  sentence_logits = unembed

  def map_microbatches(self, function, batch):
    return jax.tree.map(lambda x: x[None], function(batch))

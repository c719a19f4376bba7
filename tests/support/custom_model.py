"""A model outside llmjax with the smallest config that a model may have."""

import jax.numpy as jnp
from flax import linen as nn

from llmjax.config.model import ModelConfig
from llmjax.types import Outputs


class TiedEmbeddingConfig(ModelConfig):
  """The config of `TiedEmbedding`, a decoder."""

  def __init__(self, vocab_size, max_len):
    self.vocab_size, self.max_len = vocab_size, max_len

  @property
  def stacks(self):
    return "decoder"


class TiedEmbedding(nn.Module):
  """Logits from the embedding of each token alone."""

  cfg: TiedEmbeddingConfig

  @nn.compact
  def __call__(self, batch):
    init = nn.with_logical_partitioning(nn.initializers.normal(0.1), ("vocab", "embed"))
    table = self.param("table", init, (self.cfg.vocab_size, 8))
    return Outputs(logits=jnp.take(table, batch.inputs.ids, axis=0) @ table.T)


def make_model(vocab_size, max_len, width):
  return TiedEmbedding(TiedEmbeddingConfig(vocab_size, max_len))

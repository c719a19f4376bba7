"""Embeddings against a forward pass of each text alone; independence of batches, order and mesh."""

import jax
import numpy as np
import pytest

import llmjax
from llmjax.config import ConfigError
from llmjax.config.model import TransformerConfig
from llmjax.data.tokenizers.registry import make_tokenizer
from llmjax.distributed import sharding
from llmjax.inference.embeddings import tokenize_texts
from llmjax.models.transformer import Transformer
from llmjax.types import Batch
from tests.support.cases import parameters

TOKENIZER = make_tokenizer({"name": "bytes"})
DECODER = TransformerConfig(264, 32, 2, 4, 64, init_stddev=0.15)
MODELS = {
  "encoder": {"encoder_layers": 2, "decoder_layers": 0, "pooler": True, "norm_placement": "post"},
  "decoder": {"positions": "rotary", "norm": "rmsnorm"},
  "both": {"encoder_layers": 2, "positions": "relative"},
}
TEXTS = [f"{i} " + "some words " * (i * 7 % 11) for i in range(21)]


def make_model(kind):
  cfg = TransformerConfig(**{**vars(DECODER), **MODELS[kind]})
  return Transformer(cfg), parameters(cfg)[0]


def embed_alone(model, params, text, pooling):
  """Return the embedding of one text, without padding."""
  ids = TOKENIZER.frame(TOKENIZER.encode(text)[:62])
  out = jax.jit(model.apply)({"params": params}, Batch.from_tokens(ids[None], target_ids=np.zeros((1, 1), np.int32)))
  hidden = np.asarray(out.hidden if out.encoder_hidden is None else out.encoder_hidden)[0]
  vector = {"cls": hidden[0], "last": hidden[-1], "mean": hidden.mean(0), "pooler": out.pooled}[pooling]
  return np.ravel(vector) / np.linalg.norm(vector)


@pytest.mark.parametrize(
  "kind, pooling",
  [("encoder", "cls"), ("encoder", "pooler"), ("decoder", "last"), ("decoder", "mean"), ("both", "mean")],
)
def test_embed_equals_the_forward_of_each_text_alone(kind, pooling):
  model, params = make_model(kind)
  vectors = llmjax.embed(model, params, TOKENIZER, TEXTS, pooling=pooling, batch_tokens=256)
  assert vectors.dtype == np.float32 and vectors.shape == (21, 32)
  for i in (3, 8):  # one of the two is truncated
    np.testing.assert_allclose(vectors[i], embed_alone(model, params, TEXTS[i], pooling), atol=1e-6)


def test_embed_does_not_depend_on_order_and_batches():
  model, params = make_model("encoder")
  vectors = llmjax.embed(model, params, TOKENIZER, TEXTS, batch_tokens=256)
  order = np.random.default_rng(0).permutation(21)
  permuted = llmjax.embed(model, params, TOKENIZER, [TEXTS[i] for i in order], batch_tokens=64)
  np.testing.assert_allclose(permuted, vectors[order], atol=1e-6)


@pytest.mark.parametrize(
  "kind, sizes", [("encoder", "data=2,fsdp=2,tensor=2"), ("decoder", "fsdp=-1"), ("both", "tensor=4")]
)
def test_embed_on_a_mesh_equals_one_device(kind, sizes):
  model, params = make_model(kind)
  mesh = sharding.make_mesh(sharding.parse_mesh(sizes))
  vectors = llmjax.embed(model, params, TOKENIZER, TEXTS, batch_tokens=300)
  np.testing.assert_allclose(
    llmjax.embed(model, params, TOKENIZER, TEXTS, batch_tokens=300, mesh=mesh), vectors, atol=1e-6
  )


def test_tokenize_texts_truncates_but_keeps_eos():
  tokenizer = make_tokenizer({"name": "bytes"})
  [row] = tokenize_texts(tokenizer, ["a" * 100], 8)
  assert len(row) == 8 and row[-1] == tokenizer.eos_id
  np.testing.assert_array_equal(tokenizer.unframe(row), tokenizer.encode("aaaaaa"))


def test_embed_without_texts_returns_an_empty_array():
  assert llmjax.embed(*make_model("encoder"), TOKENIZER, []).shape == (0, 32)


@pytest.mark.parametrize(
  "settings, words",
  [
    ({"pooling": "men"}, ["pooling='men'", "`mean`"]),
    ({"pooling": "pooler"}, ["model.pooler=True", "mean"]),
    ({"max_len": 65}, ["max_len=65", "64"]),
    ({"max_len": 2}, ["max_len=2", "raise it"]),
    ({"batch_tokens": 0}, ["batch_tokens=0"]),
    ({"texts": ["a", ""]}, ["text 1", "no tokens"]),
  ],
)
def test_embed_with_bad_settings_raises_one_line(settings, words):
  texts = settings.pop("texts", ["a"])
  with pytest.raises(ConfigError) as error:
    llmjax.embed(*make_model("decoder"), TOKENIZER, texts, **settings)
  assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value

"""A text's vector does not depend on what else is embedded, in which order, in what batch or on what mesh."""

import json

import jax
import numpy as np
import pytest

import llmjax
from llmjax.cli.main import main
from llmjax.config import ConfigError
from llmjax.config.model import TransformerConfig
from llmjax.data.sources.tables import record_fields
from llmjax.data.tokenizers.registry import make_tokenizer
from llmjax.distributed import sharding
from llmjax.inference import embeddings
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


def make(kind):
  cfg = TransformerConfig(**{**vars(DECODER), **MODELS[kind]})
  return Transformer(cfg), parameters(cfg)[0]


def by_hand(model, params, text, pooling):
  """One text without padding."""
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
  model, params = make(kind)
  vectors = llmjax.embed(model, params, TOKENIZER, TEXTS, pooling=pooling, batch_tokens=256)
  assert vectors.dtype == np.float32 and vectors.shape == (21, 32)
  for i in (3, 8):  # of which one is cut
    np.testing.assert_allclose(vectors[i], by_hand(model, params, TEXTS[i], pooling), atol=1e-6)
  order = np.random.default_rng(0).permutation(21)
  again = llmjax.embed(model, params, TOKENIZER, [TEXTS[i] for i in order], pooling=pooling, batch_tokens=64)
  np.testing.assert_allclose(again, vectors[order], atol=1e-6)


@pytest.mark.parametrize(
  "kind, sizes", [("encoder", "data=2,fsdp=2,tensor=2"), ("decoder", "fsdp=-1"), ("both", "tensor=4")]
)
def test_embed_on_a_mesh_equals_one_device(kind, sizes):
  model, params = make(kind)
  mesh = sharding.make_mesh(sharding.parse_mesh(sizes))
  vectors = llmjax.embed(model, params, TOKENIZER, TEXTS, batch_tokens=300)
  np.testing.assert_allclose(
    llmjax.embed(model, params, TOKENIZER, TEXTS, batch_tokens=300, mesh=mesh), vectors, atol=1e-6
  )


def test_embedding_batches_hold_each_text_once_in_few_shapes():
  rng = np.random.default_rng(0)
  for parts, tokens in ((1, 512), (8, 4096), (8, 1), (3, 1000)):
    lengths = rng.integers(1, 101, 500)
    shapes, seen = set(), []
    for which, rows, length in embeddings.batches(lengths, 100, tokens, parts):
      assert len(which) <= rows and rows % parts == 0 and lengths[which].max() <= length <= 100
      assert rows * length <= tokens or rows == parts
      shapes.add((rows, length))
      seen += which.tolist()
    assert sorted(seen) == list(range(500)) and len(shapes) <= 5
  [(which, rows, _)] = embeddings.batches(np.full(3, 5), 100, 10**6, 2)
  assert len(which) == 3 and rows == 4  # few texts make a small batch


def test_embed_of_a_long_text_keeps_its_eos():
  tokenizer = make_tokenizer({"name": "bytes"})
  [row] = embeddings.tokenize(tokenizer, ["a" * 100], 8)
  assert len(row) == 8 and row[-1] == tokenizer.eos_id
  np.testing.assert_array_equal(tokenizer.unframe(row), tokenizer.encode("aaaaaa"))


def test_embed_without_texts_returns_an_empty_array():
  assert llmjax.embed(*make("encoder"), TOKENIZER, []).shape == (0, 32)


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
def test_bad_embed_settings_are_one_line(settings, words):
  texts = settings.pop("texts", ["a"])
  with pytest.raises(ConfigError) as error:
    llmjax.embed(*make("decoder"), TOKENIZER, texts, **settings)
  assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


# files


CONTENT = {
  "a.txt": "one\ntwo words\r\nthree",
  "a.jsonl": '{"text": "one", "id": "x"}\n\n{"text": "two words", "id": 7}\n{"text": "three"}\n',
  "a.csv": 'name,id,text\nn,x,one\nn,7,"two words"\nn,2,three\n',
  "a.tsv": "text\tid\none\tx\ntwo words\t7\nthree\t2\n",
}


@pytest.mark.parametrize("name", CONTENT)
def test_embed_file_returns_texts_in_order_with_ids(home, name):
  (home / name).write_text(CONTENT[name])
  texts, ids = embeddings.read_texts(str(home / name))
  assert texts == ["one", "two words", "three"]
  assert ids == (["0", "1", "2"] if name == "a.txt" else ["x", "7", "2"])
  assert "text" in record_fields(str(home / name))


@pytest.mark.parametrize(
  "name, content, column, words",
  [
    ("a.txt", None, None, ["a.txt", "no such file"]),
    ("a.txt", b"", None, ["a.txt", "empty"]),
    ("a.txt", b"one\n\nthree\n", None, ["line 2", "fill it"]),
    ("a.txt", b"one\n\xff\n", None, ["byte 4", "UTF-8"]),
    ("a.txt", b"one\n", "text", ["--column=text", "plain text"]),
    ("a.jsonl", b'{"txt": "one"}\n', None, ["'text'", "`txt`", "--column"]),
    ("a.jsonl", b'{"text": "one"}\n{"text": " "}\n', None, ["record 2", "no text"]),
    ("a.jsonl", b'{"text": "one"}\n{"txt": "one"}\n', None, ["'text'", ":2"]),
    ("a.jsonl", b'{"text": "one", "id": "a\\nb"}\n', None, ["record 1", "not one line"]),
    ("a.jsonl", b'["one"]\n', None, ["first record", "list"]),
    ("a.jsonl", b"\n", None, ["empty"]),
    ("a.csv", b"text\n", "body", ["'body'", "known: text"]),
    ("a.csv", b"", None, ["a.csv", "csv"]),
  ],
)
def test_embed_of_a_bad_file_is_one_line(home, name, content, column, words):
  if content is not None:
    (home / name).write_bytes(content)
  with pytest.raises(ConfigError) as error:
    embeddings.read_texts(str(home / name), column)
  assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


# the command

CONFIG = """
from ml_collections import ConfigDict

from configs import base
from llmjax.config import optional


def get_config(arg=None):
  config = base.get_config()
  config.model.update(d_model=32, encoder_layers=1, decoder_layers=0, num_heads=4)
  config.update(seq_len=32, batch_size=8, total_steps=2)
  config.data.corpus = ConfigDict({"name": "files", "files": "pairs.jsonl"})
  config.data.train, config.data.eval = "[:50%]", "[50%:]"
  config.data.tokenizer = ConfigDict({"name": "bytes"})
  config.objective = ConfigDict({"name": "contrastive", "anchor": "title", "positive": "text", "pooling": "cls"})
  config.log.tensorboard = False
  return config
"""


def test_embed_output_is_atomic_and_never_the_input(tmp_path):
  target = tmp_path / "out.npy"
  target.write_text("old")
  assert embeddings.check_output(target, tmp_path / "in.txt") == target.resolve()
  with pytest.raises(OSError, match="full"), embeddings.replacing(target) as partial:
    partial.write_text("half")
    raise OSError("disk full")
  assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["out.npy"]
  with embeddings.replacing(target) as partial:
    partial.write_text("new")
  assert target.read_text() == "new"
  with pytest.raises(ConfigError, match="over --input"):
    embeddings.check_output(target, tmp_path / "." / "out.npy")
  with pytest.raises(ConfigError, match="is no file"):
    embeddings.check_output(tmp_path, target)


def test_embed_command_uses_the_trained_model(home, monkeypatch, capsys):
  monkeypatch.chdir(home)
  (home / "tiny.py").write_text(CONFIG)
  pairs = [{"title": f"how to get {i}", "text": f"def get_{i}(): return {i}", "id": f"f{i}"} for i in range(40)]
  (home / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

  def run(*arguments):
    return main(list(arguments))

  command = ["embed", "--model=x", "--input=pairs.jsonl", "--output=v.npy"]
  assert run("train", "--config=tiny.py", "--workdir=x") == 0
  assert run(*command, "--mesh=fsdp=2,tensor=2") == 0
  assert "40 vectors of 32" in capsys.readouterr().out
  vectors = np.load("v.npy")
  assert (home / "v.ids.txt").read_text().split() == [pair["id"] for pair in pairs]
  expected = llmjax.embed(*llmjax.load("x"), [pair["text"] for pair in pairs], pooling="cls")  # as it was trained
  np.testing.assert_allclose(vectors, expected, atol=1e-6)
  assert run(*command, "--pooling=mean", "--column=title", "--max_len=9", "--batch_tokens=99") == 0
  expected = llmjax.embed(*llmjax.load("x"), [pair["title"] for pair in pairs], max_len=9)
  np.testing.assert_allclose(np.load("v.npy"), expected, atol=1e-6)

  capsys.readouterr()
  for flags, words in [
    (["--mesh=data"], ["--mesh=data", "AXIS=SIZE"]),
    (["--mesh=dta=2"], ["dta", "`data`"]),
    (["--mesh=tensor=3"], ["multiple of 3", "8"]),
    (["--mesh=data=4"], ["8", "-1"]),
    (["--mesh=data=-1,fsdp=-1"], ["at most one is -1"]),
    (["--output=v"], ["--output=v", "FILE.npy"]),
    (["--output=no/v.npy"], ["no/v.npy", "folder"]),
    (["--input=nowhere.txt"], ["nowhere.txt"]),
    (["--column=body"], ["'body'", "--column"]),
    (["--pooling=pooler"], ["model.pooler=True"]),
    (["--max_len=33"], ["max_len=33", "32"]),
    (["--model=nowhere"], ["nowhere"]),
  ]:
    assert run(*command, *flags) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and all(word in said.err for word in words), said

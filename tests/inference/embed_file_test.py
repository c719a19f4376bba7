"""Texts of a file and their embeddings: `llmjax embed`."""

from pathlib import Path

import numpy as np
import pytest

import llmjax
from llmjax.cli.main import main
from llmjax.config import ConfigError
from llmjax.inference.embed_file import read_texts
from tests.support.contrastive_run import write_run

CONTENT = {
  "a.txt": "one\ntwo words\r\nthree",
  "a.jsonl": '{"text": "one", "id": "x"}\n\n{"text": "two words", "id": 7}\n{"text": "three"}\n',
  "a.csv": 'name,id,text\nn,x,one\nn,7,"two words"\nn,2,three\n',
  "a.tsv": "text\tid\none\tx\ntwo words\t7\nthree\t2\n",
}


@pytest.mark.parametrize("name", CONTENT)
def test_read_texts_returns_texts_in_order_with_ids(home, name):
  (home / name).write_text(CONTENT[name])
  texts, ids = read_texts(str(home / name))
  assert texts == ["one", "two words", "three"]
  assert ids == (["0", "1", "2"] if name == "a.txt" else ["x", "7", "2"])


@pytest.mark.parametrize(
  "name, content, column, words",
  [
    ("a.txt", None, None, ["a.txt", "does not exist"]),
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
def test_read_texts_of_a_bad_file_raises_one_line(home, name, content, column, words):
  if content is not None:
    (home / name).write_bytes(content)
  with pytest.raises(ConfigError) as error:
    read_texts(str(home / name), column)
  assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


PAIRS = [{"title": f"how to get {i}", "text": f"def get_{i}(): return {i}", "id": f"f{i}"} for i in range(40)]
EMBED = ("embed", "--model=x", "--input=pairs.jsonl", "--output=v.npy")


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
  """Return a folder with pairs.jsonl and a contrastive run x on it."""
  folder = tmp_path_factory.mktemp("contrastive")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("LLMJAX_CACHE", str(folder / "cache"))
    patch.chdir(folder)
    write_run(folder, PAIRS)
    assert main(["train", "--config=tiny.py", "--workdir=x"]) == 0
  return folder


@pytest.fixture
def trained(home, trained_folder, monkeypatch):
  """Change into `trained_folder`."""
  monkeypatch.chdir(trained_folder)


def test_embed_command_on_a_mesh_uses_the_pooling_of_training(trained, capsys):
  assert main([*EMBED, "--mesh=fsdp=2,tensor=2"]) == 0
  assert "40 vectors of 32" in capsys.readouterr().out
  assert Path("v.ids.txt").read_text().split() == [pair["id"] for pair in PAIRS]
  expected = llmjax.embed(*llmjax.load("x"), [pair["text"] for pair in PAIRS], pooling="cls")
  np.testing.assert_allclose(np.load("v.npy"), expected, atol=1e-6)


def test_embed_command_with_flags_uses_them(trained):
  assert main([*EMBED, "--pooling=mean", "--column=title", "--max_len=9", "--batch_tokens=99"]) == 0
  expected = llmjax.embed(*llmjax.load("x"), [pair["title"] for pair in PAIRS], max_len=9)
  np.testing.assert_allclose(np.load("v.npy"), expected, atol=1e-6)


@pytest.mark.parametrize(
  "flags, words",
  [
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
  ],
)
def test_embed_command_with_bad_flags_exits_2_with_one_line(trained, capsys, flags, words):
  assert main([*EMBED, *flags]) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and all(word in error for word in words), error

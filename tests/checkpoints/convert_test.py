"""Import and export of Hugging Face folders."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import llmjax
from llmjax.checkpoints.convert import export_folder, import_folder, parse_size
from llmjax.checkpoints.paths import open_path
from llmjax.cli.main import main
from llmjax.config import ConfigError
from tests.support.tiny_folders import SHAPES


@pytest.mark.parametrize("kind", SHAPES)
def test_folder_imported_and_exported_again_is_bitwise_equal(kind, folders, tmp_path):
  model, params, tokenizer = llmjax.load(folders[kind])
  import_folder(str(folders[kind]), str(tmp_path / "run"))
  again = llmjax.load(tmp_path / "run")
  assert again.model.cfg == model.cfg
  jax.tree.map(np.testing.assert_array_equal, again.params, params)
  text = "Once upon a time"
  np.testing.assert_array_equal(again.tokenizer.encode(text), tokenizer.encode(text))
  architecture, files, _ = export_folder(str(tmp_path / "run"), str(tmp_path / "back"))
  assert architecture == json.loads((folders[kind] / "config.json").read_text())["architectures"][0]
  theirs = {p.name: p.read_bytes() for p in folders[kind].iterdir() if p.name != "config.json"}
  assert set(theirs) <= set(files)
  assert all((tmp_path / "back" / name).read_bytes() == content for name, content in theirs.items())
  jax.tree.map(np.testing.assert_array_equal, llmjax.load(tmp_path / "back").params, params)


def test_export_of_a_classifier_writes_its_labels(folders, home):
  records = home / "r.jsonl"
  records.write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in (("a b", "no"), ("c", "yes")) * 10))
  flags = [f"--config=classify:init_from={folders['bert']},train={records},debug", "--config.seq_len=16"]
  assert main(["train", *flags, f"--workdir={home / 'run'}"]) == 0
  export_folder(str(home / "run"), str(home / "out"))
  config = json.loads((home / "out" / "config.json").read_text())
  assert config["architectures"] == ["BertForSequenceClassification"] and config["id2label"] == {"0": "no", "1": "yes"}
  assert config["problem_type"] == "single_label_classification"
  with open_path(home / "out") as source:
    assert source.objective().labels == ("no", "yes")


@pytest.mark.parametrize(("text", "expected"), [("5GB", 5 * 10**9), ("20kb", 20_000), ("7", 7)])
def test_parse_size_returns_bytes(text, expected):
  assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["5XB", "GB", "-1", "0", "1.5GB"])
def test_parse_size_of_another_text_is_refused(text):
  with pytest.raises(ConfigError, match="is not a size; give 5GB"):
    parse_size(text)


@pytest.mark.parametrize(
  ("command", "words"),
  [
    ("import --hf={gpt2} --output={full}", ["exists already"]),
    ("import --hf={missing} --output={new}", ["does not exist; give a workdir"]),
    ("export --model={gpt2} --output={new} --max_shard_size=5XB", ["5XB", "200MB"]),
    ("export --model={gpt2} --output={new} --dtype=int8", ["int8", "bfloat16"]),
    ("export --model={gpt2} --output={new} --family=llama", ["family llama", "model.norm"]),
    ("generate --model={bare} --prompt=x", ["tokenizer", "tokenizer.json"]),
    ("generate --model={gpt2} --prompt=x --num_beams=2 --temperature=1", ["num_beams=2", "temperature"]),
    ("generate --model={gpt2} --prompt=x --system=y", ["--system", "--chat"]),
  ],
)
def test_bad_request_on_a_folder_is_one_line(command, words, folders, tmp_path, capsys):
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "x").write_text("")
  copy_without_tokenizer(folders["gpt2"], tmp_path / "bare")
  names = {name: tmp_path / name for name in ("full", "bare", "new", "missing")}
  assert main(command.format(gpt2=folders["gpt2"], **names).split()) == 2
  error = capsys.readouterr().err
  assert all(word in error for word in words) and error.count("\n") == 1, error


def copy_without_tokenizer(folder, target):
  shutil.copytree(folder, target, ignore=lambda _, names: [n for n in names if n in ("vocab.json", "merges.txt")])


def test_load_of_a_folder_without_tokenizer_gives_none(folders, tmp_path):
  copy_without_tokenizer(folders["gpt2"], tmp_path / "bare")
  model, _, tokenizer = llmjax.load(tmp_path / "bare")
  assert tokenizer is None and dataclasses.is_dataclass(model.cfg)

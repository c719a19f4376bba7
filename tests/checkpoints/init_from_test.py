"""Runs that start from a Hugging Face folder."""

import json

import numpy as np
import pytest

import llmjax
from llmjax.cli.main import main
from tests.support.tiny_folders import MODEL_TYPES

TINY = ["--config.total_steps=2", "--config.batch_size=8", "--config.seq_len=16", "--config.log.tensorboard=False"]


@pytest.mark.parametrize(
  "kind, config",
  [
    ("llama3", "gpt"),
    pytest.param("bert", "bert", marks=pytest.mark.full("families")),
    pytest.param("bert", "contrastive", marks=pytest.mark.slow),
    pytest.param("t5", "t5", marks=pytest.mark.slow),
  ],
)
def test_train_with_init_from_a_folder_starts_from_its_weights(kind, config, folders, tmp_path, home, capsys):
  text = tmp_path / "my.txt"
  text.write_text("".join(f"line {i} of a text.\n\n" for i in range(400)))
  views = ",views=dropout" if config == "contrastive" else ""
  argument = f"{config}:init_from={folders[kind]},text={text},debug{views}"
  run = ["train", f"--config={argument}", f"--workdir={tmp_path / 'run'}", *TINY, "--config.optim.lr=1e-9"]
  assert main(run) == 0, capsys.readouterr().err
  _, params, tokenizer = llmjax.load(tmp_path / "run")
  _, before, folder_tokenizer = llmjax.load(folders[kind])
  np.testing.assert_allclose(params["embedding"]["table"], before["embedding"]["table"], atol=1e-6)
  np.testing.assert_array_equal(tokenizer.encode("of a text"), folder_tokenizer.encode("of a text"))
  assert main(["export", f"--model={tmp_path / 'run'}", f"--output={tmp_path / 'back'}"]) == 0
  assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == MODEL_TYPES[kind]
  assert main(run) == 0  # the finished run is found again


def test_init_from_with_another_shape_names_the_first_difference(folders, tmp_path, home, capsys):
  text = tmp_path / "my.txt"
  text.write_text("".join(f"line {i} of a text.\n\n" for i in range(400)))
  flags = [f"--config.init_from={folders['gpt2']}", f"--workdir={tmp_path / 'run'}", *TINY]
  assert main(["train", f"--config=gpt:debug,text={text}", *flags]) == 2
  error = capsys.readouterr().err
  assert "init_from=" in error and "in the folder; set it to that" in error and error.count("\n") == 1

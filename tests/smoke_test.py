"""Every shipped config at `debug` size, as a user runs it: train, resume, evaluate."""

import json

import pytest

from llmjax.cli.main import main
from llmjax.config import files
from tests.support.datasets import small_datasets

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
  with small_datasets(tmp_path_factory.mktemp("datasets")):
    yield


@pytest.mark.parametrize("name", sorted(files.shipped_configs()))
def test_config_trains_saves_resumes_and_evaluates(datasets, tmp_path, capsys, name):
  flags = [f"--config={name}:debug", "--config.batch_size=8", f"--workdir={tmp_path / 'run'}"]
  assert main(["train", *flags]) == 0
  assert main(["train", *flags, "--config.total_steps=4"]) == 0
  assert "resuming" in capsys.readouterr().out
  assert main(["evaluate", *flags]) == 0
  assert "heldout/loss" in capsys.readouterr().out
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert max(line["step"] for line in lines) == 4

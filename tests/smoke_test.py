"""Every shipped config at `debug` size, as a user runs it: two steps, save, resume, evaluate."""

import json

import pytest

from llmjax import cli, config


@pytest.mark.parametrize("name", sorted(config.shipped()))
def test_a_config_trains_saves_resumes_and_evaluates(tmp_path, capsys, name):
  flags = [f"--config={name}:debug", "--config.batch_size=8", f"--workdir={tmp_path / 'run'}"]
  assert cli.main(["train", *flags]) == 0
  assert cli.main(["train", *flags]) == 0
  assert "is finished at 2 steps" in capsys.readouterr().out
  assert cli.main(["train", *flags, "--config.total_steps=4"]) == 0
  assert "resuming" in capsys.readouterr().out
  assert cli.main(["evaluate", *flags]) == 0
  said = capsys.readouterr().out
  assert "heldout/loss" in said
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert max(line["step"] for line in lines) == 4

"""Metrics and samples on disk, and their copies for TensorBoard and Weights & Biases."""

import json
import math
import sys
import types

import pytest

from llmjax.config import ConfigError
from llmjax.telemetry import writers
from llmjax.telemetry.curves import read_curves, read_samples


def test_read_curves_returns_the_written_curves(tmp_path):
  writer = writers.MetricWriter(tmp_path / "run", tensorboard=False)
  writer.write(1, {"train/loss": 2.5, "train/grad_norm": math.inf})
  writer.write(2, {"train/loss": math.nan, "train/grad_norm": -math.inf})
  curves = read_curves(tmp_path / "run")  # before `close`: every line is on disk at once
  writer.close()
  assert curves["train/grad_norm"] == ([1, 2], [math.inf, -math.inf])
  assert curves["train/loss"][1][0] == 2.5 and math.isnan(curves["train/loss"][1][1])
  for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
    json.loads(line, parse_constant=pytest.fail)  # valid JSON: no bare NaN


def test_resumed_writer_leaves_one_value_per_step(tmp_path):
  first = writers.MetricWriter(tmp_path, tensorboard=False)
  for step in range(6):
    first.write(step, {"x": 10.0 + step})
    first.write_text(step, "sample", f"old {step}")
  first.close()
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 6, "x": 1')  # killed while writing
  second = writers.MetricWriter(tmp_path, start_step=3, tensorboard=False)
  assert read_curves(tmp_path)["x"] == ([0, 1, 2, 3], [10, 11, 12, 13])
  second.write(3, {"x": 0.0})  # evaluated again after the resume: the newest value counts
  second.write(4, {"x": 1.0})
  second.write_text(4, "sample", "new")
  second.close()
  assert read_curves(tmp_path)["x"] == ([0, 1, 2, 3, 4], [10, 11, 12, 0, 1])
  assert [(s["step"], s["text"]) for s in read_samples(tmp_path)][-2:] == [(3, "old 3"), (4, "new")]
  writers.MetricWriter(tmp_path, start_step=0, tensorboard=False).close()
  with pytest.raises(ConfigError, match="not logged a step"):
    read_curves(tmp_path)


@pytest.mark.parametrize("text", ["é\u2028x\r\n", "\ud800 lone", "\x00\x1b[2J", "日本 🎉"])
def test_samples_preserve_any_text(tmp_path, text):
  writer = writers.MetricWriter(tmp_path, tensorboard=False)
  writer.write_text(0, "sample", text, prompt="p")
  writer.close()
  assert read_samples(tmp_path) == [{"step": 0, "name": "sample", "prompt": "p", "text": text}]


def test_tensorboard_gets_values_and_texts(tmp_path):
  writer = writers.MetricWriter(tmp_path)
  writer.write(3, {"train/loss": 0.5})
  writer.write_text(3, "sample", "def f():\ud800")
  writer.close()
  (events,) = (tmp_path / "tensorboard").iterdir()
  assert b"train/loss" in events.read_bytes() and b"def f():" in events.read_bytes()


def test_curves_of_missing_or_broken_files_are_one_line_errors(tmp_path):
  for folder, message in ((tmp_path / "no", "does not exist"), (tmp_path, "has no metrics.jsonl")):
    with pytest.raises(ConfigError, match=message):
      read_curves(folder)
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x": 1}\n[]\n{"step": 2, "x": 1}\n')
  with pytest.raises(ConfigError, match=r"metrics.jsonl:2 "):
    read_curves(tmp_path)


def test_writer_without_workdir_writes_nothing(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  writer = writers.MetricWriter(None)
  writer.write(1, {"x": 1.0})
  writer.write_text(1, "sample", "x")
  writer.close()
  assert not list(tmp_path.iterdir())


def test_wandb_gets_values_and_keeps_its_run_id_after_resume(tmp_path, monkeypatch):
  started, logged = [], []
  run = types.SimpleNamespace(log=logged.append, finish=lambda: logged.append("end"), define_metric=lambda *_, **__: 0)
  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kwargs: started.append(kwargs) or run))
  for start in (0, 1):
    writer = writers.MetricWriter(tmp_path / "sweep" / "trial", start, False, wandb="team/project", config={"seed": 1})
    writer.write(start + 1, {"train/loss": 2.0})
    writer.close()
  assert logged == [{"step": 1, "train/loss": 2.0}, "end", {"step": 2, "train/loss": 2.0}, "end"]
  assert started[0] == started[1] and started[0]["config"] == {"seed": 1}
  assert started[0]["id"] == (tmp_path / "sweep" / "trial" / writers.WANDB_ID_FILE).read_text() != ""
  assert [started[0][key] for key in ("entity", "project", "group", "name")] == ["team", "project", "sweep", "trial"]


def test_wandb_that_cannot_start_is_one_line_error(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ConfigError, match="pip install wandb"):
    writers.MetricWriter(tmp_path, wandb="project")

  def refuse(**_):
    raise RuntimeError("no key\nin sight")

  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
  with pytest.raises(ConfigError, match="no key in sight"):
    writers.MetricWriter(tmp_path, wandb="project")

"""Metrics: weighted means, curves on disk, progress display, FLOPs."""

import io
import json
import math
import sys
import types

import jax
import numpy as np
import pytest
from flax import linen as nn

from llmjax.config import ConfigError
from llmjax.config.model import TransformerConfig
from llmjax.models.transformer import Transformer
from llmjax.telemetry import writers
from llmjax.telemetry.curves import read_curves, read_samples
from llmjax.telemetry.flops import forward_flops, peak_flops
from llmjax.telemetry.progress import Progress, sparkline
from llmjax.types import Batch, dummy_batch


def test_read_returns_the_written_curves(tmp_path):
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
    first.text(step, "sample", f"old {step}")
  first.close()
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 6, "x": 1')  # killed while writing
  second = writers.MetricWriter(tmp_path, start_step=3, tensorboard=False)
  assert read_curves(tmp_path)["x"] == ([0, 1, 2, 3], [10, 11, 12, 13])
  second.write(3, {"x": 0.0})  # evaluated again after the resume: the newest value counts
  second.write(4, {"x": 1.0})
  second.text(4, "sample", "new")
  second.close()
  assert read_curves(tmp_path)["x"] == ([0, 1, 2, 3, 4], [10, 11, 12, 0, 1])
  assert [(s["step"], s["text"]) for s in read_samples(tmp_path)][-2:] == [(3, "old 3"), (4, "new")]
  writers.MetricWriter(tmp_path, start_step=0, tensorboard=False).close()
  with pytest.raises(ConfigError, match="not logged a step"):
    read_curves(tmp_path)


@pytest.mark.parametrize("text", ["é\u2028x\r\n", "\ud800 lone", "\x00\x1b[2J", "日本 🎉"])
def test_samples_preserve_any_text(tmp_path, text):
  writer = writers.MetricWriter(tmp_path, tensorboard=False)
  writer.text(0, "sample", text, prompt="p")
  writer.close()
  assert read_samples(tmp_path) == [{"step": 0, "name": "sample", "prompt": "p", "text": text}]


def test_tensorboard_gets_values_and_texts(tmp_path):
  writer = writers.MetricWriter(tmp_path)
  writer.write(3, {"train/loss": 0.5})
  writer.text(3, "sample", "def f():\ud800")
  writer.close()
  (events,) = (tmp_path / "tensorboard").iterdir()
  assert b"train/loss" in events.read_bytes() and b"def f():" in events.read_bytes()


def test_read_of_missing_or_broken_files_is_one_line_error(tmp_path):
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
  writer.text(1, "sample", "x")
  writer.close()
  assert not list(tmp_path.iterdir())


def test_wandb_gets_the_values_and_one_run_id_after_resume(tmp_path, monkeypatch):
  started, logged = [], []
  run = types.SimpleNamespace(log=logged.append, finish=lambda: logged.append("end"), define_metric=lambda *_, **__: 0)
  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kwargs: started.append(kwargs) or run))
  for start in (0, 1):
    writer = writers.MetricWriter(tmp_path / "sweep" / "trial", start, False, wandb="team/project", config={"seed": 1})
    writer.write(start + 1, {"train/loss": 2.0})
    writer.close()
  assert logged == [{"step": 1, "train/loss": 2.0}, "end", {"step": 2, "train/loss": 2.0}, "end"]
  assert started[0] == started[1] and started[0]["config"] == {"seed": 1}
  assert started[0]["id"] == (tmp_path / "sweep" / "trial" / writers.WANDB).read_text() != ""
  assert [started[0][key] for key in ("entity", "project", "group", "name")] == ["team", "project", "sweep", "trial"]


def test_wandb_that_cannot_start_is_one_line_error(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ConfigError, match="pip install wandb"):
    writers.MetricWriter(tmp_path, wandb="project")

  def refuse(**_):
    raise RuntimeError("no key\nin sight")

  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
  with pytest.raises(ConfigError, match="no key in sight; mend"):
    writers.MetricWriter(tmp_path, wandb="project")


@pytest.mark.parametrize("width", [0, 1, 5, 20, 200])
def test_sparkline_has_the_width_and_falls(width):
  spark = sparkline([10 - math.log(i) for i in range(1, 400)], width)
  assert len(spark) == width
  assert list(spark) == sorted(spark, reverse=True)
  if width > 1:
    assert (spark[0], spark[-1]) == ("█", "▁")


def test_sparkline_ignores_non_finite_values():
  assert sparkline([math.nan, math.inf, 2.0]) == "▁"
  assert sparkline([math.nan]) == sparkline([]) == ""


@pytest.mark.parametrize("width", [10, 30, 60, 80, 120])
def test_progress_line_fits_the_width_and_keeps_the_step(width):
  out = io.StringIO()
  progress = Progress(123_456, 0, 4096, stream=out)
  for step in range(0, 1000, 10):
    progress.update(step, 9.0 - step / 200, None if step == 0 else 52_300.0)
  line = progress.line(width)
  assert len(line) <= width and "990" in line and ("4.0500" in line or width < 20)
  assert ("tok/s" in line and "2:39:51 left" in line) or width < 80
  assert out.getvalue().count("\n") == 100
  progress.print_above("a [bold] \x1b[2J sample")
  assert out.getvalue().endswith("a [bold] \ufffd[2J sample\n")
  progress.close()


def test_forward_flops_follow_the_palm_convention():
  """Per token: 6 x parameters of matrix products + 12 x layers x width x length, scanned or not."""
  for scan in (True, False):
    cfg = TransformerConfig(96, 32, 3, 4, 16, d_ff=80, tie_embeddings=False, scan=scan)
    model = Transformer(cfg)
    params = jax.eval_shape(lambda k, m=model: nn.unbox(m.init(k, dummy_batch()))["params"], jax.random.key(0))
    batch = Batch.from_tokens(np.zeros((2, 16), np.int32))
    flops = 3 * forward_flops(lambda p, b, m=model: m.apply({"params": p}, b).logits, params, batch)
    matmul = 3 * (4 * 32 * 32 + 2 * 32 * 80) + 32 * 96
    assert flops == 2 * 16 * (6 * matmul + 12 * 3 * 32 * 16)


@pytest.mark.parametrize(
  "kind, dtype, tera",
  [
    ("TPU v5 lite", "bfloat16", 197),
    ("TPU v5", "bfloat16", 459),
    ("TPU v5p", "bfloat16", 459),
    ("TPU v6 lite", "bfloat16", 918),
    ("TPU7x", "bfloat16", 1153.5),
    ("TPU v4", "float16", None),
    ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
    ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
    ("NVIDIA H100 PCIe", "bfloat16", 756),
    ("NVIDIA H200", "float16", 989.4),
    ("NVIDIA GH200 480GB", "bfloat16", 989.4),
    ("NVIDIA H20", "bfloat16", 148),
    ("NVIDIA GB200", "bfloat16", 2500),
    ("NVIDIA B200", "bfloat16", 2250),
    ("NVIDIA A10G", "bfloat16", 70),
    ("NVIDIA L4", "bfloat16", 121),
    ("NVIDIA L40S", "bfloat16", 362),
    ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
    ("Tesla V100-SXM2-16GB", "bfloat16", None),
    ("NVIDIA H100 80GB HBM3", "float32", None),
    ("cpu", "bfloat16", None),
  ],
)
def test_peak_flops_of_device(kind, dtype, tera):
  assert peak_flops(kind, dtype) == (None if tera is None else pytest.approx(tera * 1e12))

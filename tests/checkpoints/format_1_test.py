"""A checkpoint of format 1, tests/testdata/checkpoint_format_1, which an earlier version wrote.

It is a character model of two local and two global layers with an average, Muon and a learning rate by layer, after 2
steps. The earlier version continued it to 4 steps; its metrics are the expected values.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import llmjax
from llmjax.checkpoints.manager import Checkpoints
from llmjax.checkpoints.upgrade import from_saved_names, to_saved_names, upgrade_manifest
from llmjax.config import files
from llmjax.evaluation.checkpoint import evaluate_checkpoint
from llmjax.training import loop

DATA = Path(__file__).parents[1] / "testdata" / "checkpoint_format_1"
LOSS_AT_4, EVAL_LOSS_AT_4 = 3.0653975009918213, 3.8263039784888697


@pytest.fixture
def folder(home, monkeypatch):
  """The current folder, with a copy of the run and its text."""
  shutil.copytree(DATA, home, dirs_exist_ok=True)
  monkeypatch.chdir(home)
  return home


def run_config(total_steps):
  """Return the config of the run; only the mesh differs, which divides the tests' eight devices."""
  keys = ["batch_size=4", "seq_len=16", "log.tensorboard=false", "log.every=1", "mesh.tensor=2"]
  keys += ["model.d_model=8", "model.num_heads=2", "model.decoder_layers=4", "model.window=8"]
  keys += ['model.attention_pattern=("local","global")', "ema_decay=0.9", "optim.layer_decay=0.9"]
  keys += ["early_stopping.metric=eval/heldout/loss", "early_stopping.patience=9", "checkpoint.keep=1"]
  keys += ["checkpoint.best=eval/heldout/loss", "schedule.warmup=0", "schedule.final=1.0", "evals.sample=none"]
  keys += [f"total_steps={total_steps}"]
  return files.load_config(["--config=char:text=text.txt,debug", *(f"--config.{key}" for key in keys)])


def read_metrics(folder):
  """Return {metric: its last value} of a run."""
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return {name: value for line in lines for name, value in json.loads(line).items()}


def test_format_1_loads_with_the_recorded_evaluation(folder):
  model, params, _ = llmjax.load(folder / "run")
  assert set(params["decoder"]["layers"]) == {"sublayer_0", "sublayer_1"}
  assert model.cfg.attention_pattern == ("local", "global")
  recorded = read_metrics(folder / "run")["eval/heldout/loss"]
  results = evaluate_checkpoint(str(folder / "run"), config=run_config(2))
  assert results["heldout/loss"] == pytest.approx(recorded, abs=1e-5)


@pytest.mark.slow
def test_format_1_resumes_with_the_recorded_losses(folder):
  loop.run(run_config(4), folder / "run")
  metrics = read_metrics(folder / "run")
  assert metrics["step"] == 4
  assert metrics["train/loss"] == pytest.approx(LOSS_AT_4, abs=1e-5)
  assert metrics["eval/heldout/loss"] == pytest.approx(EVAL_LOSS_AT_4, abs=1e-5)
  checkpoints = Checkpoints(folder / "run")
  manifest = checkpoints.manager.restore(4)["manifest"]
  checkpoints.close()
  assert manifest["early_stopping"]["mode"] == "min" and manifest["format_version"] == 2


def test_format_1_shapes_have_current_names(folder):
  checkpoints = Checkpoints(folder / "run")
  shapes = checkpoints.parameter_shapes(2)
  checkpoints.close()
  assert not any("slot_" in path for path in shapes)
  parts = {path.partition("/")[0] for path in shapes if "sublayer_1" in path}
  assert parts == {"params", "ema", "opt_state"}


def test_names_of_format_1_are_mapped_below_any_container():
  state = {"opt_state": ({"sublayer_0": {"mlp": np.ones(2)}}, [{"sublayer_12": np.zeros(1)}]), "sublayer_x": None}
  saved = to_saved_names(state, 1)
  assert set(saved["opt_state"][0]) == {"slot_0"} and set(saved["opt_state"][1][0]) == {"slot_12"}
  restored = from_saved_names(saved, 1)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert to_saved_names(state, 2) is state


def test_regexes_of_a_format_1_manifest_are_upgraded():
  manifest = {
    "format_version": 1,
    "config": {"model": {"name": "x:y"}, "trainable": [[".*slot_1.*", False], [".*", True]]},
    "model": {"name": "transformer", "lora_targets": r".*slot_\d/attention/query"},
  }
  upgraded = upgrade_manifest(manifest)
  assert upgraded["config"]["trainable"] == [[".*sublayer_1.*", False], [".*", True]]
  assert upgraded["model"]["lora_targets"] == r".*sublayer_\d/attention/query"

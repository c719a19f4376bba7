"""`llmjax verify`: a shrunk config on meshes and processes equals one device, and differences are reported."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from llmjax.cli.main import main
from llmjax.config import load_config, to_dict
from llmjax.diagnostics import verify
from llmjax.diagnostics.comparison import compare_measurements
from llmjax.diagnostics.measurement import PARTS, measure_run
from llmjax.diagnostics.shrink import shrink_config
from llmjax.distributed import sharding
from llmjax.models.attention import blockwise
from llmjax.models.transformer import Transformer
from llmjax.training.optimizers import with_optimizer
from llmjax.types import Batch
from tests.support.cases import MIXTRAL, parameters

GOLDEN = Path(__file__).parents[1] / "testdata" / "collectives.json"  # LLMJAX_UPDATE_GOLDEN=1 writes it

DROPOUT = ["--config.model.dropout=0.1", "--config.model.attention_dropout=0.1"]
EXPERTS = ["--config.model.num_experts=4", "--config.model.mlp_bias=False", "--config.model.gated=True"]
KINDS = {
  "encoder": ["--config=bert:debug", *DROPOUT],
  "decoder": ["--config=gpt:debug", *DROPOUT, "--config.accum=2", "--config.logit_tiles=4"],
  "both": ["--config=t5:debug", *DROPOUT],
  "experts": ["--config=gpt:debug", *EXPERTS, "--config.objective.balance=0.01"],
  "contrastive": ["--config=contrastive:debug", "--config.accum=2"],
  "adapters": ["--config=lora:debug"],
}
TENSOR, EXPERT = "data=2,fsdp=2,tensor=2", "fsdp=2,expert=2,context=2"
MESHES = ["data=8", "fsdp=8", "data=4,tensor=2", "context=8", "data=2,fsdp=2,context=2", TENSOR, "context=4,tensor=2"]
MATRIX = [
  *((kind, mesh) for kind in KINDS for mesh in MESHES),
  *(("experts", mesh) for mesh in (EXPERT, "data=2,expert=4", "expert=4,tensor=2")),
]
TIERS = {("decoder", TENSOR): (), ("experts", EXPERT): pytest.mark.slow}


@functools.cache
def shrunk_config(kind):
  return shrink_config(load_config(KINDS[kind]), 8)


@functools.cache
def measure_one_device(kind):
  return measure_run(shrunk_config(kind), {}, jax.devices()[:1])


@functools.cache
def measure_mesh(kind, mesh):
  return measure_run(shrunk_config(kind), sharding.parse_mesh(mesh), jax.devices())


EACH_MESH = pytest.mark.parametrize(
  "kind, mesh", [pytest.param(*c, marks=TIERS.get(c, pytest.mark.full("meshes"))) for c in MATRIX]
)


@EACH_MESH
def test_measure_on_mesh_equals_one_device(kind, mesh):
  assert verify.report_differences(mesh, measure_one_device(kind), measure_mesh(kind, mesh))


@EACH_MESH
def test_train_step_on_mesh_has_the_recorded_collectives(kind, mesh):
  got = measure_mesh(kind, mesh)
  golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
  if os.environ.get("LLMJAX_UPDATE_GOLDEN"):
    golden.setdefault(jax.__version__, {}).setdefault(kind, {})[mesh] = got.collectives
    GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
  if jax.__version__ not in golden:
    pytest.skip(f"{GOLDEN.name} has no collectives for jax {jax.__version__}, whose compiler may differ")
  assert got.collectives == golden[jax.__version__][kind][mesh]


@pytest.mark.full("processes")
def test_verify_command_on_two_processes_equals_one_device(capsys):
  meshes = "--meshes=context=4,tensor=2;expert=4,data=2"
  assert main(["verify", *KINDS["experts"], meshes, "--processes=2"]) == 0
  output = capsys.readouterr().out
  assert "the same on 2 meshes" in output and output.count("process 1 of 2") == 2


def replace_measurements(monkeypatch, on_mesh):
  """Let `verify` use the decoder's measurement on one device, and for a mesh the result of `on_mesh` for it."""
  one_device = measure_one_device("decoder")
  measured = {1: one_device, 8: on_mesh(one_device)}
  monkeypatch.setattr(verify, "measure_run", lambda config, sizes, devices: measured[len(devices)])


@pytest.mark.parametrize("part", PARTS)
def test_verify_reports_each_part_that_differs(part, monkeypatch, capsys):
  def perturb(measured):
    name = max(measured.parts[part], key=lambda name: np.abs(measured.parts[part][name]).max())
    changed = {**measured.parts[part], name: measured.parts[part][name] * np.float32(1 + 1e-4)}
    return dataclasses.replace(measured, parts={**measured.parts, part: changed})

  replace_measurements(monkeypatch, perturb)
  assert not verify.verify(load_config(KINDS["decoder"]), ["data=8"])
  output = capsys.readouterr().out
  assert output.rstrip().endswith("NOT the same")
  assert f"  {part} " in output and "times the tolerance" in output


def test_verify_accepts_equal_measurements(monkeypatch, capsys):
  replace_measurements(monkeypatch, lambda measured: measured)
  assert verify.verify(load_config(KINDS["decoder"]), ["data=8"])
  assert "the same on 1 meshes" in capsys.readouterr().out


def test_verify_reports_rows_that_no_process_has(monkeypatch, capsys):
  replace_measurements(monkeypatch, lambda measured: measured)
  whole = measure_one_device("decoder")
  rows = {row: content for row, content in whole.rows.items() if row != "0/3"}
  monkeypatch.setattr(verify, "measure_processes", lambda *_: [dataclasses.replace(whole, rows=rows)] * 2)
  assert not verify.verify(load_config(KINDS["decoder"]), ["data=8"], [2])
  assert "no process has row 0/3" in capsys.readouterr().out


def config_with(**changes):
  """Return gpt:debug with a loss or an optimizer of `tests.support.local_reductions`."""
  config = to_dict(load_config(["--config=gpt:debug"]))
  if "norm" in changes:
    optimizer = {"name": "tests.support.local_reductions:clip_each_parameter", **changes}
    config["optim"] = with_optimizer(config["optim"], optimizer)
  else:
    config["objective"] |= {"name": "tests.support.local_reductions:LocalLoss", **changes}
  return config


@pytest.mark.full("meshes")
@pytest.mark.parametrize(
  "wrong, right",
  [
    ({"reduction": "none"}, {"reduction": "sum"}),
    ({"reduction": "mean"}, {"reduction": "sum"}),
    ({"norm": "local"}, {"norm": "global"}),
  ],
)
def test_verify_detects_wrong_reductions_of_user_code(wrong, right):
  assert verify.verify(config_with(**right), ["data=2,fsdp=4"])
  assert not verify.verify(config_with(**wrong), ["data=2,fsdp=4"])


@pytest.mark.full("meshes")
@pytest.mark.parametrize("kind", ["decoder", "adapters"])
def test_measure_detects_a_wrong_attention_gradient(kind, monkeypatch):
  """Noise makes this work with adapters, whose gradients are zero at their initial values."""
  right = blockwise._local_backward

  def wrong(*arguments):
    query, *others = right(*arguments)
    return 1.5 * query, *others

  monkeypatch.setattr(blockwise, "_local_backward", wrong)
  got = measure_run(shrunk_config(kind), {"context": 8}, jax.devices())
  parts = {
    difference.part for difference in compare_measurements(measure_one_device(kind), got) if difference.excess > 1
  }
  assert "gradient" in parts and "held out" not in parts


@pytest.mark.full("meshes")
@pytest.mark.parametrize("capacity, same", [(0.5, False), (4, True)])
def test_verify_with_expert_capacity_differs_only_if_tokens_are_dropped(capacity, same):
  config = load_config([*KINDS["experts"], f"--config.model.expert_capacity={capacity}"])
  assert verify.verify(config, ["expert=4"]) is same


def mixtral_logits(batch):
  forward = jax.jit(lambda params, batch: Transformer(MIXTRAL).apply({"params": params}, batch).logits)
  return np.asarray(forward(parameters(MIXTRAL)[0], batch))


@pytest.mark.parametrize(
  "mesh",
  [
    "expert=2,context=2,tensor=2",
    *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("data=8", "expert=4,data=2", "context=8")),
  ],
)
def test_experts_on_mesh_accept_batches_that_it_does_not_divide(mesh):
  batch = Batch.from_tokens(np.random.default_rng(0).integers(0, MIXTRAL.vocab_size, (3, 10)))
  want = mixtral_logits(batch)
  with sharding.use_mesh(sharding.make_mesh(sharding.parse_mesh(mesh))):
    got = mixtral_logits(batch)
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--meshes=data=3"], "mesh"),
    (["--meshes=dta=8"], "data"),
    (["--processes=3"], "divide the 8 devices"),
    (["--processes=two"], "--processes=two must be numbers"),
  ],
)
def test_verify_command_rejects_invalid_flags_in_one_line(flags, words, capsys):
  assert main(["verify", "--config=gpt:debug", "--meshes=data=8", *flags]) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and words in error

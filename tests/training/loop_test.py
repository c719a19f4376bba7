"""The train loop and its checkpoints: bitwise resume, one compilation, damaged checkpoints, refused configs."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import llmjax
from llmjax.checkpoints import manifest
from llmjax.checkpoints.manager import Checkpoints
from llmjax.cli.main import main
from llmjax.config import ConfigError
from llmjax.config import files as cfglib
from llmjax.evaluation.checkpoint import evaluate_checkpoint
from llmjax.training import loop, session, step_metrics

TEXT = "".join(f"{i}: the quick brown fox jumps over {i * 37 % 101} lazy dogs.\n" for i in range(400))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A folder with a run `x` of two steps."""
  folder = tmp_path_factory.mktemp("trained")
  (folder / "t.txt").write_text(TEXT)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    patch.setenv("LLMJAX_CACHE", str(folder / "cache"))
    run(folder, "x", "--config.total_steps=2")
  return folder


@pytest.fixture
def folder(home, monkeypatch):
  """The current folder, with a text."""
  monkeypatch.chdir(home)
  (home / "t.txt").write_text(TEXT)
  return home


@pytest.fixture
def folder_with_run(folder, trained):
  """The current folder, with a text and a copy of the run `x` of two steps."""
  shutil.copytree(trained / "x", folder / "x")
  return folder


def flags(*more):
  base = ["--config=char:text=t.txt,debug", "--config.batch_size=8", "--config.log.tensorboard=false"]
  return [*base, "--config.model.dropout=0.1", "--config.ema_decay=0.9", *more]


def run(folder, name, *more):
  return loop.run(cfglib.load_config(flags(*more)), folder / name)


def saved(folder, name):
  """Return the newest checkpoint's state as {path: array}, its step and data cursor."""
  checkpoints = Checkpoints(folder / name)
  step = checkpoints.steps()[-1]
  tree = checkpoints.manager.restore(step)["state"]
  cursor = checkpoints.read_cursor(step)
  checkpoints.close()
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(p): np.asarray(x) for p, x in leaves}, step, cursor


CHILD = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
from llmjax.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def run_in_child(*arguments):
  """Run a command in a process of its own; return its exit code."""
  cache = str(jax.config.jax_compilation_cache_dir)
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": str(Path(__file__).parents[2])}
  return subprocess.run([sys.executable, "-c", CHILD, cache, *arguments], env=environment, check=False).returncode


def assert_same_state(one, other):
  (a, step_a, cursor_a), (b, step_b, cursor_b) = one, other
  assert step_a == step_b and cursor_a == cursor_b and a.keys() == b.keys()
  for path in a:
    np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.fixture(scope="module")
def whole(trained):
  """The state after four uninterrupted steps with a constant learning rate."""
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(trained)
    patch.setenv("LLMJAX_CACHE", str(trained / "cache"))
    run(trained, "whole", CONSTANT_RATE, "--config.total_steps=4", "--config.checkpoint.every=2")
  return saved(trained, "whole")


CONSTANT_RATE = "--config.schedule.final=1.0"  # other schedules depend on the number of steps


@pytest.mark.parametrize("own_process", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_resumed_run_equals_an_uninterrupted_one_bitwise(folder, whole, own_process):
  command = ["train", *flags(CONSTANT_RATE, "--config.total_steps=2"), f"--workdir={folder / 'halves'}"]
  assert (run_in_child(*command) if own_process else main(command)) == 0
  run(folder, "halves", CONSTANT_RATE, "--config.total_steps=4")
  assert_same_state(saved(folder, "halves"), whole)
  lines = [json.loads(x) for x in (folder / "halves" / "metrics.jsonl").read_text().splitlines()]
  assert [x["step"] for x in lines if "train/loss" in x] == [1, 2, 3, 4]


def test_train_and_eval_step_compile_once_in_a_run(folder, monkeypatch):
  programs = []
  make = session.make_program
  monkeypatch.setattr(session, "make_program", lambda *a, **k: programs.append(make(*a, **k)) or programs[-1])
  run(folder, "x", "--config.total_steps=4", "--config.checkpoint.every=2", "--config.evals.heldout.every=1")
  assert programs[0].train_step._cache_size() == 1 and programs[0].eval_step._cache_size() == 1


def test_metrics_are_fetched_after_the_next_step_is_dispatched(folder, monkeypatch):
  order = []
  get, add = jax.device_get, step_metrics.StepMetrics.add
  monkeypatch.setattr(step_metrics.jax, "device_get", lambda x: order.append("fetch") or get(x))
  monkeypatch.setattr(step_metrics.StepMetrics, "add", lambda self, step, *a: order.append(step) or add(self, step, *a))
  run(
    folder, "x", "--config.total_steps=6", "--config.log.every=3", "--config.evals={}", "--config.checkpoint.every=none"
  )
  # Step 1 is logged when step 2 is under way, step 3 when 4 is; the last at the end.
  assert order == [1, 2, "fetch", 3, 4, "fetch", 5, 6, "fetch"]


@pytest.mark.parametrize("item", ["state", pytest.param("manifest", marks=pytest.mark.slow)])
def test_damaged_checkpoint_is_skipped_with_a_warning_and_replaced(folder, capsys, item):
  run(folder, "x", "--config.total_steps=4", "--config.checkpoint.every=2")
  expected = saved(folder, "x")
  for path in (folder / "x" / "checkpoints" / "4" / item).rglob("*"):
    if path.is_file() and (item == "manifest" or path.parent.name == "d"):
      path.write_bytes(b"\0" * 16)
  capsys.readouterr()
  run(folder, "x", "--config.total_steps=4")
  output = capsys.readouterr().out
  assert "checkpoints/4 cannot be read" in output and "trying an older one" in output and "2/4" in output
  assert len(list((folder / "x" / "damaged").iterdir())) == 1
  assert_same_state(saved(folder, "x"), expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_interrupted_run_saves_and_exits_with_130(folder, capsys, monkeypatch, number):
  add = step_metrics.StepMetrics.add

  def add_and_interrupt(self, step, *args):
    add(self, step, *args)
    if step == 3:
      os.kill(os.getpid(), number)

  monkeypatch.setattr(step_metrics.StepMetrics, "add", add_and_interrupt)
  more = ["--config.total_steps=20", "--config.checkpoint.every=none", "--config.log.every=1", "--config.evals={}"]
  assert main(["train", *flags(*more), f"--workdir={folder / 'x'}"]) == 130
  assert "the same command resumes" in capsys.readouterr().err
  _, step, _ = saved(folder, "x")
  assert step == 3
  last = json.loads((folder / "x" / "metrics.jsonl").read_text().splitlines()[-1])
  assert last["step"] == step


def test_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(folder_with_run):
  with pytest.raises(step_metrics.DivergenceError, match=r"is (nan|inf)"):
    run(folder_with_run, "x", "--config.total_steps=8", "--config.optim.lr=1e38", "--config.optim.clip_norm=none")
  assert saved(folder_with_run, "x")[1] == 2


def test_checkpoints_retain_best_latest_and_periodic(folder):
  """The losses are set so that the best one is old."""
  checkpoints = Checkpoints(folder / "x", write=True, keep=2, keep_every=4, best="loss")
  for step, loss in enumerate([5.0, 1.0, 4.0, 3.0, 2.0, 2.5, 2.2], start=1):
    checkpoints.save(step, {"a": np.ones(2)}, {}, {}, {"loss": loss})
    checkpoints.wait()
  assert checkpoints.steps() == [2, 4, 6, 7]
  checkpoints.close()
  every = Checkpoints(folder / "y", write=True, keep=None, keep_every=4, best="loss")
  for step in range(1, 7):
    every.save(step, {"a": np.ones(2)}, {}, {}, {})
    every.wait()
  assert every.steps() == [1, 2, 3, 4, 5, 6]
  every.close()


@pytest.mark.slow
def test_checkpoint_metrics_are_those_measured_at_its_step(folder):
  run(folder, "x", "--config.total_steps=4", "--config.checkpoint.every=1", "--config.evals.heldout.every=2")
  checkpoints = Checkpoints(folder / "x")
  measured = {step: bool(checkpoints.read_manifest(step)["metrics"]) for step in checkpoints.steps()}
  checkpoints.close()
  assert measured == {3: False, 4: True}


def test_init_from_starts_with_the_ema(folder_with_run):
  run(
    folder_with_run, "b", "--config.total_steps=1", "--config.init_from=x", "--config.optim.lr=1e-30"
  )  # too small to change a float32
  before, after = saved(folder_with_run, "x")[0], saved(folder_with_run, "b")[0]
  key = "['params']['embedding']['table']"
  np.testing.assert_array_equal(after[key], before[key.replace("params", "ema")])


def test_init_from_with_other_shapes_is_refused(folder_with_run):
  with pytest.raises(ConfigError, match=r"has shape .* but this config requires"):
    run(folder_with_run, "c", "--config.total_steps=1", "--config.init_from=x", "--config.model.d_model=64")


def test_unfinished_save_is_ignored_and_retained(folder_with_run):
  unfinished = folder_with_run / "x" / "checkpoints" / "3.orbax-checkpoint-tmp"
  shutil.copytree(folder_with_run / "x" / "checkpoints" / "2", unfinished)
  assert saved(folder_with_run, "x")[1] == 2
  llmjax.load(folder_with_run / "x")
  assert unfinished.exists()


@pytest.mark.slow
def test_init_from_reuses_the_tokenizer(folder_with_run):
  Path("t.txt").write_text("ab\n" * 2000)  # a smaller alphabet would have other ids
  run(folder_with_run, "b", "--config.total_steps=1", "--config.init_from=x")
  first, second = (llmjax.load(folder_with_run / name).tokenizer.to_files() for name in "xb")
  assert first == second


@pytest.mark.slow
def test_failing_evaluator_loses_no_trained_step(folder):
  with pytest.raises(ZeroDivisionError):
    run(folder, "x", "--config.total_steps=3", "--config.evals.sample.name=tests.training.loop_test:broken")
  assert saved(folder, "x")[1] == 3


def broken(program, prompt, max_new_tokens, temperature, top_p):
  """An evaluator that succeeds at steps 0 and 1 and fails after training."""
  calls = []

  def evaluate(params):
    calls.append(params)
    return {"one": 1 / (3 - len(calls))}

  return evaluate


def test_invalid_config_with_fresh_archives_nothing(folder_with_run):
  with pytest.raises(ConfigError):
    loop.run(cfglib.load_config(flags("--config.accum=5")), folder_with_run / "x", fresh=True)
  assert not (folder_with_run / "x.1").exists()


@pytest.mark.parametrize(
  "flag, message",
  [
    ("--config.log.every=0", r"log\.every=0 must be at least one step"),
    ("--config.evals.heldout.every=often", r"evals\.heldout\.every='often' is not a duration"),
    ("--config.evals.heldout.batch_size=6", r"batch_size=6 must be a multiple of the 8 devices"),
    ("--config.evals.heldout.name=losss", r"evals\.heldout\.name='losss'"),
    ("--config.checkpoint.best=heldout/loss", r"checkpoint\.best='heldout/loss' .*eval/heldout"),
    ("--config.profile=3:1", r"config\.profile='3:1'"),
  ],
)
def test_wrong_config_is_refused_before_the_first_step(folder, flag, message):
  with pytest.raises(ConfigError, match=message):
    run(folder, "x", flag)
  assert not (folder / "x").exists()


def edit_manifest(run_folder, edit):
  """Change the manifest of the checkpoint at step 2."""
  [manifest] = (run_folder / "checkpoints" / "2" / "manifest").rglob("metadata")
  content = json.loads(manifest.read_text())
  edit(content)
  manifest.write_text(json.dumps(content))


def test_evaluate_runs_no_code_of_unused_parts_of_the_config(folder_with_run):
  def edit(content):
    content["config"]["schedule"] = {"name": "pathlib:Path.touch", "self": str(folder_with_run / "touched")}
    content["config"]["optim"]["name"] = "os:abort"
    content["config"]["evals"] = {"x": {"name": "os:abort", "every": None, "at": []}}

  edit_manifest(folder_with_run / "x", edit)
  assert evaluate_checkpoint("x", data="t.txt")["data/loss"] > 0


def test_evaluate_of_an_untrusted_objective_is_refused(folder_with_run):
  edit_manifest(folder_with_run / "x", lambda content: content["config"]["objective"].update(name="os:abort"))
  with pytest.raises(ConfigError, match="--trust"):
    evaluate_checkpoint("x", data="t.txt")


def test_init_from_runs_no_code_named_by_the_tokenizer(folder_with_run):
  edit_manifest(folder_with_run / "x", lambda content: content["tokenizer"].update(spec={"name": "os:abort"}))
  with pytest.raises(ConfigError, match="is not part of llmjax"):
    run(folder_with_run, "b", "--config.init_from=x")


@pytest.mark.slow
def test_checkpoint_records_the_commit_and_another_resumes(folder, monkeypatch):
  monkeypatch.setattr(manifest, "source_commit", lambda: "a")
  run(folder, "x", "--config.total_steps=1")
  monkeypatch.setattr(manifest, "source_commit", lambda: "b")
  run(folder, "x", "--config.total_steps=2")
  checkpoints = Checkpoints(folder / "x")
  assert [checkpoints.read_manifest(step)["versions"]["commit"] for step in (1, 2)] == ["a", "b"]
  checkpoints.close()


def test_commit_is_the_one_of_the_running_code(tmp_path, monkeypatch):
  monkeypatch.delenv("LLMJAX_COMMIT", raising=False)

  def commit(root, name="llmjax"):
    manifest.source_commit.cache_clear()
    root.mkdir(exist_ok=True)
    (root / "setup.py").write_text(f'setup(\n  name="{name}",\n)\n')
    return manifest.source_commit(root)

  def git(*words):
    command = ["git", "-C", tmp_path / "clone", "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

  assert commit(tmp_path / "clone") is None
  for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"], ["tag", "v1"]):
    git(*words)
  head = git("rev-parse", "HEAD")
  (tmp_path / "clone" / "untracked").touch()
  assert commit(tmp_path / "clone") == head
  assert commit(tmp_path / "clone" / "site-packages") is None  # a package installed in a repository is not part of it
  assert commit(tmp_path / "clone", "other") is None
  (tmp_path / "clone" / "site-packages" / ".commit").write_text("shipped\n")
  assert commit(tmp_path / "clone" / "site-packages") == "shipped"
  git("rm", "-q", "--cached", "setup.py")
  assert commit(tmp_path / "clone") == f"{head}-dirty"
  monkeypatch.setenv("PATH", "")
  assert commit(tmp_path / "clone") is None
  monkeypatch.setenv("LLMJAX_COMMIT", "built")
  assert commit(tmp_path / "clone") == "built"
  manifest.source_commit.cache_clear()

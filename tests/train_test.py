"""A whole run: bitwise resume through a process that ended, one compilation, damage survived, nothing fetched early."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import llmjax
from llmjax import checkpoint, evaluate, train
from llmjax import config as cfglib
from llmjax.checkpoint import Checkpoints
from llmjax.config import ConfigError

TEXT = "".join(f"{i}: the quick brown fox jumps over {i * 37 % 101} lazy dogs.\n" for i in range(400))


@pytest.fixture
def folder(home):
  (home / "t.txt").write_text(TEXT)
  return home


def flags(folder, *more):
  base = [f"--config=char:text={folder / 't.txt'},debug", "--config.batch_size=8", "--config.log.tensorboard=false"]
  return [*base, "--config.model.dropout=0.1", "--config.optim.ema_decay=0.9", *more]


def run(folder, name, *more):
  return train.run(cfglib.load_config(flags(folder, *more)), folder / name)


def saved(folder, name):
  """Everything in the newest checkpoint's state, as {path: array}, with its step and data cursor."""
  checkpoints = Checkpoints(folder / name)
  step = checkpoints.steps()[-1]
  tree = checkpoints.manager.restore(step)["state"]
  cursor = checkpoints.read(step, "data")["cursor"]
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
from llmjax.cli import main
sys.exit(main(sys.argv[2:]))
"""


def child(*arguments, **how):
  cache = str(jax.config.jax_compilation_cache_dir)
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": str(Path(__file__).parent.parent)}
  return subprocess.Popen([sys.executable, "-c", CHILD, cache, *arguments], env=environment, **how)


def assert_same_state(one, other):
  (a, step_a, cursor_a), (b, step_b, cursor_b) = one, other
  assert step_a == step_b and cursor_a == cursor_b and a.keys() == b.keys()
  for path in a:
    np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def test_two_and_two_resumed_steps_are_four_bitwise_through_a_process_that_ended(folder):
  same = ["--config.schedule.final=1.0"]  # with a longer run, any other schedule would be another one
  run(folder, "whole", *same, "--config.total_steps=4", "--config.checkpoint.every=2")
  half = child("train", *flags(folder, *same, "--config.total_steps=2"), f"--workdir={folder / 'halves'}")
  assert half.wait() == 0
  run(folder, "halves", *same, "--config.total_steps=4")
  assert_same_state(saved(folder, "halves"), saved(folder, "whole"))
  lines = [json.loads(x) for x in (folder / "halves" / "metrics.jsonl").read_text().splitlines()]
  assert [x["step"] for x in lines if "train/loss" in x] == [1, 2, 3, 4]


def test_the_step_is_compiled_once_in_a_whole_run(folder, monkeypatch):
  programs = []
  make = train.make_program
  monkeypatch.setattr(train, "make_program", lambda *a, **k: programs.append(make(*a, **k)) or programs[-1])
  run(folder, "x", "--config.total_steps=4", "--config.checkpoint.every=2", "--config.evals.heldout.every=1")
  assert programs[0].train_step._cache_size() == 1 and programs[0].eval_step._cache_size() == 1


def test_metrics_are_fetched_once_a_log_line_and_after_the_next_step_was_dispatched(folder, monkeypatch):
  order = []
  get, add = jax.device_get, train.Meter.add
  monkeypatch.setattr(train.jax, "device_get", lambda x: order.append("fetch") or get(x))
  monkeypatch.setattr(train.Meter, "add", lambda self, step, *a: order.append(step) or add(self, step, *a))
  run(
    folder, "x", "--config.total_steps=6", "--config.log.every=3", "--config.evals={}", "--config.checkpoint.every=none"
  )
  # Step 1 is logged when step 2 is under way, step 3 when 4 is; the last at the end.
  assert order == [1, 2, "fetch", 3, 4, "fetch", 5, 6, "fetch"]


@pytest.mark.parametrize("item", ["state", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_with_a_word_and_replaced(folder, capsys, item):
  run(folder, "x", "--config.total_steps=4", "--config.checkpoint.every=2")
  want = saved(folder, "x")
  for path in (folder / "x" / "checkpoints" / "4" / item).rglob("*"):
    if path.is_file() and (item == "manifest" or path.parent.name == "d"):
      path.write_bytes(b"\0" * 16)
  capsys.readouterr()
  run(folder, "x", "--config.total_steps=4")
  said = capsys.readouterr().out
  assert "checkpoints/4 cannot be read" in said and "trying an older one" in said and "2/4" in said
  assert len(list((folder / "x" / "damaged").iterdir())) == 1
  assert_same_state(saved(folder, "x"), want)


def test_an_interrupted_run_saves_and_goes_on_where_it_was(folder):
  more = ["--config.total_steps=100000", "--config.checkpoint.every=none", "--config.log.every=1", "--config.evals={}"]
  process = child("train", *flags(folder, *more), f"--workdir={folder / 'x'}", stderr=subprocess.PIPE, text=True)
  metrics = folder / "x" / "metrics.jsonl"
  deadline = time.time() + 120
  while time.time() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate(timeout=60)
  assert process.returncode == 130 and "the same command resumes" in said
  _, step, _ = saved(folder, "x")
  assert 0 < step < 100_000
  last = json.loads(metrics.read_text().splitlines()[-1])
  assert last["step"] == step


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(folder):
  run(folder, "x", "--config.total_steps=2")
  with pytest.raises(train.Diverged, match=r"is (nan|inf)"):
    run(folder, "x", "--config.total_steps=8", "--config.optim.lr=1e38", "--config.optim.clip_norm=none")
  assert saved(folder, "x")[1] == 2


def test_best_and_latest_checkpoints_are_kept_and_the_newest_never_lost(folder):
  """Losses are given, so that the best one is old."""
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


def test_the_best_checkpoint_is_judged_by_what_was_measured_at_it(folder):
  run(folder, "x", "--config.total_steps=4", "--config.checkpoint.every=1", "--config.evals.heldout.every=2")
  checkpoints = Checkpoints(folder / "x")
  measured = {step: bool(checkpoints.read(step, "manifest")["metrics"]) for step in checkpoints.steps()}
  checkpoints.close()
  assert measured == {3: False, 4: True}


def test_a_run_starts_from_another_ones_average_and_a_stranger_is_refused(folder):
  run(folder, "a", "--config.total_steps=2")
  run(folder, "b", "--config.total_steps=1", f"--config.init_from={folder / 'a'}", "--config.optim.lr=0.0")
  before, after = saved(folder, "a")[0], saved(folder, "b")[0]
  key = "['params']['embedding']['table']"
  np.testing.assert_array_equal(after[key], before[key.replace("params", "ema")])
  with pytest.raises(ConfigError, match=r"has shape .* this config's is"):
    run(folder, "c", "--config.total_steps=1", f"--config.init_from={folder / 'a'}", "--config.model.d_model=64")


def test_an_unfinished_save_is_ignored_and_left_alone_by_readers(folder):
  run(folder, "x", "--config.total_steps=2")
  unfinished = folder / "x" / "checkpoints" / "3.orbax-checkpoint-tmp"
  shutil.copytree(folder / "x" / "checkpoints" / "2", unfinished)
  assert saved(folder, "x")[1] == 2
  llmjax.load(folder / "x")
  assert unfinished.exists()


def test_a_start_from_another_run_keeps_its_tokenizer(folder):
  run(folder, "a", "--config.total_steps=1")
  (folder / "t.txt").write_text("ab\n" * 2000)  # a smaller alphabet would give other ids
  run(folder, "b", "--config.total_steps=1", f"--config.init_from={folder / 'a'}")
  first, second = (llmjax.load(folder / name).tokenizer.to_files() for name in "ab")
  assert first == second


def test_a_broken_evaluator_costs_no_trained_step(folder):
  with pytest.raises(ZeroDivisionError):
    run(folder, "x", "--config.total_steps=3", "--config.evals.sample.name=tests.train_test:broken")
  assert saved(folder, "x")[1] == 3


def broken(program, prompt, max_new_tokens, temperature, top_p):
  """An evaluator that works at steps 0 and 1 and fails after training."""
  calls = []

  def evaluate(params):
    calls.append(params)
    return {"one": 1 / (3 - len(calls))}

  return evaluate


def test_a_config_that_cannot_run_moves_nothing_aside(folder):
  run(folder, "x", "--config.total_steps=1")
  with pytest.raises(ConfigError):
    train.run(cfglib.load_config(flags(folder, "--config.accum=5")), folder / "x", fresh=True)
  assert not (folder / "x.1").exists()


@pytest.mark.parametrize(
  "flag, words",
  [
    ("--config.log.every=0", r"log\.every=0 must be at least one step"),
    ("--config.evals.heldout.every=often", r"evals\.heldout\.every='often' is not a duration"),
    ("--config.evals.heldout.batch_size=6", r"batch_size=6 must be a multiple of the 8 devices"),
    ("--config.evals.heldout.name=losss", r"evals\.heldout\.name='losss'"),
    ("--config.checkpoint.best=heldout/loss", r"checkpoint\.best='heldout/loss' .*eval/heldout"),
    ("--config.profile=3:1", r"config\.profile='3:1'"),
  ],
)
def test_mistakes_are_found_before_the_first_step(folder, flag, words):
  with pytest.raises(ConfigError, match=words):
    run(folder, "x", flag)
  assert not (folder / "x").exists()


def test_evaluating_a_checkpoint_runs_no_code_that_its_config_names(folder):
  run(folder, "x", "--config.total_steps=1")
  [manifest] = (folder / "x" / "checkpoints" / "1" / "manifest").rglob("metadata")
  content = json.loads(manifest.read_text())
  content["config"]["schedule"] = {"name": "pathlib:Path.touch", "self": str(folder / "touched")}
  content["config"]["optim"]["name"] = "os:abort"
  content["config"]["evals"] = {"x": {"name": "os:abort", "every": None, "at": []}}
  manifest.write_text(json.dumps(content))
  found = evaluate.evaluate_checkpoint(str(folder / "x"), data=str(folder / "t.txt"))
  assert found["data/loss"] > 0
  content["config"]["objective"]["name"] = "os:abort"
  manifest.write_text(json.dumps(content))
  with pytest.raises(ConfigError, match="--trust"):
    evaluate.evaluate_checkpoint(str(folder / "x"), data=str(folder / "t.txt"))


def test_starting_from_a_checkpoint_runs_no_code_that_its_tokenizer_names(folder):
  run(folder, "a", "--config.total_steps=1")
  [manifest] = (folder / "a" / "checkpoints" / "1" / "manifest").rglob("metadata")
  content = json.loads(manifest.read_text())
  content["tokenizer"]["spec"] = {"name": "os:abort"}
  manifest.write_text(json.dumps(content))
  with pytest.raises(ConfigError, match="none of llmjax"):
    run(folder, "b", f"--config.init_from={folder / 'a'}")


def test_a_checkpoint_says_of_which_commit_it_is_and_another_commit_goes_on(folder, monkeypatch):
  monkeypatch.setattr(checkpoint, "commit", lambda: "a")
  run(folder, "x", "--config.total_steps=1")
  monkeypatch.setattr(checkpoint, "commit", lambda: "b")
  run(folder, "x", "--config.total_steps=2")
  found = Checkpoints(folder / "x")
  assert [found.read(step, "manifest")["versions"]["commit"] for step in (1, 2)] == ["a", "b"]


def test_the_commit_is_that_of_the_code_that_runs(tmp_path, monkeypatch):
  monkeypatch.delenv("LLMJAX_COMMIT", raising=False)

  def commit(root, name="llmjax"):
    checkpoint.commit.cache_clear()
    root.mkdir(exist_ok=True)
    (root / "setup.py").write_text(f'setup(\n  name="{name}",\n)\n')
    return checkpoint.commit(root)

  def git(*words):
    command = ["git", "-C", tmp_path / "clone", "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

  assert commit(tmp_path / "clone") is None
  for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"], ["tag", "v1"]):
    git(*words)
  head = git("rev-parse", "HEAD")
  (tmp_path / "clone" / "untracked").touch()
  assert commit(tmp_path / "clone") == head
  assert commit(tmp_path / "clone" / "site-packages") is None  # what is installed in a repository is not of it
  assert commit(tmp_path / "clone", "other") is None
  (tmp_path / "clone" / "site-packages" / ".commit").write_text("shipped\n")
  assert commit(tmp_path / "clone" / "site-packages") == "shipped"
  git("rm", "-q", "--cached", "setup.py")
  assert commit(tmp_path / "clone") == f"{head}-dirty"
  monkeypatch.setenv("PATH", "")
  assert commit(tmp_path / "clone") is None
  monkeypatch.setenv("LLMJAX_COMMIT", "built")
  assert commit(tmp_path / "clone") == "built"
  checkpoint.commit.cache_clear()

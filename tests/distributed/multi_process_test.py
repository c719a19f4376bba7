"""Several processes compute the same as one, detect differences before the first compilation, and end together.

The processes are real, over loopback, with eight simulated devices in all. The process of the tests is the one process
that they are compared with.
"""

import itertools
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

from llmjax.checkpoints.manager import Checkpoints
from llmjax.config import load_config
from llmjax.telemetry.curves import METRICS_FILE, read_curves
from llmjax.training.loop import run as train_run
from tests.support import hosts_worker
from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
SENTENCES = [f"{i}: the quick brown fox jumps over {i * 37 % 101} lazy dogs." for i in range(300)]
LABELLED = [{"id": i, "text": text, "label": "odd" if i % 2 else "even"} for i, text in enumerate(SENTENCES[:40])]
WAIT = 150  # seconds; a few would do on an idle machine
NUM_DEVICES = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("hosts")
  (folder / "t.txt").write_text("\n".join(SENTENCES))
  (folder / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in LABELLED))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("LLMJAX_CACHE", str(folder / "cache"))
    yield folder


def launch(home, *command, port=0, count=1, index=0, **settings):
  """Start a Python process, one of `count`."""
  variables = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(NUM_DEVICES // count),
    "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "PYTHONPATH": str(ROOT),
    "LLMJAX_COORDINATOR": f"127.0.0.1:{port}",
    "LLMJAX_NUM_PROCESSES": str(count),
    "LLMJAX_PROCESS_ID": str(index),
  }
  settings = {"cwd": home, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | settings
  return subprocess.Popen([sys.executable, "-m", *command], env=os.environ | variables, **settings)


def launch_all(home, count, *command, **settings):
  port = free_port()
  return [launch(home, *command, port=port, count=count, index=index, **settings) for index in range(count)]


def finish(processes, wait=WAIT):
  """Return the exit code, standard output and standard error of each process; kill those that do not end."""
  try:
    ended = [process.communicate(timeout=wait) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, *texts) for process, texts in zip(processes, ended)]


def own_messages(text):
  return [line for line in text.splitlines() if line.startswith("llmjax: ")]


def train(data, workdir, *more, steps=4):
  return [
    *("train", f"--config=gpt:text={data / 't.txt'},debug", f"--workdir={workdir}", "--config.log.tensorboard=false"),
    *("--config.batch_size=8", f"--config.total_steps={steps}", "--config.checkpoint.every=2", "--config.log.every=1"),
    *("--config.schedule.final=1.0", "--config.schedule.warmup=none"),  # the same for every number of steps
    *("--config.mesh.data=4", "--config.mesh.fsdp=2", "--config.evals.sample.at=()", *more),
  ]


def run_commands(home, count, commands):
  """Run commands of the command line in `count` processes, in this one if `count` is 1."""
  if count == 1:
    hosts_worker.run_commands(home, commands)
    return
  processes = launch_all(home, count, "tests.support.hosts_worker", str(home), json.dumps(commands))
  for code, _, errors in finish(processes, 2 * WAIT):
    assert code == 0, errors


def curves(workdir):
  """Return {name: values} without measurements of time."""
  return {name: values for name, (_, values) in read_curves(workdir).items() if "per_second" not in name}


def assert_curves_close(one, other):
  one, other = curves(one), curves(other)
  assert one.keys() == other.keys() and {"train/loss", "eval/heldout/loss"} <= one.keys()
  for name in one:
    np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5, err_msg=name)


def outputs(home, index=0):
  """Return what the commands printed in one process."""
  return json.loads((home / f"output.{index}.json").read_text())


def row_hashes(home, count):
  """Return {(training, step, row): hash}; a row that several processes make is the same in all."""
  merged: dict = {}
  for index in range(count):
    for *where, digest in json.loads((home / f"rows.{index}.json").read_text()):
      assert merged.setdefault(tuple(where), digest) == digest
  return merged


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
  """Return {number of processes: folder with a training in `run`}."""
  homes = {count: tmp_path_factory.mktemp(f"of_{count}") for count in (1, 2)}
  for count, home in homes.items():
    run_commands(home, count, [train(data, home / "run")])
  return homes


@pytest.mark.slow
def test_losses_of_two_processes_equal_those_of_one(runs):
  assert_curves_close(runs[2] / "run", runs[1] / "run")
  np.testing.assert_allclose(curves(runs[2] / "run")["train/loss"], curves(runs[1] / "run")["train/loss"], rtol=2e-6)


@pytest.mark.slow
def test_only_process_0_prints(runs):
  assert not any(outputs(runs[2], 1)) and all(outputs(runs[2], 0))


@pytest.mark.slow
def test_global_batches_of_two_processes_equal_those_of_one(runs):
  one, two = row_hashes(runs[1], 1), row_hashes(runs[2], 2)
  assert one == two
  assert one.keys() == set(itertools.product((0,), range(4), range(8)))  # prefetched batches do not count
  halves = [{row for _, _, row, _ in json.loads((runs[2] / f"rows.{i}.json").read_text())} for i in range(2)]
  assert halves[0] != halves[1]  # no process makes all rows


@pytest.mark.slow
def test_checkpoint_of_two_processes_resumes_in_one(runs, data, tmp_path):
  for count, home in runs.items():
    shutil.copytree(home / "run", tmp_path / str(count) / "run")
    run_commands(tmp_path / str(count), 1, [train(data, tmp_path / str(count) / "run", steps=6)])
  assert_curves_close(tmp_path / "2" / "run", tmp_path / "1" / "run")
  assert len(curves(tmp_path / "2" / "run")["train/loss"]) == 6


# The other commands


@pytest.fixture(scope="module")
def classifier(data):
  """A run that can predict."""
  config = f"--config=classify:train={data / 't.jsonl'},debug"
  small = ["--config.log.tensorboard=false", "--config.total_steps=1", "--config.evals={}", "--config.batch_size=8"]
  train_run(load_config([config, *small, "--config.checkpoint.best=none"]), data / "classes")
  return data / "classes"


def other_commands(data, classifier, home):
  """All commands besides `train` that several processes can run, with the training in `home`."""
  return [
    ["evaluate", f"--model={home / 'run'}", f"--data={data / 't.txt'}"],
    ["generate", f"--model={home / 'run'}", "--prompt=the quick", "--max_new_tokens=12", "--seed=3"],
    ["embed", f"--model={home / 'run'}", f"--input={data / 't.jsonl'}", f"--output={home / 'v.npy'}"],
    ["predict", f"--model={classifier}", f"--input={data / 't.jsonl'}", f"--output={home / 'p.jsonl'}"],
  ]


def parse_numbers(text):
  return {line.split()[0]: float(line.split()[1]) for line in text.splitlines()}


def assert_same_outputs(home, alone):
  """Compare the outputs of `other_commands`."""
  (*_, evaluated, written, _, _), (*_, evaluated_alone, written_alone, _, _) = outputs(home), outputs(alone)
  assert parse_numbers(evaluated) == pytest.approx(parse_numbers(evaluated_alone), rel=1e-5)
  assert "data/loss" in parse_numbers(evaluated)
  assert written == written_alone and written.startswith("the quick")
  vectors, expected = np.load(home / "v.npy"), np.load(alone / "v.npy")
  assert vectors.shape == expected.shape == (40, 32)
  np.testing.assert_allclose(vectors, expected, atol=1e-5)
  answers, others = ([json.loads(x) for x in (each / "p.jsonl").read_text().splitlines()] for each in (home, alone))
  assert [a["id"] for a in answers] == list(range(40))
  assert [a["label"] for a in answers] == [t["label"] for t in others]
  assert [a["confidence"] for a in answers] == pytest.approx([t["confidence"] for t in others], abs=1e-5)


@pytest.mark.full("processes")
def test_other_commands_in_two_processes_have_the_outputs_of_one(data, classifier, runs, tmp_path):
  homes = {count: tmp_path / str(count) for count in runs}
  for count, home in homes.items():
    shutil.copytree(runs[count], home)
    run_commands(home, count, other_commands(data, classifier, home))
  assert_same_outputs(homes[2], homes[1])


@pytest.mark.full("processes")
def test_four_processes_equal_one_and_resume_a_run_of_two(data, classifier, runs, tmp_path):
  homes = {count: tmp_path / str(count) for count in (1, 2, 4)}
  for count, home in homes.items():
    home.mkdir()
    run_commands(home, count, [train(data, home / "run"), *other_commands(data, classifier, home)])
  hashes = [row_hashes(home, count) for count, home in homes.items()]
  assert hashes[0] == hashes[1] == hashes[2]
  for one, other in itertools.combinations(homes.values(), 2):
    assert_curves_close(one / "run", other / "run")
    assert_same_outputs(one, other)
  for count in (1, 2):
    run_commands(homes[count], 4, [train(data, homes[count] / "run", steps=6)])
  assert_curves_close(homes[1] / "run", homes[2] / "run")
  assert len(curves(homes[2] / "run")["train/loss"]) == 6


# Differences and missing processes


@pytest.mark.full("processes")
def test_different_configs_are_reported_once_and_end_both(data, tmp_path):
  port, start = free_port(), time.monotonic()
  both = [
    launch(tmp_path, "llmjax", *train(data, "x", f"--config.optim.lr={rate}"), port=port, count=2, index=index)
    for index, rate in enumerate(("0.001", "0.002"))
  ]
  (code, _, errors), (other_code, _, other_errors) = finish(both)
  assert (code, other_code) == (2, 2) and not own_messages(other_errors)
  [line] = own_messages(errors)
  assert "config.optim.lr differs between processes: 0.001 on process 0, 0.002 on process 1; all must" in line
  assert time.monotonic() - start < WAIT / 2


@pytest.mark.full("processes")
def test_different_data_are_reported_once_and_end_both(tmp_path):
  """The path is the same, and each process finds another text there."""
  port, both = free_port(), []
  for index in range(2):
    folder = tmp_path / str(index)
    folder.mkdir()
    (folder / "t.txt").write_text("\n".join(SENTENCES[index:]))
    command = train(Path(), tmp_path / "y", "--config.data.tokenizer={'name': 'bytes'}")
    both.append(launch(tmp_path, "llmjax", *command, port=port, count=2, index=index, cwd=folder))
  (code, _, errors), (other_code, _, other_errors) = finish(both)
  assert (code, other_code) == (2, 2) and not own_messages(other_errors)
  [line] = own_messages(errors)
  assert "data.fingerprint differs" in line and "on process 0" in line and "on process 1" in line


@pytest.mark.full("processes")
def test_failure_before_the_first_step_ends_both(tmp_path):
  """Process 1 does not find its text."""
  port = free_port()
  for index in range(2):
    (tmp_path / str(index)).mkdir()
  (tmp_path / "0" / "t.txt").write_text("\n".join(SENTENCES))
  command = train(Path(), tmp_path / "y")
  both = [
    launch(tmp_path, "llmjax", *command, port=port, count=2, index=index, cwd=tmp_path / str(index))
    for index in range(2)
  ]
  (code, _, errors), (other_code, _, other_errors) = finish(both)
  assert (code, other_code) == (2, 2)
  [line], [other] = own_messages(errors), own_messages(other_errors)
  assert "process 1 has ended: " in line and "t.txt" in line
  assert other.startswith("llmjax: process 1: ") and "t.txt" in other


@pytest.mark.full("processes")
def test_missing_process_is_named(data, tmp_path):
  port, start = free_port(), time.monotonic()
  command = [*train(data, "x"), "--start_timeout=3"]
  present = [launch(tmp_path, "llmjax", *command, port=port, count=3, index=index) for index in (0, 2)]
  without_first = launch(tmp_path, "llmjax", *command, port=free_port(), count=2, index=1)
  (code, _, errors), (other_code, _, other_errors) = finish(present)
  assert (code, other_code) == (1, 1) and not own_messages(other_errors)  # 1: it may be there at the next start
  [line] = own_messages(errors)
  assert f"process 1 of 3 did not come to 127.0.0.1:{port} within 3 s" in line
  [(code, _, errors)] = finish([without_first])
  assert code == 1 and "process 0 did not open 127.0.0.1:" in errors
  assert time.monotonic() - start < WAIT / 2


# Ends


def wait_for_steps(workdir, steps, processes):
  """Wait until so many steps are logged."""
  path, deadline = workdir / METRICS_FILE, time.monotonic() + WAIT
  while not (path.exists() and path.read_text().count("train/loss") >= steps):
    assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
    time.sleep(0.1)


def interrupt_one(data, home):
  """Train in two processes, send SIGTERM to one; return the command and the step after which both have stopped."""
  endless = ["--config.checkpoint.every=none", "--config.evals={}"]
  command = [x for x in train(data, home / "x", steps=100_000) if "evals" not in x] + endless
  both = launch_all(home, 2, "llmjax", *command)
  wait_for_steps(home / "x", 3, both)
  both[1].send_signal(signal.SIGTERM)
  ended = finish(both)
  checkpoints = Checkpoints(home / "x")
  [step] = checkpoints.steps()
  checkpoints.close()
  for index, (code, _, errors) in enumerate(ended):
    assert code == 130
    assert own_messages(errors)[-1].startswith(f"llmjax: process {index}: interrupted at {step:,}/100,000; saved")
  return command, step


@pytest.mark.full("processes")
def test_signal_to_one_process_saves_and_ends_both_at_the_same_step(data, tmp_path):
  """The same command resumes both, and a process that is killed ends the other."""
  command, step = interrupt_one(data, tmp_path)
  both = launch_all(tmp_path, 2, "llmjax", *command)
  wait_for_steps(tmp_path / "x", step + 2, both)
  start = time.monotonic()
  both[1].kill()
  (code, out, errors), _ = finish(both)
  assert f"resuming {tmp_path / 'x'} at {step:,}/" in out
  assert time.monotonic() - start < 60  # JAX's heartbeat, if no connection is closed under a waiting thread
  assert (code, "another process has ended" in errors) == (1, True) or (code, "task died" in errors) == (
    -signal.SIGABRT,
    True,
  )

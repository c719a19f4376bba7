"""Several processes compute what one computes, find out before the first compile what differs, and end together.

The processes are real, over loopback, and each has two simulated devices.
"""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from llmjax import cli, hosts, metrics
from llmjax.checkpoint import Checkpoints
from llmjax.config import ConfigError, load_config
from llmjax.train import run as train_run

ROOT = Path(__file__).parent.parent
SENTENCES = [f"{i}: the quick brown fox jumps over {i * 37 % 101} lazy dogs." for i in range(300)]
LABELLED = [{"id": i, "text": text, "label": "odd" if i % 2 else "even"} for i, text in enumerate(SENTENCES[:40])]
WAIT = 150  # seconds for what takes a few on an idle machine


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("hosts")
  (folder / "t.txt").write_text("\n".join(SENTENCES))
  (folder / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in LABELLED))
  return folder


def free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def launch(home, *command, port=0, count=1, index=0, devices=2, **how):
  """A Python process, one of `count`, with a cache of trained vocabularies that all of them share."""
  own = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
    "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "LLMJAX_CACHE": str(home / "cache"),
    "PYTHONPATH": str(ROOT),
  }
  several = {"COORDINATOR": f"127.0.0.1:{port}", "NUM_PROCESSES": str(count), "PROCESS_ID": str(index)}
  own |= {f"LLMJAX_{name}": value for name, value in several.items()} if count > 1 else {}
  how = {"cwd": home, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | how
  return subprocess.Popen([sys.executable, "-m", *command], env=os.environ | own, **how)


def launch_all(home, count, *command, **how):
  port = free_port()
  return [launch(home, *command, port=port, count=count, index=index, **how) for index in range(count)]


def finish(processes, wait=WAIT):
  """(exit code, standard output, standard error) of each; none outlives the test."""
  try:
    ended = [process.communicate(timeout=wait) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, *texts) for process, texts in zip(processes, ended)]


def own_words(text):
  return [line for line in text.splitlines() if line.startswith("llmjax: ")]


def train(data, workdir, *more, steps=4, mesh="data=2,fsdp=2"):
  sizes = [f"--config.mesh.{size}" for size in mesh.split(",")]
  return [
    *("train", f"--config=gpt:text={data / 't.txt'},debug", f"--workdir={workdir}", "--config.log.tensorboard=false"),
    *("--config.batch_size=8", f"--config.total_steps={steps}", "--config.checkpoint.every=2", "--config.log.every=1"),
    *("--config.schedule.final=1.0", "--config.schedule.warmup=none", *sizes),  # the same whatever the steps
    *("--config.evals.sample.at=()", *more),
  ]


@pytest.fixture(scope="module")
def classes(data):
  """A run that can predict."""
  config = f"--config=classify:train={data / 't.jsonl'},debug"
  small = ["--config.log.tensorboard=false", "--config.total_steps=1", "--config.evals={}", "--config.batch_size=8"]
  train_run(load_config([config, *small, "--config.checkpoint.best=none"]), data / "classes")
  return data / "classes"


def commands(data, classes, home, mesh="data=2,fsdp=2"):
  """Everything that several processes can do, with a run in `home`."""
  return [
    train(data, home / "run", mesh=mesh),
    ["evaluate", f"--model={home / 'run'}", f"--data={data / 't.txt'}"],
    ["generate", f"--model={home / 'run'}", "--prompt=the quick", "--max_new_tokens=12", "--seed=3"],
    ["embed", f"--model={home / 'run'}", f"--input={data / 't.jsonl'}", f"--output={home / 'v.npy'}"],
    ["predict", f"--model={classes}", f"--input={data / 't.jsonl'}", f"--output={home / 'p.jsonl'}"],
  ]


@pytest.fixture(scope="module")
def runs(data, classes, tmp_path_factory):
  """{how many processes: where they ran `commands`}, of four devices in all."""
  homes = {count: tmp_path_factory.mktemp(f"of_{count}") for count in (1, 2)}
  processes = []
  for count, home in homes.items():
    arguments = ("tests.support.hosts_worker", str(home), json.dumps(commands(data, classes, home)))
    processes += launch_all(home, count, *arguments, devices=4 // count)
  for code, _, said in finish(processes, 2 * WAIT):
    assert code == 0, said
  return homes


def curves(workdir):
  """{name: values}, without those that are of time."""
  return {name: values for name, (_, values) in metrics.read(workdir).items() if "per_second" not in name}


def assert_same_curves(one, other):
  one, other = curves(one), curves(other)
  assert one.keys() == other.keys() and {"train/loss", "eval/heldout/loss"} <= one.keys()
  for name in one:
    np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5, err_msg=name)


def spoken(home, index=0):
  return json.loads((home / f"said.{index}.json").read_text())


def test_losses_and_evaluations_of_two_processes_are_those_of_one(runs):
  assert_same_curves(runs[2] / "run", runs[1] / "run")
  np.testing.assert_allclose(curves(runs[2] / "run")["train/loss"], curves(runs[1] / "run")["train/loss"], rtol=2e-6)


def numbers(text):
  return {line.split()[0]: float(line.split()[1]) for line in text.splitlines()}


def test_what_two_processes_measure_write_embed_and_predict_is_what_one_does(runs):
  assert_same_outputs(runs[2], runs[1])


def assert_same_outputs(home, alone):
  """Of all `commands` but the first."""
  (_, evaluated, written, *_), (_, evaluated_alone, written_alone, *_) = spoken(home), spoken(alone)
  assert numbers(evaluated) == pytest.approx(numbers(evaluated_alone), rel=1e-5)
  assert "data/loss" in numbers(evaluated)
  assert written == written_alone and written.startswith("the quick")
  vectors, expected = np.load(home / "v.npy"), np.load(alone / "v.npy")
  assert vectors.shape == expected.shape == (40, 32)
  np.testing.assert_allclose(vectors, expected, atol=1e-5)
  answers, theirs = ([json.loads(x) for x in (each / "p.jsonl").read_text().splitlines()] for each in (home, alone))
  assert [a["id"] for a in answers] == list(range(40))
  assert [a["label"] for a in answers] == [t["label"] for t in theirs]
  assert [a["confidence"] for a in answers] == pytest.approx([t["confidence"] for t in theirs], abs=1e-5)


def test_process_0_alone_speaks(runs):
  assert not any(spoken(runs[2], 1)) and all(spoken(runs[2], 0))


def ledger(home, count):
  """{(which training, step, row): hash}; a row that several processes make is the same in all."""
  merged: dict = {}
  for index in range(count):
    for *where, digest in json.loads((home / f"rows.{index}.json").read_text()):
      assert merged.setdefault(tuple(where), digest) == digest
  return merged


def test_the_global_batches_are_the_same_row_by_row(runs):
  one, two = ledger(runs[1], 1), ledger(runs[2], 2)
  assert one == two
  assert one.keys() == set(itertools.product((0,), range(4), range(8)))  # whatever was prefetched beyond
  halves = [{row for _, _, row, _ in json.loads((runs[2] / f"rows.{i}.json").read_text())} for i in range(2)]
  assert halves[0] != halves[1]  # no process makes all rows


def resume(data, homes, count, devices, mesh):
  """Six steps of each run that has four, in the workdirs of `homes`."""
  for home in homes:
    again = json.dumps([train(data, home / "run", steps=6, mesh=mesh)])
    for code, _, said in finish(
      launch_all(home, count, "tests.support.hosts_worker", str(home), again, devices=devices)
    ):
      assert code == 0, said


def test_a_checkpoint_of_two_processes_goes_on_in_one(runs, data):
  resume(data, runs.values(), 1, 4, "data=2,fsdp=2")
  assert_same_curves(runs[2] / "run", runs[1] / "run")
  assert len(curves(runs[2] / "run")["train/loss"]) == 6


# what differs, and who is missing


def test_processes_that_differ_say_so_once_and_end(data, tmp_path):
  """One pair has two learning rates; the other one text in two versions, where each process looks."""
  port, begun = free_port(), time.monotonic()
  rates = [
    launch(tmp_path, "llmjax", *train(data, "x", f"--config.optim.lr={rate}"), port=port, count=2, index=index)
    for index, rate in enumerate(("0.001", "0.002"))
  ]
  port = free_port()
  texts = []
  for index in range(2):
    folder = tmp_path / str(index)
    folder.mkdir()
    (folder / "t.txt").write_text("\n".join(SENTENCES[index:]))
    command = train(Path(), tmp_path / "y", "--config.data.tokenizer={'name': 'bytes'}")
    texts.append(launch(tmp_path, "llmjax", *command, port=port, count=2, index=index, cwd=folder))
  (code, _, said), (other_code, _, other_said) = finish(rates)
  assert (code, other_code) == (2, 2) and not own_words(other_said)
  [line] = own_words(said)
  assert "config.optim.lr differs between processes: 0.001 on process 0, 0.002 on process 1; all must" in line
  (code, _, said), (other_code, _, other_said) = finish(texts)
  assert (code, other_code) == (2, 2) and not own_words(other_said)
  [line] = own_words(said)
  assert "data.fingerprint differs" in line and "on process 0" in line and "on process 1" in line
  assert time.monotonic() - begun < WAIT / 2


def test_a_process_that_fails_before_the_first_step_takes_the_others_along(data, tmp_path):
  """Process 1 does not find its text."""
  port = free_port()
  (tmp_path / "0").mkdir()
  (tmp_path / "1").mkdir()
  (tmp_path / "0" / "t.txt").write_text("\n".join(SENTENCES))
  command = train(Path(), tmp_path / "y")
  both = [
    launch(tmp_path, "llmjax", *command, port=port, count=2, index=i, cwd=tmp_path / str(i), devices=2)
    for i in range(2)
  ]
  (code, _, said), (other_code, _, other_said) = finish(both)
  assert (code, other_code) == (2, 2)
  [line], [other] = own_words(said), own_words(other_said)
  assert "process 1 has ended: " in line and "t.txt" in line
  assert other.startswith("llmjax: process 1: ") and "t.txt" in other


def test_the_missing_process_is_named(data, tmp_path):
  port = free_port()
  command = [*train(data, "x"), "--start_timeout=3"]
  begun = time.monotonic()
  came = [launch(tmp_path, "llmjax", *command, port=port, count=3, index=index) for index in (0, 2)]
  lonely = launch(tmp_path, "llmjax", *command, port=free_port(), count=2, index=1)
  (code, _, said), (other_code, _, other_said) = finish(came)
  assert (code, other_code) == (1, 1) and not own_words(other_said)  # it may come when all start again
  [line] = own_words(said)
  assert f"process 1 of 3 did not come to 127.0.0.1:{port} within 3 s" in line
  [(code, _, said)] = finish([lonely])
  assert code == 1 and "process 0 did not open 127.0.0.1:" in said
  assert time.monotonic() - begun < WAIT / 2


@pytest.mark.parametrize(
  "others, words",
  [
    ([(1, 3), (1, 3)], r"there are two processes 1"),
    ([(0, 3), (2, 3)], r"there are two processes 0"),
    ([(1, 2), (2, 3)], r"--num_processes is 3 on process 0, and 2 on process 1"),
  ],
)
def test_contradictions_are_told_to_all(others, words):
  address = f"127.0.0.1:{free_port()}"
  heard = []

  def come(index, count):
    try:
      hosts._report(hosts.Place(address, count, index), 20)
    except hosts.Disagreement as error:
      heard.append((str(error), error.code))

  threads = [threading.Thread(target=come, args=other) for other in others]
  for thread in threads:
    thread.start()
  with pytest.raises(hosts.Disagreement, match=words):
    hosts._call_roll(hosts.Place(address, 3, 0), 20)
  for thread in threads:
    thread.join()
  assert len(heard) == 2 and len(set(heard)) == 1 and heard[0][1] == 2


@pytest.mark.parametrize("code", [1, 2, 130])
def test_who_hears_that_another_has_ended_ends_with_its_code(monkeypatch, code):
  monkeypatch.setattr(hosts, "_read", lambda key, timeout: json.dumps({"ended": "broken", "code": code}))
  assert hosts._compare("x", 2, 1) == ("process 0 has ended: broken", code)


@pytest.mark.parametrize(
  "error, code",
  [
    (ConfigError("optim.lr is too high"), 2),
    (FileNotFoundError("t.txt"), 2),
    (PermissionError("t.txt"), 2),
    (ConnectionResetError("by peer"), 1),
    (TimeoutError("process 0 did not open a:1"), 1),
    (OSError(28, "No space left on device"), 1),
  ],
)
def test_only_what_the_user_can_mend_ends_with_2(monkeypatch, capsys, error, code):
  def fail(arguments, rest):
    raise error

  monkeypatch.setitem(cli.COMMANDS, "configs", fail)
  assert cli.main(["configs"]) == code
  assert capsys.readouterr().err == f"llmjax: {error}\n"


def test_a_difference_is_named_by_its_key_and_by_the_processes_that_are_odd():
  same = {"config": {"optim": {"lr": 0.001}, "batch": (1, 2)}, "data": "a"}
  assert hosts.disagreement([same, {**same, "config": {"optim": {"lr": 0.001}, "batch": [1, 2]}}]) == ""
  other = {"config": {"optim": {"lr": 0.002}, "batch": (1, 2)}, "data": "b"}
  said = hosts.disagreement([same, same, same, other, other])
  assert said.startswith("config.optim.lr differs between processes: 0.001 on process 0, 0.002 on processes 3, 4")
  assert "so do data" in said
  assert "0.001 on process 1, 0.002 on process 0" in hosts.disagreement([other, same, same])
  assert "null on process 1" in hosts.disagreement([{"a": 1}, {}])


# flags and machines


@pytest.fixture
def bare(monkeypatch):
  """An environment that says nothing about other processes."""
  for name in list(os.environ):
    if name.startswith(("LLMJAX_", "SLURM_", "TPU_", "KUBERNETES_", "OMPI_", "MEGASCALE_", "JOB_")):
      monkeypatch.delenv(name)
  return monkeypatch


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--num_processes=2"], r"without --coordinator .*LLMJAX_COORDINATOR.* and --process_id"),
    (["--coordinator=a:1"], r"without --num_processes"),
    (["--coordinator=a:1", "--num_processes=2", "--process_id=2"], r"--process_id=2 must be less than"),
    (["--coordinator=a", "--num_processes=2", "--process_id=0"], r"--coordinator=a must be HOST:PORT"),
    (["--coordinator=a:1", "--num_processes=two", "--process_id=0"], r"--num_processes=two .* must be a number"),
  ],
)
def test_flags_that_say_too_little_or_too_much_are_one_line(bare, capsys, flags, words):
  assert cli.main(["train", "--config=gpt:debug", *flags]) == 2
  said = capsys.readouterr().err
  assert said.count("\n") == 1
  with pytest.raises(ConfigError, match=words):
    raise ConfigError(said)


SLURM = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "node[3-6]",
  "SLURM_NTASKS": "4",
  "SLURM_PROCID": "2",
  "SLURM_LOCALID": "0",
}
OPEN_MPI = {
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
  "OMPI_COMM_WORLD_SIZE": "2",
  "OMPI_COMM_WORLD_RANK": "1",
  "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.mark.parametrize(
  "environment, place",
  [
    ({}, None),
    (OPEN_MPI, ("10.96.0.1:62624", 2, 1, [1])),
    (SLURM, ("node3:61447", 4, 2, [0])),
    ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, ("node3:61447", 4, 2, None)),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, None),  # in a shell of salloc
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, None),  # in a batch script
    ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # a step of one task in a larger job
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod that belongs to no indexed job
  ],
)
def test_what_a_machine_says_of_itself(bare, environment, place):
  for name, value in environment.items():
    bare.setenv(name, value)
  found = hosts._found(1)
  assert found == place and (found is None or isinstance(found, hosts.Place))


def test_a_machine_that_contradicts_itself_is_told_of_the_flags(bare):
  for name, value in {**SLURM, "SLURM_NTASKS": "four"}.items():
    bare.setenv(name, value)
  with pytest.raises(ConfigError, match=r"does not say which .*'four'.* --num_processes=1"):
    hosts._found(1)


@pytest.fixture
def tpu(bare):
  """A TPU VM; sets what its metadata server says, and nobody asks the network."""
  from jax._src import cloud_tpu_init
  from jax._src.clusters import cloud_tpu_cluster

  for module in (cloud_tpu_init, cloud_tpu_cluster):
    bare.setattr(module, "running_in_cloud_tpu_vm", True)

  def say(**metadata):
    known = {name.replace("_", "-"): value for name, value in metadata.items()}
    bare.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (known.get(key, ""), 200 if key in known else 404))

  say()
  return say


@pytest.mark.parametrize("names, place", [("localhost", None), ("localhost,b,c", ("localhost:8482", 3, 1, None))])
def test_workers_of_a_tpu_slice_on_gke(bare, tpu, names, place):
  bare.setenv("TPU_WORKER_HOSTNAMES", names)
  bare.setenv("TPU_WORKER_ID", "1")
  assert hosts._found(1) == place


@pytest.mark.parametrize("names, place", [("10.0.0.1", None), ("10.0.0.1,10.0.0.2", ("10.0.0.1:8482", 2, 1, None))])
def test_workers_of_a_tpu_slice_on_virtual_machines(tpu, names, place):
  tpu(agent_worker_number="1", worker_network_endpoints=names)
  assert hosts._found(1) == place


def test_flags_come_before_the_environment_and_one_process_is_never_looked_for(bare):
  for name, value in {**SLURM, "LLMJAX_COORDINATOR": "a:1", "LLMJAX_NUM_PROCESSES": "2"}.items():
    bare.setenv(name, value)
  assert hosts._asked("b:2", None, 1) == ("b:2", 2, 1, None)
  hosts.start(num_processes=1)
  assert not hosts.several() and hosts.leader()


# ends


def wait_for_steps(workdir, steps, processes):
  """Until so many steps are logged."""
  path, deadline = workdir / metrics.CURVES, time.monotonic() + WAIT
  while not (path.exists() and path.read_text().count("train/loss") >= steps):
    assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
    time.sleep(0.1)


def interrupted(data, home):
  """A training of two processes of which one got SIGTERM: its command, and the step after which both stopped."""
  endless = ["--config.checkpoint.every=none", "--config.evals={}"]
  command = [x for x in train(data, home / "x", steps=100_000) if "evals" not in x] + endless
  both = launch_all(home, 2, "llmjax", *command)
  wait_for_steps(home / "x", 3, both)
  both[1].send_signal(signal.SIGTERM)
  ended = finish(both)
  checkpoints = Checkpoints(home / "x")
  [step] = checkpoints.steps()
  checkpoints.close()
  for index, (code, _, said) in enumerate(ended):
    assert code == 130
    assert own_words(said)[-1].startswith(f"llmjax: process {index}: interrupted at {step:,}/100,000; saved")
  return command, step


def test_a_signal_to_one_process_has_both_save_after_the_same_step_and_end(data, tmp_path):
  interrupted(data, tmp_path)


@pytest.mark.slow
def test_an_interrupted_pair_goes_on_and_ends_when_one_is_killed(data, tmp_path):
  command, step = interrupted(data, tmp_path)
  both = launch_all(tmp_path, 2, "llmjax", *command)
  wait_for_steps(tmp_path / "x", step + 2, both)
  begun = time.monotonic()
  both[1].kill()
  (code, out, said), _ = finish(both)
  assert f"resuming {tmp_path / 'x'} at {step:,}/" in out
  assert time.monotonic() - begun < 60  # JAX's heartbeat, where no connection is closed under a waiting thread
  assert (code, "another process has gone" in said) == (1, True) or (code, "task died" in said) == (
    -signal.SIGABRT,
    True,
  )


@pytest.mark.slow
def test_four_processes_are_as_one_and_go_on_where_two_were(data, classes, tmp_path):
  homes = {count: tmp_path / str(count) for count in (1, 2, 4)}
  processes = []
  for count, home in homes.items():
    home.mkdir()
    command = json.dumps(commands(data, classes, home, mesh="data=4,fsdp=2"))
    processes += launch_all(home, count, "tests.support.hosts_worker", str(home), command, devices=8 // count)
  for code, _, said in finish(processes, 4 * WAIT):
    assert code == 0, said
  ledgers = [ledger(home, count) for count, home in homes.items()]
  assert ledgers[0] == ledgers[1] == ledgers[2]
  for one, other in itertools.combinations(homes.values(), 2):
    assert_same_curves(one / "run", other / "run")
    assert_same_outputs(one, other)
  resume(data, [homes[1], homes[2]], 4, 2, "data=4,fsdp=2")
  assert_same_curves(homes[1] / "run", homes[2] / "run")
  assert len(curves(homes[2] / "run")["train/loss"]) == 6

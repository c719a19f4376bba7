"""Rendezvous of processes: flags, environment variables, and contradictions between processes.

multi_process_test.py runs real processes.
"""

import json
import os
import re
import threading

import pytest

from llmjax.cli.main import COMMANDS, main
from llmjax.config import ConfigError
from llmjax.distributed import cluster, processes, rendezvous
from tests.support.ports import free_port


@pytest.mark.parametrize(
  "others, message",
  [
    ([(1, 3), (1, 3)], r"there are two processes 1"),
    ([(0, 3), (2, 3)], r"there are two processes 0"),
    ([(1, 2), (2, 3)], r"--num_processes is 3 on process 0, and 2 on process 1"),
  ],
)
def test_contradicting_processes_all_get_the_same_error(others, message):
  address = f"127.0.0.1:{free_port()}"
  errors = []

  def connect(index, count):
    try:
      rendezvous._rendezvous_client(cluster.ProcessInfo(address, count, index), 20)
    except rendezvous.ProcessGroupError as error:
      errors.append((str(error), error.code))

  threads = [threading.Thread(target=connect, args=other) for other in others]
  for thread in threads:
    thread.start()
  with pytest.raises(rendezvous.ProcessGroupError, match=message):
    rendezvous._rendezvous_server(cluster.ProcessInfo(address, 3, 0), 20)
  for thread in threads:
    thread.join()
  assert len(errors) == 2 and len(set(errors)) == 1 and errors[0][1] == 2


@pytest.mark.parametrize("code", [1, 2, 130])
def test_process_ends_with_the_exit_code_of_its_failed_peer(monkeypatch, code):
  monkeypatch.setattr(processes, "_get_value", lambda key, timeout: json.dumps({"ended": "broken", "code": code}))
  assert processes._compare_fingerprints("x", 2, 1) == ("process 0 has ended: broken", code)


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
def test_exit_code_is_2_only_for_errors_of_the_user(monkeypatch, capsys, error, code):
  def fail(arguments, rest):
    raise error

  monkeypatch.setitem(COMMANDS, "configs", fail)
  assert main(["configs"]) == code
  assert capsys.readouterr().err == f"llmjax: {error}\n"


def test_disagreement_names_keys_and_the_minority_of_processes():
  same = {"config": {"optim": {"lr": 0.001}, "batch": (1, 2)}, "data": "a"}
  assert processes.first_disagreement([same, {**same, "config": {"optim": {"lr": 0.001}, "batch": [1, 2]}}]) == ""
  other = {"config": {"optim": {"lr": 0.002}, "batch": (1, 2)}, "data": "b"}
  message = processes.first_disagreement([same, same, same, other, other])
  assert message.startswith("config.optim.lr differs between processes: 0.001 on process 0, 0.002 on processes 3, 4")
  assert "so do data" in message
  assert "0.001 on process 1, 0.002 on process 0" in processes.first_disagreement([other, same, same])
  assert "null on process 1" in processes.first_disagreement([{"a": 1}, {}])


@pytest.fixture
def bare(monkeypatch):
  """Remove environment variables about other processes."""
  for name in list(os.environ):
    if name.startswith(("LLMJAX_", "SLURM_", "TPU_", "KUBERNETES_", "OMPI_", "MEGASCALE_", "JOB_")):
      monkeypatch.delenv(name)
  return monkeypatch


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--num_processes=2"], r"--coordinator .*LLMJAX_COORDINATOR.* and --process_id .* is missing"),
    (["--coordinator=a:1"], r"--num_processes .* is missing"),
    (["--coordinator=a:1", "--num_processes=2", "--process_id=2"], r"--process_id=2 must be less than"),
    (["--coordinator=a", "--num_processes=2", "--process_id=0"], r"--coordinator=a must be HOST:PORT"),
    (["--coordinator=a:1", "--num_processes=two", "--process_id=0"], r"--num_processes=two .* must be a number"),
  ],
)
def test_incomplete_or_wrong_flags_are_one_line(bare, capsys, flags, message):
  assert main(["train", "--config=gpt:debug", *flags]) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and re.search(message, error)


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
  "environment, expected",
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
def test_processes_are_detected_from_the_environment(bare, environment, expected):
  for name, value in environment.items():
    bare.setenv(name, value)
  info = cluster.detect_process_info(1)
  assert info == expected and (info is None or isinstance(info, cluster.ProcessInfo))


def test_unreadable_environment_names_the_flag_to_set(bare):
  for name, value in {**SLURM, "SLURM_NTASKS": "four"}.items():
    bare.setenv(name, value)
  with pytest.raises(ConfigError, match=r"which one cannot be read .*'four'.* --num_processes=1"):
    cluster.detect_process_info(1)


@pytest.fixture
def tpu(bare):
  """Act as a TPU VM; return a function that sets the answers of its metadata server."""
  from jax._src import cloud_tpu_init
  from jax._src.clusters import cloud_tpu_cluster

  for module in (cloud_tpu_init, cloud_tpu_cluster):
    bare.setattr(module, "running_in_cloud_tpu_vm", True)

  def set_metadata(**metadata):
    known = {name.replace("_", "-"): value for name, value in metadata.items()}
    bare.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (known.get(key, ""), 200 if key in known else 404))

  set_metadata()
  return set_metadata


@pytest.mark.parametrize("names, expected", [("localhost", None), ("localhost,b,c", ("localhost:8482", 3, 1, None))])
def test_tpu_workers_on_gke_are_detected(bare, tpu, names, expected):
  bare.setenv("TPU_WORKER_HOSTNAMES", names)
  bare.setenv("TPU_WORKER_ID", "1")
  assert cluster.detect_process_info(1) == expected


@pytest.mark.parametrize("names, expected", [("10.0.0.1", None), ("10.0.0.1,10.0.0.2", ("10.0.0.1:8482", 2, 1, None))])
def test_tpu_workers_on_virtual_machines_are_detected(tpu, names, expected):
  tpu(agent_worker_number="1", worker_network_endpoints=names)
  assert cluster.detect_process_info(1) == expected


def test_flags_take_precedence_over_the_environment(bare):
  for name, value in {**SLURM, "LLMJAX_COORDINATOR": "a:1", "LLMJAX_NUM_PROCESSES": "2"}.items():
    bare.setenv(name, value)
  assert cluster.explicit_process_info("b:2", None, 1) == ("b:2", 2, 1, None)


def test_start_with_one_process_ignores_the_environment(bare):
  for name, value in SLURM.items():
    bare.setenv(name, value)
  processes.join_processes(num_processes=1)
  assert not processes.is_multi_process() and processes.is_primary_process()

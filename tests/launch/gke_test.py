"""launch/gke.py with a kubectl that answers from a transcript; its manifests compared with golden files.

The transcript's answers follow kubectl's documentation (tests/testdata/gke.json), since no cluster was available. The
flags are checked against the installed kubectl.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile

import pytest

from llmjax.cli.arguments import make_parser as cli_parser
from llmjax.distributed import processes
from tests.support.cloud_transcripts import TESTDATA, KubernetesCluster
from tests.support.launchers import (
  EXIT_UNKNOWN,
  LAUNCH,
  assert_one_line_error,
  make_checkout,
  run_git,
  run_script,
  write_program,
)

TRAIN = ("--", "train", "--config=gpt:size=small", "--workdir=gs://b/a")
TPU = ("run", "--name=a", "--image=I", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4", "--spot", "--env=TOKEN")
GPU = ("run", "--name=b", "--image=I", "--accelerator=nvidia-h100-80gb", "--gpus=8", "--nodes=2")
GOLDENS = {"gke_tpu.txt": (*TPU, "--slices=2", "--service_account=trainer"), "gke_gpu.txt": GPU}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
  monkeypatch.setenv("FAKE_CLOUD", str(tmp_path))
  monkeypatch.setenv("TOKEN", "s3cret")
  monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
  monkeypatch.chdir(tmp_path)
  return KubernetesCluster(tmp_path, TPU, TRAIN)


def run_words(*more):
  return (*TPU, "--poll=0", *more, *TRAIN)


@pytest.mark.parametrize("name", GOLDENS)
def test_dry_run_output_equals_golden(cluster, name):
  _, output, _ = cluster.run(*GOLDENS[name], "--dry_run", *TRAIN)
  update = f"python3 launch/gke.py {shlex.join([*GOLDENS[name], '--dry_run', *TRAIN])} >tests/testdata/{name}"
  assert output == (TESTDATA / name).read_text(), f"if the change is intended: {update}"
  assert subprocess.run(["bash", "-n"], input=output, text=True).returncode == 0
  assert not cluster.calls() and "s3cret" not in output


def test_manifest_is_valid_yaml(cluster):
  yaml = pytest.importorskip("yaml")
  manifest = cluster.manifest(*TPU)
  assert yaml.safe_load(json.dumps(manifest, indent=2)) == manifest


@pytest.mark.parametrize(
  "accelerator, topology, more, chips, machines",
  [  # the tables of https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
    ("tpu-v4-podslice", "2x2x1", (), 4, 1),
    ("tpu-v4-podslice", "4x4x4", (), 4, 16),
    ("tpu-v5-lite-podslice", "1x1", (), 1, 1),
    ("tpu-v5-lite-podslice", "2x4", ("--chips_per_node=8",), 8, 1),
    ("tpu-v5-lite-podslice", "16x16", (), 4, 64),
    ("tpu-v5p-slice", "2x2x2", (), 4, 2),
    ("tpu-v6e-slice", "4x4", (), 4, 4),
  ],
)
def test_manifest_has_machines_and_chips_of_the_topology(cluster, accelerator, topology, more, chips, machines):
  manifest = cluster.manifest(
    "run", "--name=a", "--image=I", f"--accelerator={accelerator}", f"--topology={topology}", *more
  )
  job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert job["parallelism"] == job["completions"] == machines
  resources = job["template"]["spec"]["containers"][0]["resources"]
  assert resources["limits"] == resources["requests"] == {"google.com/tpu": chips}


def test_run_creates_the_jobset_and_prints_its_log_once(cluster):
  cluster.set_answers()
  code, output, errors = cluster.run(*run_words())
  assert code == 0 and output == "step 1\nstep 2\n"
  assert "created" in errors and "ended with exit code 0" in errors
  created = [call for call in cluster.calls() if "create" in call["words"] and "secret" not in call["words"]]
  assert [json.loads(call["input"]) for call in created] == [cluster.manifest(*TPU)]
  assert cluster.count("logs a-slice-0-0-x .*--since-time=2025-01-01T00:01:00.000000001Z") == 1


def secret_patch(cluster):
  """The only `kubectl patch secret` of the calls."""
  [patch] = [call["words"] for call in cluster.calls() if "patch" in call["words"]]
  assert all("s3cret" not in " ".join(call["words"]) for call in cluster.calls())
  return patch


def test_secret_values_are_passed_through_standard_input(cluster):
  cluster.set_answers()
  cluster.run(*run_words())
  inputs = [call["input"] for call in cluster.calls() if "secret" in call["words"] and "create" in call["words"]]
  assert inputs == ["TOKEN=s3cret\n"]


def test_secret_is_owned_by_the_jobset(cluster):
  """Kubernetes then deletes it with the JobSet."""
  cluster.set_answers()
  cluster.run(*run_words())
  patch = secret_patch(cluster)
  assert patch[2:4] == ["secret", "a-environment"]
  owner = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "name": "a", "uid": "1f-a5"}
  assert json.loads(patch[-1].removeprefix("--patch=")) == {"metadata": {"ownerReferences": [owner]}}
  cluster.set_answers()
  pasted = cluster.run(*TPU, "--dry_run", *TRAIN)[1]
  subprocess.run(["bash"], input=pasted, text=True, stdout=subprocess.DEVNULL)
  assert secret_patch(cluster) == patch


def test_existing_secret_is_referenced_and_not_created(cluster):
  manifest = cluster.manifest(*TPU, "--secret=mine")
  container = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
  assert container["env"] == [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "mine", "key": "TOKEN"}}}]
  cluster.set_answers()
  assert cluster.run(*run_words("--secret=mine"))[0] == 0
  assert not cluster.count("secret generic|patch")


def test_several_machines_wait_a_day_for_each_other(cluster):
  """A preempted node can be back hours later; a process that gives up before would end the run."""
  one = ("run", "--name=a", "--image=I", "--accelerator=tpu-v5-lite-podslice", "--topology=2x2")
  expected = {(*one, "--slices=2"): True, TPU: True, GPU: True, one: False, (*GPU, "--nodes=1"): False}
  for words, several in expected.items():
    job = cluster.manifest(*words)["spec"]["replicatedJobs"][0]["template"]["spec"]
    arguments = job["template"]["spec"]["containers"][0]["args"]
    assert arguments == ["train", *(["--start_timeout=86400"] if several else []), *TRAIN[2:]]
    assert cli_parser().parse_known_args(arguments)[0].start_timeout == (86400 if several else processes.START_TIMEOUT)


def test_failed_run_has_the_exit_code_of_worker_0(cluster):
  cluster.set_answers(jobset="absent running failed", pods="pod pod_failed")
  code, _, errors = cluster.run(*run_words())
  assert code == 2 and "exit code 2 (Failed: jobset failed" in errors


def test_pending_reason_and_restarts_are_logged(cluster):
  cluster.set_answers(
    jobset="absent running no_cluster running restarted restarted completed",
    pods="pending pod next_pod pod_succeeded",
    logs="log resumed_log log",  # the last one is for the first pod again
  )
  code, output, errors = cluster.run(*run_words())
  assert code == 0 and output == "step 1\nresumed at step 2\n"
  assert "pending (Unschedulable 0/3 nodes are available)" in errors and "restart 1: running" in errors


def test_same_command_attaches_to_the_running_jobset(cluster):
  cluster.set_answers(jobset="running running completed")
  code, _, errors = cluster.run(*run_words())
  assert code == 0 and "already exists" in errors and not cluster.count("create")


def test_other_command_on_a_running_jobset_is_refused(cluster):
  cluster.set_answers(jobset="another")
  code, _, errors = cluster.run(*run_words())
  assert code == EXIT_UNKNOWN and "running something else" in errors and not cluster.count("create|delete")


def test_ended_jobset_is_replaced(cluster):
  cluster.set_answers(jobset="failed running completed")
  code, _, errors = cluster.run(*run_words())
  assert code == 0 and "replacing" in errors
  assert cluster.count("delete jobset a") == cluster.count("create --filename") == 1


def test_ctrl_c_leaves_the_run_and_names_the_command_to_follow_it(cluster):
  cluster.set_answers(pods="pod", logs=[{"before": 'kill -INT "$CALLER"', "seconds": 30}])
  code, _, errors = cluster.run(*run_words())
  assert code == 130 and "the same command follows it" in errors
  assert not cluster.count("delete jobset")


def test_script_as_its_own_process_has_same_output(cluster):
  cluster.set_answers()
  command = [sys.executable, "-S", "-E", str(LAUNCH / "gke.py"), *run_words()]
  process = subprocess.run(command, capture_output=True, text=True, timeout=60)
  cluster.set_answers()
  assert cluster.run(*run_words()) == (process.returncode, process.stdout, process.stderr)


def test_status_logs_and_delete_call_kubectl(cluster):
  cluster.set_answers(jobset="running", pods="pod")
  assert "a-slice-0-1-y: running" in cluster.run("status", "--name=a")[1]
  assert cluster.run("logs", "--name=a")[1] == "step 1\n"
  assert cluster.run("delete", "--name=a")[0] == 0
  assert cluster.count("delete jobset a") == cluster.count("delete secret a-environment") == 1


@pytest.mark.parametrize(
  "words, expected",
  [
    ((*TPU, "--"), "nothing to run"),
    ((*TPU, "--", "train", "--workdir=runs/a"), "gs://BUCKET"),
    ((*TPU, "--topology=4x4x4", *TRAIN), "like 4x4, in chips"),
    ((*TPU, "--accelerator=tpu-v9", *TRAIN), "tpu-v5p-slice"),
    ((*GPU, "--topology=4x4", *TRAIN), "are for TPUs only"),
    ((*GPU, "--node_selector=a", *TRAIN), "KEY=VALUE"),
    ((*TPU, "--env=ABSENT", *TRAIN), "ABSENT is not set"),
    (("status", "--name=A_b"), "lower-case"),
    (("image", "--tag=T", "--extra=wandbb"), "must be one or more of tpu"),
    (("run", "--name=a", *TRAIN), "--image"),
  ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(cluster, words, expected):
  code, _, errors = cluster.run(*words)
  assert code == 2 and expected in errors and errors.count("\n") == 1
  assert_one_line_error(errors, "gke.py")


@pytest.mark.parametrize("words", [("status",), ("logs",), ("logs", "--follow")])
def test_dry_run_prints_the_commands_that_run_calls(cluster, words):
  cluster.set_answers(jobset="running", pods="pod")
  printed = cluster.run(*words, "--name=a", "--dry_run")[1].replace("POD", "a-slice-0-0-x")
  assert not cluster.calls()
  cluster.run(*words, "--name=a")
  called = [shlex.join(call["words"]) for call in cluster.calls()]
  assert [line for line in printed.splitlines() if not line.startswith("#")] == called


@pytest.mark.parametrize("answer, expected", [("no_jobset", "install it: https"), ("no_cluster", "refused")])
def test_missing_jobset_or_cluster_is_one_line(cluster, answer, expected):
  cluster.set_answers(jobset=answer)
  code, _, errors = cluster.run(*run_words())
  assert code == EXIT_UNKNOWN and expected in errors and not cluster.count("create|delete")


def test_image_is_built_from_a_clean_archive(cluster, tmp_path):
  root = make_checkout(tmp_path / "checkout", "")
  commit = run_git(root, "rev-parse", "HEAD")
  (root / "untracked").touch()
  write_program(
    tmp_path / "bin" / "docker",
    f'echo "$@" >>{tmp_path}/docker\n[ "$1" = push ] || cat >{tmp_path}/context.tar.gz',
  )
  words = ("image", "--tag=T", "--extra=cuda,wandb")
  code, _, errors = cluster.run(*words, script=root / "launch" / "gke.py")
  assert code == 0 and "untracked not shipped" in errors
  calls = (tmp_path / "docker").read_text().splitlines()
  assert f"--build-arg=COMMIT={commit} --build-arg=EXTRA=cuda,wandb --tag=T -" in calls[0] and calls[1] == "push T"
  with tarfile.open(tmp_path / "context.tar.gz") as tar:
    assert ".commit" in tar.getnames() and "launch/Dockerfile" in tar.getnames() and "untracked" not in tar.getnames()
    assert tar.extractfile(".commit").read().decode() == f"{commit}\n"
  (root / "launch" / "gke.py").write_text("")
  code, _, errors = run_script(root / "launch" / "shipping.py", "--output=/dev/null")
  assert code == 2 and "uncommitted changes in launch/gke.py" in errors


@pytest.mark.full("clusters")
def test_flags_are_known_to_the_installed_kubectl_and_docker(cluster):
  lines = []
  for words in ((*TPU, "--namespace=n", "--context=c", "--dry_run", *TRAIN), ("delete", "--name=a", "--dry_run"),
                ("image", "--tag=T", "--dirty", "--dry_run")):  # fmt: skip
    _, output, _ = cluster.run(*words)
    lines += re.findall(r"(?:^|\| |\$\()((?:kubectl|docker) [^<|\n]*)", output, re.MULTILINE)
  used = {}
  for words in map(shlex.split, lines):
    depth = 4 if "generic" in words else 2
    used.setdefault(tuple(words[:depth]), set()).update(word.split("=")[0] for word in words if word.startswith("--"))
  assert {" ".join(command) for command in used} == {
    *(
      "kubectl get",
      "kubectl create",
      "kubectl create secret generic",
      "kubectl logs",
      "kubectl delete",
      "kubectl patch",
    ),
    *("docker build", "docker push"),
  }
  for name in ("kubectl", "docker"):  # what the PATH then has is the real one
    (cluster.folder / "bin" / name).unlink()
  for command, flags in used.items():
    if not shutil.which(command[0]):
      pytest.skip(f"{command[0]} is not installed")
    text = subprocess.run([*command, "--help"], capture_output=True, text=True).stdout
    if command[0] == "kubectl":
      text += subprocess.run(["kubectl", "options"], capture_output=True, text=True).stdout
    assert flags <= set(re.findall(r"--[a-z][a-z-]+", text)), command

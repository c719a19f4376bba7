"""The GKE launcher against a kubectl of ours; its manifests against goldens, its flags against the installed kubectl.

What kubectl says is written after its documentation (tests/testdata/gke.json): no cluster was at hand.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from llmjax import hosts
from llmjax.flags import parser as cli_parser

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "testdata"
FAKE_CLOUD = ROOT / "tests" / "support" / "fake_cloud.py"
GKE = ROOT / "launch" / "gke.py"
ANSWERS = json.loads((DATA / "gke.json").read_text())
UNSETTLED = 75  # exit code
TRAIN = ("--", "train", "--config=gpt:size=small", "--workdir=gs://b/a")
TPU = ("run", "--name=a", "--image=I", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4", "--spot", "--env=TOKEN")
GPU = ("run", "--name=b", "--image=I", "--accelerator=nvidia-h100-80gb", "--gpus=8", "--nodes=2")
GOLDENS = {"gke_tpu.txt": (*TPU, "--slices=2", "--service_account=trainer"), "gke_gpu.txt": GPU}


@pytest.fixture
def cluster(tmp_path):
  return Cluster(tmp_path)


class Cluster:
  """A kubectl (and docker) that answers as it is told."""

  def __init__(self, folder):
    self.folder = folder
    (folder / "bin").mkdir()
    for name in ("kubectl", "docker"):
      path = folder / "bin" / name
      path.write_text(f'#!/bin/bash\nexec {sys.executable} -S -E {FAKE_CLOUD} {name} "$@"\n')
      path.chmod(0o755)
    self.environment = {**os.environ, "FAKE_CLOUD": str(folder), "TOKEN": "s3cret"}
    self.environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"

  def says(self, **answers):
    """Sets the answers to jobset, pods, logs, create: names of ANSWERS, in order."""
    calls = {"jobset": "get jobset", "pods": "get pods", "logs": "kubectl logs", "create": "kubectl create"}
    usual = {"jobset": "absent running running completed", "pods": "nothing pod pod_succeeded", "logs": "log more_log"}
    usual |= {"create": "created"} | answers
    text = json.dumps([{"call": calls[name], "answers": [ANSWERS[a] for a in usual[name].split()]} for name in calls]
                      + [{"call": "kubectl (delete|patch)|docker", "answers": [{}]}])  # fmt: skip
    # The name of the run is what the manifest has.
    manifest = self.manifest(*TPU)
    (self.folder / "transcript.json").write_text(text.replace("RUN", manifest["metadata"]["annotations"]["llmjax/run"]))
    return self

  def start(self, *words, script=GKE):
    command = [sys.executable, "-S", "-E", str(script), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=self.environment, stdout=pipe, stderr=pipe, text=True, cwd=self.folder)

  def run(self, *words, **how):
    process = self.start(*words, **how)
    output, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors and all(call["known"] for call in self.calls()), errors
    return process.returncode, output, errors

  def manifest(self, *words):
    _, output, _ = self.run(*words, "--dry_run", *TRAIN)
    return json.loads(re.search(r"<<'MANIFEST'\n(.*)\nMANIFEST", output, re.DOTALL)[1])

  def calls(self):
    path = self.folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def count(self, pattern):
    return sum(bool(re.search(pattern, " ".join(call["words"]))) for call in self.calls())


def run_words(*more):
  return (*TPU, "--poll=0", *more, *TRAIN)


@pytest.mark.parametrize("name", GOLDENS)
def test_manifests_and_commands_are_the_recorded_ones(cluster, name):
  _, output, _ = cluster.run(*GOLDENS[name], "--dry_run", *TRAIN)
  update = f"python3 launch/gke.py {shlex.join([*GOLDENS[name], '--dry_run', *TRAIN])} >tests/testdata/{name}"
  assert output == (DATA / name).read_text(), f"if it is meant: {update}"
  assert subprocess.run(["bash", "-n"], input=output, text=True).returncode == 0
  assert not cluster.calls() and "s3cret" not in output


def test_a_manifest_is_yaml_too(cluster):
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
def test_machines_and_chips_follow_from_the_topology(cluster, accelerator, topology, more, chips, machines):
  manifest = cluster.manifest(
    "run", "--name=a", "--image=I", f"--accelerator={accelerator}", f"--topology={topology}", *more
  )
  job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert job["parallelism"] == job["completions"] == machines
  resources = job["template"]["spec"]["containers"][0]["resources"]
  assert resources["limits"] == resources["requests"] == {"google.com/tpu": chips}


def test_a_run_is_created_followed_and_its_log_shown_once(cluster):
  code, output, errors = cluster.says().run(*run_words())
  assert code == 0 and output == "step 1\nstep 2\n"
  assert "created" in errors and "ended with exit code 0" in errors
  created = [call for call in cluster.calls() if "create" in call["words"] and "secret" not in call["words"]]
  assert [json.loads(call["input"]) for call in created] == [cluster.manifest(*TPU)]
  assert cluster.count("logs a-slice-0-0-x .*--since-time=2025-01-01T00:01:00.000000001Z") == 1


def test_secrets_go_through_standard_input_alone(cluster):
  cluster.says().run(*run_words())
  inputs = [call["input"] for call in cluster.calls() if "secret" in call["words"] and "create" in call["words"]]
  assert inputs == ["TOKEN=s3cret\n"]
  pasted = cluster.run(*TPU, "--dry_run", *TRAIN)[1]
  subprocess.run(["bash"], input=pasted, env=cluster.environment, text=True, stdout=subprocess.DEVNULL)
  patch, same = [call["words"] for call in cluster.calls() if "patch" in call["words"]]
  assert same == patch
  assert patch[2:4] == ["secret", "a-environment"]  # which Kubernetes then deletes with its owner
  owner = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "name": "a", "uid": "1f-a5"}
  assert json.loads(patch[-1].removeprefix("--patch=")) == {"metadata": {"ownerReferences": [owner]}}
  assert all("s3cret" not in " ".join(call["words"]) for call in cluster.calls())
  (cluster.folder / "calls.jsonl").unlink()
  (cluster.folder / "counts.json").unlink()
  manifest = cluster.manifest(*TPU, "--secret=mine")
  container = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
  assert container["env"] == [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "mine", "key": "TOKEN"}}}]
  assert cluster.run(*run_words("--secret=mine"))[0] == 0 and not cluster.count("secret generic|patch")


def test_a_process_may_come_long_after_the_others(cluster):
  """A node that was taken away can be back hours later, and a process that gives up would end the run for good."""
  one = ("run", "--name=a", "--image=I", "--accelerator=tpu-v5-lite-podslice", "--topology=2x2")
  expected = {(*one, "--slices=2"): True, TPU: True, GPU: True, one: False, (*GPU, "--nodes=1"): False}
  for words, patient in expected.items():
    job = cluster.manifest(*words)["spec"]["replicatedJobs"][0]["template"]["spec"]
    arguments = job["template"]["spec"]["containers"][0]["args"]
    assert arguments == ["train", *(["--start_timeout=86400"] if patient else []), *TRAIN[2:]]
    assert cli_parser().parse_known_args(arguments)[0].start_timeout == (86400 if patient else hosts.TIMEOUT)


def test_a_failed_run_has_the_exit_code_of_worker_0(cluster):
  code, _, errors = cluster.says(jobset="absent running failed", pods="pod pod_failed").run(*run_words())
  assert code == 2 and "exit code 2 (Failed: jobset failed" in errors


def test_what_keeps_a_run_waiting_and_restarts_are_said(cluster):
  cluster.says(
    jobset="absent running no_cluster running restarted restarted completed",
    pods="pending pod next_pod pod_succeeded",
    logs="log resumed_log log",  # the last is asked for the first pod again
  )
  code, output, errors = cluster.run(*run_words())
  assert code == 0 and output == "step 1\nresumed at step 2\n"
  assert "pending (Unschedulable 0/3 nodes are available)" in errors and "restart 1: running" in errors


def test_the_same_command_attaches_and_another_one_is_refused(cluster):
  code, _, errors = cluster.says(jobset="running running completed").run(*run_words())
  assert code == 0 and "is there" in errors and not cluster.count("create")
  (cluster.folder / "counts.json").unlink()
  code, _, errors = cluster.says(jobset="another").run(*run_words())
  assert code == UNSETTLED and "running something else" in errors and not cluster.count("create|delete")


def test_what_has_ended_is_replaced(cluster):
  code, _, errors = cluster.says(jobset="failed running completed").run(*run_words())
  assert code == 0 and "replacing" in errors
  assert cluster.count("delete jobset a") == cluster.count("create --filename") == 1


def test_ctrl_c_leaves_the_run_and_says_so(cluster):
  process = cluster.says(pods="pod", logs="long").start(*run_words())
  deadline = time.monotonic() + 30
  while not cluster.count("kubectl logs"):
    assert time.monotonic() < deadline
    time.sleep(0.02)
  process.send_signal(signal.SIGINT)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 130 and "the same command follows it" in errors
  assert not cluster.count("delete jobset")


def test_status_logs_and_delete(cluster):
  cluster.says(jobset="running", pods="pod")
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
    ((*GPU, "--topology=4x4", *TRAIN), "are those of TPUs"),
    ((*GPU, "--node_selector=a", *TRAIN), "KEY=VALUE"),
    ((*TPU, "--env=ABSENT", *TRAIN), "ABSENT is not set"),
    (("status", "--name=A_b"), "lower-case"),
    (("image", "--tag=T", "--extra=wandbb"), "wandbb is none of tpu"),
    (("run", "--name=a", *TRAIN), "--image"),
  ],
)
def test_mistakes_are_one_line(cluster, words, expected):
  code, _, errors = cluster.run(*words)
  assert code == 2 and expected in errors and errors.startswith("gke.py: ") and errors.count("\n") == 1


@pytest.mark.parametrize("words", [("status",), ("logs",), ("logs", "--follow")])
def test_a_dry_run_prints_the_commands_that_are_run(cluster, words):
  cluster.says(jobset="running", pods="pod")
  printed = cluster.run(*words, "--name=a", "--dry_run")[1].replace("POD", "a-slice-0-0-x")
  assert not cluster.calls()
  cluster.run(*words, "--name=a")
  called = [shlex.join(call["words"]) for call in cluster.calls()]
  assert [line for line in printed.splitlines() if not line.startswith("#")] == called


@pytest.mark.parametrize("answer, expected", [("no_jobset", "install it: https"), ("no_cluster", "refused")])
def test_a_cluster_that_lacks_something_is_one_line(cluster, answer, expected):
  code, _, errors = cluster.says(jobset=answer).run(*run_words())
  assert code == UNSETTLED and expected in errors and not cluster.count("create|delete")


def test_an_image_is_built_from_a_clean_archive(cluster, tmp_path):
  root = tmp_path / "checkout"
  (root / "launch").mkdir(parents=True)
  for name in ("gke.py", "jobset.py", "shipping.py", "command_line.py", "Dockerfile"):
    shutil.copy(ROOT / "launch" / name, root / "launch")
  shutil.copy(ROOT / "setup.py", root)
  git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
  for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
    subprocess.run([*git, *words], check=True)
  commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
  (root / "untracked").touch()
  docker = tmp_path / "bin" / "docker"
  docker.write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/docker\n[ "$1" = push ] || cat >{tmp_path}/context.tar.gz\n')
  words = ("image", "--tag=T", "--extra=cuda,wandb")
  code, _, errors = cluster.run(*words, script=root / "launch" / "gke.py")
  assert code == 0 and "untracked not shipped" in errors
  calls = (tmp_path / "docker").read_text().splitlines()
  assert f"--build-arg=COMMIT={commit} --build-arg=EXTRA=cuda,wandb --tag=T -" in calls[0] and calls[1] == "push T"
  with tarfile.open(tmp_path / "context.tar.gz") as tar:
    assert ".commit" in tar.getnames() and "launch/Dockerfile" in tar.getnames() and "untracked" not in tar.getnames()
    assert tar.extractfile(".commit").read().decode() == f"{commit}\n"
  (root / "launch" / "gke.py").write_text("")
  assert "uncommitted changes in launch/gke.py" in shipping_refuses(root)


def shipping_refuses(root):
  command = [sys.executable, str(root / "launch" / "shipping.py"), "--output=/dev/null"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 2
  return done.stderr


@pytest.mark.slow
def test_every_flag_is_one_of_the_installed_kubectl_and_docker(cluster):
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
  for command, flags in used.items():
    if not shutil.which(command[0]):
      pytest.skip(f"{command[0]} is not installed")
    text = subprocess.run([*command, "--help"], capture_output=True, text=True).stdout
    if command[0] == "kubectl":
      text += subprocess.run(["kubectl", "options"], capture_output=True, text=True).stdout
    assert flags <= set(re.findall(r"--[a-z][a-z-]+", text)), command

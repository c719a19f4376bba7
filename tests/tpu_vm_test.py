"""The TPU VM launcher against a gcloud of ours: every state that Google Cloud can be in, and workers that are folders.

What gcloud says is written after its documentation (tests/testdata/tpu_vm.json); its flags are checked against the
installed one. The scripts that workers run are the real ones, with a stand-in for llmjax.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent
ANSWERS = json.loads((ROOT / "tests" / "testdata" / "tpu_vm.json").read_text())
SCRIPTS = ("tpu_vm.py", "gcloud.py", "shipping.py", "command_line.py", "tpu_worker.sh")
FLAGS = ("--name=a", "--zone=us-west4-a", "--poll=0")
REQUEST = ("run", *FLAGS, "--type=v5litepod-16")
TRAIN = ("train", "--config=quick", "--workdir=gs://b/a")

UNSETTLED = 75  # exit code

# In place of launch/setup.sh, what installs, and llmjax: `slow` runs until the home has a file `go`, and takes $SAVING
# seconds to end when it is told to.
SETUP = """
setup() {
  echo "installed $1" >>"$HOME/installations"
  mkdir -p .venv/bin
  cat >.venv/bin/llmjax <<'LLMJAX'
#!/usr/bin/env bash
echo "started $*" | tee -a "$HOME/runs"
echo "token ${TOKEN:-none} slice ${MEGASCALE_SLICE_ID:-none}/${MEGASCALE_NUM_SLICES:-1} $MEGASCALE_COORDINATOR_ADDRESS"
trap 'sleep "${SAVING:-0}"; echo saved; exit 130' TERM
case "$*" in
  *config=bad*) echo 'llmjax: a mistake' >&2; exit 2 ;;
  *config=slow*) until [ -e "$HOME/go" ]; do sleep 0.05; done ;;
esac
echo done
LLMJAX
  chmod +x .venv/bin/llmjax
}
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
  """A git checkout of the launchers and setup.py alone."""
  root = tmp_path_factory.mktemp("checkout")
  (root / "launch").mkdir()
  for name in SCRIPTS:
    shutil.copy(ROOT / "launch" / name, root / "launch")
  shutil.copy(ROOT / "setup.py", root)
  (root / "launch" / "setup.sh").write_text(SETUP)
  git(root, "init", "-q")
  git(root, "add", ".")
  git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "all")
  return root


def git(root, *words):
  return subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def cloud(tmp_path, checkout):
  return Cloud(tmp_path, checkout)


class Cloud:
  """A project of Google Cloud that answers as it is told, with `workers` for each node."""

  def __init__(self, folder, checkout):
    self.folder, self.checkout = folder, checkout
    for name in ("bin", "worker_bin", "workers"):
      (folder / name).mkdir()
    self.script("bin/gcloud", f'exec {sys.executable} -S -E {ROOT / "tests" / "support" / "fake_cloud.py"} gcloud "$@"')
    self.script("worker_bin/hostname", 'echo "$WORKER"')
    self.script("worker_bin/python3.12", "exit 0")
    self.script("worker_bin/sudo", "exit 1")
    self.environment = {**os.environ, "FAKE_CLOUD": str(folder), "TOKEN": "s3cret"}
    self.environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"

  def script(self, path, text):
    (self.folder / path).write_text(f"#!/bin/bash\n{text}\n")
    (self.folder / path).chmod(0o755)

  def says(self, *, nodes=("a",), workers=1, **answers):
    """Sets the answers to describe, node, create, delete, ssh, scp, address: names of ANSWERS, in order."""
    calls = {
      "address": r"tpu-vm describe .*format=value",
      "describe": "queued-resources describe",
      "node": "tpu-vm describe",
      "create": "queued-resources create",
      "delete": "queued-resources delete",
      "log": r"tpu-vm ssh .*\.sh log ",
      "ssh": "tpu-vm ssh",
      "scp": "tpu-vm scp",
    }
    usual = {
      "ssh": "play",
      "scp": "play",
      "node": "ready",
      "create": "created",
      "delete": "deleted",
      "address": "address",
    }
    usual |= {"describe": "not_found waiting provisioning active", "log": "play"} | answers
    entries = [{"call": calls[name], "answers": [ANSWERS[a] for a in usual[name].split()]} for name in calls]
    (self.folder / "transcript.json").write_text(json.dumps(entries))
    for node in nodes:
      for index in range(workers):
        (self.folder / "workers" / f"{node}-w{index}").mkdir(exist_ok=True)
    return self

  def start(self, *words):
    command = [sys.executable, "-S", "-E", str(self.checkout / "launch" / "tpu_vm.py"), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=self.environment, stdout=pipe, stderr=pipe, text=True, cwd=self.folder)

  def run(self, *words):
    process = self.start(*words)
    output, errors = process.communicate(timeout=60)
    assert all(call["known"] for call in self.calls()), errors
    return process.returncode, output, errors

  def calls(self):
    path = self.folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def count(self, pattern):
    return sum(bool(re.search(pattern, " ".join(call["words"]))) for call in self.calls())

  def home(self, worker):
    return self.folder / "workers" / worker

  def wait(self, condition):
    deadline = time.monotonic() + 30
    while not condition():
      assert time.monotonic() < deadline
      time.sleep(0.02)


def one_line(errors):
  assert "Traceback" not in errors
  assert errors.splitlines()[-1].startswith("tpu_vm.py: ")


def test_a_run_from_request_to_deletion(cloud):
  odd = """--config.text=it's "a $HOME"; exit 1"""
  code, output, errors = cloud.says(workers=2).run(*REQUEST, "--", *TRAIN, odd)
  assert code == 0, errors
  assert output.splitlines()[0] == f"started {' '.join(TRAIN)} {odd}" and output.splitlines()[-1] == "done"
  steps = r"WAITING_FOR\w+|PROVISIONING|active|installing|running|ended|requesting|deleted"
  assert re.findall(steps, errors) == [
    *("requesting", "WAITING_FOR_RESOURCES", "PROVISIONING", "active"),
    *("installing", "running", "ended", "deleted"),
  ]
  commit = git(cloud.checkout, "rev-parse", "HEAD")
  for worker in ("a-w0", "a-w1"):
    assert (cloud.home(worker) / f"llmjax-{commit}" / ".commit").read_text() == f"{commit}\n"
    assert (cloud.home(worker) / "runs").read_text().count("started") == 1
  assert cloud.count("queued-resources create") == cloud.count("queued-resources delete a --force") == 1


def test_dry_run_prints_every_command_and_runs_none(cloud):
  run = (*REQUEST, "--slices=2", "--env=TOKEN")
  cloud.says(nodes=("a-0", "a-1"), workers=2)
  code, output, _ = cloud.run(*run, "--dry_run", "--", *TRAIN)
  assert code == 0 and not cloud.calls() and "s3cret" not in output and '"$TOKEN"' in output
  assert subprocess.run(["bash", "-n"], input=output, text=True).returncode == 0
  printed = {plain(line) for line in output.splitlines() if "gcloud" in line}
  cloud.run(*run, "--", "train", "--config=bad", "--workdir=gs://b/a")
  called = {plain(shlex.join(call["words"])).replace("config=bad", "config=quick") for call in cloud.calls()}
  assert called <= printed


def test_what_is_installed_can_write_to_a_bucket(cloud, monkeypatch):
  given = {}
  monkeypatch.setattr(setuptools, "setup", lambda **keywords: given.update(keywords))
  runpy.run_path(str(ROOT / "setup.py"))
  for flags in ((), ("--extra=wandb",)):
    _, output, _ = cloud.run(*REQUEST, *flags, "--dry_run", "--", *TRAIN)
    installed = re.search(r"worker\.sh install \w+ (\S+)'", output)[1].split(",")
    assert {"tpu", "gcs"} <= set(installed) <= set(given["extras_require"])


def test_a_dry_run_without_a_type_requests_nothing(cloud):
  code, output, errors = cloud.run("run", *FLAGS, "--dry_run", "--", *TRAIN)
  assert code == 0 and "queued-resources describe" in output and " create " not in output, errors


def plain(line):
  """A command without what differs from run to run."""
  line = re.sub(r'ADDRESS="\$\((.*)\)"', r"\1", line)
  line = re.sub(r"/tmp/\S*?(llmjax-|llmjax\.)?(environment-\d|[\w.-]*tar\.gz) ", r"FILE ", line)
  return re.sub(r"begin \w+|log \d+", "", line)


def test_the_printed_plan_runs_when_it_is_pasted(cloud):
  cloud.says(describe="active")
  _, output, _ = cloud.run(*REQUEST, "--env=TOKEN", "--dry_run", "--", *TRAIN)
  done = subprocess.run(["bash"], input=output, env=cloud.environment, text=True, capture_output=True)
  assert "token s3cret" in done.stdout and done.returncode == 0, done.stderr
  assert all("s3cret" not in " ".join(call["words"]) for call in cloud.calls())


def test_secrets_are_in_no_command_line_and_do_not_stay(cloud):
  code, output, _ = cloud.says().run(*REQUEST, "--env=TOKEN", "--", *TRAIN)
  assert code == 0 and "token s3cret" in output
  copies = [call for call in cloud.calls() if "text" in call]
  assert [(call["mode"], call["text"]) for call in copies] == [("0o600", "TOKEN=s3cret\n")]
  assert all("s3cret" not in " ".join(call["words"]) for call in cloud.calls())
  assert not (cloud.home("a-w0") / ".llmjax-environment").exists()
  for wrong in ("--env=TOKEN=s3cret", "--env=ABSENT"):
    code, _, errors = cloud.run(*REQUEST, wrong, "--", *TRAIN)
    assert code == 2 and "--env=" in errors and "s3cret" not in errors


def test_slices_are_told_where_they_meet(cloud):
  cloud.says(nodes=("a-0", "a-1"), workers=2)
  code, output, errors = cloud.run(*REQUEST, "--slices=2", "--", *TRAIN)
  assert code == 0 and "slice 0/2 10.0.0.2" in output, errors
  assert cloud.count("create a --node-count=2 --node-prefix=a --accel") == 1
  for node, index in (("a-0", 0), ("a-1", 1)):
    for worker in range(2):
      assert f"slice {index}/2 10.0.0.2" in (cloud.home(f"{node}-w{worker}") / ".llmjax" / "log").read_text()
  text = next(call["text"] for call in cloud.calls() if "text" in call and "a-1:" in " ".join(call["words"]))
  assert text.splitlines() == [
    "MEGASCALE_COORDINATOR_ADDRESS=10.0.0.2",
    "MEGASCALE_PORT=8081",
    "MEGASCALE_NUM_SLICES=2",
    "MEGASCALE_SLICE_ID=1",
  ]


def test_a_failed_run_ends_with_its_code_its_errors_and_no_vm(cloud):
  code, _, errors = cloud.says(workers=2).run(*REQUEST, "--", "train", "--config=bad", "--workdir=gs://b/a")
  assert code == 2
  assert "[a-w0] llmjax: a mistake" in errors and "[a-w1] llmjax: a mistake" in errors
  assert cloud.count("delete a --force") == 1
  assert (cloud.home("a-w0") / "runs").read_text().count("started") == 1


def test_keep_leaves_the_vm_and_the_next_run_installs_only_where_it_must(cloud):
  cloud.says(describe="not_found active", workers=2)
  assert cloud.run(*REQUEST, "--keep", "--", *TRAIN)[0] == 0
  other = (*REQUEST, "--keep", "--", "train", "--config=other", "--workdir=gs://b/other")
  code, output, errors = cloud.run(*other)
  assert code == 0 and output.startswith("started train --config=other") and "installing" not in errors
  next(cloud.home("a-w1").glob("llmjax-*/.ready")).unlink()
  assert cloud.run(*other)[0] == 0
  counts = [(cloud.home(worker) / "installations").read_text().count("installed") for worker in ("a-w0", "a-w1")]
  assert counts == [1, 2]
  assert cloud.run(*REQUEST, "--extra=wandb", *other[len(REQUEST) :])[0] == 0
  assert (cloud.home("a-w0") / "installations").read_text() == "installed tpu,gcs\ninstalled tpu,gcs,wandb\n"
  assert cloud.count("create") == 1 and not cloud.count("delete")


@pytest.mark.parametrize("taken", ["suspended", "suspending"])
def test_a_preempted_run_goes_on_in_new_vms(cloud, taken):
  states = f"not_found active {taken} {taken} waiting active"
  cloud.says(describe=states, log="unusable play", delete="not_deletable deleted")
  code, output, errors = cloud.run(*REQUEST, "--spot", "--", *TRAIN)
  assert code == 0 and "done" in output and "preempted" in errors, errors
  assert cloud.count("create .*--spot") == 2
  assert cloud.count("delete") == 3  # what was preempted, at the second try, and at the end


def test_a_node_can_be_preempted_while_its_request_is_active(cloud):
  cloud.says(describe="not_found active", node="ready preempted preempted ready", log="unusable play")
  code, _, errors = cloud.run(*REQUEST, "--", *TRAIN)
  assert code == 0 and "preempted (PREEMPTED)" in errors
  assert cloud.count("create") == 2


def test_a_run_that_was_ended_by_the_machine_is_started_again(cloud):
  process = cloud.says(describe="active").start(*REQUEST, "--", "train", "--config=slow", "--workdir=gs://b/a")
  home = cloud.home("a-w0")
  cloud.wait((home / "runs").exists)
  cloud.wait((home / ".llmjax" / "pid").exists)
  os.kill(int((home / ".llmjax" / "pid").read_text()), signal.SIGTERM)  # as a machine that shuts down
  cloud.wait(lambda: (home / "runs").read_text().count("started") == 2)
  (home / "go").touch()
  output, errors = process.communicate(timeout=60)
  assert process.returncode == 0 and "lost the run" in errors and output.endswith("done\n")


def test_too_many_preemptions_end(cloud):
  cloud.says(describe="suspended", log="unusable")
  code, _, errors = cloud.run(*REQUEST, "--max_restarts=1", "--", *TRAIN)
  assert code == UNSETTLED and "lost 2 times" in errors
  one_line(errors)


@pytest.mark.parametrize(
  "answers, expected",
  [
    ({"describe": "not_found waiting failed"}, "an internal error has occurred"),
    ({"describe": "not_found waiting failed_quota"}, "TPUV5sPreemptibleLitepodPerProjectPerRegionForTPUAPI is used up"),
    ({"describe": "not_found", "create": "quota"}, "TPUV5sLitepodPerProjectPerZoneForTPUAPI is used up"),
    ({"describe": "not_found waiting not_found"}, "deleted by someone else"),
    ({"describe": "not_found active not_found", "log": "unusable"}, "deleted by someone else"),
  ],
)
def test_what_trying_again_does_not_mend_ends_at_once_and_is_cleaned_up(cloud, answers, expected):
  code, _, errors = cloud.says(**answers).run(*REQUEST, "--", *TRAIN)
  assert code == UNSETTLED and expected in errors
  assert cloud.count("create") == cloud.count("delete") == 1


def test_a_request_that_is_there_is_used_and_one_that_failed_is_replaced(cloud):
  cloud.says(describe="waiting active")
  assert cloud.run(*REQUEST, "--", *TRAIN)[0] == 0
  assert not cloud.count("create") and cloud.count("delete") == 1
  cloud.says(describe="not_found active", create="exists")  # made by another between two calls
  assert cloud.run(*REQUEST, "--", *TRAIN)[0] == 0
  (cloud.folder / "counts.json").unlink()
  cloud.says(describe="failed active")
  code, _, errors = cloud.run(*REQUEST, "--", *TRAIN)
  assert code == 0 and "deleting what is left" in errors


def test_an_existing_vm_is_used_and_never_deleted(cloud):
  cloud.says()
  run = ("run", *FLAGS, "--existing", "--")
  assert cloud.run(*run, "train", "--config=quick")[0] == 0
  assert cloud.run(*run, "train", "--config=bad")[0] == 2
  (cloud.folder / "counts.json").unlink()
  cloud.says(node="ready preempted", log="unusable")
  code, _, errors = cloud.run(*run, "train", "--config=quick")
  assert code == UNSETTLED and "--existing needs a TPU VM" in errors
  assert not cloud.count("queued-resources")


def test_a_lost_connection_finds_the_run_again_and_prints_its_log_once(cloud):
  cloud.says(log="lost lost play lost play")
  process = cloud.start(*REQUEST, "--", "train", "--config=slow", "--workdir=gs://b/a")
  cloud.wait(lambda: cloud.count(r"\.sh log ") > 6)
  (cloud.home("a-w0") / "go").touch()
  output, errors = process.communicate(timeout=60)
  assert process.returncode == 0 and "no connection" in errors
  assert [line.split()[0] for line in output.splitlines()] == ["started", "token", "done"]
  assert (cloud.home("a-w0") / "runs").read_text().count("started") == 1


def test_the_same_command_attaches_and_another_one_is_refused(cloud):
  cloud.says(describe="active")
  slow = ("train", "--config=slow", "--workdir=gs://b/a")
  process = cloud.start(*REQUEST, "--keep", "--", *slow)
  cloud.wait((cloud.home("a-w0") / "runs").exists)
  cloud.wait(lambda: cloud.count(r"\.sh log ") > 1)
  process.send_signal(signal.SIGINT)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 130 and "left running" in errors and "the same command goes on" in errors
  code, _, errors = cloud.run(*REQUEST, "--", *TRAIN)
  assert code == UNSETTLED and "it is running llmjax train --config=slow" in errors
  one_line(errors)
  assert cloud.run("status", *FLAGS)[1].splitlines() == ["a: active (READY)", "a-w0: running"]
  calls = cloud.count(r"\.sh log ")
  process = cloud.start(*REQUEST, "--keep", "--", *slow)
  cloud.wait(lambda: cloud.count(r"\.sh log ") > calls)
  (cloud.home("a-w0") / "go").touch()
  output, _ = process.communicate(timeout=60)
  assert process.returncode == 0 and output.startswith("started") and output.endswith("done\n")
  assert (cloud.home("a-w0") / "runs").read_text().count("started") == 1
  assert not cloud.count("delete")


def test_ctrl_c_saves_then_deletes(cloud):
  cloud.says(describe="active")
  process = cloud.start(*REQUEST, "--", "train", "--config=slow", "--workdir=gs://b/a")
  cloud.wait(lambda: cloud.count(r"\.sh log ") > 1)
  process.send_signal(signal.SIGINT)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 130 and "Ctrl-C again leaves it" in errors
  assert "saved" in (cloud.home("a-w0") / ".llmjax" / "log").read_text()
  assert cloud.count("delete a --force") == 1


def test_a_second_ctrl_c_leaves_the_vm_and_says_how_to_delete_it(cloud):
  cloud.says(describe="not_found waiting")
  transcript = json.loads((cloud.folder / "transcript.json").read_text())
  next(entry for entry in transcript if "delete" in entry["call"])["answers"] = [{"seconds": 30}]
  (cloud.folder / "transcript.json").write_text(json.dumps(transcript))
  process = cloud.start(*REQUEST, "--", *TRAIN)
  cloud.wait(lambda: cloud.count("describe") > 2)
  process.send_signal(signal.SIGINT)
  cloud.wait(lambda: cloud.count("delete"))
  process.send_signal(signal.SIGINT)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 130
  assert "delete it with: gcloud compute tpus queued-resources delete a --force --zone=us-west4-a" in errors


def test_stop_waits_until_the_run_has_saved(cloud):
  cloud.environment["SAVING"] = "1"
  cloud.says(describe="active", workers=2)
  process = cloud.start(*REQUEST, "--keep", "--", "train", "--config=slow", "--workdir=gs://b/a")
  cloud.wait(lambda: cloud.count(r"\.sh log ") > 1)
  code, _, errors = cloud.run("stop", *FLAGS)
  assert code == 0 and "has ended" in errors
  for worker in ("a-w0", "a-w1"):
    assert "saved" in (cloud.home(worker) / ".llmjax" / "log").read_text()
  process.communicate(timeout=60)
  assert process.returncode == 130


def test_what_is_not_there_is_no_verdict_on_the_run(cloud):
  for action in ("logs", "stop"):
    code, _, errors = cloud.says(describe="not_found", ssh="lost", log="lost").run(action, *FLAGS)
    assert code == UNSETTLED and "a is absent" in errors
    one_line(errors)


def test_stop_logs_and_delete(cloud):
  cloud.says(describe="active")
  process = cloud.start(*REQUEST, "--keep", "--", "train", "--config=slow", "--workdir=gs://b/a")
  cloud.wait(lambda: cloud.count(r"\.sh log ") > 1)
  assert cloud.run("stop", *FLAGS)[0] == 0
  process.communicate(timeout=60)
  assert process.returncode == 130  # the run's own
  assert "saved" in cloud.run("logs", *FLAGS)[1]
  assert cloud.run("delete", *FLAGS)[0] == 0 and cloud.count("delete a --force") == 1


@pytest.mark.parametrize(
  "words, expected",
  [
    (("run", *FLAGS, "--"), "nothing to run"),
    ((*REQUEST, "--", "train", "--workdir=runs/a"), "gs://BUCKET"),
    (("run", *FLAGS, "--type=v9-8", "--", *TRAIN), "v5litepod-N"),
    (("run", *FLAGS, "--", *TRAIN), "needs --type"),
    ((*REQUEST, "--spot", "--reserved", "--", *TRAIN), "not allowed with"),
    ((*REQUEST, "--extra=wandbb", "--", *TRAIN), "wandbb is none of tpu"),
    (("run", "--name=A_b", "--zone=z", "--", *TRAIN), "lower-case"),
    (("run", "--nam=a", "--zone=z", "--", *TRAIN), "--name"),
    (("delete", *FLAGS, "--existing"), "not deleted"),
  ],
)
def test_mistakes_are_one_line(cloud, words, expected):
  code, _, errors = cloud.says(describe="not_found").run(*words)
  assert code == 2 and expected in errors
  one_line(errors)
  assert not cloud.count("create|delete")


def test_without_an_account_nothing_is_touched(cloud):
  code, _, errors = cloud.says(describe="no_account").run(*REQUEST, "--", *TRAIN)
  assert code == UNSETTLED and "active account" in errors
  assert not cloud.count("create|delete")


def test_uncommitted_changes_are_refused_or_recorded(cloud, tmp_path):
  root = tmp_path / "changed"
  shutil.copytree(cloud.checkout, root)
  (root / "launch" / "setup.sh").write_text(SETUP + "# changed\n")
  cloud.checkout = root
  code, _, errors = cloud.says().run(*REQUEST, "--", *TRAIN)
  assert code == 2 and "launch/setup.sh" in errors and not cloud.calls()
  assert cloud.run(*REQUEST, "--dirty", "--", *TRAIN)[0] == 0
  (folder,) = cloud.home("a-w0").glob("llmjax-*-dirty-*")
  assert folder.name == f"llmjax-{(folder / '.commit').read_text().strip()}"
  assert "# changed" in (folder / "launch" / "setup.sh").read_text()


@pytest.mark.slow
def test_every_flag_is_one_of_the_installed_gcloud(cloud):
  if not shutil.which("gcloud"):
    pytest.skip("gcloud is not installed")
  everything = ("--project=p", "--network=n", "--subnetwork=s", "--service_account=e", "--internal_ips", "--env=HOME")
  commands = []
  for more in (("--spot",), ("--reserved", "--slices=2")):
    _, output, _ = cloud.run(*REQUEST, *everything, *more, "--dry_run", "--", *TRAIN)
    commands += [shlex.split(re.sub(r'ADDRESS="\$\((.*)\)"', r"\1", line)) for line in output.splitlines()
                 if re.match(r'gcloud|ADDRESS="', line)]  # fmt: skip
  used = {}
  for words in commands:
    used.setdefault(tuple(words[1:5]), set()).update(word.split("=")[0] for word in words if word.startswith("--"))
  assert len(used) == 6
  for command, flags in used.items():
    text = subprocess.run(["gcloud", *command, "--help"], capture_output=True, text=True).stdout
    known = set(re.findall(r"--[a-z][a-z-]+", re.sub(r"\x1b\[[0-9;]*m", "", text)))
    assert flags <= known, command

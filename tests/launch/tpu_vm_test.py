"""launch/tpu_vm.py with a gcloud that answers from a transcript and workers that are folders.

The transcript's answers follow gcloud's documentation (tests/testdata/tpu_vm.json); the flags are checked against the
installed gcloud. Workers run the real tpu_worker.sh, with a stand-in for llmjax.
"""

import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
import setuptools

from tests.support.cloud_transcripts import SETUP, TpuCloud
from tests.support.launchers import EXIT_UNKNOWN, ROOT, assert_one_line_error, make_checkout, run_git

FLAGS = ("--name=a", "--zone=us-west4-a", "--poll=0")
REQUEST = ("run", *FLAGS, "--type=v5litepod-16")
TRAIN = ("train", "--config=quick", "--workdir=gs://b/a")
SLOW = ("train", "--config=slow", "--workdir=gs://b/a")
INTERRUPT = 'kill -INT "$CALLER"'  # Ctrl-C in the terminal of the launcher


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
  return make_checkout(tmp_path_factory.mktemp("tpu") / "checkout", SETUP)


@pytest.fixture
def cloud(tmp_path, checkout, monkeypatch):
  monkeypatch.setenv("FAKE_CLOUD", str(tmp_path))
  monkeypatch.setenv("TOKEN", "s3cret")
  monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
  monkeypatch.chdir(tmp_path)
  return TpuCloud(tmp_path, checkout)


def play_before(command):
  """An answer that runs a shell command, then the call on the workers."""
  return {"play": True, "before": command}


def test_run_requests_installs_runs_and_deletes_in_order(cloud):
  cloud.set_answers(workers=2)
  code, output, errors = cloud.run(*REQUEST, "--", *TRAIN)
  assert code == 0 and output.endswith("done\n")
  steps = r"WAITING_FOR\w+|PROVISIONING|active|installing|running|ended|requesting|deleted"
  assert re.findall(steps, errors) == [
    *("requesting", "WAITING_FOR_RESOURCES", "PROVISIONING", "active"),
    *("installing", "running", "ended", "deleted"),
  ]
  commit = run_git(cloud.checkout, "rev-parse", "HEAD")
  for worker in ("a-w0", "a-w1"):
    assert (cloud.home(worker) / f"llmjax-{commit}" / ".commit").read_text() == f"{commit}\n"
    assert cloud.num_starts(worker) == 1
  assert cloud.count("queued-resources create") == cloud.count("queued-resources delete a --force") == 1


def test_run_argument_with_shell_characters_arrives_unchanged(cloud):
  odd = """--config.text=it's "a $HOME"; exit 1"""
  code, output, errors = cloud.run(*REQUEST, "--", *TRAIN, odd)
  assert code == 0 and output.splitlines()[0] == f"started {' '.join(TRAIN)} {odd}", errors


def test_script_as_its_own_process_has_same_output(cloud):
  words = [*REQUEST, "--", *TRAIN]
  command = [sys.executable, "-S", "-E", str(cloud.checkout / "launch" / "tpu_vm.py"), *words]
  process = subprocess.run(command, capture_output=True, text=True, timeout=60)
  cloud.set_answers()
  code, output, _ = cloud.run(*words)
  assert (process.returncode, process.stdout) == (code, output) and output.endswith("done\n"), process.stderr


def test_dry_run_prints_every_command_and_calls_none(cloud):
  run = (*REQUEST, "--slices=2", "--env=TOKEN")
  cloud.set_answers(nodes=("a-0", "a-1"), workers=2)
  code, output, _ = cloud.run(*run, "--dry_run", "--", *TRAIN)
  assert code == 0 and not cloud.calls() and "s3cret" not in output and '"$TOKEN"' in output
  assert subprocess.run(["bash", "-n"], input=output, text=True).returncode == 0
  printed = {normalize(line) for line in output.splitlines() if "gcloud" in line}
  cloud.run(*run, "--", "train", "--config=bad", "--workdir=gs://b/a")
  called = {normalize(shlex.join(call["words"])).replace("config=bad", "config=quick") for call in cloud.calls()}
  assert called <= printed


def normalize(line):
  """A command without the parts that differ between runs."""
  line = re.sub(r'ADDRESS="\$\((.*)\)"', r"\1", line)
  line = re.sub(r"/tmp/\S*?(llmjax-|llmjax\.)?(environment-\d|[\w.-]*tar\.gz) ", r"FILE ", line)
  return re.sub(r"begin \w+|log \d+", "", line)


def test_dry_run_without_type_requests_nothing(cloud):
  code, output, errors = cloud.run("run", *FLAGS, "--dry_run", "--", *TRAIN)
  assert code == 0 and "queued-resources describe" in output and " create " not in output, errors


def test_dry_run_output_pasted_into_a_shell_runs(cloud):
  cloud.set_answers(describe="active")
  _, output, _ = cloud.run(*REQUEST, "--env=TOKEN", "--dry_run", "--", *TRAIN)
  done = subprocess.run(["bash"], input=output, text=True, capture_output=True)
  assert "token s3cret" in done.stdout and done.returncode == 0, done.stderr
  assert all("s3cret" not in " ".join(call["words"]) for call in cloud.calls())


def test_install_includes_the_gcs_extra(cloud, monkeypatch):
  """Without it a run could not save to its bucket."""
  given = {}
  monkeypatch.setattr(setuptools, "setup", lambda **keywords: given.update(keywords))
  runpy.run_path(str(ROOT / "setup.py"))
  for flags in ((), ("--extra=wandb",)):
    _, output, _ = cloud.run(*REQUEST, *flags, "--dry_run", "--", *TRAIN)
    installed = re.search(r"worker\.sh install \w+ (\S+)'", output)[1].split(",")
    assert {"tpu", "gcs"} <= set(installed) <= set(given["extras_require"])


def test_secrets_are_copied_privately_and_removed(cloud):
  code, output, _ = cloud.run(*REQUEST, "--env=TOKEN", "--", *TRAIN)
  assert code == 0 and "token s3cret" in output
  copies = [call for call in cloud.calls() if "text" in call]
  assert [(call["mode"], call["text"]) for call in copies] == [("0o600", "TOKEN=s3cret\n")]
  assert all("s3cret" not in " ".join(call["words"]) for call in cloud.calls())
  assert not (cloud.home("a-w0") / ".llmjax-environment").exists()


@pytest.mark.parametrize("flag", ["--env=TOKEN=s3cret", "--env=ABSENT"])
def test_env_flag_with_value_or_unset_name_is_refused(cloud, flag):
  code, _, errors = cloud.run(*REQUEST, flag, "--", *TRAIN)
  assert code == 2 and "--env=" in errors and "s3cret" not in errors


def test_slices_get_the_coordinator_and_their_index(cloud):
  cloud.set_answers(nodes=("a-0", "a-1"), workers=2)
  code, output, errors = cloud.run(*REQUEST, "--slices=2", "--", *TRAIN)
  assert code == 0 and "slice 0/2 10.0.0.2" in output, errors
  assert cloud.count("create a --node-count=2 --node-prefix=a --accel") == 1
  for node, index in (("a-0", 0), ("a-1", 1)):
    for worker in range(2):
      assert f"slice {index}/2 10.0.0.2" in cloud.log(f"{node}-w{worker}")
  text = next(call["text"] for call in cloud.calls() if "text" in call and "a-1:" in " ".join(call["words"]))
  assert text.splitlines() == [
    "MEGASCALE_COORDINATOR_ADDRESS=10.0.0.2",
    "MEGASCALE_PORT=8081",
    "MEGASCALE_NUM_SLICES=2",
    "MEGASCALE_SLICE_ID=1",
  ]


def test_failed_run_returns_its_code_prints_errors_and_deletes(cloud):
  cloud.set_answers(workers=2)
  code, _, errors = cloud.run(*REQUEST, "--", "train", "--config=bad", "--workdir=gs://b/a")
  assert code == 2
  assert "[a-w0] llmjax: a mistake" in errors and "[a-w1] llmjax: a mistake" in errors
  assert cloud.count("delete a --force") == 1 and cloud.num_starts() == 1


def test_keep_leaves_the_vm_and_installs_only_what_is_missing(cloud):
  cloud.set_answers(describe="not_found active", workers=2)
  assert cloud.run(*REQUEST, "--keep", "--", *TRAIN)[0] == 0
  other = (*REQUEST, "--keep", "--", "train", "--config=other", "--workdir=gs://b/other")
  code, output, errors = cloud.run(*other)
  assert code == 0 and output.startswith("started train --config=other") and "installing" not in errors
  next(cloud.home("a-w1").glob("llmjax-*/.ready")).unlink()
  assert cloud.run(*other)[0] == 0
  counts = [(cloud.home(worker) / "installations").read_text().count("installed") for worker in ("a-w0", "a-w1")]
  assert counts == [1, 2]
  assert cloud.count("create") == 1 and not cloud.count("delete")


@pytest.mark.slow
def test_keep_with_another_extra_installs_again(cloud):
  cloud.set_answers(describe="active")
  assert cloud.run(*REQUEST, "--keep", "--", *TRAIN)[0] == 0
  assert cloud.run(*REQUEST, "--keep", "--extra=wandb", "--", *TRAIN)[0] == 0
  assert (cloud.home("a-w0") / "installations").read_text() == "installed tpu,gcs\ninstalled tpu,gcs,wandb\n"


@pytest.mark.parametrize("state", ["suspended", pytest.param("suspending", marks=pytest.mark.slow)])
def test_preempted_request_is_deleted_and_requested_again(cloud, state):
  states = f"not_found active {state} {state} waiting active"
  cloud.set_answers(describe=states, log="unusable play", delete="not_deletable deleted")
  code, output, errors = cloud.run(*REQUEST, "--spot", "--", *TRAIN)
  assert code == 0 and "done" in output and "preempted" in errors, errors
  assert cloud.count("create .*--spot") == 2
  assert cloud.count("delete") == 3  # the preempted one, at the second try, and at the end


def test_preempted_node_of_active_request_is_requested_again(cloud):
  cloud.set_answers(describe="not_found active", node="ready preempted preempted ready", log="unusable play")
  code, _, errors = cloud.run(*REQUEST, "--", *TRAIN)
  assert code == 0 and "preempted (PREEMPTED)" in errors
  assert cloud.count("create") == 2


def test_run_ended_by_its_machine_is_started_again(cloud):
  home = cloud.home("a-w0")
  shutdown = f"kill -TERM $(cat {home}/.llmjax/pid); touch {home}/go"  # SIGTERM that no launcher has sent
  cloud.set_answers(describe="active", log=["play", play_before(shutdown), "play"])
  code, output, errors = cloud.run(*REQUEST, "--", *SLOW)
  assert code == 0 and "lost the run" in errors and output.endswith("done\n")
  assert cloud.num_starts() == 2


def test_more_preemptions_than_max_restarts_end(cloud):
  cloud.set_answers(describe="suspended", log="unusable")
  code, _, errors = cloud.run(*REQUEST, "--max_restarts=1", "--", *TRAIN)
  assert code == EXIT_UNKNOWN and "lost 2 times" in errors
  assert_one_line_error(errors, "tpu_vm.py")


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
def test_permanent_failure_is_not_retried_and_cleans_up(cloud, answers, expected):
  cloud.set_answers(**answers)
  code, _, errors = cloud.run(*REQUEST, "--", *TRAIN)
  assert code == EXIT_UNKNOWN and expected in errors
  assert cloud.count("create") == cloud.count("delete") == 1


def test_existing_request_is_used(cloud):
  cloud.set_answers(describe="waiting active")
  assert cloud.run(*REQUEST, "--", *TRAIN)[0] == 0
  assert not cloud.count("create") and cloud.count("delete") == 1


@pytest.mark.slow
def test_request_made_by_another_process_meanwhile_is_used(cloud):
  cloud.set_answers(describe="not_found active", create="exists")
  assert cloud.run(*REQUEST, "--", *TRAIN)[0] == 0


@pytest.mark.slow
def test_failed_request_is_replaced(cloud):
  cloud.set_answers(describe="failed active")
  code, _, errors = cloud.run(*REQUEST, "--", *TRAIN)
  assert code == 0 and "deleting what is left" in errors and cloud.count("create") == 1


def test_existing_vm_is_used_and_never_deleted(cloud):
  run = ("run", *FLAGS, "--existing", "--")
  assert cloud.run(*run, "train", "--config=quick")[0] == 0
  assert cloud.run(*run, "train", "--config=bad")[0] == 2
  assert not cloud.count("queued-resources")


def test_existing_vm_that_is_preempted_is_an_error(cloud):
  cloud.set_answers(node="ready preempted", log="unusable")
  code, _, errors = cloud.run("run", *FLAGS, "--existing", "--", "train", "--config=quick")
  assert code == EXIT_UNKNOWN and "--existing needs a READY TPU VM" in errors
  assert not cloud.count("queued-resources")


def test_lost_connection_reattaches_and_prints_the_log_once(cloud):
  go = play_before(f"touch {cloud.home('a-w0')}/go")
  cloud.set_answers(log=["lost", "lost", "play", "lost", "play", "play", go])
  code, output, errors = cloud.run(*REQUEST, "--", *SLOW)
  assert code == 0 and "no connection" in errors
  assert [line.split()[0] for line in output.splitlines()] == ["started", "token", "done"]
  assert cloud.num_starts() == 1


def test_same_command_after_ctrl_c_attaches_to_the_kept_run(cloud):
  cloud.set_answers(describe="active", log=["play", play_before(INTERRUPT)])
  code, _, errors = cloud.run(*REQUEST, "--keep", "--", *SLOW)
  assert code == 130 and "left running" in errors and "the same command resumes" in errors
  cloud.set_answers(describe="active", log=["play", play_before(f"touch {cloud.home('a-w0')}/go"), "play"])
  code, output, _ = cloud.run(*REQUEST, "--keep", "--", *SLOW)
  assert code == 0 and output.startswith("started") and output.endswith("done\n")
  assert cloud.num_starts() == 1 and not cloud.count("delete")


def test_other_command_on_a_busy_vm_is_refused(cloud):
  cloud.set_answers(describe="active", log=["play", play_before(INTERRUPT)])
  cloud.run(*REQUEST, "--keep", "--", *SLOW)
  code, _, errors = cloud.run(*REQUEST, "--", *TRAIN)
  assert code == EXIT_UNKNOWN and "it is running llmjax train --config=slow" in errors
  assert_one_line_error(errors, "tpu_vm.py")
  assert cloud.run("status", *FLAGS)[1].splitlines() == ["a: active (READY)", "a-w0: running"]
  (cloud.home("a-w0") / "go").touch()


def test_ctrl_c_waits_for_the_save_then_deletes(cloud):
  cloud.set_answers(describe="active", log=["play", play_before(INTERRUPT)])
  code, _, errors = cloud.run(*REQUEST, "--", *SLOW)
  assert code == 130 and "Ctrl-C again leaves it" in errors
  assert "saved" in cloud.log() and cloud.count("delete a --force") == 1


def test_second_ctrl_c_leaves_the_vm_and_prints_the_delete_command(cloud):
  interrupt = {**cloud.ANSWERS["waiting"], "before": INTERRUPT}
  cloud.set_answers(describe=["not_found", "waiting", interrupt], delete=[{"before": INTERRUPT, "seconds": 30}])
  code, _, errors = cloud.run(*REQUEST, "--", *TRAIN)
  assert code == 130
  assert "delete it with: gcloud compute tpus queued-resources delete a --force --zone=us-west4-a" in errors


def test_stop_waits_until_all_workers_have_saved(cloud, monkeypatch):
  """The launcher that follows the run meanwhile ends with the run's exit code."""
  monkeypatch.setenv("SAVING", "0.5")
  saved = " && ".join(f"grep -q saved {cloud.home(worker)}/.llmjax/log" for worker in ("a-w0", "a-w1"))
  script = shlex.join([sys.executable, "-S", "-E", str(cloud.checkout / "launch" / "tpu_vm.py"), "stop", *FLAGS])
  stop = f"{script} 2>{cloud.folder}/stop.txt && {saved}"
  cloud.set_answers(describe="active", workers=2, log=["play", play_before(stop), "play"])
  assert cloud.run(*REQUEST, "--keep", "--", *SLOW)[0] == 130
  assert "has ended" in (cloud.folder / "stop.txt").read_text()
  assert "saved" in cloud.run("logs", *FLAGS)[1]


@pytest.mark.parametrize("action", ["logs", "stop"])
def test_absent_vm_leaves_the_state_of_the_run_unknown(cloud, action):
  cloud.set_answers(describe="not_found", ssh="lost", log="lost")
  code, _, errors = cloud.run(action, *FLAGS)
  assert code == EXIT_UNKNOWN and "a is absent" in errors
  assert_one_line_error(errors, "tpu_vm.py")


def test_delete_deletes_the_request(cloud):
  assert cloud.run("delete", *FLAGS)[0] == 0 and cloud.count("delete a --force") == 1


@pytest.mark.parametrize(
  "words, expected",
  [
    (("run", *FLAGS, "--"), "nothing to run"),
    ((*REQUEST, "--", "train", "--workdir=runs/a"), "gs://BUCKET"),
    (("run", *FLAGS, "--type=v9-8", "--", *TRAIN), "v5litepod-N"),
    (("run", *FLAGS, "--", *TRAIN), "needs --type"),
    ((*REQUEST, "--spot", "--reserved", "--", *TRAIN), "not allowed with"),
    ((*REQUEST, "--extra=wandbb", "--", *TRAIN), "must be one or more of tpu"),
    (("run", "--name=A_b", "--zone=z", "--", *TRAIN), "lower-case"),
    (("run", "--nam=a", "--zone=z", "--", *TRAIN), "--name"),
    (("delete", *FLAGS, "--existing"), "not deleted"),
  ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(cloud, words, expected):
  cloud.set_answers(describe="not_found")
  code, _, errors = cloud.run(*words)
  assert code == 2 and expected in errors
  assert_one_line_error(errors, "tpu_vm.py")
  assert not cloud.count("create|delete")


def test_missing_account_creates_and_deletes_nothing(cloud):
  cloud.set_answers(describe="no_account")
  code, _, errors = cloud.run(*REQUEST, "--", *TRAIN)
  assert code == EXIT_UNKNOWN and "active account" in errors
  assert not cloud.count("create|delete")


def test_uncommitted_changes_are_refused_unless_dirty(cloud, tmp_path):
  root = tmp_path / "changed"
  shutil.copytree(cloud.checkout, root)
  (root / "launch" / "setup.sh").write_text(SETUP + "# changed\n")
  cloud.checkout = root
  code, _, errors = cloud.run(*REQUEST, "--", *TRAIN)
  assert code == 2 and "launch/setup.sh" in errors and not cloud.calls()
  assert cloud.run(*REQUEST, "--dirty", "--", *TRAIN)[0] == 0
  (folder,) = cloud.home("a-w0").glob("llmjax-*-dirty-*")
  assert folder.name == f"llmjax-{(folder / '.commit').read_text().strip()}"
  assert "# changed" in (folder / "launch" / "setup.sh").read_text()


@pytest.mark.full("clusters")
def test_flags_are_known_to_the_installed_gcloud(cloud):
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
  (cloud.folder / "bin" / "gcloud").unlink()  # what the PATH then has is the real one
  if not shutil.which("gcloud"):
    pytest.skip("gcloud is not installed")
  for command, flags in used.items():
    text = subprocess.run(["gcloud", *command, "--help"], capture_output=True, text=True).stdout
    known = set(re.findall(r"--[a-z][a-z-]+", re.sub(r"\x1b\[[0-9;]*m", "", text)))
    assert flags <= known, command

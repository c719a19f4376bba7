"""launch/slurm.py: against programs that stand in for SLURM's, and with SLURM itself on a cluster of one node.

The cluster is made in a temporary folder from what Debian calls slurm-wlm and munge, and needs root:

  LLMJAX_SLURM_TEST=install python -m pytest -q tests/slurm_test.py -k real      # installs both where they are missing
"""

import contextlib
import csv
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from llmjax import metrics

ROOT = Path(__file__).parent.parent
UNSETTLED = 75  # exit code
VENV = Path(sys.prefix)
# Notes how it was called, and says what the test has put beside it.
FAKE = r"""#!{python}
import json, os, pathlib, sys
me = pathlib.Path(sys.argv[0])
with open(me.parent / "calls.jsonl", "a") as calls:
  calls.write(json.dumps([me.name, *sys.argv[1:]]) + "\n")
answer = me.with_suffix(".json")
out, err, code = json.loads(answer.read_text()) if answer.exists() else ("", "", 0)
print(out, end="")
print(err, end="", file=sys.stderr)
sys.exit(code)
"""
TRIALS = [
  {"name": "lr=1", "workdir": "{home}/sweep/lr=1", "arguments": ["train", "--config=gpt:debug", "--config.x=a b"]},
  {"name": "lr=2", "workdir": "{home}/sweep/lr=2", "arguments": ["train", "--config=gpt", "--workdir=gs://b/lr=2"]},
]


class Fake:
  """SLURM's programs on the PATH."""

  def __init__(self, folder):
    self.folder = folder
    for name in ("sbatch", "squeue", "scancel", "scontrol", "srun"):
      (folder / name).write_text(FAKE.replace("{python}", sys.executable))
      (folder / name).chmod(0o755)
    self.says("sbatch", "17\n")

  def says(self, name, out="", err="", code=0):
    (self.folder / f"{name}.json").write_text(json.dumps([out, err, code]))

  def calls(self, *names):
    path = self.folder / "calls.jsonl"
    calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [call for call in calls if not names or call[0] in names]


@pytest.fixture
def fake(tmp_path, monkeypatch):
  for name in list(os.environ):
    if name.startswith("SLURM_"):
      monkeypatch.delenv(name)
  (tmp_path / "bin").mkdir()
  monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
  return Fake(tmp_path / "bin")


def slurm(*words, root=ROOT):
  """Standard output, standard error, exit code."""
  command = [sys.executable, str(root / "launch" / "slurm.py"), *map(str, words)]
  done = subprocess.run(command, capture_output=True, text=True, timeout=60)
  return done.stdout, done.stderr, done.returncode


def submit(home, *flags, command=("train", "--config=gpt:debug")):
  return slurm("submit", f"--workdir={home / 'run'}", f"--venv={VENV}", *flags, "--", *command)


def array(home, *flags, trials=TRIALS):
  lines = [json.dumps(trial).replace("{home}", str(home)) + "\n" for trial in trials]
  (home / "trials.jsonl").write_text("".join(lines))
  return slurm("array", f"--commands={home / 'trials.jsonl'}", f"--folder={home / 'sweep'}", f"--venv={VENV}", *flags)


def script(folder, number=0):
  return (folder / "slurm" / f"{number}.sh").read_text()


def flags(folder):
  return {line.removeprefix("#SBATCH ") for line in script(folder).splitlines() if line.startswith("#SBATCH ")}


def test_flags_become_those_of_sbatch(fake, tmp_path):
  given = ["--time=1:00:00", "--partition=p", "--account=a", "--qos=q", "--constraint=c", "--mem=8G"]
  sizes = ["--nodes=2", "--gpus_per_node=h100:4", "--processes_per_node=4", "--cpus_per_task=7"]
  out, err, code = submit(tmp_path, *given, *sizes, "--name=two words", "--sbatch=--exclusive", "--sbatch=--hint=x")
  assert code == 0, err
  assert out.startswith("job 17, ")
  assert flags(tmp_path / "run") == {
    *("--time=1:00:00", "--partition=p", "--account=a", "--qos=q", "--constraint=c", "--mem=8G"),
    *("--nodes=2", "--gpus-per-node=h100:4", "--ntasks-per-node=4", "--cpus-per-task=7"),
    *("--job-name='two words'", "--exclusive", "--hint=x", "--export=NONE", f"--chdir={Path.cwd()}"),
    *("--requeue", "--open-mode=append", "--signal=TERM@120", f"--output={tmp_path}/run/slurm/%j.log"),
  }
  assert "options=(--export=ALL --kill-on-bad-exit=1 --cpus-per-task=7 --label)" in script(tmp_path / "run")
  assert fake.calls() == [["sbatch", "--parsable", f"{tmp_path}/run/slurm/0.sh"]]


def test_the_commit_is_recorded(fake, tmp_path):
  assert submit(tmp_path)[2] == 0
  about = json.loads((tmp_path / "run" / "slurm" / "0.json").read_text())
  assert re.fullmatch(r"[0-9a-f]{40}(-dirty-[0-9a-f]{8})?", about["commit"]) and about["names"] == ["run"]
  assert f"commit={about['commit']}\n" in script(tmp_path / "run")


def test_a_dry_run_does_nothing_and_pasted_does_the_same(fake, tmp_path):
  for number, submitting in enumerate(
    (lambda *flags: submit(tmp_path, *flags), lambda *flags: array(tmp_path, *flags))
  ):
    folder = tmp_path / ("run", "sweep")[number]
    printed, _, code = submitting("--dry_run")
    assert code == 0 and not folder.exists() and not fake.calls()
    subprocess.run(["bash", "-c", printed], check=True)
    pasted = {path.name: path.read_text() for path in (folder / "slurm").iterdir()}
    shutil.rmtree(folder)
    assert submitting()[2] == 0
    assert pasted == {path.name: path.read_text() for path in (folder / "slurm").iterdir()}
    assert pasted["0.job"] == "17\n" and fake.calls()[0] == fake.calls()[1]
    (fake.folder / "calls.jsonl").unlink()
  looking = "squeue --noheader --array '--format=%F %K' --jobs=17\n"
  assert queued(tmp_path, dry_run=True)[0] == looking
  printed, _, _ = slurm("cancel", f"--folder={tmp_path / 'sweep'}", "--dry_run")
  assert printed == f"{looking}scancel 17\n"
  printed, _, _ = array(tmp_path, "--wait", "--dry_run")
  assert printed.startswith(looking) and not fake.calls()
  shutil.copy(tmp_path / "sweep/slurm/0.job", tmp_path / "sweep/slurm/1.job")
  subprocess.run(["bash", "-c", printed.splitlines()[-1]], check=True)
  assert fake.calls() == [["scontrol", "--oneliner", "show", "job", "17"]]


def test_secrets_are_passed_by_name(fake, tmp_path, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "hf_not_to_be_seen")
  assert "hf_not" not in submit(tmp_path, "--env=HF_TOKEN", "--dry_run")[0]
  assert submit(tmp_path, "--env=HF_TOKEN", "--env=HOME")[2] == 0
  assert "--export=HF_TOKEN,HOME" in flags(tmp_path / "run")
  assert "hf_not" not in json.dumps(fake.calls())
  for path in (tmp_path / "run").rglob("*.*"):
    assert "hf_not" not in path.read_text()


def test_the_whole_environment_is_passed_where_it_is_asked_for(fake, tmp_path):
  assert submit(tmp_path, "--env=ALL")[2] == 0
  assert "--export=ALL" in flags(tmp_path / "run")


def test_trials_are_tasks_of_an_array(fake, tmp_path):
  _, err, code = array(tmp_path, "--max_parallel=3")
  assert code == 0, err
  assert {"--array=0-1%3", f"--output={tmp_path}/sweep/slurm/%A_%a.log"} <= flags(tmp_path / "sweep")
  text = script(tmp_path / "sweep")
  assert f"arguments=(train --config=gpt:debug '--config.x=a b' --workdir={tmp_path}/sweep/lr=1)" in text
  assert "arguments=(train --config=gpt --workdir=gs://b/lr=2)" in text
  assert fake.calls() == [["sbatch", "--parsable", f"{tmp_path}/sweep/slurm/0.sh"]]


def queued(home, folder="sweep", dry_run=False):
  return slurm("queued", f"--folder={home / folder}", *(["--dry_run"] if dry_run else []))


def test_what_is_queued_is_known_by_its_name(fake, tmp_path):
  assert queued(tmp_path) == ("", "", 0) and not fake.calls()
  array(tmp_path)
  fake.says("squeue", "17 1\n16 0\n")
  assert queued(tmp_path) == ("lr=2\n", "", 0)
  assert fake.calls("squeue") == [["squeue", "--noheader", "--array", "--format=%F %K", "--jobs=17"]]
  fake.says("sbatch", "18;cluster\n")
  fake.says("squeue", "")
  assert array(tmp_path)[2] == 0
  fake.says("squeue", "18 0\n17 1\n")
  assert queued(tmp_path)[0] == "lr=2\nlr=1\n"
  fake.says("squeue", "", "slurm_load_jobs error: Invalid job id specified\n", 1)
  assert queued(tmp_path) == ("", "", 0)
  fake.says("squeue", "17 1\n17 0\n")
  assert slurm("cancel", f"--folder={tmp_path / 'sweep'}")[2] == 0
  assert fake.calls("scancel") == [["scancel", "17"]]


def test_a_queue_that_does_not_answer_is_not_an_empty_one(fake, tmp_path):
  array(tmp_path)
  fake.says("squeue", "", "slurm_load_jobs error: Unable to contact slurm controller\n", 1)
  for out, err, code in (queued(tmp_path), array(tmp_path), slurm("cancel", f"--folder={tmp_path / 'sweep'}")):
    assert (out, code) == ("", UNSETTLED) and "squeue does not say what is queued" in err
  assert len(fake.calls("sbatch")) == 1 and not fake.calls("scancel")


def test_what_is_queued_is_not_submitted_again(fake, tmp_path):
  submit(tmp_path)
  fake.says("squeue", "17 N/A\n")
  assert queued(tmp_path, "run")[0] == "run\n"
  _, err, code = submit(tmp_path)
  assert code == UNSETTLED and "run is still in the queue as job 17" in err and len(fake.calls("sbatch")) == 1


def test_a_refused_submission_leaves_nothing_queued(fake, tmp_path):
  fake.says("sbatch", "", "sbatch: error: invalid partition specified: p\n", 1)
  _, err, code = submit(tmp_path, "--partition=p")
  assert code == UNSETTLED and "invalid partition" in err and "slurm.py: `sbatch --parsable" in err
  assert queued(tmp_path, "run") == ("", "", 0)


def test_a_job_that_cannot_be_looked_at_has_no_exit_code(fake, tmp_path):
  fake.says("scontrol", "", "slurm_load_jobs error: Unable to contact slurm controller\n", 1)
  _, err, code = submit(tmp_path, "--wait", "--poll=0")
  assert code == UNSETTLED and "what has become of job 17" in err


def test_without_slurm_nothing_is_settled(fake, tmp_path, monkeypatch):
  (fake.folder / "git").symlink_to(shutil.which("git"))
  (fake.folder / "sbatch").unlink()
  monkeypatch.setenv("PATH", str(fake.folder))
  _, err, code = submit(tmp_path)
  assert code == UNSETTLED and err.count("\n") == 1 and "sbatch was not found" in err


def job(state, code, task=""):
  return f"JobId=17 {task}JobName=run JobState={state} Reason=None Requeue=1 ExitCode={code}:0 RunTime=00:00:02\n"


@pytest.mark.parametrize(
  "said, expected",
  [
    (job("COMPLETED", 0), 0),
    (job("FAILED", 3), 3),
    (job("CANCELLED", 0), 1),
    (job("COMPLETED", 0) + job("FAILED", 2).replace("17", "18"), 2),
  ],
)
def test_waiting_gives_the_exit_code_of_the_job(fake, tmp_path, said, expected):
  fake.says("scontrol", said)
  assert submit(tmp_path, "--wait", "--poll=0")[2] == expected
  assert fake.calls("scontrol") == [["scontrol", "--oneliner", "show", "job", "17"]]


def test_the_end_of_a_job_is_waited_for(fake, tmp_path):
  fake.says("scontrol", job("PENDING", 0))
  command = [sys.executable, ROOT / "launch/slurm.py", "submit", f"--workdir={tmp_path / 'run'}", f"--venv={VENV}"]
  process = subprocess.Popen([*command, "--wait", "--poll=0.05", "--", "train"], stdout=subprocess.PIPE, text=True)
  while len(fake.calls("scontrol")) < 3:
    assert process.poll() is None
    time.sleep(0.05)
  fake.says("scontrol", job("COMPLETED", 0))
  assert process.wait(10) == 0


@pytest.mark.parametrize(
  "code, state, again",
  [
    (0, "RUNNING", False),
    (2, "RUNNING", False),
    (1, "RUNNING", False),
    (137, "RUNNING", False),
    (130, "RUNNING", True),  # the end of the time limit, or a preemption: SLURM thinks that it runs
    (143, "RUNNING", True),
    (130, "COMPLETING", False),  # cancelled, or already queued again by SLURM
    (130, "CANCELLED", False),
  ],
)
def test_only_what_was_interrupted_is_queued_again(fake, tmp_path, monkeypatch, code, state, again):
  array(tmp_path)
  fake.says("srun", "training\n", "", code)
  fake.says("squeue", f"{state}\n")
  own = {"JOB_ID": "17", "ARRAY_JOB_ID": "17", "ARRAY_TASK_ID": "1", "JOB_NODELIST": "n1", "RESTART_COUNT": "2"}
  for name, value in own.items():
    monkeypatch.setenv(f"SLURM_{name}", value)
  assert subprocess.run(["bash", "-c", script(tmp_path / "sweep")]).returncode == code
  told = ["scontrol", "requeue", "17_1"]  # 17 alone would be the whole array
  assert fake.calls("scontrol") == ([told] if again else [])
  llmjax = [str(VENV / "bin" / "llmjax"), "train", "--config=gpt", "--workdir=gs://b/lr=2"]
  assert fake.calls("srun") == [["srun", "--export=ALL", "--kill-on-bad-exit=1", *llmjax]]
  log = (tmp_path / "sweep" / "lr=2" / "log.txt").read_text()
  assert log.startswith("-- job 17_1 on n1, start 3\ntraining\n") and ("queued again" in log) == again


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_pass_shellcheck(fake, tmp_path):
  submit(tmp_path, "--nodes=2", "--cpus_per_task=4")
  array(tmp_path)
  paths = [tmp_path / "run" / "slurm" / "0.sh", tmp_path / "sweep" / "slurm" / "0.sh"]
  done = subprocess.run(["shellcheck", *paths], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  "flags, command, said",
  [
    ([], [], "nothing to run; put it behind --"),
    (["--nodes=0"], ["train"], "argument --nodes: 0 must be a number, 1 or more"),
    (["--node=2"], ["train"], "unrecognized arguments: --node=2"),
    (["--gpus_per_node=many"], ["train"], "many must be a number, or TYPE:NUMBER such as a100:8"),
    (["--gpus_per_node=a:8", "--processes_per_node=2"], ["train"], "--processes_per_node=2 must be 1,"),
    (["--env=A=b"], ["train"], "--env=A must be the name of an environment variable alone"),
    (["--env=NOT_SET"], ["train"], "NOT_SET is not set here"),
    (["--env=A_TOKEN"], ["train", "--config.key=seen_by_all"], "the value of A_TOKEN stands in the command"),
    (["--venv=/nowhere"], ["train"], "no llmjax at /nowhere/bin/llmjax"),
    ([], ["train", "--fresh"], "--fresh would start anew whenever the job is queued again"),
  ],
)
def test_what_cannot_work_is_one_line(fake, tmp_path, monkeypatch, flags, command, said):
  monkeypatch.setenv("A_TOKEN", "seen_by_all")
  out, err, code = submit(tmp_path, *flags, command=command)
  assert (out, code) == ("", 2) and not fake.calls()
  assert err.startswith("slurm.py: ") and err.count("\n") == 1 and said in err


@pytest.mark.parametrize(
  "trials, said",
  [
    ([], "has no trials"),
    ([TRIALS[0], {"name": "b"}], ':2 must be {"name": ..., "workdir": ..., "arguments": ["train", ...]}'),
    ([TRIALS[0], TRIALS[0]], "two trials have the name lr=1; each needs its own"),
    ([TRIALS[0], {**TRIALS[0], "name": "b"}], "two trials have the workdir"),
  ],
)
def test_trials_that_cannot_be_are_one_line(fake, tmp_path, trials, said):
  _, err, code = array(tmp_path, trials=trials)
  assert code == 2 and err.count("\n") == 1 and said in err and not fake.calls()


def git(root, *words):
  command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *words]
  return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
  """Of the launcher, with a setup that only makes an empty `llmjax`."""
  root = tmp_path / "checkout"
  (root / "launch").mkdir(parents=True)
  for name in ("slurm.py", "command_line.py", "processes.py", "shipping.py"):
    shutil.copy(ROOT / "launch" / name, root / "launch")
  (root / "launch" / "setup.sh").write_text(
    'setup() (cd "$(dirname "${BASH_SOURCE[0]}")/.." && mkdir -p .venv/bin && echo "with:$1" >>.venv/bin/llmjax)\n'
  )
  for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=a"]):
    git(root, *words)
  return root


def test_code_is_shipped_once_and_run_from_there(fake, tmp_path, checkout):
  root, shared = checkout, tmp_path / "shared code"
  commit = git(root, "rev-parse", "HEAD")
  words = ["submit", f"--workdir={tmp_path / 'run'}", f"--ship={shared}", "--gpus_per_node=1"]
  assert slurm(*words, "--dry_run", "--", "train", root=root)[2] == 0 and not shared.exists()
  for _ in range(2):
    _, err, code = slurm(*words, "--", "train", root=root)
    assert code == 0, err
  assert (shared / commit / ".commit").read_text() == f"{commit}\n"
  assert (shared / commit / ".venv/bin/llmjax").read_text() == "with:cuda\n" * 2
  assert [path.name for path in shared.iterdir()] == [commit]
  assert f"llmjax='{shared}/{commit}/.venv/bin/llmjax'" in script(tmp_path / "run", 1)
  assert f"--chdir='{shared}/{commit}'" in flags(tmp_path / "run")
  (root / "launch" / "setup.sh").write_text("changed")
  _, err, code = slurm(*words, "--", "train", root=root)
  assert code == 2 and "uncommitted changes in launch/setup.sh" in err


@pytest.mark.parametrize("shipped", [False, True])
def test_the_log_says_where_a_checkout_has_moved_on(fake, tmp_path, monkeypatch, checkout, shipped):
  where = f"--ship={tmp_path / 'shared'}" if shipped else f"--venv={VENV}"
  assert slurm("submit", f"--workdir={tmp_path / 'run'}", where, "--", "train", root=checkout)[2] == 0
  monkeypatch.setenv("SLURM_JOB_ID", "17")
  monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
  log, said = tmp_path / "run" / "log.txt", []
  for _ in range(2):
    subprocess.run(["bash", "-c", script(tmp_path / "run")], check=True)
    said += [line for line in log.read_text().splitlines() if "submitted at" in line]
    git(checkout, "commit", "--quiet", "--allow-empty", "--message=b")
  before, after = git(checkout, "rev-parse", "HEAD~2", "HEAD~1").split()
  assert said == ([] if shipped else [f"-- job 17: submitted at {before}, runs {after}"])


# SLURM itself

DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIGURATION = """
ClusterName=llmjax
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
GetEnvTimeout=100
KillWait=60
NodeName=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
WAIT = 240  # seconds for what takes a few on an idle machine


def missing():
  """Why there can be no cluster here; empty where there can."""
  if not sys.platform.startswith("linux") or os.geteuid() != 0:
    return "a cluster of one's own needs Linux and root"
  if all(map(find, DAEMONS)):
    return ""
  if os.environ.get("LLMJAX_SLURM_TEST") != "install":
    return "SLURM is not installed; with LLMJAX_SLURM_TEST=install, Debian's slurm-wlm and munge are"
  if shutil.which("apt-get") is None:
    return "SLURM is not installed, and there is no apt-get"
  quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
  subprocess.run(["apt-get", "update", "-qq"], env=quiet, capture_output=True)
  command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "slurm-wlm", "munge"]
  done = subprocess.run(command, env=quiet, capture_output=True, text=True)
  return "" if done.returncode == 0 else f"SLURM cannot be installed: {done.stderr.strip()[-300:]}"


def find(daemon):
  return shutil.which(daemon, path=f"/usr/sbin{os.pathsep}{os.environ['PATH']}")


class Cluster:
  """A controller and a node on this machine, which live in `folder`."""

  def __init__(self, folder):
    self.folder, self.configuration = folder, folder / "slurm.conf"
    self.daemons = {}
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    with socket.socket() as one, socket.socket() as other:
      for each in (one, other):
        each.bind(("127.0.0.1", 0))
      ports = [each.getsockname()[1] for each in (one, other)]
    self.configuration.write_text(CONFIGURATION.format(folder=folder, ports=ports))
    for name in ("state", "spool"):
      (folder / name).mkdir()

  def start(self, name, *words):
    with open(self.folder / f"{name}.out", "ab") as out:
      self.daemons[name] = subprocess.Popen([find(name), *words], stdout=out, stderr=out)

  def up(self):
    files = [f"--{name}-file={self.folder / name}" for name in ("key", "pid", "seed", "log")]
    self.start("munged", "--foreground", f"--socket={self.folder / 'munge.socket'}", *files)
    wait_for(lambda: (self.folder / "munge.socket").exists())
    self.start("slurmctld", "-D", "-f", str(self.configuration))
    self.start_node()

  def start_node(self):
    self.start("slurmd", "-D", "-N", "localhost", "-f", str(self.configuration))
    wait_for(lambda: self.ask("sinfo", "--noheader", "--format=%T").strip() in ("idle", "mixed", "allocated"))

  def ask(self, *words):
    return subprocess.run(words, capture_output=True, text=True).stdout

  def kill_node(self):
    """All that runs there at once, as when the power goes: stopped first, nothing can tell of another's end."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
      for process in self.of_node():
        with contextlib.suppress(ProcessLookupError):
          os.kill(process, number)

  def of_node(self):
    """The processes of the node: its daemons, known by their log since they overwrite their environment, and jobs."""
    for folder in Path("/proc").glob("[0-9]*"):
      with contextlib.suppress(OSError):
        variables = set((folder / "environ").read_bytes().decode(errors="replace").split("\0"))
        opened = {os.readlink(link) for link in (folder / "fd").iterdir()}
        job = {f"SLURM_CONF={self.configuration}", "SLURMD_NODENAME=localhost"} <= variables
        if job or str(self.folder / "slurmd.log") in opened:
          yield int(folder.name)

  def down(self):
    self.kill_node()
    for daemon in self.daemons.values():
      daemon.terminate()
    for daemon in self.daemons.values():
      with contextlib.suppress(subprocess.TimeoutExpired):
        daemon.wait(2)
      daemon.kill()
      daemon.wait()


def wait_for(holds):
  deadline = time.monotonic() + WAIT
  while not holds():
    assert time.monotonic() < deadline, f"not within {WAIT} s"
    time.sleep(0.1)


@pytest.fixture
def cluster(monkeypatch):
  reason = missing()
  if reason:
    pytest.skip(reason)
  folder = Path(tempfile.mkdtemp(prefix="llmjax_slurm_"))
  folder.chmod(0o755)  # munge's clients go through it
  monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
  made = Cluster(folder)
  try:
    made.up()
    yield made
  except BaseException:
    for log in sorted(folder.glob("*.log")):
      print(f"-- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
    raise
  finally:
    made.down()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def settings(tmp_path, monkeypatch):
  """Flags that pass what the tests have set for JAX to jobs."""
  own = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "2",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "LLMJAX_CACHE": str(tmp_path / "cache"),
  }
  for name, value in own.items():
    monkeypatch.setenv(name, value)
  return [f"--venv={VENV}", *(f"--env={name}" for name in own)]


def train(home, steps, *more):
  return [
    *("train", f"--config=gpt:text={home / 't.txt'},debug", f"--config.total_steps={steps}", "--config.batch_size=8"),
    *("--config.evals={}", "--config.checkpoint.best=none", "--config.log.tensorboard=false", *more),
  ]


def log_of(workdir):
  return (workdir / "log.txt").read_text() if (workdir / "log.txt").exists() else ""


def starts(workdir):
  return re.findall(r"^-- job .*, start (\d+)$", log_of(workdir), re.MULTILINE)


def logged(workdir):
  return (workdir / metrics.CURVES).exists() and "train/loss" in (workdir / metrics.CURVES).read_text()


def resumed(workdir, total):
  """The step at which a run went on, after which it came to its end."""
  [step] = re.findall(rf"resuming .* at ([\d,]+)/{total:,}", log_of(workdir))
  assert f"is finished at {total:,} steps" in log_of(workdir)
  return int(step.replace(",", ""))


def loss(workdir):
  return metrics.read(workdir)["train/loss"]


@pytest.mark.slow
def test_real_slurm_queues_again_and_runs_go_on(cluster, settings, tmp_path):
  """A sweep of a trial that fails, one that is cancelled and one that is interrupted; then two processes whose node
  dies."""
  home = tmp_path / "a b"
  home.mkdir()
  (tmp_path / "t.txt").write_text("\n".join(f"{i}: the quick brown fox jumps over {i * 37 % 101}." for i in range(300)))
  total = 300
  usual = train(tmp_path, total, "--config.log.every=5", "--config.checkpoint.every=none")
  sweep = {
    "wrong": [*usual, "--config.optim.learning=1"],
    "cancelled": train(tmp_path, 10**6, "--config.checkpoint.every=none"),
    "told": usual,  # the last, whose number is that of the array
  }
  (home / "trials.jsonl").write_text(
    "".join(json.dumps({"name": n, "workdir": str(home / n), "arguments": a}) + "\n" for n, a in sweep.items())
  )
  words = ["array", f"--commands={home / 'trials.jsonl'}", f"--folder={home}", "--max_parallel=3"]
  _, err, code = slurm(*words, *settings)
  assert code == 0, err
  assert queued(tmp_path, "a b")[0].split() == list(sweep)
  [number] = [path.read_text().strip() for path in (home / "slurm").glob("*.job")]
  wait_for(lambda: logged(home / "told"))
  cluster.ask("scancel", "--signal=TERM", f"{number}_2")  # as at the end of the time limit: only the tasks hear it
  wait_for(lambda: logged(home / "cancelled"))
  assert "cancelled" in queued(tmp_path, "a b")[0].split()
  cluster.ask("scancel", f"{number}_1")

  # Meanwhile, what is to be expected of two processes.
  alone = train(tmp_path, 12, "--config.log.every=1", "--config.checkpoint.every=4")
  alone += ["--config.mesh.data=4", "--config.mesh.fsdp=1"]
  subprocess.run(
    [str(VENV / "bin" / "llmjax"), *alone, f"--workdir={home / 'one'}"],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"},
    stdout=subprocess.DEVNULL,
    check=True,
  )
  wait_for(lambda: not queued(tmp_path, "a b")[0])
  assert 0 < resumed(home / "told", total) < total and starts(home / "told") == ["1", "2"]
  assert "is queued again" in log_of(home / "told")
  assert starts(home / "wrong") == starts(home / "cancelled") == ["1"]
  assert "is queued again" not in log_of(home / "wrong") and "learning" in log_of(home / "wrong")
  assert "interrupted at" in log_of(home / "cancelled") and "is queued again" not in log_of(home / "cancelled")
  steps = list(loss(home / "told")[0])
  assert steps == sorted(set(steps)) and steps[-1] == total

  command = [sys.executable, str(ROOT / "launch/slurm.py"), "submit", f"--workdir={home / 'two'}", *settings]
  waiting = subprocess.Popen([*command, "--processes_per_node=2", "--wait", "--poll=1", "--", *alone])
  try:
    wait_for(lambda: list((home / "two" / "checkpoints").glob("4/*")) or waiting.poll() is not None)
    cluster.kill_node()
    # SLURM finds out by itself after SlurmdTimeout, here 300 seconds.
    cluster.ask("scontrol", "update", "NodeName=localhost", "State=DOWN", "Reason=power")
    cluster.start_node()
    assert waiting.wait(WAIT) == 0, log_of(home / "two")
  finally:
    waiting.kill()
  assert starts(home / "two") == ["1", "2"] and resumed(home / "two", 12) in (4, 8)
  np.testing.assert_array_equal(loss(home / "two")[0], loss(home / "one")[0])
  np.testing.assert_allclose(loss(home / "two")[1], loss(home / "one")[1], rtol=1e-5)


SWEEP = """
from configs import gpt
from llmjax.trials import Sweep, vary

def get_config(arg=None):
  config = gpt.get_config("text={text},debug")
  config.total_steps, config.batch_size = 300, 8
  config.evals = {{}}
  config.checkpoint.update({{"best": None, "every": None}})
  config.log.update({{"every": 5, "tensorboard": False}})
  return config

def get_sweep():
  return Sweep(vary("optim.lr", [1e-3, 3e-3]), metric="train/loss", x="optim.lr")
"""


@pytest.mark.slow
def test_real_slurm_runs_a_sweep(cluster, settings, tmp_path):
  """Two trials, one of which is told to end: both come to their end, and the same command has nothing left to do."""
  (tmp_path / "t.txt").write_text("\n".join(f"{i}: the quick brown fox jumps over {i * 37 % 101}." for i in range(300)))
  (tmp_path / "rates.py").write_text(SWEEP.format(text=tmp_path / "t.txt"))
  home = tmp_path / "a sweep"
  command = [VENV / "bin" / "llmjax", "sweep", f"--config={tmp_path / 'rates.py'}", f"--workdir={home}"]
  command += ["--launcher=slurm", "--max_parallel=2", f"--launcher_flags={shlex.join(settings)}"]
  trials = [home / "lr=0.001", home / "lr=0.003"]
  sweep = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  try:
    wait_for(lambda: logged(trials[0]) or sweep.poll() is not None)
    [number] = [path.read_text().strip() for path in (home / "slurm").glob("*.job")]
    cluster.ask("scancel", "--signal=TERM", f"{number}_0")
    said, _ = sweep.communicate(timeout=WAIT)
  finally:
    sweep.kill()
  assert sweep.returncode == 0, said + log_of(trials[0])
  assert 0 < resumed(trials[0], 300) < 300 and [starts(trial) for trial in trials] == [["1", "2"], ["1"]]
  rows = list(csv.DictReader(open(home / "results.csv")))
  assert [(row["state"], row["step"]) for row in rows] == [("finished", "300")] * 2
  assert all(float(row["seconds"]) > 1 for row in rows)
  again = subprocess.run(command, capture_output=True, text=True)
  assert again.returncode == 0 and "0 to run" in again.stdout
  assert len(list((home / "slurm").glob("*.job"))) == 1

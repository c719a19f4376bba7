"""launch/slurm.py against programs that stand in for SLURM's; slurm_cluster_test.py runs it with SLURM itself."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launchers import EXIT_UNKNOWN, ROOT, assert_one_line_error, run_script

VENV = Path(sys.prefix)
# Append the call to calls.jsonl and answer with the next of the answers in NAME.json; the last one repeats.
FAKE = r"""#!{python} -SE
import json, os, sys
folder, name = os.path.split(sys.argv[0])
with open(f"{folder}/calls.jsonl", "a") as calls:
  calls.write(json.dumps([name, *sys.argv[1:]]) + "\n")
answers = [["", "", 0]]
if os.path.exists(f"{folder}/{name}.json"):
  with open(f"{folder}/{name}.json") as file:
    answers = json.load(file)
if len(answers) > 1:
  with open(f"{folder}/{name}.json", "w") as file:
    json.dump(answers[1:], file)
out, err, code = answers[0]
print(out, end="")
print(err, end="", file=sys.stderr)
sys.exit(code)
"""
TRIALS = [
  {"name": "lr=1", "workdir": "{home}/sweep/lr=1", "arguments": ["train", "--config=gpt:debug", "--config.x=a b"]},
  {"name": "lr=2", "workdir": "{home}/sweep/lr=2", "arguments": ["train", "--config=gpt", "--workdir=gs://b/lr=2"]},
]


class Fake:
  """Stand-ins for SLURM's programs on the PATH."""

  def __init__(self, folder):
    self.folder = folder
    for name in ("sbatch", "squeue", "scancel", "scontrol", "srun"):
      (folder / name).write_text(FAKE.replace("{python}", sys.executable))
      (folder / name).chmod(0o755)
    self.set_answer("sbatch", "17\n")

  def set_answer(self, name, out="", err="", code=0):
    self.set_answers(name, (out, err, code))

  def set_answers(self, name, *answers):
    """Set what a program prints, writes to stderr and returns, call by call."""
    (self.folder / f"{name}.json").write_text(json.dumps(answers))

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
  """Run launch/slurm.py; return its standard output, standard error and exit code."""
  code, out, err = run_script(root / "launch" / "slurm.py", *words)
  return out, err, code


def submit(home, *flags, command=("train", "--config=gpt:debug")):
  return slurm("submit", f"--workdir={home / 'run'}", f"--venv={VENV}", *flags, "--", *command)


def array(home, *flags, trials=TRIALS):
  lines = [json.dumps(trial).replace("{home}", str(home)) + "\n" for trial in trials]
  (home / "trials.jsonl").write_text("".join(lines))
  return slurm("array", f"--commands={home / 'trials.jsonl'}", f"--folder={home / 'sweep'}", f"--venv={VENV}", *flags)


def batch_script(folder, number=0):
  return (folder / "slurm" / f"{number}.sh").read_text()


def sbatch_flags(folder):
  return {line.removeprefix("#SBATCH ") for line in batch_script(folder).splitlines() if line.startswith("#SBATCH ")}


def test_flags_become_flags_of_sbatch(fake, tmp_path):
  given = ["--time=1:00:00", "--partition=p", "--account=a", "--qos=q", "--constraint=c", "--mem=8G"]
  sizes = ["--nodes=2", "--gpus_per_node=h100:4", "--processes_per_node=4", "--cpus_per_task=7"]
  out, err, code = submit(tmp_path, *given, *sizes, "--name=two words", "--sbatch=--exclusive", "--sbatch=--hint=x")
  assert code == 0, err
  assert out.startswith("job 17, ")
  assert sbatch_flags(tmp_path / "run") == {
    *("--time=1:00:00", "--partition=p", "--account=a", "--qos=q", "--constraint=c", "--mem=8G"),
    *("--nodes=2", "--gpus-per-node=h100:4", "--ntasks-per-node=4", "--cpus-per-task=7"),
    *("--job-name='two words'", "--exclusive", "--hint=x", "--export=NONE", f"--chdir={Path.cwd()}"),
    *("--requeue", "--open-mode=append", "--signal=TERM@120", f"--output={tmp_path}/run/slurm/%j.log"),
  }
  assert "options=(--export=ALL --kill-on-bad-exit=1 --cpus-per-task=7 --label)" in batch_script(tmp_path / "run")
  assert fake.calls() == [["sbatch", "--parsable", f"{tmp_path}/run/slurm/0.sh"]]


def test_submit_records_the_commit(fake, tmp_path):
  assert submit(tmp_path)[2] == 0
  about = json.loads((tmp_path / "run" / "slurm" / "0.json").read_text())
  assert re.fullmatch(r"[0-9a-f]{40}(-dirty-[0-9a-f]{8})?", about["commit"]) and about["names"] == ["run"]
  assert f"commit={about['commit']}\n" in batch_script(tmp_path / "run")


def test_dry_run_changes_nothing_and_pasted_submits(fake, tmp_path):
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


def test_env_variables_are_passed_by_name(fake, tmp_path, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "hf_not_to_be_seen")
  assert "hf_not" not in submit(tmp_path, "--env=HF_TOKEN", "--dry_run")[0]
  assert submit(tmp_path, "--env=HF_TOKEN", "--env=HOME")[2] == 0
  assert "--export=HF_TOKEN,HOME" in sbatch_flags(tmp_path / "run")
  assert "hf_not" not in json.dumps(fake.calls())
  for path in (tmp_path / "run").rglob("*.*"):
    assert "hf_not" not in path.read_text()


def test_env_all_passes_the_whole_environment(fake, tmp_path):
  assert submit(tmp_path, "--env=ALL")[2] == 0
  assert "--export=ALL" in sbatch_flags(tmp_path / "run")


def test_array_has_a_task_for_each_trial(fake, tmp_path):
  _, err, code = array(tmp_path, "--max_parallel=3")
  assert code == 0, err
  assert {"--array=0-1%3", f"--output={tmp_path}/sweep/slurm/%A_%a.log"} <= sbatch_flags(tmp_path / "sweep")
  text = batch_script(tmp_path / "sweep")
  assert f"arguments=(train --config=gpt:debug '--config.x=a b' --workdir={tmp_path}/sweep/lr=1)" in text
  assert "arguments=(train --config=gpt --workdir=gs://b/lr=2)" in text
  assert fake.calls() == [["sbatch", "--parsable", f"{tmp_path}/sweep/slurm/0.sh"]]


def queued(home, folder="sweep", dry_run=False):
  return slurm("queued", f"--folder={home / folder}", *(["--dry_run"] if dry_run else []))


def test_queued_without_jobs_calls_nothing(fake, tmp_path):
  assert queued(tmp_path) == ("", "", 0) and not fake.calls()


def test_queued_prints_names_of_pending_and_running_trials(fake, tmp_path):
  array(tmp_path)
  fake.set_answer("squeue", "17 1\n16 0\n")
  assert queued(tmp_path) == ("lr=2\n", "", 0)
  assert fake.calls("squeue") == [["squeue", "--noheader", "--array", "--format=%F %K", "--jobs=17"]]
  fake.set_answer("sbatch", "18;cluster\n")
  fake.set_answer("squeue", "")
  assert array(tmp_path)[2] == 0
  fake.set_answer("squeue", "18 0\n17 1\n")
  assert queued(tmp_path)[0] == "lr=2\nlr=1\n"


def test_queued_omits_jobs_that_slurm_has_forgotten(fake, tmp_path):
  array(tmp_path)
  fake.set_answer("squeue", "", "slurm_load_jobs error: Invalid job id specified\n", 1)
  assert queued(tmp_path) == ("", "", 0)


def test_cancel_cancels_each_queued_job_once(fake, tmp_path):
  array(tmp_path)
  fake.set_answer("squeue", "17 1\n17 0\n")
  assert slurm("cancel", f"--folder={tmp_path / 'sweep'}")[2] == 0
  assert fake.calls("scancel") == [["scancel", "17"]]


def test_unreachable_queue_is_not_taken_for_an_empty_one(fake, tmp_path):
  array(tmp_path)
  fake.set_answer("squeue", "", "slurm_load_jobs error: Unable to contact slurm controller\n", 1)
  for out, err, code in (queued(tmp_path), array(tmp_path), slurm("cancel", f"--folder={tmp_path / 'sweep'}")):
    assert (out, code) == ("", EXIT_UNKNOWN) and "squeue does not say what is queued" in err
  assert len(fake.calls("sbatch")) == 1 and not fake.calls("scancel")


def test_queued_run_is_not_submitted_again(fake, tmp_path):
  submit(tmp_path)
  fake.set_answer("squeue", "17 N/A\n")
  assert queued(tmp_path, "run")[0] == "run\n"
  _, err, code = submit(tmp_path)
  assert code == EXIT_UNKNOWN and "run is still in the queue as job 17" in err and len(fake.calls("sbatch")) == 1


def test_refused_submission_leaves_nothing_queued(fake, tmp_path):
  fake.set_answer("sbatch", "", "sbatch: error: invalid partition specified: p\n", 1)
  _, err, code = submit(tmp_path, "--partition=p")
  assert code == EXIT_UNKNOWN and "invalid partition" in err and "slurm.py: `sbatch --parsable" in err
  assert queued(tmp_path, "run") == ("", "", 0)


def test_wait_without_answer_leaves_the_state_unknown(fake, tmp_path):
  fake.set_answer("scontrol", "", "slurm_load_jobs error: Unable to contact slurm controller\n", 1)
  _, err, code = submit(tmp_path, "--wait", "--poll=0")
  assert code == EXIT_UNKNOWN and "what has become of job 17" in err


def test_missing_sbatch_is_one_line(fake, tmp_path, monkeypatch):
  (fake.folder / "git").symlink_to(shutil.which("git"))
  (fake.folder / "sbatch").unlink()
  monkeypatch.setenv("PATH", str(fake.folder))
  _, err, code = submit(tmp_path)
  assert code == EXIT_UNKNOWN and err.count("\n") == 1 and "sbatch was not found" in err


def job(state, code, task=""):
  return f"JobId=17 {task}JobName=run JobState={state} Reason=None Requeue=1 ExitCode={code}:0 RunTime=00:00:02\n"


@pytest.mark.parametrize(
  "answer, expected",
  [
    (job("COMPLETED", 0), 0),
    (job("FAILED", 3), 3),
    (job("CANCELLED", 0), 1),
    (job("COMPLETED", 0) + job("FAILED", 2).replace("17", "18"), 2),
  ],
)
def test_wait_returns_the_exit_code_of_the_job(fake, tmp_path, answer, expected):
  fake.set_answer("scontrol", answer)
  assert submit(tmp_path, "--wait", "--poll=0")[2] == expected
  assert fake.calls("scontrol") == [["scontrol", "--oneliner", "show", "job", "17"]]


def test_wait_polls_until_the_job_has_ended(fake, tmp_path):
  fake.set_answers("scontrol", *[(job("PENDING", 0), "", 0)] * 2, (job("COMPLETED", 0), "", 0))
  assert submit(tmp_path, "--wait", "--poll=0")[2] == 0
  assert len(fake.calls("scontrol")) == 3


def test_script_as_its_own_process_submits(fake, tmp_path):
  command = [sys.executable, ROOT / "launch" / "slurm.py", "submit", f"--workdir={tmp_path / 'run'}", f"--venv={VENV}"]
  done = subprocess.run([*command, "--", "train"], capture_output=True, text=True, timeout=60)
  assert done.returncode == 0 and done.stdout.startswith("job 17, "), done.stderr


@pytest.mark.parametrize(
  "code, state, again",
  [
    (0, "RUNNING", False),
    (2, "RUNNING", False),
    (1, "RUNNING", False),
    (137, "RUNNING", False),
    (130, "RUNNING", True),  # the time limit or a preemption; for SLURM it is running
    (143, "RUNNING", True),
    (130, "COMPLETING", False),  # cancelled, or already requeued by SLURM
    (130, "CANCELLED", False),
  ],
)
def test_batch_script_requeues_only_interrupted_jobs(fake, tmp_path, monkeypatch, code, state, again):
  array(tmp_path)
  fake.set_answer("srun", "training\n", "", code)
  fake.set_answer("squeue", f"{state}\n")
  own = {"JOB_ID": "17", "ARRAY_JOB_ID": "17", "ARRAY_TASK_ID": "1", "JOB_NODELIST": "n1", "RESTART_COUNT": "2"}
  for name, value in own.items():
    monkeypatch.setenv(f"SLURM_{name}", value)
  assert subprocess.run(["bash", "-c", batch_script(tmp_path / "sweep")]).returncode == code
  requeue = ["scontrol", "requeue", "17_1"]  # 17 alone would be the whole array
  assert fake.calls("scontrol") == ([requeue] if again else [])
  llmjax = [str(VENV / "bin" / "llmjax"), "train", "--config=gpt", "--workdir=gs://b/lr=2"]
  assert fake.calls("srun") == [["srun", "--export=ALL", "--kill-on-bad-exit=1", *llmjax]]
  log = (tmp_path / "sweep" / "lr=2" / "log.txt").read_text()
  assert log.startswith("-- job 17_1 on n1, start 3\ntraining\n") and ("queued again" in log) == again


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_batch_scripts_pass_shellcheck(fake, tmp_path):
  submit(tmp_path, "--nodes=2", "--cpus_per_task=4")
  array(tmp_path)
  paths = [tmp_path / "run" / "slurm" / "0.sh", tmp_path / "sweep" / "slurm" / "0.sh"]
  done = subprocess.run(["shellcheck", *paths], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  "flags, command, message",
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
def test_wrong_flags_are_one_line_and_exit_code_2(fake, tmp_path, monkeypatch, flags, command, message):
  monkeypatch.setenv("A_TOKEN", "seen_by_all")
  out, err, code = submit(tmp_path, *flags, command=command)
  assert (out, code) == ("", 2) and not fake.calls()
  assert err.count("\n") == 1 and message in err
  assert_one_line_error(err, "slurm.py")


@pytest.mark.parametrize(
  "trials, message",
  [
    ([], "has no trials"),
    ([TRIALS[0], {"name": "b"}], ':2 must be {"name": ..., "workdir": ..., "arguments": ["train", ...]}'),
    ([TRIALS[0], TRIALS[0]], "two trials have the name lr=1; each needs its own"),
    ([TRIALS[0], {**TRIALS[0], "name": "b"}], "two trials have the workdir"),
  ],
)
def test_wrong_trials_are_one_line_and_exit_code_2(fake, tmp_path, trials, message):
  _, err, code = array(tmp_path, trials=trials)
  assert code == 2 and err.count("\n") == 1 and message in err and not fake.calls()


def git(root, *words):
  command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *words]
  return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
  """A git checkout of the launcher, whose setup makes a `llmjax` that is a text file."""
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


def test_ship_unpacks_the_commit_once_and_runs_from_it(fake, tmp_path, checkout):
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
  assert f"llmjax='{shared}/{commit}/.venv/bin/llmjax'" in batch_script(tmp_path / "run", 1)
  assert f"--chdir='{shared}/{commit}'" in sbatch_flags(tmp_path / "run")
  (root / "launch" / "setup.sh").write_text("changed")
  _, err, code = slurm(*words, "--", "train", root=root)
  assert code == 2 and "uncommitted changes in launch/setup.sh" in err


@pytest.mark.parametrize("shipped", [False, True])
def test_log_reports_a_checkout_that_has_changed(fake, tmp_path, monkeypatch, checkout, shipped):
  where = f"--ship={tmp_path / 'shared'}" if shipped else f"--venv={VENV}"
  assert slurm("submit", f"--workdir={tmp_path / 'run'}", where, "--", "train", root=checkout)[2] == 0
  monkeypatch.setenv("SLURM_JOB_ID", "17")
  monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
  log, reports = tmp_path / "run" / "log.txt", []
  for _ in range(2):
    subprocess.run(["bash", "-c", batch_script(tmp_path / "run")], check=True)
    reports += [line for line in log.read_text().splitlines() if "submitted at" in line]
    git(checkout, "commit", "--quiet", "--allow-empty", "--message=b")
  before, after = git(checkout, "rev-parse", "HEAD~2", "HEAD~1").split()
  assert reports == ([] if shipped else [f"-- job 17: submitted at {before}, runs {after}"])

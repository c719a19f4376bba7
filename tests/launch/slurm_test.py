"""launch/slurm.py with stand-ins for SLURM's programs; slurm_cluster_test.py runs it with SLURM itself."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fake_slurm import FakeSlurm, run_queued, run_slurm_script
from tests.support.launchers import EXIT_UNKNOWN, ROOT, assert_one_line_error, make_checkout, run_git

VENV = Path(sys.prefix)
TRIALS = [
  {"name": "lr=1", "workdir": "{home}/sweep/lr=1", "arguments": ["train", "--config=gpt:debug", "--config.x=a b"]},
  {"name": "lr=2", "workdir": "{home}/sweep/lr=2", "arguments": ["train", "--config=gpt", "--workdir=gs://b/lr=2"]},
]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
  for name in list(os.environ):
    if name.startswith("SLURM_"):
      monkeypatch.delenv(name)
  (tmp_path / "bin").mkdir()
  monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
  return FakeSlurm(tmp_path / "bin")


def submit(home, *flags, command=("train", "--config=gpt:debug")):
  return run_slurm_script("submit", f"--workdir={home / 'run'}", f"--venv={VENV}", *flags, "--", *command)


def array(home, *flags, trials=TRIALS):
  lines = [json.dumps(trial).replace("{home}", str(home)) + "\n" for trial in trials]
  (home / "trials.jsonl").write_text("".join(lines))
  return run_slurm_script(
    "array", f"--commands={home / 'trials.jsonl'}", f"--folder={home / 'sweep'}", f"--venv={VENV}", *flags
  )


def batch_script(folder, number=0):
  return (folder / "slurm" / f"{number}.sh").read_text()


def sbatch_flags(folder):
  return {line.removeprefix("#SBATCH ") for line in batch_script(folder).splitlines() if line.startswith("#SBATCH ")}


def test_flags_become_flags_of_sbatch(slurm, tmp_path):
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
  assert slurm.calls() == [["sbatch", "--parsable", f"{tmp_path}/run/slurm/0.sh"]]


def test_submit_records_the_commit(slurm, tmp_path):
  assert submit(tmp_path)[2] == 0
  about = json.loads((tmp_path / "run" / "slurm" / "0.json").read_text())
  assert re.fullmatch(r"[0-9a-f]{40}(-dirty-[0-9a-f]{8})?", about["commit"]) and about["names"] == ["run"]
  assert f"commit={about['commit']}\n" in batch_script(tmp_path / "run")


def test_dry_run_changes_nothing_and_pasted_submits(slurm, tmp_path):
  for number, submitting in enumerate(
    (lambda *flags: submit(tmp_path, *flags), lambda *flags: array(tmp_path, *flags))
  ):
    folder = tmp_path / ("run", "sweep")[number]
    printed, _, code = submitting("--dry_run")
    assert code == 0 and not folder.exists() and not slurm.calls()
    subprocess.run(["bash", "-c", printed], check=True)
    pasted = {path.name: path.read_text() for path in (folder / "slurm").iterdir()}
    shutil.rmtree(folder)
    assert submitting()[2] == 0
    assert pasted == {path.name: path.read_text() for path in (folder / "slurm").iterdir()}
    assert pasted["0.job"] == "17\n" and slurm.calls()[0] == slurm.calls()[1]
    (slurm.folder / "calls.jsonl").unlink()
  squeue = "squeue --noheader --array '--format=%F %K' --jobs=17\n"
  assert run_queued(tmp_path, dry_run=True)[0] == squeue
  printed, _, _ = run_slurm_script("cancel", f"--folder={tmp_path / 'sweep'}", "--dry_run")
  assert printed == f"{squeue}scancel 17\n"
  printed, _, _ = array(tmp_path, "--wait", "--dry_run")
  assert printed.startswith(squeue) and not slurm.calls()
  shutil.copy(tmp_path / "sweep/slurm/0.job", tmp_path / "sweep/slurm/1.job")
  subprocess.run(["bash", "-c", printed.splitlines()[-1]], check=True)
  assert slurm.calls() == [["scontrol", "--oneliner", "show", "job", "17"]]


def test_env_variables_are_passed_by_name(slurm, tmp_path, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "hf_not_to_be_seen")
  assert "hf_not" not in submit(tmp_path, "--env=HF_TOKEN", "--dry_run")[0]
  assert submit(tmp_path, "--env=HF_TOKEN", "--env=HOME")[2] == 0
  assert "--export=HF_TOKEN,HOME" in sbatch_flags(tmp_path / "run")
  assert "hf_not" not in json.dumps(slurm.calls())
  for path in (tmp_path / "run").rglob("*.*"):
    assert "hf_not" not in path.read_text()


def test_env_all_passes_the_whole_environment(slurm, tmp_path):
  assert submit(tmp_path, "--env=ALL")[2] == 0
  assert "--export=ALL" in sbatch_flags(tmp_path / "run")


def test_array_has_a_task_for_each_trial(slurm, tmp_path):
  _, err, code = array(tmp_path, "--max_parallel=3")
  assert code == 0, err
  assert {"--array=0-1%3", f"--output={tmp_path}/sweep/slurm/%A_%a.log"} <= sbatch_flags(tmp_path / "sweep")
  text = batch_script(tmp_path / "sweep")
  assert f"arguments=(train --config=gpt:debug '--config.x=a b' --workdir={tmp_path}/sweep/lr=1)" in text
  assert "arguments=(train --config=gpt --workdir=gs://b/lr=2)" in text
  assert slurm.calls() == [["sbatch", "--parsable", f"{tmp_path}/sweep/slurm/0.sh"]]


def test_queued_without_jobs_calls_nothing(slurm, tmp_path):
  assert run_queued(tmp_path) == ("", "", 0) and not slurm.calls()


def test_queued_prints_names_of_pending_and_running_trials(slurm, tmp_path):
  array(tmp_path)
  slurm.set_answer("squeue", "17 1\n16 0\n")
  assert run_queued(tmp_path) == ("lr=2\n", "", 0)
  assert slurm.calls("squeue") == [["squeue", "--noheader", "--array", "--format=%F %K", "--jobs=17"]]
  slurm.set_answer("sbatch", "18;cluster\n")
  slurm.set_answer("squeue", "")
  assert array(tmp_path)[2] == 0
  slurm.set_answer("squeue", "18 0\n17 1\n")
  assert run_queued(tmp_path)[0] == "lr=2\nlr=1\n"


def test_queued_omits_jobs_that_slurm_has_forgotten(slurm, tmp_path):
  array(tmp_path)
  slurm.set_answer("squeue", "", "slurm_load_jobs error: Invalid job id specified\n", 1)
  assert run_queued(tmp_path) == ("", "", 0)


def test_cancel_cancels_each_queued_job_once(slurm, tmp_path):
  array(tmp_path)
  slurm.set_answer("squeue", "17 1\n17 0\n")
  assert run_slurm_script("cancel", f"--folder={tmp_path / 'sweep'}")[2] == 0
  assert slurm.calls("scancel") == [["scancel", "17"]]


def test_unreachable_queue_is_not_taken_for_an_empty_one(slurm, tmp_path):
  array(tmp_path)
  slurm.set_answer("squeue", "", "slurm_load_jobs error: Unable to contact slurm controller\n", 1)
  for out, err, code in (
    run_queued(tmp_path),
    array(tmp_path),
    run_slurm_script("cancel", f"--folder={tmp_path / 'sweep'}"),
  ):
    assert (out, code) == ("", EXIT_UNKNOWN) and "squeue: does not report what is queued" in err
  assert len(slurm.calls("sbatch")) == 1 and not slurm.calls("scancel")


def test_queued_run_is_not_submitted_again(slurm, tmp_path):
  submit(tmp_path)
  slurm.set_answer("squeue", "17 N/A\n")
  assert run_queued(tmp_path, "run")[0] == "run\n"
  _, err, code = submit(tmp_path)
  assert code == EXIT_UNKNOWN and "run: is still in the queue as job 17" in err and len(slurm.calls("sbatch")) == 1


def test_refused_submission_leaves_nothing_queued(slurm, tmp_path):
  slurm.set_answer("sbatch", "", "sbatch: error: invalid partition specified: p\n", 1)
  _, err, code = submit(tmp_path, "--partition=p")
  assert code == EXIT_UNKNOWN and "invalid partition" in err and "slurm.py: `sbatch --parsable" in err
  assert run_queued(tmp_path, "run") == ("", "", 0)


def test_wait_without_answer_leaves_the_state_unknown(slurm, tmp_path):
  slurm.set_answer("scontrol", "", "slurm_load_jobs error: Unable to contact slurm controller\n", 1)
  _, err, code = submit(tmp_path, "--wait", "--poll=0")
  assert code == EXIT_UNKNOWN and "how job 17 ended" in err


def test_missing_sbatch_is_one_line(slurm, tmp_path, monkeypatch):
  (slurm.folder / "git").symlink_to(shutil.which("git"))
  (slurm.folder / "sbatch").unlink()
  monkeypatch.setenv("PATH", str(slurm.folder))
  _, err, code = submit(tmp_path)
  assert code == EXIT_UNKNOWN and err.count("\n") == 1 and "sbatch: not found" in err


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
def test_wait_returns_the_exit_code_of_the_job(slurm, tmp_path, answer, expected):
  slurm.set_answer("scontrol", answer)
  assert submit(tmp_path, "--wait", "--poll=0")[2] == expected
  assert slurm.calls("scontrol") == [["scontrol", "--oneliner", "show", "job", "17"]]


def test_wait_polls_until_the_job_has_ended(slurm, tmp_path):
  slurm.set_answers("scontrol", *[(job("PENDING", 0), "", 0)] * 2, (job("COMPLETED", 0), "", 0))
  assert submit(tmp_path, "--wait", "--poll=0")[2] == 0
  assert len(slurm.calls("scontrol")) == 3


def test_script_as_its_own_process_submits(slurm, tmp_path):
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
def test_batch_script_requeues_only_interrupted_jobs(slurm, tmp_path, monkeypatch, code, state, again):
  array(tmp_path)
  slurm.set_answer("srun", "training\n", "", code)
  slurm.set_answer("squeue", f"{state}\n")
  variables = {"JOB_ID": "17", "ARRAY_JOB_ID": "17", "ARRAY_TASK_ID": "1", "JOB_NODELIST": "n1", "RESTART_COUNT": "2"}
  for name, value in variables.items():
    monkeypatch.setenv(f"SLURM_{name}", value)
  assert subprocess.run(["bash", "-c", batch_script(tmp_path / "sweep")]).returncode == code
  requeue = ["scontrol", "requeue", "17_1"]  # 17 alone would be the whole array
  assert slurm.calls("scontrol") == ([requeue] if again else [])
  llmjax = [str(VENV / "bin" / "llmjax"), "train", "--config=gpt", "--workdir=gs://b/lr=2"]
  assert slurm.calls("srun") == [["srun", "--export=ALL", "--kill-on-bad-exit=1", *llmjax]]
  log = (tmp_path / "sweep" / "lr=2" / "log.txt").read_text()
  assert log.startswith("-- job 17_1 on n1, start 3\ntraining\n") and ("queued again" in log) == again


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_batch_scripts_pass_shellcheck(slurm, tmp_path):
  submit(tmp_path, "--nodes=2", "--cpus_per_task=4")
  array(tmp_path)
  paths = [tmp_path / "run" / "slurm" / "0.sh", tmp_path / "sweep" / "slurm" / "0.sh"]
  done = subprocess.run(["shellcheck", *paths], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  "flags, command, message",
  [
    ([], [], "nothing to run. Put"),
    (["--nodes=0"], ["train"], "argument --nodes: must be a positive integer, got 0"),
    (["--node=2"], ["train"], "unrecognized arguments: --node=2"),
    (["--gpus_per_node=many"], ["train"], "must be a number, or TYPE:NUMBER such as a100:8, got many"),
    (["--gpus_per_node=a:8", "--processes_per_node=2"], ["train"], "--processes_per_node: must be 1 "),
    (["--env=A=b"], ["train"], "--env=A: must be only the name of an environment variable"),
    (["--env=NOT_SET"], ["train"], "NOT_SET is not set in this shell"),
    (["--env=A_TOKEN"], ["train", "--config.key=seen_by_all"], "the command contains the value of A_TOKEN"),
    (["--venv=/nowhere"], ["train"], "no llmjax at /nowhere/bin/llmjax"),
    ([], ["train", "--fresh"], "--fresh would start from scratch whenever the job is queued again"),
  ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(slurm, tmp_path, monkeypatch, flags, command, message):
  monkeypatch.setenv("A_TOKEN", "seen_by_all")
  out, err, code = submit(tmp_path, *flags, command=command)
  assert (out, code) == ("", 2) and not slurm.calls()
  assert err.count("\n") == 1 and message in err
  assert_one_line_error(err, "slurm.py")


@pytest.mark.parametrize(
  "trials, message",
  [
    ([], "has no trials"),
    ([TRIALS[0], {"name": "b"}], ':2: must be {"name": ..., "workdir": ..., "arguments": ["train", ...]}'),
    ([TRIALS[0], TRIALS[0]], "two trials have the name lr=1. Each needs its own"),
    ([TRIALS[0], {**TRIALS[0], "name": "b"}], "two trials have the workdir"),
  ],
)
def test_wrong_trials_are_one_line_and_exit_code_2(slurm, tmp_path, trials, message):
  _, err, code = array(tmp_path, trials=trials)
  assert code == 2 and err.count("\n") == 1 and message in err and not slurm.calls()


@pytest.fixture
def checkout(tmp_path):
  """A git checkout of the launchers, whose setup makes a `llmjax` that is a text file."""
  setup = (
    'setup() (cd "$(dirname "${BASH_SOURCE[0]}")/.." && mkdir -p .venv/bin && echo "with:$1" >>.venv/bin/llmjax)\n'
  )
  return make_checkout(tmp_path / "checkout", setup)


def test_ship_unpacks_the_commit_once_and_runs_from_it(slurm, tmp_path, checkout):
  root, shared = checkout, tmp_path / "shared code"
  commit = run_git(root, "rev-parse", "HEAD")
  words = ["submit", f"--workdir={tmp_path / 'run'}", f"--ship={shared}", "--gpus_per_node=1"]
  assert run_slurm_script(*words, "--dry_run", "--", "train", root=root)[2] == 0 and not shared.exists()
  for _ in range(2):
    _, err, code = run_slurm_script(*words, "--", "train", root=root)
    assert code == 0, err
  assert (shared / commit / ".commit").read_text() == f"{commit}\n"
  assert (shared / commit / ".venv/bin/llmjax").read_text() == "with:cuda\n" * 2
  assert [path.name for path in shared.iterdir()] == [commit]
  assert f"llmjax='{shared}/{commit}/.venv/bin/llmjax'" in batch_script(tmp_path / "run", 1)
  assert f"--chdir='{shared}/{commit}'" in sbatch_flags(tmp_path / "run")
  (root / "launch" / "setup.sh").write_text("changed")
  _, err, code = run_slurm_script(*words, "--", "train", root=root)
  assert code == 2 and "uncommitted changes in launch/setup.sh" in err


@pytest.mark.parametrize("shipped", [False, True])
def test_log_reports_a_checkout_that_has_changed(slurm, tmp_path, monkeypatch, checkout, shipped):
  where = f"--ship={tmp_path / 'shared'}" if shipped else f"--venv={VENV}"
  assert run_slurm_script("submit", f"--workdir={tmp_path / 'run'}", where, "--", "train", root=checkout)[2] == 0
  monkeypatch.setenv("SLURM_JOB_ID", "17")
  monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
  log, reports = tmp_path / "run" / "log.txt", []
  for _ in range(2):
    subprocess.run(["bash", "-c", batch_script(tmp_path / "run")], check=True)
    reports += [line for line in log.read_text().splitlines() if "submitted at" in line]
    run_git(checkout, "commit", "--quiet", "--allow-empty", "--message=b")
  before, after = run_git(checkout, "rev-parse", "HEAD~2", "HEAD~1").split()
  assert reports == ([] if shipped else [f"-- job 17: submitted at {before}, runs {after}"])

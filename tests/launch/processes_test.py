"""launch/processes.py: environments, output, exit codes and signals of its processes.

`tests/support/fake_llmjax.py` stands in for `llmjax`, except in the last test.
"""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmjax.telemetry.curves import METRICS_FILE
from tests.support.launchers import LAUNCH, ROOT, run_script, write_program

FAKE_LLMJAX = ROOT / "tests" / "support" / "fake_llmjax.py"


@pytest.fixture
def venv(tmp_path, monkeypatch):
  for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "CUDA_VISIBLE_DEVICES"):
    monkeypatch.delenv(name, raising=False)
  script = tmp_path / "venv" / "bin" / "llmjax"
  script.parent.mkdir(parents=True)
  write_program(script, f'exec {sys.executable} {FAKE_LLMJAX} "$@"')
  return tmp_path / "venv"


def launch(*words):
  command = [sys.executable, str(LAUNCH / "processes.py"), *map(str, words)]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen(command, start_new_session=True, **pipes)


def finish(process, wait=30):
  try:
    return (*process.communicate(timeout=wait), process.returncode)
  finally:
    process.kill()


def run(*words):
  """Return standard output, standard error and exit code."""
  return finish(launch(*words))


def test_processes_get_coordinator_index_and_devices(venv):
  out, _, code = run("--processes=3", "--devices=2", f"--venv={venv}", "--", 0, 0, 0)
  assert code == 0
  [(first, port)] = re.findall(r"^(0 127\.0\.0\.1:(\d+) 3 cpu 2 -)$", out, re.MULTILINE)
  for index in (1, 2):
    assert f"[{index}] {index} {first[2:]}" in out and f"[{index}] to stderr" in out
  assert int(port) > 1023


def test_output_of_process_0_has_no_prefix(venv):
  out, err, _ = run("--processes=2", f"--venv={venv}", "--", 0, 0)
  assert err == "to stderr\n"
  assert next(line for line in out.splitlines() if not line.startswith("[1] ")).startswith("0 127.0.0.1:")


@pytest.mark.parametrize("visible, gpus", [(None, ["0", "1"]), ("4,6,7", ["4", "6"])])
def test_gpus_gives_each_process_one_visible_device(venv, monkeypatch, visible, gpus):
  if visible:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
  out, _, _ = run("--processes=2", "--gpus", f"--venv={venv}", "--", 0, 0)
  visible_gpus = {line.split()[-6]: line.split()[-1] for line in out.splitlines() if "127.0.0.1" in line}
  assert visible_gpus == dict(zip("01", gpus))


@pytest.mark.parametrize("actions, code", [(("wait", 3), 3), ((2, "wait"), 2), (("wait", "killed"), 137)])
def test_failed_process_ends_all_with_its_exit_code(venv, actions, code):
  out, _, ended = finish(launch_with_exit_timeout(0.5, "--processes=2", f"--venv={venv}", "--", *actions), wait=20)
  assert ended == code
  assert "0 127.0.0.1:" in out


def launch_with_exit_timeout(seconds, *words):
  """Start the launcher with another time that the other processes have to end."""
  code = f"import sys; sys.path.insert(0, {str(LAUNCH)!r}); import processes; processes.EXIT_TIMEOUT = {seconds}; "
  words = [str(word) for word in words]
  return subprocess.Popen(
    [sys.executable, "-c", f"{code}sys.exit(processes.main({words!r}))"],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_reaches_every_process_once(venv, number):
  process = launch("--processes=2", f"--venv={venv}", "--", "wait", "wait")
  lines = [process.stdout.readline(), process.stdout.readline()]
  while not all(any(line.startswith(start) for line in lines) for start in ("0 ", "[1] 1 ")):
    lines.append(process.stdout.readline())
  os.killpg(process.pid, number)  # as a terminal does
  out, _, code = finish(process)
  assert code == 130 and not [line for line in lines if "terminal" in line]
  assert sorted(line for line in out.splitlines() if "received" in line) == [
    f"[1] received {number.name}",
    f"received {number.name}",
  ]


def test_dry_run_output_pasted_into_a_shell_runs(venv):
  out, _, code = run("--processes=2", "--devices=1", f"--venv={venv}", "--dry_run", "--", 0, 0, "two words")
  assert code == 0 and "received" not in out
  pasted = subprocess.run(["bash", "-c", out], capture_output=True, text=True, timeout=30)
  assert sorted(re.findall(r"^\d", pasted.stdout, re.MULTILINE)) == ["0", "1"]


@pytest.mark.parametrize(
  "words, message",
  [
    (["--processes=0", "--", "train"], "argument --processes: must be a positive integer, got 0"),
    (["--proc=2", "--", "train"], "required: --processes"),
    (["--processes=2"], "nothing to run. Put"),
    (["--processes=2", "--devices=2", "--gpus", "--", "train"], "not allowed with argument"),
    (["--processes=2", "--venv=/nowhere", "--", "train"], "no llmjax at /nowhere/bin/llmjax"),
  ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(words, message):
  code, out, err = run_script(LAUNCH / "processes.py", *words)
  assert code == 2 and not out
  assert err.startswith("processes.py: ") and err.count("\n") == 1 and message in err


def test_fewer_visible_gpus_than_processes_is_refused(venv, monkeypatch):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
  _, err, code = run("--processes=2", "--gpus", f"--venv={venv}", "--", 0, 0)
  assert code == 2 and "CUDA_VISIBLE_DEVICES=0 shows 1" in err


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.py")), ids=lambda path: path.name)
def test_launch_scripts_parse_as_python_3_9(path):
  ast.parse(path.read_text(), feature_version=(3, 9))


@pytest.mark.full("processes")
def test_ctrl_c_saves_the_run_of_two_real_processes(tmp_path, monkeypatch):
  """The processes have two simulated devices each."""
  (tmp_path / "t.txt").write_text("\n".join(f"{i}: the quick brown fox jumps over a dog." for i in range(300)))
  monkeypatch.setenv("LLMJAX_CACHE", str(tmp_path / "cache"))
  command = [
    *("train", f"--config=gpt:text={tmp_path / 't.txt'},debug", f"--workdir={tmp_path / 'run'}", "--config.evals={}"),
    *("--config.batch_size=4", "--config.total_steps=100000", "--config.log.every=1", "--config.log.tensorboard=false"),
    "--config.checkpoint.best=none",
  ]
  venv = Path(sys.executable).parent.parent
  process = launch("--processes=2", "--devices=2", f"--venv={venv}", "--", *command)
  curves, deadline = tmp_path / "run" / METRICS_FILE, time.monotonic() + 120
  while not (curves.exists() and curves.read_text().count("train/loss") >= 2):
    assert process.poll() is None and time.monotonic() < deadline, finish(process)
    time.sleep(0.1)
  os.killpg(process.pid, signal.SIGINT)
  _, err, code = finish(process, wait=60)
  assert code == 130 and "interrupted at" in err
  assert json.loads((tmp_path / "run" / "config.json").read_text())["total_steps"] == 100000
  assert list((tmp_path / "run").glob("checkpoints/*"))

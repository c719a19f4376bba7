"""Run the scripts of launch/ in the test process.

They need only the standard library and state that differs between runs is in the environment and in files, so that a
new interpreter for each call would cost time and test nothing more.
"""

import contextlib
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
EXIT_UNKNOWN = 75  # the exit code of a launcher that does not know how the run ends


def run_script(path, *words) -> tuple[int, str, str]:
  """Run `python3 PATH WORDS...` in this process.

  Modules of the script's folder are imported anew and forgotten afterwards, since folders of several checkouts have
  modules of the same names.

  Returns:
    The exit code, standard output and standard error, those of child processes included.
  """
  siblings = {sibling.stem for sibling in Path(path).parent.glob("*.py")}
  saved = sys.argv, sys.path, {name: sys.modules.pop(name) for name in siblings & sys.modules.keys()}
  handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  sys.argv, sys.path = [str(path), *map(str, words)], [str(Path(path).parent), *sys.path]
  signal.signal(signal.SIGINT, signal.default_int_handler)
  code = 0
  try:
    with _captured() as texts:
      try:
        runpy.run_path(str(path), run_name="__main__")
      except SystemExit as ended:
        code = ended.code or 0
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
    for name in siblings:
      sys.modules.pop(name, None)
    sys.argv, sys.path, modules = saved
    sys.modules.update(modules)
  return (code, *texts)


@contextlib.contextmanager
def _captured():
  """Redirect the file descriptors 1 and 2, which child processes inherit; yield a list that gets their texts."""
  texts: list[str] = []
  streams, descriptors = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
  with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
    try:
      for stream, number, file in zip(streams, (1, 2), (output, errors)):
        stream.flush()
        os.dup2(file.fileno(), number)
      sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
      yield texts
    finally:
      sys.stdout.flush(), sys.stderr.flush()
      sys.stdout, sys.stderr = streams
      for number, descriptor in zip((1, 2), descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
      for file in (output, errors):
        file.seek(0)
        texts.append(file.read().decode())


def write_program(path, text, interpreter="/bin/bash") -> None:
  """Write an executable script."""
  path.write_text(f"#!{interpreter}\n{text}\n")
  path.chmod(0o755)


def run_git(root, *words) -> str:
  """Run git in a folder, as a user that every machine has; return its output."""
  command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *words]
  return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def make_checkout(root, setup) -> Path:
  """Make a git checkout of the launchers with another `launch/setup.sh`; return its folder."""
  (root / "launch").mkdir(parents=True)
  for path in (*LAUNCH.glob("*.py"), LAUNCH / "tpu_worker.sh", LAUNCH / "Dockerfile"):
    shutil.copy(path, root / "launch")
  shutil.copy(ROOT / "setup.py", root)
  (root / "launch" / "setup.sh").write_text(setup)
  for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=all"]):
    run_git(root, *words)
  return root


def assert_one_line_error(errors, script) -> None:
  """Check that the last line of `errors` is the script's message, without a traceback."""
  assert "Traceback" not in errors
  assert errors.splitlines()[-1].startswith(f"{script}: ")

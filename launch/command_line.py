"""Exit codes, messages, child processes and retries of the launchers; README.md explains the exit codes."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
MAX_PAUSE = 60.0  # seconds between two queries
MAX_TRIES = 20  # of a connection in a row


class OutcomeUnknown(Exception):
  """How the run ends is unknown: it has not started, or it is still running."""


def run_main(main: Callable[[Sequence[str]], int], interrupted: str) -> NoReturn:
  """Run `main` with the arguments of this process and exit with its result; SIGTERM acts as Ctrl-C.

  Args:
    main: Raises ValueError or OSError for a user error (exit code 2), and OutcomeUnknown (exit code 75).
    interrupted: State after a Ctrl-C (exit code 130) and how to resume.
  """
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    sys.exit(main(sys.argv[1:]))
  except (ValueError, OSError) as error:
    message, code = str(error), 2
  except OutcomeUnknown as error:
    message, code = str(error), os.EX_TEMPFAIL
  except KeyboardInterrupt:
    message, code = f"interrupted; {interrupted}", 130
  print_status(message)
  sys.exit(code)


def print_status(text: str) -> None:
  """Print one line to standard error, after the name of the script."""
  print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)


def run_program(words: Sequence[str], fix: str, **options: Any) -> subprocess.CompletedProcess[str]:
  """Run a command with options of subprocess.run; raise OutcomeUnknown with `fix` if the program does not exist."""
  try:
    return subprocess.run(words, text=True, **options)
  except FileNotFoundError:
    raise OutcomeUnknown(f"{words[0]}: not found on the PATH. {fix}") from None


def pauses(start: float, tries: int | None = None) -> Iterator[float]:
  """Yield `tries` (default: unlimited) pauses in seconds, which grow from `start` to MAX_PAUSE."""
  indices = itertools.count() if tries is None else range(tries)
  return (min(start * 1.5 ** min(index, 50), max(start, MAX_PAUSE)) for index in indices)


def find_llmjax(venv: str | None = None) -> str:
  """Return the path of `llmjax`: of the environment `venv`, else of ROOT/.venv, else on the PATH."""
  path = Path(venv or ROOT / ".venv").absolute() / "bin" / "llmjax"
  found = str(path) if path.exists() else None if venv else shutil.which("llmjax")
  if found is None:
    raise ValueError(f"no llmjax at {path}{'' if venv else ' or on the PATH'}. `bash launch/setup.sh` creates .venv")
  return found

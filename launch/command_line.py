"""What the command lines of the launchers share: what goes wrong is one line and an exit code, see README.md."""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

LONGEST_PAUSE = 60.0  # seconds between two looks


class Unsettled(Exception):
  """How the run ends is not known: it has not begun, or goes on."""


class Parser(argparse.ArgumentParser):
  """Shows texts as they are written, takes flags by their whole names, says what is wrong in one line."""

  def __init__(self, **given: Any):
    super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **given})

  def error(self, message: str) -> NoReturn:
    raise ValueError(f"{message}; see --help")


def positive(text: str) -> int:
  if not text.isdecimal() or not int(text):
    raise argparse.ArgumentTypeError(f"{text} must be a number, 1 or more")
  return int(text)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Own arguments, and what stands behind the first `--`."""
  cut = argv.index("--") if "--" in argv else len(argv)
  return list(argv[:cut]), list(argv[cut + 1 :])


def pauses(start: float) -> Iterator[float]:
  """Seconds, growing to LONGEST_PAUSE."""
  return (min(start * 1.5 ** min(index, 50), max(start, LONGEST_PAUSE)) for index in itertools.count())


def serve(main: Callable[[Sequence[str]], int], interrupted: str) -> NoReturn:
  """Ends this process with what `main` makes of its arguments; SIGTERM is a Ctrl-C.

  Args:
    main: raises ValueError or OSError for what is wrong, and Unsettled.
    interrupted: what is true after a Ctrl-C, and how to go on.
  """
  script = Path(sys.argv[0]).name
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    sys.exit(main(sys.argv[1:]))
  except (ValueError, OSError) as error:
    print(f"{script}: {error}", file=sys.stderr)
    sys.exit(2)
  except Unsettled as error:
    print(f"{script}: {error}", file=sys.stderr)
    sys.exit(os.EX_TEMPFAIL)
  except KeyboardInterrupt:
    print(f"{script}: interrupted; {interrupted}", file=sys.stderr)
    sys.exit(130)

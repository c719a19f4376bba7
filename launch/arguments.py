"""Command-line arguments of the launchers: the parser, and flags and checks that several of them share."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from command_line import ROOT


class LauncherParser(argparse.ArgumentParser):
  """Parser that takes only whole names of flags, keeps the lines of its help and raises ValueError."""

  def __init__(self, **options: Any):
    super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options})

  def error(self, message: str) -> NoReturn:
    raise ValueError(f"{message}. See --help")


def positive_int(text: str) -> int:
  """Parse the value of a flag that counts something."""
  if not text.isdecimal() or not int(text):
    raise argparse.ArgumentTypeError(f"must be a positive integer, got {text}")
  return int(text)


def extra_names(text: str) -> list[str]:
  """Parse names of setup.py's extras, separated by commas; pip would ignore an unknown one."""
  nodes = ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
  values = [node.value for node in nodes if isinstance(node, ast.keyword) and node.arg == "extras_require"]
  names = [ast.literal_eval(key) for value in values if isinstance(value, ast.Dict) for key in value.keys if key]
  for name in text.split(","):
    if name not in names:
      raise argparse.ArgumentTypeError(f"must be one or more of {', '.join(names)}, got {name}")
  return text.split(",")


# {flag: keywords of add_argument}
SHARED_FLAGS: dict[str, dict[str, Any]] = {
  "dirty": {"action": "store_true", "help": "ship uncommitted changes of tracked files"},
  "dry_run": {"action": "store_true", "help": "print every command and file, and run nothing"},
  "env": {
    "action": "append",
    "default": [],
    "metavar": "NAME",
    "help": "environment variable of this shell to pass to the run; repeatable",
  },
  "extra": {
    "type": extra_names,
    "default": [],
    "metavar": "NAME[,NAME]",
    "help": "further extras of setup.py to install, such as wandb",
  },
  "follow": {"action": "store_true", "help": "print the log as it grows"},
  "max_restarts": {"type": int, "default": 100, "help": "restarts of a preempted run (default: %(default)s)"},
  "name": {"required": True, "help": "name of the run in the cloud; several slices are NAME-0, NAME-1, ..."},
  "no_follow": {"dest": "follow", "action": "store_false", "help": "wait without printing the log"},
  "nodes": {"type": positive_int, "default": 1, "metavar": "N", "help": "number of nodes (default: %(default)s)"},
  "poll": {"type": float, "metavar": "SECONDS", "help": "time between two queries (default: %(default)s)"},
  "service_account": {"help": "account of the run, with access to the bucket (default: the cloud's)"},
  "slices": {
    "type": positive_int,
    "default": 1,
    "metavar": "N",
    "help": "TPU slices that run as one (multislice) (default: %(default)s)",
  },
  "spot": {"action": "store_true", "help": "cheaper capacity that can be preempted; the run then resumes"},
  "venv": {"metavar": "DIR", "help": "environment of llmjax (default: .venv beside this folder, else the PATH)"},
}


def add_shared_flags(parser: argparse._ActionsContainer, *names: str, **changes: object) -> None:
  """Add flags of SHARED_FLAGS; `changes` replace their keywords of add_argument."""
  for name in names:
    parser.add_argument(f"--{name}", **{**SHARED_FLAGS[name], **changes})


def add_actions(
  parser: LauncherParser, actions: Mapping[str, tuple[Callable[[argparse.Namespace], int], str]]
) -> dict[str, LauncherParser]:
  """Add subcommands {name: (function, description)} with the flag --dry_run; return {name: parser}."""
  subparsers = parser.add_subparsers(dest="action", required=True, metavar="|".join(actions))
  parsers = {}
  for name, (_, about) in actions.items():
    parsers[name] = subparsers.add_parser(name, help=about, description=about, epilog=parser.epilog)
    add_shared_flags(parsers[name], "dry_run")
  return parsers


def parse_with_command(parser: LauncherParser, argv: Sequence[str]) -> argparse.Namespace:
  """Parse the launcher's own arguments; those after the first `--` become `arguments`, the command of llmjax."""
  index = argv.index("--") if "--" in argv else len(argv)
  options = parser.parse_args(argv[:index])
  options.arguments = list(argv[index + 1 :])
  return options


def check_command(arguments: Sequence[str], temporary_disk: str = "", alternative: str = "") -> None:
  """Raise ValueError if there is no llmjax command, or if it trains into a folder that is deleted.

  Args:
    arguments: Arguments of llmjax.
    temporary_disk: Why only a bucket survives the run; empty if folders survive.
    alternative: Another fix than a bucket.
  """
  if not arguments:
    raise ValueError(
      "nothing to run. Put llmjax's subcommand and flags after --, such as `-- train --config=gpt:size=nano`"
    )
  if temporary_disk and arguments[0] == "train" and not any(re.match(r"--workdir=gs://.", word) for word in arguments):
    raise ValueError(f"train: {temporary_disk}. Use --workdir=gs://BUCKET/... {alternative}".rstrip())


def check_name(name: str, max_length: int) -> None:
  """Raise ValueError if the cloud would refuse a name."""
  if not re.fullmatch(rf"[a-z]([a-z0-9-]{{0,{max_length - 2}}}[a-z0-9])?", name):
    raise ValueError(
      f"--name: must be at most {max_length} lower-case letters, digits and hyphens, which start with a letter and do "
      f"not end with a hyphen, got {name}"
    )

#!/usr/bin/env python3
"""What goes to other machines: the code as a clean git archive with its commit in `.commit`, secrets by name, extras.

  python3 launch/shipping.py --output=llmjax.tar.gz            # prints the commit
  python3 launch/shipping.py --output=llmjax.tar.gz --dirty    # the tracked files as they are

Shared by the launchers beside it; needs git, and nothing of llmjax.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, serve

ROOT = Path(__file__).resolve().parent.parent


def archive(root: Path, output: Path, dirty: bool = False) -> str:
  """Writes a .tar.gz of the commit that is checked out.

  Args:
    root: of the git checkout.
    dirty: whether tracked files with uncommitted changes are shipped as they are.
  Returns:
    the commit, or COMMIT-dirty-DIGEST where it says less than what was shipped.
  Raises:
    ValueError: not a git checkout, or changes without `dirty`.
  """
  commit, content = _pack(root, dirty)
  untracked = _names(_git(root, "ls-files", "--others", "--exclude-standard", "-z"))
  if untracked:
    print(f"{_few(untracked)} not shipped: not known to git (git add)", file=sys.stderr)
  with io.BytesIO(content) as buffer:
    with tarfile.open(fileobj=buffer, mode="a") as tar:
      text = f"{commit}\n".encode()
      member = tarfile.TarInfo(".commit")
      member.size = len(text)
      tar.addfile(member, io.BytesIO(text))
    output.write_bytes(gzip.compress(buffer.getvalue(), mtime=0))
  return commit


def commit(root: Path, dirty: bool = False) -> str:
  """What `archive` would return."""
  return _pack(root, dirty)[0]


def secrets(names: Sequence[str]) -> dict[str, str]:
  """The values of environment variables; ValueError where one is not set, or cannot be a line of a file."""
  for name in names:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
      raise ValueError(
        f"--env={name.split('=')[0]} must be the name of an environment variable alone: values on a command line can "
        f"be seen by others; export {name.split('=')[0]}=... and pass its name"
      )
    if name not in os.environ:
      raise ValueError(f"--env={name}: {name} is not set here; export it, or leave the flag out")
    if "\n" in os.environ[name]:
      raise ValueError(f"--env={name}: the value of {name} has several lines, and must be one")
  return {name: os.environ[name] for name in names}


def extras(text: str) -> list[str]:
  """Names of setup.py's extras with commas between, for argparse: pip would ignore one that is not there."""
  nodes = ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
  values = [node.value for node in nodes if isinstance(node, ast.keyword) and node.arg == "extras_require"]
  names = [ast.literal_eval(key) for value in values if isinstance(value, ast.Dict) for key in value.keys if key]
  for name in text.split(","):
    if name not in names:
      raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(names)}")
  return text.split(",")


def _pack(root: Path, dirty: bool) -> tuple[str, bytes]:
  """The commit and an uncompressed tar."""
  head = _git(root, "rev-parse", "HEAD").decode().strip()
  changed = _names(_git(root, "diff", "--name-only", "-z", "HEAD"))
  if not changed:
    return head, _git(root, "archive", "--format=tar", "HEAD")
  if not dirty:
    raise ValueError(f"uncommitted changes in {_few(changed)}; commit them, or ship them with --dirty")
  content = _tar(root, _names(_git(root, "ls-files", "-z")))
  return f"{head}-dirty-{hashlib.sha256(content).hexdigest()[:8]}", content


def _tar(root: Path, names: Sequence[str]) -> bytes:
  """Of files as they are, without times and owners, so that equal files give equal bytes."""

  def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member

  with io.BytesIO() as buffer:
    with tarfile.open(fileobj=buffer, mode="w") as tar:
      for name in sorted(names):
        if os.path.lexists(root / name):  # it may have been deleted
          tar.add(root / name, arcname=name, recursive=False, filter=plain)
    return buffer.getvalue()


def _names(output: bytes) -> list[str]:
  return [os.fsdecode(name) for name in output.split(b"\0") if name]


def _few(names: Sequence[str], count: int = 5) -> str:
  more = f" and {len(names) - count} more" if len(names) > count else ""
  return f"{', '.join(names[:count])}{more}"


def _git(root: Path, *words: str) -> bytes:
  try:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True)
  except FileNotFoundError:
    raise ValueError("code is shipped from a git checkout, and git is not installed; install git") from None
  if done.returncode:
    raise ValueError(
      f"{root} must be a git checkout with a commit, since that is what is shipped "
      f"({done.stderr.decode(errors='replace').strip().splitlines()[-1]}); clone the repository, or git init and commit"
    )
  return done.stdout


def main(words: Sequence[str]) -> int:
  parser = Parser(prog="shipping.py", description=__doc__)
  parser.add_argument("--output", type=Path, required=True, help="the .tar.gz to write")
  parser.add_argument("--root", type=Path, default=ROOT, help="of the checkout (this one)")
  parser.add_argument("--dirty", action="store_true", help="ship uncommitted changes of tracked files")
  options = parser.parse_args(words)
  print(archive(options.root, options.output, options.dirty))
  return 0


if __name__ == "__main__":
  serve(main, "nothing was shipped")

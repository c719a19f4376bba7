#!/usr/bin/env python3
"""Archive of the code, with its commit in `.commit`, and values of environment variables, for the other launchers.

  python3 launch/shipping.py --output=llmjax.tar.gz            # prints the commit
  python3 launch/shipping.py --output=llmjax.tar.gz --dirty    # with uncommitted changes of tracked files

Needs git; llmjax need not be installed.
"""

from __future__ import annotations

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

from arguments import LauncherParser, add_shared_flags
from command_line import ROOT, run_main


def write_archive(root: Path, output: Path, dirty: bool = False) -> str:
  """Write the commit that is checked out to a .tar.gz; report untracked files, which it does not contain.

  Args:
    root: Folder of the git checkout.
    output: File to write.
    dirty: Archive tracked files with their uncommitted changes, instead of refusing these.

  Returns:
    The commit; COMMIT-dirty-DIGEST if uncommitted changes are in the archive.

  Raises:
    ValueError: The folder is not a git checkout, or has changes and `dirty` is false.
  """
  commit, content = _pack_commit(root, dirty)
  untracked = _split_names(_run_git(root, "ls-files", "--others", "--exclude-standard", "-z"))
  if untracked:
    print(f"{_summarize(untracked)} not shipped: unknown to git (git add)", file=sys.stderr)
  with io.BytesIO(content) as buffer:
    with tarfile.open(fileobj=buffer, mode="a") as tar:
      text = f"{commit}\n".encode()
      member = tarfile.TarInfo(".commit")
      member.size = len(text)
      tar.addfile(member, io.BytesIO(text))
    output.write_bytes(gzip.compress(buffer.getvalue(), mtime=0))
  return commit


def commit_to_ship(root: Path, dirty: bool = False) -> str:
  """Return what `write_archive` would return."""
  return _pack_commit(root, dirty)[0]


def archive_command(output: str, dirty: bool) -> list[str]:
  """Return the command that writes an archive of this checkout."""
  return ["python3", str(ROOT / "launch" / "shipping.py"), f"--output={output}", *(["--dirty"] if dirty else [])]


def secret_values(names: Sequence[str]) -> dict[str, str]:
  """Return values of environment variables.

  Raises:
    ValueError: A variable is not set, or its value has several lines, which an environment file cannot have.
  """
  for name in names:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
      name = name.split("=")[0]
      raise ValueError(
        f"--env={name}: must be only the name of an environment variable, since others can read values on a command "
        f"line. Export {name}=... and pass its name"
      )
    if name not in os.environ:
      raise ValueError(f"--env={name}: {name} is not set in this shell. Export it or omit the flag")
    if "\n" in os.environ[name]:
      raise ValueError(f"--env={name}: the value of {name} has several lines. It must be one line")
  return {name: os.environ[name] for name in names}


def _pack_commit(root: Path, dirty: bool) -> tuple[str, bytes]:
  """Return the commit and an uncompressed tar."""
  head = _run_git(root, "rev-parse", "HEAD").decode().strip()
  changed = _split_names(_run_git(root, "diff", "--name-only", "-z", "HEAD"))
  if not changed:
    return head, _run_git(root, "archive", "--format=tar", "HEAD")
  if not dirty:
    raise ValueError(f"uncommitted changes in {_summarize(changed)}. Commit them or ship them with --dirty")
  content = _pack_files(root, _split_names(_run_git(root, "ls-files", "-z")))
  return f"{head}-dirty-{hashlib.sha256(content).hexdigest()[:8]}", content


def _pack_files(root: Path, names: Sequence[str]) -> bytes:
  """Return a tar without times and owners, so that equal files give equal bytes."""

  def without_metadata(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member

  with io.BytesIO() as buffer:
    with tarfile.open(fileobj=buffer, mode="w") as tar:
      for name in sorted(names):
        if os.path.lexists(root / name):  # a tracked file can be deleted
          tar.add(root / name, arcname=name, recursive=False, filter=without_metadata)
    return buffer.getvalue()


def _split_names(output: bytes) -> list[str]:
  return [os.fsdecode(name) for name in output.split(b"\0") if name]


def _summarize(names: Sequence[str], max_shown: int = 5) -> str:
  more = f" and {len(names) - max_shown} more" if len(names) > max_shown else ""
  return f"{', '.join(names[:max_shown])}{more}"


def _run_git(root: Path, *words: str) -> bytes:
  try:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True)
  except FileNotFoundError:
    raise ValueError("git: not found on the PATH, and code is shipped from a git checkout. Install git") from None
  if done.returncode:
    error = done.stderr.decode(errors="replace").strip().splitlines()[-1]
    raise ValueError(
      f"{root}: must be a git checkout with a commit, got: {error}. Clone the repository, or git init and commit"
    )
  return done.stdout


def main(argv: Sequence[str]) -> int:
  parser = LauncherParser(prog="shipping.py", description=__doc__)
  parser.add_argument("--output", type=Path, required=True, help="the .tar.gz to write")
  parser.add_argument("--root", type=Path, default=ROOT, help="folder of the checkout (default: this one)")
  add_shared_flags(parser, "dirty")
  options = parser.parse_args(argv)
  print(write_archive(options.root, options.output, options.dirty))
  return 0


if __name__ == "__main__":
  run_main(main, "no archive was written")

"""Mutation tests: plant one mistake in a copy of the package, and check that the tests named for it fail.

  python -m tests.support.mutants [NAME ...] [--list] [--all-tests NAME] [--output PATH]

The mistakes are in `mutant_list.py`. The harness copies the repository to a temporary folder per worker and runs, in a
process of its own, the tests of one mutant after the other there. Before that, all these tests have to pass unmutated.
Only a test that fails while it runs, or in a fixture, catches a mutant: a mutated file that cannot be imported is an
error of the mutant. The exit code is 1 if a mutant survives or has an error.

Compiled programs are cached as in the test suite (LLMJAX_TEST_CACHE), so that only mutated programs are compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REPORT, COPY = "LLMJAX_MUTANT_REPORT", "LLMJAX_MUTANT_COPY"  # environment of pytest in a copy
WORKERS = 2
TIMEOUT = 600.0  # seconds for the tests of one mutant
# The parts of the repository that tests read; not what runs have left beside them.
COPIED = (".ci", "configs", "docs", "experiments", "launch", "llmjax", "tests")
COPIED += (".gitignore", "LICENSE", "README.md", "pyproject.toml", "setup.py")

# Run at the start of every Python process in the copy, also of commands that tests start.
SITECUSTOMIZE = f"""
import importlib.util, os, sys
spec = importlib.util.find_spec("llmjax")
if spec is None or not spec.origin.startswith(os.environ["{COPY}"] + os.sep):
  sys.stderr.write(f"llmjax is {{spec and spec.origin}}, not the mutated copy\\n")
  sys.stderr.flush()
  os._exit(70)
"""


@dataclasses.dataclass(frozen=True)
class Mutant:
  """A mistake that a maintainer could make.

  Attributes:
    name: short, in kebab case.
    file: below llmjax/.
    before: source text that occurs once in the file.
    after: text that replaces it.
    tests: node ids of pytest that are expected to fail, cheapest first.
    effect: visible consequence for a user, if the name does not imply it.
  """

  name: str
  file: str
  before: str
  after: str
  tests: tuple[str, ...]
  effect: str = ""

  def apply(self, source: str) -> str:
    """Return the mutated source; raises ValueError if `before` does not occur exactly once."""
    count = source.count(self.before)
    if count != 1:
      raise ValueError(f"{self.name}: `before` occurs {count} times in llmjax/{self.file}, expected once")
    return source.replace(self.before, self.after)


@dataclasses.dataclass
class TestRun:
  """Outcome of one pytest process: node ids by outcome, and what prevented the tests from running."""

  passed: list[str] = dataclasses.field(default_factory=list)
  failed: list[str] = dataclasses.field(default_factory=list)
  errors: list[str] = dataclasses.field(default_factory=list)
  seconds: float = 0.0


@dataclasses.dataclass
class Result:
  """Outcome of one mutant."""

  mutant: str
  caught_by: list[str]
  missed_by: list[str]
  seconds: float
  error: str | None = None


# The pytest plugin in the copy (`-p tests.support.mutants`).


def _record(**entry: object) -> None:
  if REPORT in os.environ:
    with open(os.environ[REPORT], "a", encoding="utf-8") as file:
      file.write(json.dumps(entry) + "\n")


def pytest_collection_finish(session) -> None:
  """Check that the copy is what the tests import."""
  import llmjax

  if COPY in os.environ and not Path(llmjax.__file__).is_relative_to(os.environ[COPY]):
    _record(error=f"tests import {llmjax.__file__}, not the mutated copy")


def pytest_collectreport(report) -> None:
  if report.failed:
    _record(error=f"collection of {report.nodeid}: {str(report.longrepr).strip().splitlines()[-1]}")


def pytest_runtest_logreport(report) -> None:
  if report.failed and report.when in ("setup", "call"):
    _record(failed=report.nodeid)
  elif report.passed and report.when == "call":
    _record(passed=report.nodeid)


# Running.


def make_copy(folder: Path) -> Path:
  """Copy the repository to `folder`."""
  for name in COPIED:
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    elif (ROOT / name).exists():
      shutil.copy2(ROOT / name, folder / name)
  (folder / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
  return folder


def commit_copy(folder: Path) -> None:
  """Make a copy a git checkout, since launchers ship commits."""
  git = ["git", "-C", str(folder), "-c", "user.name=mutants", "-c", "user.email=mutants@localhost"]
  for command in (["init", "-q"], ["add", "--all"], ["commit", "-q", "--no-gpg-sign", "-m", "Mutant"]):
    subprocess.run([*git, *command], check=True)


def run_pytest(copy: Path, arguments: Sequence[str], *, timeout: float, write_bytecode: bool = False) -> TestRun:
  """Run pytest in a copy of the repository."""
  report, log = copy / ".mutant_report", copy / ".mutant_log"
  report.write_text("", encoding="utf-8")
  environment = {
    "LLMJAX_TEST_CACHE": str(ROOT / ".cache" / "jax"),
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(copy),
    REPORT: str(report),
    COPY: str(copy),
  }
  # Bytecode is identified by the time of its file in whole seconds and its size, which a mutation may not change.
  environment |= {} if write_bytecode else {"PYTHONDONTWRITEBYTECODE": "1"}
  command = [sys.executable, "-m", "pytest", "-p", "tests.support.mutants", "-p", "no:cacheprovider", "--tb=line"]
  start, test_run = time.monotonic(), TestRun()
  with open(log, "wb") as output:
    process = subprocess.Popen(
      [*command, *arguments], cwd=copy, env=environment, stdout=output, stderr=output, start_new_session=True
    )
    try:
      code = process.wait(timeout)
    except subprocess.TimeoutExpired:
      test_run.errors.append(f"no end after {timeout:.0f} seconds")
      code = 0
    finally:
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
  test_run.seconds = time.monotonic() - start
  for line in report.read_text(encoding="utf-8").splitlines():
    for outcome, value in json.loads(line).items():
      reported = getattr(test_run, "errors" if outcome == "error" else outcome)
      if value not in reported:  # with xdist, by the worker and by its controller
        reported.append(value)
  if code not in (0, 1) and not test_run.errors:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    lines = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
    test_run.errors.append(f"pytest exited with {code}: {'; '.join(lines)}")
  return test_run


def matching(test: str, node_ids: Iterable[str]) -> list[str]:
  """The node ids that a listed test selects: itself, and its parameters."""
  return [node for node in node_ids if node == test or node.startswith((f"{test}[", f"{test}::"))]


def check_unmutated(copies: Sequence[Path], tests: Iterable[str]) -> list[str]:
  """Run all listed tests on the unmutated package; return one line per test that did not pass."""
  shares: list[list[str]] = [[] for _ in copies]
  by_file: dict[str, list[str]] = {}
  for test in sorted(set(tests)):
    by_file.setdefault(test.split("::")[0], []).append(test)
  for each in sorted(by_file.values(), key=len, reverse=True):
    min(shares, key=len).extend(each)
  with ThreadPoolExecutor(len(copies)) as pool:
    run = lambda copy, share: run_pytest(  # noqa: E731
      copy, ["-m", "not full", *share], timeout=10 * TIMEOUT, write_bytecode=True
    )
    runs = list(pool.map(run, *zip(*((c, s) for c, s in zip(copies, shares) if s))))
  passed, failed = ([node for each in runs for node in getattr(each, kind)] for kind in ("passed", "failed"))
  problems = [error for each in runs for error in each.errors]
  for test in sorted(set(tests)):
    if matching(test, failed):
      problems.append(f"{test} fails without a mutant")
    elif not problems and not matching(test, passed):
      problems.append(f"{test} did not run: it is skipped, or only in the full tier")
  return problems


def run_mutant(copy: Path, mutant: Mutant) -> Result:
  """Plant a mutant, run its tests, and restore the file."""
  path = copy / "llmjax" / mutant.file
  source = path.read_text(encoding="utf-8")
  try:
    mutated = mutant.apply(source)
    compile(mutated, str(path), "exec")
  except (ValueError, SyntaxError) as error:
    return Result(mutant.name, [], list(mutant.tests), 0.0, str(error))
  try:
    path.write_text(mutated, encoding="utf-8")
    test_run = run_pytest(copy, ["-m", "not full", *mutant.tests], timeout=TIMEOUT)
  finally:
    path.write_text(source, encoding="utf-8")
  caught = [test for test in mutant.tests if matching(test, test_run.failed)]
  missed = [test for test in mutant.tests if test not in caught]
  return Result(mutant.name, caught, missed, test_run.seconds, "; ".join(test_run.errors) or None)


def run_all(copies: Sequence[Path], mutants: Sequence[Mutant]) -> Iterator[Result]:
  """Run the mutants, one at a time in each copy."""
  free: queue.Queue[Path] = queue.Queue()
  for copy in copies:
    free.put(copy)

  def run(mutant: Mutant) -> Result:
    copy = free.get()
    try:
      return run_mutant(copy, mutant)
    finally:
      free.put(copy)

  with ThreadPoolExecutor(len(copies)) as pool:
    yield from pool.map(run, mutants)


# Reporting.


def as_line(result: Result) -> str:
  """One line of the table that is printed."""
  if result.error:
    outcome = f"ERROR: {result.error}"
  elif not result.caught_by:
    outcome = f"SURVIVED {', '.join(result.missed_by)}"
  else:
    outcome = ", ".join(result.caught_by)
    outcome += f"  (not by {', '.join(result.missed_by)})" if result.missed_by else ""
  return f"{result.mutant:<44}{result.seconds:>6.1f} s  {outcome}"


def write_table(path: Path, results: Sequence[Result], mutants: Sequence[Mutant]) -> None:
  """Write the results as JSON to `path` and as a Markdown table beside it."""
  path = path.with_suffix(".json")
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps([dataclasses.asdict(each) for each in results], indent=2) + "\n", encoding="utf-8")
  by_name = {mutant.name: mutant for mutant in mutants}
  lines = ["| mutant | file | effect | caught by | seconds |", "|---|---|---|---|---|"]
  for each in results:
    mutant = by_name[each.mutant]
    caught = "<br>".join(f"`{test}`" for test in each.caught_by) or f"**{each.error or 'survived'}**"
    lines.append(f"| {each.mutant} | {mutant.file} | {mutant.effect} | {caught} | {each.seconds:.1f} |")
  path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def all_tests(mutant: Mutant) -> int:
  """Run the default tier against one mutant and print every test that fails."""
  with tempfile.TemporaryDirectory(prefix="llmjax-mutant-") as folder:
    copy = make_copy(Path(folder).resolve())
    path = copy / "llmjax" / mutant.file
    path.write_text(mutant.apply(path.read_text(encoding="utf-8")), encoding="utf-8")
    commit_copy(copy)
    side_by_side = ("-n", str(WORKERS), "--dist", "loadfile")
    # The list of mutants does not fit a file that is mutated already.
    test_run = run_pytest(
      copy, ["tests", "-m", "not full", "--ignore=tests/mutants_test.py", *side_by_side], timeout=7200
    )
  for line in (*test_run.errors, *sorted(test_run.failed)):
    print(line)
  print(f"{mutant.name}: {len(test_run.failed)} of {len(test_run.failed) + len(test_run.passed)} tests fail")
  return 0 if test_run.failed else 1


def run(mutants: Sequence[Mutant], output: Path | None = None) -> int:
  """Check the unmutated tests, run the mutants, print and write the table; return the exit code."""
  began = time.monotonic()
  with tempfile.TemporaryDirectory(prefix="llmjax-mutants-") as folder:
    copies = [make_copy(Path(folder).resolve() / f"copy{i}") for i in range(min(WORKERS, len(mutants)))]
    problems = check_unmutated(copies, (test for mutant in mutants for test in mutant.tests))
    if problems:
      print("\n".join(problems))
      return 1
    print(f"the tests pass unmutated ({time.monotonic() - began:.0f} s)", flush=True)
    results = []
    for result in run_all(copies, mutants):
      results.append(result)
      print(as_line(result), flush=True)
  if output is not None:
    write_table(output, results, mutants)
  survived = [each for each in results if each.error or not each.caught_by]
  print(f"{len(results) - len(survived)} of {len(results)} mutants caught in {time.monotonic() - began:.0f} s")
  for each in survived:
    print(f"{each.mutant}: {each.error or 'survived'}")
  return 1 if survived else 0


def main(arguments: Sequence[str] | None = None) -> int:
  from tests.support.mutant_list import MUTANTS

  parser = argparse.ArgumentParser(prog="python -m tests.support.mutants", description=__doc__.splitlines()[0])
  parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to run; default: all")
  parser.add_argument("--list", action="store_true", help="print the mutants and their tests")
  parser.add_argument("--all-tests", metavar="NAME", help="run the whole default tier against one mutant")
  parser.add_argument("--output", type=Path, metavar="PATH", help="write the table to PATH.json and PATH.md")
  flags = parser.parse_args(arguments)
  by_name = {mutant.name: mutant for mutant in MUTANTS}
  for name in (*flags.names, *([flags.all_tests] if flags.all_tests else [])):
    if name not in by_name:
      parser.error(f"there is no mutant {name!r}; --list prints them")
  if flags.list:
    for mutant in MUTANTS:
      print(f"{mutant.name} ({mutant.file}) {mutant.effect}".rstrip())
      print("".join(f"  {test}\n" for test in mutant.tests), end="")
    return 0
  if flags.all_tests:
    return all_tests(by_name[flags.all_tests])
  return run([by_name[name] for name in flags.names] or MUTANTS, flags.output)


if __name__ == "__main__":
  sys.exit(main())

"""The list of mutants is sound, and the harness reports what survives. `bash launch/test.sh mutants` runs them."""

import ast
import collections
import functools

import pytest

from tests.support import mutants
from tests.support.mutant_list import MUTANTS
from tests.support.mutants import ROOT, Mutant

SPLIT = "tests/data/packing_test.py::test_cut_example_has_every_token_once_for_any_room"


@functools.cache
def read(path):
  return (ROOT / path).read_text(encoding="utf-8")


@functools.cache
def test_functions(path):
  """{name: source of its decorators} of a file's tests, with those that `pytestmark` gives all of them."""
  nodes = ast.parse(read(path)).body
  shared = [
    ast.unparse(n.value) for n in nodes if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "pytestmark"
  ]
  return {
    node.name: shared + [ast.unparse(decorator) for decorator in node.decorator_list]
    for node in nodes
    if isinstance(node, ast.FunctionDef)
  }


test_functions.__test__ = False


def test_mutant_list_names_at_least_45_different_mutants():
  names = collections.Counter(mutant.name for mutant in MUTANTS)
  assert len(MUTANTS) >= 45 and max(names.values()) == 1, names.most_common(3)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_changes_one_place_and_names_default_tier_tests(mutant):
  ast.parse(mutant.apply(read(f"llmjax/{mutant.file}")))
  assert mutant.before != mutant.after and mutant.tests
  for test in mutant.tests:
    path, _, rest = test.partition("::")
    decorators = test_functions(path).get(rest.split("[")[0])
    assert decorators is not None, f"{test} does not exist"
    assert not any(text.startswith("pytest.mark.full") for text in decorators), f"{test} is in the full tier alone"


def test_mutant_whose_source_occurs_twice_is_an_error(tmp_path):
  (tmp_path / "llmjax").mkdir()
  (tmp_path / "llmjax" / "a.py").write_text("x = 1\ny = 1\n")
  for before, after, words in (("1", "2", "occurs 2 times"), ("z", "2", "occurs 0 times"), ("x = 1", "x = (", "'('")):
    result = mutants.run_mutant(tmp_path, Mutant("m", "a.py", before, after, (SPLIT,)))
    assert words in result.error and not result.caught_by
  assert (tmp_path / "llmjax" / "a.py").read_text() == "x = 1\ny = 1\n"


@pytest.mark.slow
def test_harness_reports_mutants_that_survive_or_cannot_be_imported(tmp_path, capsys):
  line = "return Example(example.inputs[offset:stop], labels=labels, weights=weights), stop"
  planted = [
    Mutant("comment", "data/packing.py", "# free tokens of each row", "# tokens that each row has free", (SPLIT,)),
    Mutant("import", "data/packing.py", "import numpy as np\n", "import numpy_of_nobody as np\n", (SPLIT,)),
    Mutant("split", "data/packing.py", line, line.replace("[offset:stop]", "[offset + 1 : stop]"), (SPLIT,)),
  ]
  assert mutants.run(planted, tmp_path / "table") == 1
  printed = capsys.readouterr().out
  assert "1 of 3 mutants caught" in printed and "\ncomment: survived\n" in printed
  assert "\nimport: collection of tests/data/packing_test.py" in printed and "numpy_of_nobody" in printed
  assert "| split | data/packing.py |  | `tests/data/packing_test.py::" in (tmp_path / "table.md").read_text()

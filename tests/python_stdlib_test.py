import ast
import collections
import importlib
import logging
import subprocess
import sys

import pytest

from llmjax.config import ConfigError
from llmjax.data import python_stdlib as stdlib
from llmjax.data.source import cache_dir
from llmjax.data.tfds_source import python_stdlib


@pytest.fixture
def few(home, monkeypatch):
  """A library of a few files, so that preparing is quick."""
  found = [(f"package{i}/module.py", f"value = {i}\n") for i in range(60)]
  monkeypatch.setattr(stdlib, "documents", lambda: found)
  monkeypatch.setattr(stdlib, "fingerprint", lambda: f"few{len(found)}")
  return found


def test_the_library_holds_source_and_topics_but_no_tests_or_tables():
  names = [name for name, _ in stdlib.documents()]
  assert "argparse.py" in names and "json/decoder.py" in names and "pydoc_data/topics.py#assert" in names
  assert names == sorted(set(names))
  assert not [n for n in names if stdlib.EXCLUDED & set(n.split("/"))]
  assert "pydoc_data/topics.py" not in names
  assert sum(len(text) for _, text in stdlib.documents()) > 3_000_000


def test_splits_are_by_path_and_about_90_5_5():
  counts = collections.Counter(stdlib.split_of(f"package/{i}.py") for i in range(10_000))
  assert abs(counts["train"] - 9000) < 150 and abs(counts["validation"] - 500) < 100
  assert stdlib.split_of("argparse.py") == stdlib.split_of("argparse.py") == "train"  # and so for ever


def test_every_file_is_in_exactly_one_split(few, caplog, capfd):
  with caplog.at_level(logging.WARNING):
    records = [r for split in ("train", "validation", "test") for r in python_stdlib(split)]
  assert sorted((r["path"], r["text"]) for r in records) == sorted(few)
  assert not caplog.records and capfd.readouterr() == ("", "")  # quiet


def test_it_is_prepared_once_for_each_content(few, monkeypatch):
  first = python_stdlib("train").fingerprint
  monkeypatch.setattr(stdlib.PythonStdlib, "_split_generators", None)  # making it again would fail
  assert python_stdlib("train").fingerprint == first
  assert python_stdlib("train[:50%]").fingerprint != first
  assert [p.name for p in (cache_dir() / "python_stdlib").iterdir()] == ["few60"]


MODULE = '''
import abc

@abc.decorated(
  1)
def first(x):
  """Return the first
  of all things.

  And more.
    """

  # Why not?
  return """
  x""", x

class Outer(object):
    """A class is no function."""

    if True:
        async def method(self):
            r"""Wait for it \\o."""
            def inner():
                """This one is a part."""
            return (inner,
\t1)

    try:
        import fast
    except ImportError:
        class Inner:
            def deep(self): return "Has no docstring at all."
            def deeper(self):
                "Say what é means here."; x = 1
            def deepest(self):
                "Do this one thing." # why
                return 1

def twice():
  """Return the first of all things."""
  return 2

def terse(): return """Nothing."""
def short():
  """Too short."""
  return 3
def abstract():
  """Do what subclasses do."""
  raise NotImplementedError("abstract")
'''


def test_docstring_pairs():
  found = list(stdlib.docstring_pairs([("a.py", MODULE), ("b.py", "not python"), ("c.py", MODULE), ("x#topic", "a b")]))
  assert [(r["name"], r["summary"], r["path"]) for r in found] == [
    ("first", "Return the first of all things.", "a.py"),
    ("Outer.method", r"Wait for it \o.", "a.py"),
    ("Outer.Inner.deepest", "Do this one thing.", "a.py"),
  ]
  assert found[0]["docstring"] == "Return the first\nof all things.\n\nAnd more."
  source = '@abc.decorated(\n  1)\ndef first(x):\n  # Why not?\n  return """\n  x""", x'
  assert found[0]["text"] == source
  method = 'async def method(self):\n    def inner():\n        """This one is a part."""\n    return (inner,\n\t1)'
  assert found[1]["text"] == method
  assert found[2]["text"] == "def deepest(self):\n    return 1"


def test_docstring_pairs_of_the_library_are_python_and_occur_once():
  found = list(stdlib.docstring_pairs(stdlib.documents()))
  assert len(found) > 3000
  assert len({r["summary"] for r in found}) == len({r["text"] for r in found}) == len(found)
  for record in found:
    [function] = ast.parse(record["text"]).body
    assert ast.get_docstring(function) is None and record["name"].split(".")[-1] == function.name


def test_pairs_are_in_the_split_of_their_file(few, monkeypatch):
  code = "def f{i}():\n  'Return number {i} here.'\n  return {i}\n"
  monkeypatch.setattr(stdlib, "documents", lambda: [(path, code.format(i=i)) for i, (path, _) in enumerate(few)])
  for split in ("train", "validation", "test"):
    records = list(python_stdlib(split, config="docstring_pairs"))
    assert {r["path"] for r in records} == {path for path, _ in few if stdlib.split_of(path) == split}
    assert all(r["summary"] == f"Return number {r['name'][1:]} here." for r in records)
  assert python_stdlib("train", config="docstring_pairs").fingerprint != python_stdlib("train").fingerprint


def test_slices_and_mistakes(few):
  whole = [r["path"] for r in python_stdlib("train")]
  assert [r["path"] for s in ("train[:30%]", "train[30%:]") for r in python_stdlib(s)] == whole
  with pytest.raises(ConfigError, match="has train, validation, test"):
    python_stdlib("trian")
  with pytest.raises(ConfigError, match="did you mean `text`"):
    python_stdlib("train", config="texts")


def test_importing_it_twice_is_no_error():
  importlib.reload(stdlib)


def test_two_processes_may_prepare_it_at_once(home):
  code = "from llmjax.data.tfds_source import python_stdlib; print(len(python_stdlib('train')))"
  runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=2, text=True) for _ in range(2)]
  sizes = {run.communicate()[0] for run in runs}
  assert len(sizes) == 1 and int(sizes.pop()) > 100
  assert {run.returncode for run in runs} == {0}
  assert [p.name for p in next((cache_dir() / "python_stdlib").iterdir()).iterdir()] == ["text"]  # and no leftovers

"""The dataset python_stdlib: the library itself, its derived tasks, and its preparation."""

import ast
import collections
import importlib
import json
import logging
import subprocess
import sys

import pytest

from llmjax.config import ConfigError
from llmjax.data.sources.tfds import python_stdlib_source
from llmjax.datasets.python_stdlib import builder, functions, library
from llmjax.datasets.python_stdlib.functions import docstring_pairs, package_snippets, summary_preferences
from llmjax.datasets.python_stdlib.library import split_of_path
from llmjax.datasets.python_stdlib.parameters import parameter_questions
from llmjax.datasets.python_stdlib.tokens import tagged_tokens
from llmjax.storage.cache import cache_dir


@pytest.fixture(scope="module")
def documents():
  return library.library_documents()


@pytest.fixture
def few(home, monkeypatch):
  """Replace the library by a few files, which are prepared quickly."""
  records = [(f"package{i}/module.py", f"value = {i}\n") for i in range(60)]
  monkeypatch.setattr(library, "library_documents", lambda: records)
  monkeypatch.setattr(library, "library_fingerprint", lambda: f"few{len(records)}")
  return records


def test_documents_are_source_and_topics_without_tests(documents):
  names = [name for name, _ in documents]
  assert "argparse.py" in names and "json/decoder.py" in names and "pydoc_data/topics.py#assert" in names
  assert names == sorted(set(names))
  assert not [n for n in names if library.EXCLUDED & set(n.split("/"))]
  assert "pydoc_data/topics.py" not in names
  assert sum(len(text) for _, text in documents) > 3_000_000


def test_splits_are_by_path_and_about_90_5_5_percent():
  counts = collections.Counter(split_of_path(f"package/{i}.py") for i in range(10_000))
  assert abs(counts["train"] - 9000) < 150 and abs(counts["validation"] - 500) < 100
  assert split_of_path("argparse.py") == "train"  # must never change


def test_every_file_is_in_one_split(few, caplog, capfd):
  with caplog.at_level(logging.WARNING):
    records = [r for split in ("train", "validation", "test") for r in python_stdlib_source(split)]
  assert sorted((r["path"], r["text"]) for r in records) == sorted(few)
  assert not caplog.records and capfd.readouterr() == ("", "")  # no output


def test_dataset_is_prepared_once_for_its_content(few, monkeypatch):
  first = python_stdlib_source("train").fingerprint
  monkeypatch.setattr(builder.PythonStdlib, "_split_generators", None)  # preparing it again would fail
  assert python_stdlib_source("train").fingerprint == first
  assert python_stdlib_source("train[:50%]").fingerprint != first
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


def test_docstring_pairs_of_a_module():
  records = list(docstring_pairs([("a.py", MODULE), ("b.py", "not python"), ("c.py", MODULE), ("x#topic", "a b")]))
  assert [(r["name"], r["summary"], r["path"]) for r in records] == [
    ("first", "Return the first of all things.", "a.py"),
    ("Outer.method", r"Wait for it \o.", "a.py"),
    ("Outer.Inner.deepest", "Do this one thing.", "a.py"),
  ]
  assert records[0]["docstring"] == "Return the first\nof all things.\n\nAnd more."
  source = '@abc.decorated(\n  1)\ndef first(x):\n  # Why not?\n  return """\n  x""", x'
  assert records[0]["text"] == source
  method = 'async def method(self):\n    def inner():\n        """This one is a part."""\n    return (inner,\n\t1)'
  assert records[1]["text"] == method
  assert records[2]["text"] == "def deepest(self):\n    return 1"


@pytest.mark.slow
def test_docstring_pairs_of_the_library_parse_and_are_unique(documents):
  records = list(docstring_pairs(documents))
  assert len(records) > 3000
  assert len({r["summary"] for r in records}) == len({r["text"] for r in records}) == len(records)
  for record in records:
    [function] = ast.parse(record["text"]).body
    assert ast.get_docstring(function) is None and record["name"].split(".")[-1] == function.name


def test_pairs_are_in_the_split_of_their_file(few, monkeypatch):
  code = "def f{i}():\n  'Return number {i} here.'\n  return {i}\n"
  monkeypatch.setattr(
    library, "library_documents", lambda: [(path, code.format(i=i)) for i, (path, _) in enumerate(few)]
  )
  for split in ("train", "validation", "test"):
    records = list(python_stdlib_source(split, config="docstring_pairs"))
    assert {r["path"] for r in records} == {path for path, _ in few if split_of_path(path) == split}
    assert all(r["summary"] == f"Return number {r['name'][1:]} here." for r in records)
  assert (
    python_stdlib_source("train", config="docstring_pairs").fingerprint != python_stdlib_source("train").fingerprint
  )


def test_packages_with_enough_functions_are_classes():
  def functions(name, count):
    return "".join(f"def {name}{i}(x):\n" + "  return x\n" * 4 for i in range(count))

  omitted = "def short(): pass\ndef telling():\n  import many\n" + "  return\n" * 4 + functions("f", 1)
  records = [
    ("many/a.py", functions("f", 49)),
    ("many/b.py", "class C:\n  def method(self):\n" + "    return self\n" * 4 + omitted),
    ("few/a.py", functions("g", 49)),
    ("module.py", functions("m", 60)),
  ]
  records = list(package_snippets(records))
  assert [r["package"] for r in records] == ["many"] * 50 and records[0]["path"] == "many/a.py#f0"
  assert records[-1]["text"] == "def method(self):\n" + "\n".join(["  return self"] * 4)


@pytest.mark.slow
def test_packages_of_the_library_are_balanced_classes(documents):
  records = list(package_snippets(documents))
  by_split = collections.defaultdict(collections.Counter)
  for record in records:
    by_split[split_of_path(record["path"])][record["package"]] += 1
  train = by_split["train"]
  assert 8 <= len(train) <= 24 and min(train.values()) >= 40 and sum(train.values()) > 2000
  assert len(set(by_split["validation"])) > len(train) // 2 and set(by_split["validation"]) <= set(train)
  assert len({r["text"] for r in records}) == len(records)
  assert all(r["path"].startswith(r["package"] + "/") for r in records)


TAGGED = """
import:O os:B-IMPORT .:I-IMPORT path:I-IMPORT as:O p:O ,:O sys:B-IMPORT

from:O .:B-IMPORT util:I-IMPORT import:O first:O as:O second:O

from:O ...:B-IMPORT import:O x:O

@:O abc:B-CALL .:I-CALL mark:I-CALL (:O 1:B-NUMBER ):O

class:O A:B-CLASS (:O B:O .:O C:O ,:O metaclass:O =:O make:B-CALL (:O ):O ):O ::O

"What:B-STRING it:I-STRING is.":I-STRING

async:O def:O run:B-FUNCTION (:O self:B-PARAMETER ,:O a:B-PARAMETER ::O x:O .:O T:O =:O f:B-CALL (:O b:O ,:O c:O ):O
,:O *:O args:B-PARAMETER ,:O d:B-PARAMETER =:O e:O *:O g:O ,:O **:O kw:B-PARAMETER ):O ->:O T:O [:O a:O ,:O b:O ]:O ::O
#:B-COMMENT Why:I-COMMENT not?:I-COMMENT

while:O self:B-CALL .:I-CALL go:I-CALL (:O a:O .:O b:O [:O 0:B-NUMBER ]:O .:O c:B-CALL (:O lambda:O q:O ::O q:O ):O
):O .:O d:B-CALL (:O b'x':B-STRING ):O ::O pass:O

f'{go(1)!r:>{w}}':B-STRING
"""


def test_tokens_have_iob2_tags():
  for line in TAGGED.strip().split("\n\n"):
    expected = [tuple(pair.rsplit(":", 1)) for pair in line.split()]
    text = " ".join(token for token, _ in expected)
    [record] = tagged_tokens([("a.py", text)])
    assert list(zip(record["tokens"], record["tags"])) == expected
    assert record["text"] == text and record["path"] == "a.py"


def test_token_excerpts_are_whole_short_lines_with_valid_tags(documents):
  documents = documents[::25]
  records = list(tagged_tokens(documents))
  assert len(records) > 50 and max(collections.Counter(r["path"] for r in records).values()) == 12
  previous = {f"{kind}-{label}" for kind in "BI" for label in ("IMPORT", "CALL", "STRING", "COMMENT")}
  for record in records:
    assert 0 < len(record["tokens"]) == len(record["tags"]) <= 60
    assert not any(token.split() != [token] for token in record["tokens"])
    for before, tag in zip(["O", *record["tags"]], record["tags"]):
      assert tag[0] != "I" or (before[1:] == tag[1:] and before in previous)
  assert {tag for r in records for tag in r["tags"]} > {
    "O",
    "B-CLASS",
    "B-FUNCTION",
    "B-PARAMETER",
    "I-CALL",
    "B-NUMBER",
  }
  long = "x = [" + "1, " * 40 + "]\n"
  assert [r["text"] for r in tagged_tokens([("a.py", f"a = 1\n{long}b = 2\n")])] == ["a = 1", "b = 2"]
  assert list(tagged_tokens([("a.py", "'"), ("topic#a", "a = 1"), ("b.py", "")])) == []


DESCRIBED = '''
def f(path, size=3, *rest, mode, i, both, gone, other):
  """Open the thing. Other than that, size says how much.

  path -- where it is,
    and more of that
  mode: as in open(), other=3
  both - one
  both - two
  i: index

  The rest are given on, as is
  usual.  Not path.  >>> gone
  """

def g(self, path):
  """One sentence about path."""
'''


def test_answers_are_descriptions_of_parameters_in_docstrings():
  records = list(parameter_questions([("a.py", DESCRIBED), ("b.py", DESCRIBED)]))
  assert {r["id"]: r["answers"][0]["text"] for r in records} == {
    "a.py#f#path": "where it is,\n  and more of that",
    "a.py#f#size": "Other than that, size says how much.",
    "a.py#f#rest": "The rest are given on, as is\nusual.",
    "a.py#f#mode": "as in open(), other=3",
  }
  assert records[0]["question"] == "What is path?" and records[0]["text"] == records[0]["context"]
  assert records[0]["context"].startswith("def f(path, size=3, *rest, mode, i, both, gone, other):\nOpen the thing.")


@pytest.mark.slow
def test_answers_of_the_library_are_at_their_offsets(documents):
  records = list(parameter_questions(documents[::3]))
  assert len(records) > 300 and len({r["id"] for r in records}) == len(records)
  for record in records:
    [answer] = record["answers"]
    start, stop = answer["answer_start"], answer["answer_start"] + len(answer["text"])
    assert record["context"][start:stop] == answer["text"] == answer["text"].strip() != ""
  in_splits = collections.defaultdict(set)
  for record in records:
    in_splits[record["context"]].add(split_of_path(record["path"]))
  assert all(len(splits) == 1 for splits in in_splits.values())


def test_rejected_answer_is_from_another_function_of_the_file():
  code = "".join(f"def f{i}():\n  'Return the number {i}.'\n  return {i}\n" for i in range(3))
  single = "def g():\n  'Do what is due.'\n  return None\n"
  records = list(summary_preferences([("a.py", code), ("b.py", single)]))
  assert [(r["text"], r["chosen"], r["rejected"]) for r in records] == [
    (f"def f{i}():\n  return {i}", f"Return the number {i}.", f"Return the number {(i + 1) % 3}.") for i in range(3)
  ]


def test_every_config_is_read_as_written(few, monkeypatch):
  code = "".join(f"def f{i}(path):\n  'Return NAME {i}. Of path.'\n" + "  return NAME\n" * 5 for i in range(3))
  documents = [(path, code.replace("NAME", path.split("/")[0])) for path, _ in few]
  monkeypatch.setattr(library, "library_documents", lambda: documents)
  monkeypatch.setattr(functions, "MIN_SNIPPETS", 1)
  for config, (_, make) in builder.CONFIGS.items():
    expected = [r for r in make(documents) if split_of_path(r["path"]) == "train"]
    for record in expected:
      if "answers" in record:
        record["answers"] = [{"text": a["text"], "start": a["answer_start"]} for a in record["answers"]]
    records = [json.dumps(r, sort_keys=True) for r in python_stdlib_source("train", config=config)]
    assert records and sorted(records) == sorted(json.dumps(r, sort_keys=True) for r in expected)


def test_split_without_records_is_omitted(few, monkeypatch):
  monkeypatch.setattr(library, "library_documents", lambda: [f for f in few if split_of_path(f[0]) == "train"])
  assert len(python_stdlib_source("train")) == len(library.library_documents())
  with pytest.raises(ConfigError, match=r"has no split 'test'.*: train$"):
    python_stdlib_source("test")


def test_slices_join_and_unknown_names_are_refused(few):
  whole = [r["path"] for r in python_stdlib_source("train")]
  assert [r["path"] for s in ("train[:30%]", "train[30%:]") for r in python_stdlib_source(s)] == whole
  with pytest.raises(ConfigError, match=r"has no split 'trian'.*: train, validation, test"):
    python_stdlib_source("trian")
  with pytest.raises(ConfigError, match="did you mean `text`"):
    python_stdlib_source("train", config="texts")


def test_module_can_be_reloaded():
  importlib.reload(builder)


@pytest.mark.full("processes")
def test_two_processes_prepare_it_at_once(home):
  code = "from llmjax.data.sources.tfds import python_stdlib_source; print(len(python_stdlib_source('train')))"
  runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=2, text=True) for _ in range(2)]
  sizes = {run.communicate()[0] for run in runs}
  assert len(sizes) == 1 and int(sizes.pop()) > 100
  assert {run.returncode for run in runs} == {0}
  assert [p.name for p in next((cache_dir() / "python_stdlib").iterdir()).iterdir()] == ["text"]  # no temporary files

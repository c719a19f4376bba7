"""Sources with labels: CoNLL, SQuAD and parallel text."""

import json
import random

import pytest

from llmjax.config import ConfigError, build
from llmjax.data.sources.registry import SOURCES
from llmjax.data.sources.tables import record_fields


def open_(name, split="train", **spec):
  return build({"name": name, **spec}, SOURCES, "data.corpus", split=split)


@pytest.fixture
def write(tmp_path):
  def write(name, content):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else json.dumps(content).encode())
    return str(path)

  return write


def sentences(count, seed=0):
  """Yield (tokens, tags), with tokens that resemble comments, tags and separators."""
  rng = random.Random(seed)
  strange = ["#", "#tag", "-", "a\u00a0b", "日本", "\u2028", "O", "'", "--", "0"]
  for _ in range(count):
    tokens = [rng.choice(strange) for _ in range(rng.randrange(1, 6))]
    yield tokens, [rng.choice(["O", "B-X", "I-X"]) for _ in tokens]


@pytest.mark.parametrize("separator", ["\t", " "])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_conll_reads_what_was_written(write, separator, end):
  expected = list(sentences(50))
  if separator == " ":  # a first token "#" would start a comment
    expected = [(tokens, tags) for tokens, tags in expected if tokens[0] != "#"]
  blocks = ["".join(f"{a}{separator}x{separator}{b}{end}" for a, b in zip(*sentence)) for sentence in expected]
  content = f"-DOCSTART-{separator}-X-{separator}O{end}{end}# a comment of words{end}#{end}" + f"{end}{end}".join(
    blocks
  )
  for last in ("", end, end + end):
    source = open_("conll", files=write("a.conll", content.removesuffix(end) + last))
    assert [(r["tokens"], r["tags"]) for r in source] == expected
    assert [r["text"] for r in source] == [" ".join(tokens) for tokens, _ in expected]


def test_conll_column_and_separator_are_selectable(write):
  path = write("a.txt", "1 Wolff U.N. B-PER\n2 said VB O\n\n1 Yes UH O")
  assert [r["tags"] for r in open_("conll", files=path, token_column=1, tag_column=2)] == [["U.N.", "VB"], ["UH"]]
  assert open_("conll", files=path, token_column=1)[0]["tokens"] == ["Wolff", "said"]
  spaced = write("b.txt", "New York|B-LOC\nis|O")
  assert open_("conll", files=spaced, separator="|")[0]["tokens"] == ["New York", "is"]


@pytest.mark.parametrize(
  ("content", "spec", "message"),
  [
    ("a O\n\nb\n", {}, r"a\.conll:3: .*got 1 column in 'b'"),
    ("a O\nb O\n", {"token_column": 2}, r"a\.conll:1: data\.corpus\.token_column=2.*got 2 columns in 'a O'"),
    ("a O\n", {"token_column": 1}, r"a\.conll:1: .*got 2 columns"),  # the same column as the tag
    ("a O\n", {"tag_column": -3}, r"a\.conll:1: .*got 2 columns"),
    ("a O\n", {"tag_column": 0}, "got 0 for both"),
    ("a O\n", {"separator": ""}, "separator: empty"),
    ("# a\n\n", {}, r"a\.conll: no records"),
  ],
)
def test_malformed_conll_is_one_line_error(write, content, spec, message):
  with pytest.raises(ConfigError, match=message) as caught:
    open_("conll", files=write("a.conll", content), **spec)
  assert "\n" not in str(caught.value)


def test_conll_with_invalid_utf8_is_refused(tmp_path):
  (tmp_path / "a.conll").write_bytes(b"a O\n\xff O\n")
  with pytest.raises(ConfigError, match=r"a\.conll: byte 4 is not UTF-8"):
    open_("conll", files=str(tmp_path / "a.conll"))


def questions(*answers, **more):
  asked = {"id": "q1", "question": "Who?", "answers": [{"text": t, "answer_start": s} for t, s in answers], **more}
  return {"version": "x", "data": [{"title": "T", "paragraphs": [{"context": "🙂 né am Rhein", "qas": [asked]}]}]}


def test_squad_reads_answers_and_impossible_questions(write):
  record = {"id": "q1", "question": "Who?", "context": "🙂 né am Rhein", "text": "🙂 né am Rhein"}
  first = open_("squad", files=write("1.json", questions(("né", 2), ("Rhein", 8))))
  assert list(first) == [{**record, "answers": [{"text": "né", "start": 2}, {"text": "Rhein", "start": 8}]}]
  plausible = {"is_impossible": True, "plausible_answers": [{"text": "am", "answer_start": 5}]}
  unanswered = questions(is_impossible=False), questions(("né", 2), **plausible), questions()
  for number, made in enumerate(unanswered):
    assert open_("squad", files=write(f"v2{number}.json", made))[0] == {**record, "answers": []}


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (questions(("né", 3)), r"question 'q1': the answer 'né' is not at answer_start 3, got 'é '"),
    (questions(("am", -8)), r"'am' is not at answer_start -8"),
    (questions(("Rheine", 8)), r"got 'Rhein'"),
    ({"data": [{"paragraphs": [{"qas": []}]}]}, r"a\.json: is not in SQuAD's format .*'context' is missing"),
    ([1], r"a\.json: is not in SQuAD's format .*JSONL"),
    ({"data": [{"paragraphs": [{"context": "a", "qas": ["b"]}]}]}, r"a\.json: is not in SQuAD's format"),
    ('{"data": [\n]', r"a\.json:2: not JSON: "),
    ({"data": []}, r"a\.json: no records"),
  ],
)
def test_malformed_squad_is_one_line_error(write, content, message):
  with pytest.raises(ConfigError, match=message) as caught:
    open_("squad", files=write("a.json", content))
  assert "\n" not in str(caught.value)


def test_parallel_reads_aligned_lines(write, tmp_path):
  for i, (left, right) in enumerate((("eins\r\n \nzwei\u2028drei\n", "one\n\n \n"), ("\nvier", "four\nfour"))):
    write(f"{i}.de", left), write(f"{i}.en", right)
  spec = {"files": str(tmp_path / "*.de"), "targets": [str(tmp_path / f"{i}.en") for i in (0, 1)]}
  assert list(open_("parallel", **spec)) == [
    {"source": "eins", "target": "one", "text": "eins"},
    {"source": "vier", "target": "four", "text": "vier"},
  ]
  assert open_("parallel", source="de", target="en", **spec)[0] == {"de": "eins", "en": "one", "text": "eins"}
  with pytest.raises(ConfigError, match=r"1\.en: must have as many lines as .*0\.de, got 2 and 3"):
    open_("parallel", files=str(tmp_path / "0.de"), targets=str(tmp_path / "1.en"))
  with pytest.raises(ConfigError, match=r"targets: must be as many files as data\.corpus\.files, got 1 and 2"):
    open_("parallel", files=spec["files"], targets=str(tmp_path / "1.en"))
  with pytest.raises(ConfigError, match=r"corpus\.targets: there is no such file, got 'none'"):
    open_("parallel", files=spec["files"], targets="none")
  with pytest.raises(ConfigError, match="target: another field has this name, got 'text'"):
    open_("parallel", target="text", **spec)


def test_labelled_splits_and_fingerprints(write):
  path = write("a.conll", "".join(f"{i} O\n\n" for i in range(10)))
  parts = [open_("conll", split, files=path) for split in ("[:90%]", "[90%:]")]
  assert [r["text"] for part in parts for r in part] == [str(i) for i in range(10)]
  named = {"train": path, "test": write("b.conll", "t O")}
  assert open_("conll", "test", files=named)[0]["text"] == "t"
  sides = {"files": {"train": path}, "targets": {"train": path}}
  assert open_("parallel", "train[:2]", **sides)[1]["target"] == "1 O"
  with pytest.raises(ConfigError, match=r"has no split 'test'.*: train$"):
    open_("parallel", "test", **sides)
  others = [open_("conll", files=path), open_("conll", files=path, token_column=-2), *parts]
  assert len({source.fingerprint for source in others}) == 4
  same = open_("conll", files=write("same.conll", "".join(f"{i} O\n\n" for i in range(10))))
  assert same.fingerprint == others[0].fingerprint


def test_files_selects_the_format_by_suffix(write):
  for path in (write("a.conll", "a O"), write("a.json", questions(("am", 5)))):
    record = open_("files", files=path)[0]
    assert record_fields(path) == list(record)
    assert open_("files", files=path, column=None)[0] == record

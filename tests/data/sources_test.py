"""Sources of records: text, tables, TFDS, mixtures, and their error messages."""

import contextlib
import importlib
import itertools
import json

import numpy as np
import pytest

from configs.corpora import CORPORA
from llmjax.config import ConfigError, build, load_config
from llmjax.data.sources.base import Source, join_sources, split_bounds, subsample_bytes, text_of
from llmjax.data.sources.registry import SOURCES
from llmjax.data.sources.tables import record_fields
from llmjax.data.sources.tfds import tfds_source
from llmjax.datasets.python_stdlib.builder import CONFIGS


def open_(name, split="train", **spec):
  return build({"name": name, **spec}, SOURCES, "data.corpus", split=split)


def texts(*args, **spec):
  return [record["text"] for record in open_(*args, **spec)]


@pytest.fixture
def write(home):
  def write(name, content):
    path = home / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)

  return write


def test_adjacent_slices_partition_any_size():
  for size in range(1, 200):
    for cut in ("10%", "33%", "90%", "99.5%", "7"):
      sizes = []
      for split in (f"train[:{cut}]", f"[{cut}:]"):
        try:
          sizes.append(split_bounds(split, size))
        except ConfigError as error:
          assert "selects none" in str(error)
      assert sizes[0][0] == 0 and sizes[-1][1] == size and all(a[1] == b[0] for a, b in itertools.pairwise(sizes))
  assert split_bounds("[:90%]", 1_115_394) == (0, int(0.9 * 1_115_394))
  assert split_bounds("train[100:200]", 150) == (100, 150) and split_bounds("[-10%:]", 50) == (45, 50)


def test_text_reads_documents_paragraphs_and_lines(write, home):
  write("a/1.txt", "one\n\n  two\nthree  \r\n \t\r\nfour")
  write("a/b/2.txt", "five\r\n\n\nsix\n")
  write("a/b/empty.txt", "")
  files = str(home / "a" / "**" / "*.txt")
  assert texts("text", files=files) == ["one\n\n  two\nthree  \r\n \t\r\nfour", "five\r\n\n\nsix\n"]
  assert texts("text", files=files, records="paragraph") == ["one", "  two\nthree  ", "four", "five", "six"]
  assert texts("text", files=files, records="line") == ["one", "  two", "three  ", "four", "five", "six"]
  assert texts("text", "[1:3]", files=files, records="line") == ["  two", "three  "]


def test_long_document_is_cut_at_lines_and_between_characters(write):
  content = "é" * 100 + "\n" + "line of words\n" * 30 + "日" * 50
  pieces = texts("text", files=write("a.txt", content), max_bytes=64)
  assert "".join(pieces) == content and max(len(p.encode()) for p in pieces) <= 64
  assert all(p.endswith("\n") for p in pieces if "words" in p)


@pytest.mark.parametrize("records", ["paragraph", "line"])
def test_text_records_equal_a_simple_implementation(write, records):
  rng = np.random.default_rng(0)
  for i in range(60):
    content = "".join(rng.choice(["\n", "\r\n", " ", "\t", "a", "é", "\n\n"], 40)) + "z"
    lines = content.split("\n")
    lines = [
      line[:-1] if line.endswith("\r") and line.strip() and j < len(lines) - 1 else line for j, line in enumerate(lines)
    ]
    if records == "line":
      expected = [line for line in lines if line.strip()]
    else:
      raw = [line if line.strip() else "" for line in content.split("\n")]
      blocks = [b.strip("\n") for b in "\n".join(raw).split("\n\n")]
      expected = [b.removesuffix("\r") for b in blocks if b]
    assert texts("text", files=write(f"{i}.txt", content), records=records) == expected


@pytest.mark.parametrize("alphabet", ["abc\n", "aé日🙂"])
def test_chunks_cover_every_character_once(write, alphabet):
  rng = np.random.default_rng(0)
  content = "".join(rng.choice(list(alphabet), 1000))
  halves = write("1.txt", content[:300]), write("2.txt", content[300:])  # chunks span files
  pieces = texts("text", files=halves, records="chunk", chunk=65, overlap=1)
  assert pieces[0][0] + "".join(piece[1:] for piece in pieces) == content
  if alphabet.isascii():
    assert {len(p) for p in pieces[:-1]} == {65}
  assert "".join(texts("text", files=halves, records="chunk", chunk=50)) == content
  train, held_out = (open_("text", s, files=halves, records="chunk", chunk=9) for s in ("[:90%]", "[90%:]"))
  left, right = ("".join(r["text"] for r in s) for s in (train, held_out))
  assert left + right == content
  size = int(0.9 * len(content.encode()))
  assert size - 4 < len(left.encode()) <= size and (len(left.encode()) == size or not alphabet.isascii())
  assert len(train.whole) == len(open_("text", files=halves, records="chunk", chunk=9))


def test_text_reads_named_splits(write):
  files = {"train": (write("a", "x"), write("b", "y")), "test": write("c", "z")}
  assert texts("text", files=files) == ["x", "y"] and texts("text", "test", files=files) == ["z"]
  with pytest.raises(ConfigError, match=r"files: has no split 'validation'.*: train, test$"):
    open_("text", "validation", files=files)


def test_jsonl_reads_the_text_field(write):
  path = write("a.jsonl", '{"body": "one", "n": 1}\n\n  \n{"body": "tw\\u00f6"}\r\n{"body": ""}')
  assert [r["text"] for r in open_("jsonl", files=path, text="body")] == ["one", "twö", ""]
  assert open_("jsonl", files=path, text="body")[0] == {"body": "one", "n": 1, "text": "one"}


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{nonsense", r"a\.jsonl:3: not a JSON object"),
    ("[1]", r"a\.jsonl:3: not a JSON object, got a list"),
    ('{"txt": "x"}', r"a\.jsonl:3: no field 'text'.*did you mean `txt`"),
    ('{"text": 3}', r"a\.jsonl:3: 'text' must be a string, got a int"),
    ('{"text": "\\ud800"}', r"a\.jsonl:3: 'text' holds half a surrogate pair"),
  ],
)
def test_jsonl_error_names_the_line(write, line, message):
  path = write("a.jsonl", '{"text": "one"}\n\n' + line + '\n{"text": "two"}')
  with pytest.raises(ConfigError, match=message):
    open_("jsonl", files=path)[1]


def test_jsonl_without_text_reads_the_columns(write):
  path = write("a.jsonl", '{"q": "wie", "n": [1, {"a": "\\u00f6"}]}\n{"q": "ja", "n": null}')
  assert list(open_("jsonl", files=path, text=None, columns=("q", "n"))) == [
    {"q": "wie", "n": [1, {"a": "ö"}]},
    {"q": "ja", "n": None},
  ]
  with pytest.raises(ConfigError, match=r"a\.jsonl:1: no field 'qq' \(data\.corpus\.columns\); did you mean `q`"):
    open_("jsonl", files=path, text=None, columns=("qq",))
  with pytest.raises(ConfigError, match=r"a\.jsonl:1: no field 'text' .*or to None"):
    open_("jsonl", files=path)
  with pytest.raises(ConfigError, match=r"b\.jsonl:1: 'n' holds half a surrogate pair"):
    open_("jsonl", files=write("b.jsonl", '{"q": "a", "n": [{"x": "\\ud800"}]}'), text=None)


def test_text_of_joins_the_strings_of_a_record():
  assert text_of({"text": "this", "title": "that"}) == "this"
  assert text_of({"tokens": ["a", "b"], "tags": ["O", "X"]}) == "a b\nO X"
  chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "n": 3, "text": None}
  assert text_of(chat) == "user\nHi\nassistant\nHo"
  assert text_of({"label": 1}) == ""


def test_subsample_bytes_keeps_labels_and_needs_no_text():
  labels = {"label": ("no", "yes")}
  source = Source(100, lambda i: {"words": [f"{i:05d}"] * 2}, "words", labels=labels)
  some = subsample_bytes(source, 110)
  assert len(some) == 10 and some.labels == labels and some[9] == {"words": ["00099", "00099"]}
  assert join_sources([source, some], (1, 1)).labels == labels
  other = Source(1, lambda i: {}, "other", labels={"label": ("yes", "no")})
  assert (
    join_sources([source, other], (1, 1)).labels
    == join_sources([source, Source(1, lambda i: {}, "x")], (1, 1)).labels
    == {}
  )


def test_csv_and_files_by_suffix_read_their_column(write, home):
  rows = "".join(f'{i},"line {i}\nand ""more""",x\n' for i in range(10))
  path = write("a.csv", "number,review,other\n" + rows)
  source = open_("csv", "[:90%]", files=path, text="review", columns=("number",))
  assert len(source) == 9 and source[3]["text"] == 'line 3\nand "more"' and source[3]["number"] == "3"
  with pytest.raises(ConfigError, match=r"a\.csv: no column 'text' .*review"):
    open_("csv", files=path)
  tsv = write("b.tsv", "text\tother\nhello, world\t1\n")
  lines = write("c.jsonl", '{"body": "one"}\n{"body": "two"}\n')
  plain = write("d.txt", "plain")
  texts = [
    open_("files", "all", files=f, column=c)[0]["text"] for f, c in ((tsv, "text"), (lines, "body"), (plain, ""))
  ]
  assert texts == ["hello, world", "one", "plain"]


def test_columns_are_read_without_text(write, home):
  import pyarrow
  from pyarrow import parquet

  table = pyarrow.table({"tokens": [["a", "é"], []], "tags": [[0, 3], []], "n": [1.5, None], "unused": ["x", "y"]})
  parquet.write_table(table, home / "a.parquet")
  path = str(home / "a.parquet")
  for name in ("parquet", "files"):
    text = {"text": None} if name == "parquet" else {"column": None}
    records = list(open_(name, files=path, columns=("tokens", "tags", "n"), **text))
    assert records == [{"tokens": ["a", "é"], "tags": [0, 3], "n": 1.5}, {"tokens": [], "tags": [], "n": None}]
  rows = write("a.csv", "premise,label\nyes,1\n,0\n")
  records = list(open_("csv", files=rows, text=None, columns=("label", "premise")))
  assert records == [{"label": "1", "premise": "yes"}, {"label": "0", "premise": ""}]
  with pytest.raises(ConfigError, match=r"columns: empty, .*a\.csv has the columns premise, label"):
    open_("files", files=rows, column=None)
  with pytest.raises(ConfigError, match=r"a\.parquet: no column 'tag' \(data\.corpus\.columns\); did you mean `tags`"):
    open_("parquet", files=path, text=None, columns=("tokens", "tag"))
  assert record_fields(path) == ["tokens", "tags", "n", "unused"] and record_fields(rows) == ["premise", "label"]


def test_files_shuffle_mixes_splits_reproducibly(write):
  rows = [{"label": i // 50, "n": i} for i in range(100)]  # sorted, as files often are
  path = write("a.jsonl", "\n".join(map(json.dumps, rows)))
  spec = {"column": None, "columns": ("label",), "shuffle": True}
  train, held_out = (list(open_("files", split, files=path, **spec)) for split in ("[:90%]", "[90%:]"))
  assert sorted(r["n"] for r in train + held_out) == list(range(100))
  assert len(held_out) == 10 and {r["label"] for r in held_out} == {0, 1}
  assert held_out == list(open_("files", "[90%:]", files=path, **spec))
  prints = [open_("files", "[:9]", files=path, **{**spec, "shuffle": shuffle}).fingerprint for shuffle in (True, False)]
  assert prints[0] != prints[1]
  named = {"train": (path,), "test": write("b.csv", "label,n\n1,2\n")}
  assert list(open_("files", "test", files=named, **spec)) == [{"label": "1"}]
  assert len(open_("files", "train[:9]", files=named, **spec)) == 9
  with pytest.raises(
    ConfigError, match=r"a\.jsonl:1: no field 'labels' \(data\.corpus\.columns\); did you mean `label`"
  ):
    open_("files", files=path, column=None, columns=("labels",))
  assert len(open_("files", files=write("c.jsonl", '{"text": "a"}\n{"text": "b"}'), columns=("id",))) == 2


def test_location_is_file_and_line_of_a_record(write):
  lines = write("a.jsonl", "\n\n" + "\n".join(f'{{"text": "{i}", "n": {i}}}' for i in range(9)))
  more = write("b.jsonl", '{"text": "9", "n": 9}')
  for spec in ({"split": "[50%:]"}, {"split": "[50%:]", "shuffle": True}):
    records = open_("files", spec.pop("split"), files=(lines, more), **spec)
    for i, record in enumerate(records):
      expected = f"{more}:1" if record["n"] == 9 else f"{lines}:{3 + record['n']}"
      assert (
        records.location(i) == expected and join_sources([subsample_bytes(records, 10**6)], [1]).location(i) == expected
      )
  rows = write("c.csv", "text\n" + "\n".join("abcd"))
  records = open_("files", "[1:]", files=rows, shuffle=True)
  assert [records.location(i) for i in range(3)] == [
    f"record {'abcd'.index(record['text'])} (from 0) of {rows}" for record in records
  ]
  assert Source(1, lambda i: {}, "x").location(0) == "record 0 (from 0)"


def test_unknown_suffix_is_text_and_not_a_table(write):
  path = write("a.out", "text,label\nx,1\n")
  with pytest.raises(ConfigError, match=r"reads 'label', but .* plain text, got .*a\.out'.* are \.jsonl, "):
    open_("files", files=path, column=None, columns=("label",))
  assert open_("files", files=path)[0]["text"].startswith("text,label")
  with pytest.raises(ConfigError, match=r"h\.csv: no rows"):
    open_("files", files=write("h.csv", "text,label\n"), column=None, columns=("label",))


def test_parquet_reads_rows_of_several_files(write, home):
  import pyarrow
  from pyarrow import parquet

  rows = [f"text {i}" for i in range(950)]
  for name, some in (("1", rows[:500]), ("2", rows[500:])):
    table = pyarrow.table({"text": some, "other": range(len(some)), "unused": some})
    parquet.write_table(table, home / f"{name}.parquet", row_group_size=100)
  files = str(home / "*.parquet")
  for _ in range(2):  # converted, then read from the cache
    source = open_("parquet", "train[:90%]", files=files, columns=("other",))
    assert [r["text"] for r in source] == rows[:855] and source[600] == {"text": "text 600", "other": 100}
  with pytest.raises(ConfigError, match=r"no column 'txt'.*did you mean `text`"):
    open_("parquet", files=files, text="txt")
  with pytest.raises(ConfigError, match="must hold strings, got int64"):
    open_("parquet", files=files, text="other")
  with pytest.raises(ConfigError, match=r"bad\.parquet: cannot be read as Parquet"):
    open_("parquet", files=write("bad.parquet", "no"))


def test_parquet_reads_dictionary_columns_of_several_row_groups(home):
  import pyarrow
  from pyarrow import parquet

  words = [f"word {i // 50}" for i in range(200)]  # each row group has another dictionary
  table = pyarrow.table(
    {"text": pyarrow.array(words).dictionary_encode(), "kind": pyarrow.array(words).dictionary_encode()}
  )
  parquet.write_table(table, home / "a.parquet", row_group_size=50)
  records = open_("parquet", files=str(home / "a.parquet"), columns=("kind",))
  assert list(records) == [{"text": word, "kind": word} for word in words]


def test_array_record_reads_text_and_json(write, home):
  from array_record.python.array_record_module import ArrayRecordWriter

  def records(name, contents):
    writer = ArrayRecordWriter(str(home / name), "group_size:1")
    for content in contents:
      writer.write(content)
    writer.close()
    return str(home / name)

  plain = records("plain.array_record", [f"né {i}".encode() for i in range(10)])
  assert texts("array_record", "[5:]", files=plain) == [f"né {i}" for i in range(5, 10)]
  objects = records("json.array_record", [json.dumps({"body": f"{i}"}).encode() for i in range(3)])
  assert texts("array_record", files=objects, format="json", text="body") == ["0", "1", "2"]
  assert open_("array_record", files=objects, format="json", text=None)[1] == {"body": "1"}
  with pytest.raises(ConfigError, match=r"record 0 \(from 0\) of .*not a JSON object with a field 'body'"):
    open_("array_record", files=plain, format="json", text="body")
  with pytest.raises(ConfigError, match=r"record 0 \(from 0\) of .*byte 0 is not UTF-8"):
    open_("array_record", files=records("bytes.array_record", [b"\xff"]))
  with pytest.raises(ConfigError, match="cannot be read as ArrayRecord"):
    open_("array_record", files=write("no.array_record", "no"))


def test_fingerprint_depends_on_content_and_selection(write):
  path = write("a.txt", "one\ntwo\n")
  first = open_("text", files=path, records="line").fingerprint
  assert open_("text", files=write("b.txt", "one\ntwo\n"), records="line").fingerprint == first
  others = [open_("text", files=path).fingerprint, open_("text", "[:1]", files=path, records="line").fingerprint]
  write("a.txt", "one\ntwe\n")
  others.append(open_("text", files=path, records="line").fingerprint)
  assert len({first, *others}) == 4


def test_mixture_has_components_and_weights(write):
  sources = {
    "one": {"weight": 3, "name": "text", "files": write("a", "1\n2"), "records": "line"},
    "two": {"weight": 1, "name": "text", "files": write("b", "3\n4\n5"), "records": "line", "split": "[1:]"},
  }
  source = open_("mixture", sources=sources)
  assert [r["text"] for r in source] == ["1", "2", "4", "5"]
  assert source.weights == (3, 1) and [len(p) for p in source.parts] == [2, 2]
  assert join_sources(source.parts, (1, 1)).fingerprint != source.fingerprint
  nested = open_("mixture", sources={"all": {"weight": 8, "name": "mixture", "sources": sources}})
  assert nested.weights == (6, 2)
  with pytest.raises(ConfigError, match=r"sources\.one\.weight: must be a positive number, got None"):
    open_("mixture", sources={"one": {"name": "text", "files": "a"}})
  with pytest.raises(ConfigError, match=r"sources\.one\.name='txt'.*did you mean `text`"):
    open_("mixture", sources={"one": {"weight": 1, "name": "txt"}})


@pytest.mark.parametrize(
  ("content", "offset"),
  [(b"abc\xff", 3), (b"\x80", 0), ("日本".encode()[:-1], 3), (b"x" * (1 << 24) + b"\xe9 ", 1 << 24)],
)
def test_invalid_utf8_is_refused_with_its_offset(write, content, offset):
  with pytest.raises(ConfigError, match=rf"bad\.txt: byte {offset} is not UTF-8"):
    open_("text", files=write("bad.txt", content))


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ({"files": "nothing*.txt"}, r"files: there is no such file, got 'nothing\*\.txt'"),
    ({"files": "."}, r"is a folder, got '\.'\. Write '\./\*\*/\*'"),
    ({"files": ()}, "files: empty"),
    ({"files": "EMPTY"}, "the file is empty"),
    ({"files": "BLANK", "records": "line"}, "only blank lines"),
    ({"files": "FULL", "records": "lines"}, "did you mean `line`"),
    ({"files": "FULL", "records": "chunk", "chunk": 8, "overlap": 8}, "chunk: must be .* larger than .*got 8"),
    ({"files": "FULL", "split": "validation"}, "no named splits"),
    ({"files": "FULL", "split": "[:10%"}, r"not a split, got '\[:10%'"),
    ({"files": "FULL", "split": "[:10%]"}, r"'\[:10%\]' selects none of 1 records"),
  ],
)
def test_wrong_text_spec_is_one_line_error(write, spec, message):
  paths = {"EMPTY": write("e", ""), "BLANK": write("w", " \n\n"), "FULL": write("f", "some text")}
  spec = {"split": "train", **spec, "files": paths.get(spec["files"], spec["files"])}
  with pytest.raises(ConfigError, match=message) as caught:
    open_("text", spec.pop("split"), **spec)
  assert "\n" not in str(caught.value)


def test_tfds_folder_is_read(home):
  import tensorflow_datasets as tfds

  with tfds.core.registered.skip_registration():

    class Tiny(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.0.0")
      url_infos = None

      def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"line": tfds.features.Text()}))

      def _split_generators(self, dl_manager):
        return {"train": ((i, {"line": f"é{i}"}) for i in range(20)), "test": iter([(0, {"line": "t"})])}

      def _generate_examples(self):
        raise NotImplementedError

  builder = Tiny(data_dir=str(home), file_format="array_record")
  builder.download_and_prepare()
  folder = builder.data_path
  records = texts("tfds", "train[:10]", folder=str(folder), text="line")
  assert len(set(records)) == 10 and set(records) < {f"é{i}" for i in range(20)}
  with pytest.raises(ConfigError, match=r"text: not a field of tiny/1\.0\.0, got 'text'; "):
    open_("tfds", folder=str(folder))
  with pytest.raises(ConfigError, match=r"tiny/1\.0\.0 has no split 'validation'.*: train, test$"):
    open_("tfds", "validation", folder=str(folder), text="line")


def test_tfds_records_have_class_names_and_python_types(home):
  import tensorflow_datasets as tfds

  features = {
    "label": tfds.features.ClassLabel(names=["bad", "good"]),
    "tags": tfds.features.Sequence(tfds.features.ClassLabel(names=["O", "B-é"])),
    "tokens": tfds.features.Sequence(tfds.features.Text()),
    "answers": tfds.features.Sequence({"text": tfds.features.Text(), "answer_start": np.int32}),
    "translation": tfds.features.Translation(["de", "en"]),
    "score": np.float32,
  }
  hidden = {"label": -1, "tags": [], "tokens": [], "answers": [], "translation": {"de": "ü", "en": "u"}, "score": 0.5}
  answers = [{"text": "é", "answer_start": 3}, {"text": "né", "answer_start": 2}]
  full = {**hidden, "label": 1, "tags": [0, 1], "tokens": ["é", "b"], "answers": answers}

  with tfds.core.registered.skip_registration():

    class Labelled(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.0.0")
      url_infos = None

      def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

      def _split_generators(self, dl_manager):
        return {"train": [(0, full)], "test": [(0, hidden)], "one": [(0, {**full, "answers": answers[:1]})]}

      def _generate_examples(self):
        raise NotImplementedError

  builder = Labelled(data_dir=str(home), file_format="array_record")
  builder.download_and_prepare()
  train, test, one = (tfds_source(s, folder=str(builder.data_path), text=None) for s in ("train", "test", "one"))
  records = [{"text": "é", "start": 3}, {"text": "né", "start": 2}]
  assert train[0] == {**full, "label": "good", "tags": ["O", "B-é"], "answers": records}
  assert test[0] == {**hidden, "label": None} and one[0] == {**train[0], "answers": records[:1]}
  assert json.loads(json.dumps(train[0])) == train[0]  # all values have Python's own types
  assert train.labels == {"label": ("bad", "good"), "tags": ("O", "B-é")}
  with pytest.raises(ConfigError, match=r"text: not a field of .*got 'labels'.*`label`.*None"):
    tfds_source("train", folder=str(builder.data_path), text="labels")


def test_wrong_tfds_spec_is_refused(home):
  with pytest.raises(ConfigError, match="did you mean `lm1b`"):
    open_("tfds", dataset="lm1bb", data_dir=str(home))
  with pytest.raises(ConfigError, match="must be a prepared TFDS dataset"):
    open_("tfds", folder=str(home))
  with pytest.raises(ConfigError, match="needs either"):
    open_("tfds")


def test_corpora_exist_in_tfds_with_their_fields(home):
  import tensorflow_datasets

  for name, entry in CORPORA.items():
    corpus = entry["corpus"]
    if corpus["name"] == "tfds":
      with contextlib.suppress(ImportError):  # registered if the packages they need are installed
        for collection in ("text", "summarization", "translate", "question_answering"):
          importlib.import_module(f"tensorflow_datasets.{collection}")
      builder = tensorflow_datasets.builder(corpus["dataset"], data_dir=str(home))
      features = builder.info.features
    else:
      features, _ = CONFIGS[corpus["config"]]
    named = {corpus.get("text", "text"), entry.get("pair", "text"), *entry.get("fields", {}).values()}
    assert named - {"text"} <= set(features), name
    assert "text" in features or "text" in corpus, name


def test_corpus_of_short_records_has_shorter_rows(home):
  for argument, seq_len in (("", 256), (",corpus=lm1b", 128), (",corpus=c4", 256), (",debug,corpus=lm1b", 32)):
    config = load_config([f"--config=gpt:size=nano{argument}"])
    assert config.seq_len == seq_len
  longer = load_config(["--config=gpt:corpus=lm1b", "--config.seq_len=200", "--config.data.train=train[:1%]"])
  assert longer.seq_len == 200 and longer.data.train == "train[:1%]" and longer.data.eval == "test"
  config = load_config(["--config=gpt:corpus=lm1b"])
  assert config.seq_len * config.batch_size == 2048  # the tokens per batch do not change

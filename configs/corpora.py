"""Corpora by name: source, training and held-out splits, and the length of rows.

`CORPORA` is plain data. TFDS corpora are read from $TFDS_DATA_DIR (or ~/tensorflow_datasets), in TFRecord or
ArrayRecord format. Missing ones are downloaded and prepared, which needs a network; those marked with Beam also need
the package apache-beam and hours. wiki40b has its markers as text: _START_ARTICLE_, _START_SECTION_, _START_PARAGRAPH_,
_NEWLINE_.

All fields of a record reach the objective, so a corpus whose records have a second text is also one of pairs. For
labelled corpora, "fields" is {key of an objective: field of a record}.
"""

from typing import Any

from ml_collections import ConfigDict

from llmjax.config import ConfigError, suggest_name


def tfds(dataset: str, held_out: str, train: str = "train", text: str = "text", **entry: Any) -> dict[str, Any]:
  """Return an entry; `text` is the field of a record with the text, `entry` has further keys."""
  return {"corpus": {"name": "tfds", "dataset": dataset, "text": text}, "train": train, "eval": held_out, **entry}


def stdlib(config: str, **entry: Any) -> dict[str, Any]:
  """Return an entry of the interpreter's own library, which needs no download."""
  return {"corpus": {"name": "python_stdlib", "config": config}, "train": "train", "eval": "validation", **entry}


def text(files: str, column: str = "text") -> dict[str, Any]:
  """Return the entry of your own files; the last tenth is held out. Records of 8 KiB let one file be shuffled."""
  corpus = {"name": "files", "files": files, "column": column, "max_bytes": 8192}
  return {"corpus": corpus, "train": "[:90%]", "eval": "[90%:]"}


def glue(task: str, *texts: str, held_out: str = "validation") -> dict[str, Any]:
  """Return a task of GLUE (Wang et al. 2019): a text or a pair, and a label, which the test splits do not have."""
  fields = dict(zip(("text", "pair"), texts)) | {"label": "label"}
  return tfds(f"glue/{task}", held_out, text=texts[0], fields=fields, seq_len=128)


def seq2seq(dataset: str, held_out: str, source: str, target: str, **entry: Any) -> dict[str, Any]:
  """Return an entry of source and target texts, which also match as a pair."""
  return tfds(dataset, held_out, text=source, pair=target, fields={"source": source, "target": target}, **entry)


SPANS = {"question": "question", "context": "context", "answer": "answers"}

# "seq_len" is for corpora of short records: if each record has a row of its own, longer rows would be padding.
CORPORA = {
  "python_stdlib": stdlib("text"),  # source and help texts, 9 MB
  "lm1b": tfds("lm1b", "test", seq_len=128),  # news sentences, 4 GB
  "pg19": tfds("pg19", "validation", text="book_text"),  # books before 1919, 11 GB
  "imdb": tfds("imdb_reviews", "test", train="unsupervised"),  # film reviews, 0.1 GB
  "wiki40b": tfds("wiki40b/en", "validation"),  # 10 GB; Beam
  "wikipedia": tfds("wikipedia/20230601.en", "train[:1%]", train="train[1%:]"),  # 20 GB; Beam
  "c4": tfds("c4/en", "validation[:5%]"),  # 800 GB; Beam
  "realnews": tfds("c4/realnewslike", "validation"),  # news sites of C4, 40 GB; Beam
  "webtext": tfds("c4/webtextlike", "validation"),  # OpenWebText's pages from C4, 19 GB; Beam, and a list by hand
  # "pair" is the field that matches the text.
  "docstring_pairs": stdlib(  # functions, 3 MB; also "docstring"
    "docstring_pairs", pair="summary", fields={"source": "text", "target": "summary"}, seq_len=256
  ),
  "gigaword": seq2seq("gigaword", "validation[:5%]", "document", "summary", seq_len=128),  # news leads, 1 GB
  "cnn_dailymail": seq2seq("cnn_dailymail", "validation", "article", "highlights"),  # news, 1 GB
  "wmt16_de_en": seq2seq("wmt16_translate/de-en", "validation", "de", "en", seq_len=128),  # German to English, 2 GB
  # Texts and labels; the label of glue_stsb is the similarity of two sentences, from 0 to 5.
  "glue_cola": glue("cola", "sentence"),
  "glue_sst2": glue("sst2", "sentence"),
  "glue_mrpc": glue("mrpc", "sentence1", "sentence2"),
  "glue_qqp": glue("qqp", "question1", "question2"),
  "glue_stsb": glue("stsb", "sentence1", "sentence2"),
  "glue_mnli": glue("mnli", "premise", "hypothesis", held_out="validation_matched"),
  "glue_qnli": glue("qnli", "question", "sentence"),
  "glue_rte": glue("rte", "sentence1", "sentence2"),
  "glue_wnli": glue("wnli", "sentence1", "sentence2"),
  "imdb_labelled": tfds("imdb_reviews", "test", fields={"text": "text", "label": "label"}),  # film reviews, good or bad
  "package": stdlib(
    "package", fields={"text": "text", "label": "package"}, seq_len=256
  ),  # functions and their packages
  # Tokens and their tags.
  "tokens": stdlib(
    "tokens", fields={"tokens": "tokens", "tags": "tags"}, seq_len=256
  ),  # code, and the kinds of its names
  # Questions with answers in a context.
  "squad": tfds("squad/v1.1", "validation", text="context", fields=SPANS),  # paragraphs of Wikipedia, 0.1 GB
  "squad2": tfds("squad/v2.0", "validation", text="context", fields=SPANS),  # a third of them without an answer
  "params": stdlib("params", fields=SPANS),  # docstrings and their descriptions of parameters
  # Two answers, the better one first.
  "preferences": stdlib(  # functions, and summaries of theirs and of others
    "preferences", fields={"prompt": "text", "chosen": "chosen", "rejected": "rejected"}, seq_len=256
  ),
}


def choose(config: ConfigDict, name: str, files: str | None = None, column: str = "text") -> None:
  """Set config.data.{corpus,train,eval} from an entry, or from your own `files`.

  config.seq_len has to be set before; it becomes that of the entry if that is shorter.
  """
  if files is None and name not in CORPORA:
    raise ConfigError(f"config argument corpus={name!r} is unknown; {suggest_name(name, CORPORA)}")
  entry = CORPORA[name] if files is None else text(files, column)
  config.data.corpus = ConfigDict(entry["corpus"])
  config.data.train, config.data.eval = entry["train"], entry["eval"]
  config.seq_len = min(config.seq_len, entry.get("seq_len", config.seq_len))

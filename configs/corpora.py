"""Corpora by name: where the text comes from, which splits are trained on and held out, how long its rows should be.

`CORPORA` is plain data. TFDS corpora are read from $TFDS_DATA_DIR (or ~/tensorflow_datasets) as they lie there, as
TFRecord or ArrayRecord; what is missing is downloaded and prepared, which takes a network, and for those marked with
Beam the package apache-beam and hours. wiki40b keeps its markers as text: _START_ARTICLE_, _START_SECTION_,
_START_PARAGRAPH_ and _NEWLINE_.

All fields of a record reach the objective, so a corpus whose records hold a second text is one of pairs, too.
"""

from typing import Any

from ml_collections import ConfigDict

from llmjax.config import ConfigError, nearest


def tfds(dataset: str, held_out: str, train: str = "train", text: str = "text", **entry: Any) -> dict[str, Any]:
  """An entry; `text` is the field of a record that is the text, `entry` more keys."""
  return {"corpus": {"name": "tfds", "dataset": dataset, "text": text}, "train": train, "eval": held_out, **entry}


def stdlib(config: str, **entry: Any) -> dict[str, Any]:
  """An entry of this interpreter's own library: no download."""
  return {"corpus": {"name": "python_stdlib", "config": config}, "train": "train", "eval": "validation", **entry}


def text(files: str, column: str = "text") -> dict[str, Any]:
  """One's own files, text or records by their name; the last tenth is held out. Pieces of 8 KiB shuffle one file."""
  corpus = {"name": "files", "files": files, "column": column, "max_bytes": 8192}
  return {"corpus": corpus, "train": "[:90%]", "eval": "[90%:]"}


# "seq_len" is for corpora of short records: longer rows would be padding where a record has a row of its own.
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
  # "pair" is the field that belongs to the text.
  "docstring_pairs": stdlib("docstring_pairs", pair="summary", seq_len=256),  # functions, 3 MB; also "docstring"
  "gigaword": tfds("gigaword", "validation[:5%]", text="document", pair="summary", seq_len=128),  # news leads, 1 GB
  "cnn_dailymail": tfds("cnn_dailymail", "validation", text="article", pair="highlights"),  # news, 1 GB
}


def choose(config: ConfigDict, name: str, files: str | None = None, column: str = "text") -> None:
  """Sets config.data's corpus, train and eval from an entry, or from one's own `files`.

  config.seq_len, which must be the model's by then, becomes the entry's where that is shorter.
  """
  if files is None and name not in CORPORA:
    raise ConfigError(f"config argument corpus={name!r} is unknown; {nearest(name, CORPORA)}")
  entry = CORPORA[name] if files is None else text(files, column)
  config.data.corpus = ConfigDict(entry["corpus"])
  config.data.train, config.data.eval = entry["train"], entry["eval"]
  config.seq_len = min(config.seq_len, entry.get("seq_len", config.seq_len))

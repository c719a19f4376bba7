"""Corpora by name: where the text comes from, which splits are trained on and held out, how long its rows should be.

`CORPORA` is plain data. TFDS corpora are read from $TFDS_DATA_DIR (or ~/tensorflow_datasets) as they lie there, as
TFRecord or ArrayRecord; what is missing is downloaded and prepared, which takes a network, and for those marked with
Beam the package apache-beam and hours. wiki40b keeps its markers as text: _START_ARTICLE_, _START_SECTION_,
_START_PARAGRAPH_ and _NEWLINE_.

All fields of a record reach the objective, so a corpus whose records hold a second text is one of pairs, too. For those
with answers to learn, "fields" says which field is what: {key of an objective: field of a record}.
"""

from typing import Any

from ml_collections import ConfigDict

from llmjax.config import ConfigError, suggest_name


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


def glue(task: str, *texts: str, held_out: str = "validation") -> dict[str, Any]:
  """A task of GLUE (Wang et al. 2019): a text, or a pair of them, and its label, which its test splits hide."""
  fields = dict(zip(("text", "pair"), texts)) | {"label": "label"}
  return tfds(f"glue/{task}", held_out, text=texts[0], fields=fields, seq_len=128)


def seq2seq(dataset: str, held_out: str, source: str, target: str, **entry: Any) -> dict[str, Any]:
  """A text and what is to be written of it; as a pair, they belong together."""
  return tfds(dataset, held_out, text=source, pair=target, fields={"source": source, "target": target}, **entry)


SPANS = {"question": "question", "context": "context", "answer": "answers"}

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
  "docstring_pairs": stdlib(  # functions, 3 MB; also "docstring"
    "docstring_pairs", pair="summary", fields={"source": "text", "target": "summary"}, seq_len=256
  ),
  "gigaword": seq2seq("gigaword", "validation[:5%]", "document", "summary", seq_len=128),  # news leads, 1 GB
  "cnn_dailymail": seq2seq("cnn_dailymail", "validation", "article", "highlights"),  # news, 1 GB
  "wmt16_de_en": seq2seq("wmt16_translate/de-en", "validation", "de", "en", seq_len=128),  # German to English, 2 GB
  # Texts and their classes; of glue_stsb a number, how much two sentences mean the same, from 0 to 5.
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
  "package": stdlib("package", fields={"text": "text", "label": "package"}, seq_len=256),  # functions, and where from
  # Tokens and their tags.
  "tokens": stdlib("tokens", fields={"tokens": "tokens", "tags": "tags"}, seq_len=256),  # code, and what its names are
  # Questions whose answers stand in a context.
  "squad": tfds("squad/v1.1", "validation", text="context", fields=SPANS),  # paragraphs of Wikipedia, 0.1 GB
  "squad2": tfds("squad/v2.0", "validation", text="context", fields=SPANS),  # a third of them without an answer
  "params": stdlib("params", fields=SPANS),  # docstrings, and what they say of parameters
  # Of two answers the better.
  "preferences": stdlib(  # functions, and summaries of theirs and of others
    "preferences", fields={"prompt": "text", "chosen": "chosen", "rejected": "rejected"}, seq_len=256
  ),
}


def choose(config: ConfigDict, name: str, files: str | None = None, column: str = "text") -> None:
  """Sets config.data's corpus, train and eval from an entry, or from one's own `files`.

  config.seq_len, which must be the model's by then, becomes the entry's where that is shorter.
  """
  if files is None and name not in CORPORA:
    raise ConfigError(f"config argument corpus={name!r} is unknown; {suggest_name(name, CORPORA)}")
  entry = CORPORA[name] if files is None else text(files, column)
  config.data.corpus = ConfigDict(entry["corpus"])
  config.data.train, config.data.eval = entry["train"], entry["eval"]
  config.seq_len = min(config.seq_len, entry.get("seq_len", config.seq_len))

"""Corpora by name: where the text comes from, and which splits are trained on and held out.

`CORPORA` is plain data. TFDS corpora are read from $TFDS_DATA_DIR (or ~/tensorflow_datasets), where they must lie as
ArrayRecord; what is missing is downloaded and prepared, which takes a network, and for those marked with Beam the
package apache-beam and hours. wiki40b keeps its markers as text: _START_ARTICLE_, _START_SECTION_, _START_PARAGRAPH_
and _NEWLINE_.
"""

from typing import Any

from ml_collections import ConfigDict

from llmjax.config import ConfigError, nearest


def tfds(dataset: str, held_out: str, text: str = "text") -> dict[str, Any]:
  return {"corpus": {"name": "tfds", "dataset": dataset, "text": text}, "train": "train", "eval": held_out}


def text(files: str, column: str = "text") -> dict[str, Any]:
  """One's own files, text or records by their name; the last tenth is held out. Pieces of 8 KiB shuffle one file."""
  corpus = {"name": "files", "files": files, "column": column, "max_bytes": 8192}
  return {"corpus": corpus, "train": "[:90%]", "eval": "[90%:]"}


CORPORA = {
  # This interpreter's own library and help texts, 9 MB: no download.
  "python_stdlib": {"corpus": {"name": "python_stdlib", "config": "text"}, "train": "train", "eval": "validation"},
  "lm1b": tfds("lm1b", "test"),  # news sentences, 4 GB
  "pg19": tfds("pg19", "validation", text="book_text"),  # books before 1919, 11 GB
  "wiki40b": tfds("wiki40b/en", "validation"),  # 10 GB; Beam
  "wikipedia": tfds("wikipedia/20230601.en", "train[:1%]") | {"train": "train[1%:]"},  # 20 GB; Beam
  "c4": tfds("c4/en", "validation[:5%]"),  # 800 GB; Beam
}


def choose(config: ConfigDict, name: str, files: str | None = None, column: str = "text") -> None:
  """Sets config.data's corpus, train and eval from an entry, or from one's own `files`."""
  if files is None and name not in CORPORA:
    raise ConfigError(f"config argument corpus={name!r} is unknown; {nearest(name, CORPORA)}")
  entry = CORPORA[name] if files is None else text(files, column)
  config.data.corpus = ConfigDict(entry["corpus"])
  config.data.train, config.data.eval = entry["train"], entry["eval"]

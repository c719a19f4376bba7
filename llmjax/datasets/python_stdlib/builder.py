"""Real text without a download: the running interpreter's standard library as a TFDS dataset.

The data is about 10 MB of Python source and the prose of `pydoc_data.topics`. A hash of the path assigns a file (or a
help topic) to a split, so that it stays in its split when other files are added or removed. The content, and with it
the fingerprint, differs between Python versions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from llmjax.config import ConfigError, suggest_name
from llmjax.datasets.python_stdlib import library
from llmjax.datasets.python_stdlib.functions import docstring_pairs, package_snippets, summary_preferences
from llmjax.datasets.python_stdlib.library import Documents
from llmjax.datasets.python_stdlib.parameters import parameter_questions
from llmjax.datasets.python_stdlib.tokens import tagged_tokens
from llmjax.storage.cache import cache_dir, fill_cache

if TYPE_CHECKING:
  from tensorflow_datasets.core.features import FeatureConnector

TEXT = tfds.features.Text()
TEXTS = tfds.features.Sequence(TEXT)
ANSWERS = tfds.features.Sequence({"text": TEXT, "answer_start": np.int32})  # as in the SQuAD of TFDS


def text_records(documents: Documents) -> Iterator[dict[str, str]]:
  """Language modelling: a file or a help topic per record."""
  for path, text in documents:
    yield {"text": text, "path": path}


class StdlibConfig(NamedTuple):
  """Features of a config's records, and a function that makes the records, of all splits, from the documents."""

  features: Mapping[str, FeatureConnector]
  make_records: Callable[[Documents], Iterator[Mapping[str, object]]]


def _text_features(*fields: str) -> dict[str, FeatureConnector]:
  return dict.fromkeys(fields, TEXT)


# A further task is one function and one entry. The split of a record is that of its "path".
CONFIGS = {
  "text": StdlibConfig(_text_features("text", "path"), text_records),
  "docstring_pairs": StdlibConfig(_text_features("text", "docstring", "summary", "name", "path"), docstring_pairs),
  "package": StdlibConfig(_text_features("text", "package", "path"), package_snippets),
  "tokens": StdlibConfig({"tokens": TEXTS, "tags": TEXTS, **_text_features("text", "path")}, tagged_tokens),
  "params": StdlibConfig(
    {**_text_features("id", "question", "context", "text", "path"), "answers": ANSWERS}, parameter_questions
  ),
  "preferences": StdlibConfig(_text_features("text", "chosen", "rejected", "path"), summary_preferences),
}

# TFDS refuses to register a name twice, which happens if this module is reloaded.
_is_registered = "python_stdlib" in tfds.core.registered.list_imported_builders()
with tfds.core.registered.skip_registration() if _is_registered else contextlib.nullcontext():

  class PythonStdlib(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]  # TFDS has no types
    """The builder. Prepare it with `file_format="array_record"`: TFDS needs TensorFlow to write its default format."""

    VERSION = tfds.core.Version(library.VERSION)
    BUILDER_CONFIGS = tuple(
      tfds.core.BuilderConfig(name=name, description=config.make_records.__doc__) for name, config in CONFIGS.items()
    )

    url_infos = None  # nothing is downloaded; a search for checksums would need a package that TFDS does not require

    def _info(self) -> tfds.core.DatasetInfo:
      return tfds.core.DatasetInfo(
        builder=self,
        description=__doc__,
        features=tfds.features.FeaturesDict(CONFIGS[self.builder_config.name].features),
        homepage="https://docs.python.org/3/library/",
      )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator[tuple[str, Mapping[str, object]]]]:
      splits: dict[str, list[Mapping[str, Any]]] = {"train": [], "validation": [], "test": []}
      for record in CONFIGS[self.builder_config.name].make_records(library.library_documents()):
        splits[library.split_of_path(str(record["path"]))].append(record)
      # TFDS cannot store a split without records.
      return {name: self._generate_examples(records) for name, records in splits.items() if records}

    def _generate_examples(self, records: list[Mapping[str, object]]) -> Iterator[tuple[str, Mapping[str, object]]]:
      for i, record in enumerate(records):
        yield f"{i:08d}", record


def prepare_python_stdlib(config: str = "text") -> PythonStdlib:
  """Return the prepared builder of a config, from the user's cache."""
  if config not in CONFIGS:
    raise ConfigError(f"data.corpus.config: unknown, got {config!r}; {suggest_name(config, CONFIGS)}")

  def builder_in(folder: Path) -> PythonStdlib:
    return PythonStdlib(config=config, data_dir=str(folder), file_format="array_record")

  folder = cache_dir() / "python_stdlib" / library.library_fingerprint() / config
  return builder_in(fill_cache(folder, lambda target: builder_in(target).download_and_prepare()))

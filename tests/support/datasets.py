"""A small python_stdlib dataset, prepared once for the tests of a module."""

import contextlib
import functools

import pytest

from llmjax.datasets.python_stdlib import library

# Two packages with enough functions to be classes of the config "package", and some of the rest.
PACKAGES = ("asyncio", "email", "json")


@functools.cache
def small_library() -> list[tuple[str, str]]:
  """Return about a tenth of the library's files and help topics, with records in every split of every config."""
  documents = library.library_documents()
  selected = [document for document in documents if document[0].split("/")[0] in PACKAGES]
  modules = [document for document in documents if "/" not in document[0]]
  topics = [document for document in documents if document[0].startswith("pydoc_data")]
  return [*selected, *modules[::20], *topics[::8]]


@contextlib.contextmanager
def small_datasets(folder):
  """Let configs with their default data use the small library, prepared in `folder`.

  Preparing the whole library takes several seconds for each config of the dataset; python_stdlib_test.py does that.
  """
  documents = small_library()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("LLMJAX_CACHE", str(folder))
    patch.setattr(library, "library_documents", lambda: documents)
    patch.setattr(library, "library_fingerprint", lambda: "small")
    yield

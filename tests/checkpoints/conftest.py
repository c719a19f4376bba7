"""Fixtures of the tests of checkpoints."""

import pytest

from tests.support.tiny_folders import SHAPES, write_tiny_folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
  """Return {kind: a tiny Hugging Face folder with a tokenizer}."""
  root = tmp_path_factory.mktemp("folders")
  return {kind: write_tiny_folder(kind, root / kind) for kind in SHAPES}

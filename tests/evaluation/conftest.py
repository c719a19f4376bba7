"""Fixtures of the tests of evaluators."""

import pytest

from tests.support.contrastive_run import write_run


@pytest.fixture
def folder(home, monkeypatch):
  """Change into a folder with the config and the data of a contrastive run, and return it."""
  monkeypatch.chdir(home)
  write_run(home)
  return home

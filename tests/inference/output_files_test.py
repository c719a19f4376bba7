"""Output files of commands."""

import pytest

from llmjax.config import ConfigError
from llmjax.inference.output_files import check_output_path, replace_when_complete


def test_check_output_path_returns_the_resolved_path(tmp_path):
  (tmp_path / "out.npy").write_text("old")
  (tmp_path / "link.npy").symlink_to(tmp_path / "out.npy")
  assert check_output_path(tmp_path / "link.npy", tmp_path / "in.txt") == (tmp_path / "out.npy").resolve()


def test_check_output_path_equal_to_the_input_raises(tmp_path):
  with pytest.raises(ConfigError, match="over --input"):
    check_output_path(tmp_path / "a.npy", tmp_path / "." / "a.npy")


def test_check_output_path_of_a_folder_raises(tmp_path):
  with pytest.raises(ConfigError, match="exists and is not a file"):
    check_output_path(tmp_path, tmp_path / "in.txt")


def test_replace_when_complete_keeps_the_old_file_after_an_error(tmp_path):
  target = tmp_path / "out.npy"
  target.write_text("old")
  with pytest.raises(OSError, match="full"), replace_when_complete(target) as partial:
    partial.write_text("half")
    raise OSError("disk full")
  assert target.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["out.npy"]


def test_replace_when_complete_replaces_the_old_file(tmp_path):
  target = tmp_path / "out.npy"
  target.write_text("old")
  with replace_when_complete(target) as partial:
    partial.write_text("new")
  assert target.read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["out.npy"]

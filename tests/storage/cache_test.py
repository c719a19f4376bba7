"""Cache entries are complete or absent, and digests depend on content only."""

import os

import pytest

from llmjax.storage.cache import SAMPLE_BYTES, SAMPLES, file_digest, fill_cache


def test_cached_entry_is_complete_or_absent(tmp_path):
  def fail(path):
    path.write_text("half")
    raise OSError("disk full")

  target = tmp_path / "folder" / "entry"
  with pytest.raises(OSError, match="disk full"):
    fill_cache(target, fail)
  assert not target.exists() and not list(target.parent.iterdir())
  assert fill_cache(target, lambda p: p.write_text("whole")).read_text() == "whole"
  assert fill_cache(target, fail).read_text() == "whole"


def test_file_digest_of_a_large_file_is_of_size_and_samples(tmp_path):
  file, size = tmp_path / "file", 4 * SAMPLES * SAMPLE_BYTES
  file.touch()
  os.truncate(file, size)
  digests = []
  for position in (None, 0, size - 1, SAMPLE_BYTES + 1):  # the last one is between two samples
    if position is not None:
      with file.open("r+b") as opened:
        opened.seek(position)
        opened.write(b"x")
    digests.append(file_digest(file, max_hashed_bytes=size - 1))
  assert digests[0] != digests[1] != digests[2] == digests[3]
  assert file_digest(file, max_hashed_bytes=size) != digests[3]


def test_file_digest_ignores_the_modification_time(tmp_path):
  file = tmp_path / "file"
  file.write_bytes(b"content")
  digest = file_digest(file)
  os.utime(file, (0, 0))
  assert file_digest(file) == digest == file_digest(file, max_hashed_bytes=7)

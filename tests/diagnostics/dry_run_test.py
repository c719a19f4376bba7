"""Texts of a dry run; tests/cli/main_test.py runs the command."""

import pytest

from llmjax.diagnostics.dry_run import format_bytes


@pytest.mark.parametrize(
  "count, text", [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (80 * 2**30, "80 GiB"), (3 * 2**40, "3 TiB")]
)
def test_format_bytes_uses_binary_units(count, text):
  assert format_bytes(count) == text

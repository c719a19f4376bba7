"""Output files of commands, which replace an existing file only when they are complete."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from llmjax.config import ConfigError


def check_output_path(output: str | Path, input: str | Path) -> Path:
  """Return the path of an output, with links resolved.

  Raises:
    ConfigError: it is the input, which would be lost, or it exists and is not a file.
  """
  target = Path(output).resolve()
  if target == Path(input).resolve():
    raise ConfigError(f"--output would write {output} over --input={input}; give another name")
  if target.exists() and not target.is_file():
    raise ConfigError(f"--output={output} exists and is not a file; give another name")
  return target


@contextlib.contextmanager
def replace_when_complete(target: Path) -> Iterator[Path]:
  """Yield a file to write, which then replaces `target`. If writing fails, `target` does not change."""
  partial = target.with_name(f".{target.name}.partial")
  try:
    yield partial
    partial.replace(target)
  finally:
    partial.unlink(missing_ok=True)

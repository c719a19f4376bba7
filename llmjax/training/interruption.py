"""Interruption of a run by Ctrl-C or SIGTERM, and its profile."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from llmjax.config import ConfigError
from llmjax.storage.buckets import staging_dir, upload_folder


@contextlib.contextmanager
def catch_interruption() -> Iterator[Callable[[int], bool]]:
  """Turn the first Ctrl-C or SIGTERM into a request to save and stop; the second one acts at once.

  Yields:
    A function of the number of finished steps: whether to stop now. Several processes stop after the same step: JAX
    receives a SIGTERM to any of them, and agrees on a step that none has passed.
  """
  is_alone = jax.process_count() == 1
  received: list[int] = []
  previous: dict[int, Any] = {}

  def handle(number: int, frame: FrameType | None) -> None:
    received.append(number)
    signal.signal(number, previous[number])
    if not is_alone:
      os.kill(os.getpid(), signal.SIGTERM)

  with contextlib.suppress(ValueError):  # handlers can be set in the main thread only
    for handled in (signal.SIGINT, signal.SIGTERM) if is_alone else (signal.SIGINT,):
      previous[handled] = signal.signal(handled, handle)
  try:
    yield (lambda step: bool(received)) if is_alone else multihost_utils.reached_preemption_sync_point
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def make_profiler(steps: str | None, workdir: Path) -> Callable[[int | None], None]:
  """Return a function of the step that traces steps "first:last" into WORKDIR/profile; None ends a trace."""
  if steps is None:
    return lambda step: None
  try:
    first, last = (int(part) for part in steps.split(":"))
    if not 0 <= first < last:
      raise ValueError
  except ValueError:
    raise ConfigError(f"config.profile={steps!r} must be FIRST:LAST with FIRST < LAST, such as 10:15") from None
  folder: Path | None = None  # of the trace while it is recorded

  def profile(step: int | None) -> None:
    nonlocal folder
    if step == first:
      folder = staging_dir(workdir / "profile")
      jax.profiler.start_trace(str(folder))
    elif folder is not None and (step is None or step >= last):
      jax.profiler.stop_trace()
      upload_folder(folder, workdir / "profile")
      folder = None

  return profile

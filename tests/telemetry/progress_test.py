"""The progress of a run: its sparkline, the live line on a terminal, and plain lines elsewhere."""

import io
import math

import pytest

from llmjax.telemetry.progress import (
  Progress,
  format_duration,
  format_number,
  replace_control_characters,
  sparkline,
)


@pytest.mark.parametrize("width", [0, 1, 5, 20, 200])
def test_sparkline_has_the_width_and_falls(width):
  spark = sparkline([10 - math.log(i) for i in range(1, 400)], width)
  assert len(spark) == width
  assert list(spark) == sorted(spark, reverse=True)
  if width > 1:
    assert (spark[0], spark[-1]) == ("█", "▁")


def test_sparkline_ignores_non_finite_values():
  assert sparkline([math.nan, math.inf, 2.0]) == "▁"
  assert sparkline([math.nan]) == sparkline([]) == ""


def test_durations_and_numbers_are_formatted_with_units():
  assert [format_duration(s) for s in (59, 3661, 200_000)] == ["0:59", "1:01:01", "2d 7h"]
  assert [format_number(v) for v in (12, 1234, 999_700, 5.6e9)] == ["12", "1.23k", "1000k", "5.6G"]


def test_control_characters_are_replaced_except_newlines_and_tabs():
  assert replace_control_characters("a\tb\n\x1b[2J\ud800") == "a\tb\n\ufffd[2J\ufffd"


def show_progress(stream):
  """Show 100 updates on a stream, and return what was written."""
  progress = Progress(123_456, 0, 4096, stream=stream)
  for step in range(0, 1000, 10):
    progress.update(step, 9.0 - step / 200, None if step == 0 else 52_300.0)
  progress.print_above("a [bold] \x1b[2J sample")
  progress.close()
  return stream.getvalue()


def test_progress_writes_one_plain_line_per_update_to_a_file(monkeypatch):
  monkeypatch.setenv("FORCE_COLOR", "1")
  first, *_, last, sample = show_progress(io.StringIO()).splitlines()
  assert first == "step 0/123,456  loss 9.0000  ▁  0%"
  assert last == "step 990/123,456  loss 4.0500  █████▇▇▇▇▆▆▆▅▅▄▄▃▂▂▁  1%  52.3k tok/s  2:39:51 left"
  assert sample == "a [bold] \ufffd[2J sample"


def test_progress_has_no_sparkline_if_the_encoding_lacks_it():
  stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
  Progress(10, 0, 8, stream=stream).update(1, 2.0, 8.0)
  assert stream.buffer.getvalue() == b"step 1/10  loss 2.0000  10%  8 tok/s  0:09 left\n"


class Terminal(io.StringIO):
  """A stream that claims to be a terminal."""

  def isatty(self):
    return True


@pytest.mark.parametrize("width", [10, 30, 60, 70, 80, 120])
def test_progress_redraws_one_line_that_fits_the_terminal(width, monkeypatch):
  for name, value in {"COLUMNS": str(width), "TERM": "xterm", "NO_COLOR": "1"}.items():
    monkeypatch.setenv(name, value)
  *_, line, end = (
    show_progress(Terminal()).replace("\x1b[1m", "").replace("\x1b[0m", "").split("\x1b[2K")[-1].split("\n")
  )
  assert len(line) <= width and line.startswith("step" if width > 10 else "st")
  assert "step 990/123,456 loss 4.0500" in line or width < 60
  assert "52.3k tok/s 2:39:51 left" in line or width < 70
  assert ("▁" in line) == (width >= 70) and end == "\x1b[?25h"

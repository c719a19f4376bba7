"""Durations in steps, tokens, examples, epochs or percent."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction

from llmjax.config.errors import ConfigError

_SCALE = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def duration_to_steps(
  value: object,
  key: str,
  *,
  batch_size: int,
  seq_len: int,
  total_steps: int | None = None,
  epoch_tokens: int | None = None,
  epoch_examples: Callable[[], int | None] = lambda: None,
) -> int | None:
  """Return a duration in optimizer steps, rounded up; None stays None.

  Args:
    value: 500, "500 steps", "10M tokens", "2k examples" (sequences), "1.5 epochs" or "5%" (of total_steps).
    key: config key of the duration, for messages.
    batch_size: global sequences per step.
    seq_len: tokens per sequence.
    total_steps: steps that percents refer to.
    epoch_tokens: tokens in the training data; the length of an epoch of packed data.
    epoch_examples: returns the sequences of an epoch if each has a row of its own, else None.

  Raises:
    ConfigError: not a duration, or a unit that cannot be converted to steps here.
  """
  if value is None:
    return None
  text = str(value).strip().replace("_", "").replace(",", "")
  match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmbt]?)\s*(step|token|example|epoch|%)?s?", text.lower())
  if match is None or isinstance(value, bool):
    raise ConfigError(
      f"{key}={value!r} is not a duration; give 500, '500 steps', '10M tokens', '2k examples', '2 epochs' or '5%'"
    )
  number = Fraction(match[1]) * _SCALE[match[2]]  # in floats, 7 % of 100 steps would be rounded up to 8
  unit = match[3] or "step"
  if unit == "%":
    if total_steps is None:
      raise ConfigError(f"{key}={value!r}: percents refer to total_steps, so it cannot be one itself")
    steps = number / 100 * total_steps
  elif unit == "token":
    steps = number / (batch_size * seq_len)
  elif unit == "example":
    steps = number / batch_size
  elif unit == "epoch":
    count = epoch_examples() if epoch_tokens is None else None
    if count is not None:
      steps = number * count / batch_size
    elif epoch_tokens is None:
      raise ConfigError(
        f"{key}={value!r}: an epoch of packed data has no known number of steps; "
        "set data.epoch_tokens (tokens in the training data) or data.pack=False, or give it in steps or tokens"
      )
    else:
      steps = number * epoch_tokens / (batch_size * seq_len)
  else:
    steps = number
  return math.ceil(steps)

"""Learning-rate schedules: the rate of every step as a multiple of the peak, computed on the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from llmjax.config import ConfigError, build, to_dict

Number = int | float


SCHEDULES = {
  "constant": "llmjax.training.schedules:constant",
  "cosine": "llmjax.training.schedules:cosine",
  "inverse_sqrt": "llmjax.training.schedules:inverse_sqrt",
  "linear": "llmjax.training.schedules:linear",
  "wsd": "llmjax.training.schedules:wsd",
}


def require_keys(spec: Mapping[str, Any], keys: tuple[str, ...], what: str) -> None:
  for key in keys:
    if key not in spec:
      raise ConfigError(f"{what}.{key} is missing; configs/base.py has its default")


def make_schedule(spec: Any, total_steps: int, to_steps: Callable[[Any, str], int | None]) -> Callable[[int], float]:
  """The learning rate of every step as a multiple of its peak; a plain float, computed on the host.

  With `warmup` = w > 0, steps 0 ... w-1 give 1/w, 2/w, ..., 1 (no step is wasted on a rate of zero), and then the
  schedule goes on from that peak; without, step 0 is the peak. Where it has `final`, the last step,
  `total_steps - 1`, and any later one, gives exactly `final` (unless the warm-up ends there).

  Args:
    spec: {"name", "warmup": a duration or None, **keys of the schedule}. "name" is in SCHEDULES, or "module:function"
      like those here: (its keys, and any of `peak`, `last`, `to_steps`) -> (step -> multiple), for steps >= `peak`.
    total_steps: steps of the whole run.
    to_steps: (duration, config key) -> steps.
  Raises:
    ConfigError: an unknown or missing key, or phases that do not fit into the run.
  """
  spec = to_dict(spec)
  require_keys(spec, ("warmup",), "schedule")
  said = spec.pop("warmup")
  warmup = to_steps(said, "schedule.warmup") or 0
  if warmup > total_steps:
    raise ConfigError(
      f"schedule.warmup={said!r} is {warmup} steps, but the run has total_steps={total_steps}; "
      "shorten it, or give it in percent ('5%') so that it follows total_steps"
    )
  peak = max(warmup - 1, 0)
  after = build(spec, SCHEDULES, "schedule", peak=peak, last=max(total_steps - 1, peak), to_steps=to_steps)
  return lambda step: float((step + 1) / warmup if step < peak else after(step))


def _progress(step: int, start: int, end: int) -> float:
  """0 at `start`, 1 from `end` on; an empty phase has not begun."""
  return min((step - start) / (end - start), 1.0) if end > start else 0.0


def _check_final(final: Number | None) -> None:
  if final is not None and not 0 <= final <= 1:
    raise ConfigError(f"schedule.final={final} must lie between 0 and 1: the last rate as a fraction of the peak")


def constant() -> Callable[[int], float]:
  """The peak to the end."""
  return lambda step: 1.0


def cosine(peak: int, last: int, final: Number = 0.0) -> Callable[[int], float]:
  """Half a cosine from the peak to `final` (Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983)."""
  _check_final(final)
  return lambda step: final + (1 - final) * (1 + math.cos(math.pi * _progress(step, peak, last))) / 2


def linear(peak: int, last: int, final: Number = 0.0) -> Callable[[int], float]:
  """A straight line from the peak to `final`."""
  _check_final(final)
  return lambda step: 1 - (1 - final) * _progress(step, peak, last)


def inverse_sqrt(
  peak: int, last: int, to_steps: Callable[[Any, str], int | None], timescale: Any = None, final: Number | None = None
) -> Callable[[int], float]:
  """sqrt(timescale / (timescale + steps since the peak)).

  Args:
    timescale: a duration; None takes the warm-up's, which gives 1 / sqrt(step) as in Vaswani et al. 2017
      (https://arxiv.org/abs/1706.03762).
    final: None leaves the formula alone; a number stretches the curve, so that it falls from 1 to `final`.
  """
  _check_final(final)
  scale = peak + 1 if timescale is None else to_steps(timescale, "schedule.timescale")
  if not scale:
    raise ConfigError(f"schedule.timescale={timescale!r} must be at least one step")

  def plain(step: int) -> float:
    return math.sqrt(scale / (scale + step - peak))

  if final is None or last == peak:
    return plain
  return lambda step: final + (1 - final) * (plain(min(step, last)) - plain(last)) / (1 - plain(last))


def wsd(
  peak: int,
  last: int,
  to_steps: Callable[[Any, str], int | None],
  decay: Any,
  shape: str = "linear",
  final: Number = 0.0,
) -> Callable[[int], float]:
  """Warm-up, stable, decay (Hu et al. 2024, https://arxiv.org/abs/2404.06395): the fall takes the last `decay` steps.

  Args:
    decay: a duration.
    shape: of the fall, "linear" or "sqrt", 1 - sqrt(progress) (Hägele et al. 2024, https://arxiv.org/abs/2405.18392).
    final: where it ends.
  """
  _check_final(final)
  if shape not in ("linear", "sqrt"):
    raise ConfigError(f"schedule.shape={shape!r} must be 'linear' or 'sqrt'")
  steps = to_steps(decay, "schedule.decay") or 0
  if steps > last - peak:
    raise ConfigError(
      f"schedule.decay={decay!r} is {steps} steps, but only {last - peak} follow the warm-up; shorten one of the two"
    )
  power = 1.0 if shape == "linear" else 0.5
  return lambda step: 1 - (1 - final) * max(_progress(step, last - steps, last), 0.0) ** power

"""Learning-rate schedules: the rate of every step as a multiple of the peak, computed on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from llmjax.config import ConfigError, ConfigTree, build, to_dict

Number: TypeAlias = int | float
Schedule: TypeAlias = Callable[[int], float]  # step -> multiple of the peak learning rate
ToSteps: TypeAlias = Callable[[object, str], int | None]  # (duration, its config key) -> steps

SCHEDULES = {
  "constant": "llmjax.training.schedules:constant",
  "cosine": "llmjax.training.schedules:cosine",
  "inverse_sqrt": "llmjax.training.schedules:inverse_sqrt",
  "linear": "llmjax.training.schedules:linear",
  "wsd": "llmjax.training.schedules:wsd",
}


def make_schedule(spec: ConfigTree, total_steps: int, to_steps: ToSteps) -> Schedule:
  """Return the learning rate of every step as a multiple of its peak: a plain float, computed on the host.

  With `warmup` = w > 0, steps 0 ... w-1 give 1/w, 2/w, ..., 1, so that no step has a rate of zero, and the schedule
  continues from that peak. Without warm-up, step 0 is the peak. If the schedule has a `final` value, the last step,
  `total_steps - 1`, and any later one give exactly that (unless the warm-up ends there).

  Args:
    spec: {"name", "warmup": a duration or None, **keys of the schedule}. "name" is in SCHEDULES, or "module:function"
      of a function that takes these keys, and any of `peak`, `last`, `to_steps`, and returns a Schedule.
    total_steps: steps of the whole run.
    to_steps: converts durations.

  Raises:
    ConfigError: an unknown or missing key, or phases that do not fit into the run.
  """
  spec = to_dict(spec)
  if "warmup" not in spec:
    raise ConfigError("schedule.warmup is missing; give a duration, or none")
  warmup = spec.pop("warmup")
  warmup_steps = to_steps(warmup, "schedule.warmup") or 0
  if warmup_steps > total_steps:
    raise ConfigError(
      f"schedule.warmup={warmup!r} is {warmup_steps} steps, but the run has total_steps={total_steps}; "
      "shorten it, or give it in percent ('5%') so that it follows total_steps"
    )
  peak = max(warmup_steps - 1, 0)
  after = build(spec, SCHEDULES, "schedule", peak=peak, last=max(total_steps - 1, peak), to_steps=to_steps)
  return lambda step: float((step + 1) / warmup_steps if step < peak else after(step))


def _progress(step: int, start: int, end: int) -> float:
  """Return the part of a phase that has passed: 0 at `start`, 1 from `end` on; 0 for an empty phase."""
  return min((step - start) / (end - start), 1.0) if end > start else 0.0


def _check_final(final: Number | None) -> None:
  if final is not None and not 0 <= final <= 1:
    raise ConfigError(f"schedule.final={final} must be between 0 and 1: the last rate as a fraction of the peak")


def constant() -> Schedule:
  """The peak until the end."""
  return lambda step: 1.0


def cosine(peak: int, last: int, final: Number = 0.0) -> Schedule:
  """Half a cosine from the peak to `final` (Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983)."""
  _check_final(final)
  return lambda step: final + (1 - final) * (1 + math.cos(math.pi * _progress(step, peak, last))) / 2


def linear(peak: int, last: int, final: Number = 0.0) -> Schedule:
  """Linear decay from the peak to `final`."""
  _check_final(final)
  return lambda step: 1 - (1 - final) * _progress(step, peak, last)


def inverse_sqrt(
  peak: int, last: int, to_steps: ToSteps, timescale: object = None, final: Number | None = None
) -> Schedule:
  """sqrt(timescale / (timescale + steps since the peak)).

  Args:
    peak: step of the peak.
    last: last step.
    to_steps: converts durations.
    timescale: a duration; None: that of the warm-up, which gives 1 / sqrt(step) as in Vaswani et al. 2017
      (https://arxiv.org/abs/1706.03762).
    final: None: the formula as it is; a number: the curve is stretched to fall from 1 to `final`.
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
  to_steps: ToSteps,
  decay: object,
  shape: str = "linear",
  final: Number = 0.0,
) -> Schedule:
  """Warm-up, stable, decay (Hu et al. 2024, https://arxiv.org/abs/2404.06395): the decay takes the last `decay` steps.

  Args:
    peak: step of the peak.
    last: last step.
    to_steps: converts durations.
    decay: a duration.
    shape: of the decay: "linear", or "sqrt" for 1 - sqrt(progress) (Hägele et al. 2024,
      https://arxiv.org/abs/2405.18392).
    final: last value.
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

"""Metrics of train steps: summed between log lines, fetched one step late, checked, and written."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping

import jax

from llmjax.metrics.sums import add_metrics, metric_means
from llmjax.telemetry.flops import peak_flops
from llmjax.telemetry.progress import Progress
from llmjax.telemetry.writers import MetricWriter
from llmjax.training.program import Program
from llmjax.types import Metrics


class DivergenceError(RuntimeError):
  """The loss is NaN or infinite."""


class StepMetrics:
  """Metrics of the steps since the last log line. They are fetched one step late, so that the loop never waits.

  Attributes:
    step_flops: model FLOPs of a step, known with the first batch.
  """

  def __init__(self, program: Program, writer: MetricWriter, progress: Progress | None) -> None:
    self.step_flops = 0.0
    self._program, self._writer, self._progress = program, writer, progress
    self._tokens_per_step = program.config["batch_size"] * program.config["seq_len"]
    self._pending: list[Metrics] = []
    self._due_step: int | None = None
    self._clock: float | None = None  # time of the last log line; None until a step has been compiled and run

  def add(self, step: int, metrics: Metrics, is_due: bool) -> None:
    """Add the metrics of a step, which are logged if `is_due`.

    Logs the steps that were due before, now that the device is busy with this one.
    """
    self.flush()
    self._pending.append(metrics)
    self._due_step = step if is_due else None

  def flush(self) -> None:
    """Log the steps that are due."""
    if self._due_step is None:
      return
    step, self._due_step = self._due_step, None
    fetched, self._pending = jax.device_get(self._pending), []
    now = time.perf_counter()
    total = fetched[0]
    for metrics in fetched[1:]:
      total = add_metrics(total, metrics)
    means = metric_means(total)
    check_finite(step, means)
    values = {f"train/{name}": value for name, value in means.items()}
    values["train/learning_rate"] = self._program.learning_rate(step - 1)
    tokens_per_second = None
    if self._clock is not None:
      steps_per_second = len(fetched) / (now - self._clock)
      tokens_per_second = self._tokens_per_step * steps_per_second
      values |= {"train/tokens_per_second": tokens_per_second, **self._flops_values(steps_per_second)}
    self._clock = now
    self._writer.write(step, values)
    if self._progress:
      self._progress.update(step, means["loss" if "loss" in means else "objective"], tokens_per_second)

  def _flops_values(self, steps_per_second: float) -> dict[str, float]:
    flops = steps_per_second * self.step_flops
    values = {"train/model_flops_per_second": flops}
    peak = peak_flops(jax.devices()[0].device_kind, self._program.model.cfg.dtype)
    if peak:
      values["train/mfu"] = flops / (peak * self._program.mesh.size)
    return values

  @contextlib.contextmanager
  def paused(self, step: int) -> Iterator[None]:
    """Exclude what happens inside, after `step`, from the measured speed.

    The loss is checked before, so that a diverged state does not replace a sound checkpoint.
    """
    self.flush()
    if self._pending:
      check_finite(step, metric_means(jax.device_get(self._pending[-1])))
    start = time.perf_counter()
    yield
    if self._clock is not None:
      self._clock += time.perf_counter() - start


def check_finite(step: int, means: Mapping[str, float]) -> None:
  """Raise DivergenceError if a loss is NaN or infinite."""
  for name in ("loss", "objective", "param_norm"):
    if name in means and not math.isfinite(means[name]):
      raise DivergenceError(
        f"{name} is {means[name]} at step {step:,}; the last checkpoint is kept (try a lower optim.lr)"
      )

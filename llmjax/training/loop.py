"""The only train loop: steps, evals, saves. It never waits for a metric."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llmjax.checkpoints.manager import Checkpoints
from llmjax.checkpoints.manifest import make_manifest, package_versions
from llmjax.checkpoints.sources import INHERITED_ENTRIES, inherited_manifest_entries
from llmjax.config import ConfigError, build, flatten_config, to_dict
from llmjax.data.pipeline import TrainStream, merge_cursors
from llmjax.distributed import processes, sharding
from llmjax.metrics import sums
from llmjax.storage.buckets import as_path, staging_dir, translate_storage_errors, upload_folder
from llmjax.telemetry.flops import peak_flops
from llmjax.telemetry.progress import Progress
from llmjax.telemetry.writers import MetricWriter
from llmjax.training.early_stopping import EarlyStopping, check_metric, metric_value
from llmjax.training.evals import EVALUATORS, SCHEDULE_KEYS, metric_name
from llmjax.training.program import Program, make_program, open_source
from llmjax.training.resume import (
  archive_run,
  check_archivable,
  check_resumable,
  finish_message,
  labels_to_reuse,
  read_previous_manifest,
  restore_or_init,
  tokenizer_to_reuse,
)


class Diverged(RuntimeError):
  """The loss is no longer a number."""


def run(config: Any, workdir: str | Path, *, fresh: bool = False) -> dict[str, float]:
  """Trains `config` in `workdir`, or resumes what is there, to the end; returns the final evaluations.

  Args:
    config: a config like configs/base.py.
    workdir: where checkpoints, metrics and samples go: a folder, or gs://BUCKET/FOLDER.
    fresh: move an earlier run in `workdir` aside and start anew.
  Raises:
    ConfigError: a config that cannot work, or that differs from the run in `workdir` where it must not.
    Diverged: the loss became NaN or infinite; the last checkpoint is kept.
  """
  workdir = as_path(workdir)
  leader = jax.process_index() == 0
  config = to_dict(config)
  if fresh:
    check_archivable(workdir)
  earlier = None if fresh else read_previous_manifest(workdir)
  config["objective"] |= labels_to_reuse(config, earlier)
  program = make_program(config, tokenizer=tokenizer_to_reuse(config, earlier))
  config = program.config
  steps = program.steps
  source = open_source(config, config["data"]["train"])
  processes.preflight(lambda: run_fingerprint(program, source))
  kept = (
    {k: earlier[k] for k in INHERITED_ENTRIES if k in earlier}
    if earlier
    else inherited_manifest_entries(config["init_from"])
  )
  manifest = make_manifest(program) | kept | {"data_fingerprint": source.fingerprint}
  changed = check_resumable(earlier, manifest, workdir) if earlier else {}
  evals, save_every, log_every, stopper = build_schedules(program)
  profile = profiler(config["profile"], workdir)
  best = config["checkpoint"]["best"]
  if fresh and leader:
    archive_run(workdir)
  processes.preflight(lambda: {"fresh": fresh})  # nobody looks into the folder before it is moved
  checkpoints = Checkpoints(
    workdir,
    keep=config["checkpoint"]["keep"],
    write=True,
    keep_every=steps(config["checkpoint"]["keep_every"], "checkpoint.keep_every"),
    best=best,
    best_is=config["checkpoint"]["best_is"],
  )
  stream = make_stream(program, source, prefetch=config["data"]["prefetch"])
  try:
    empty, seen = (0, 0) if program.objective.fields == ("text",) else stream.plan.count_skipped()
    state, first, cursor = restore_or_init(program, checkpoints)
  except BaseException:  # threads of both would complain at the exit
    stream.close()
    checkpoints.close()
    raise
  if cursor is not None:
    stream.restore(cursor)
  before: dict[str, Any] = checkpoints.read(first, "manifest") if first else {}
  stopper.restore(before.get("early_stopping"))
  total, tokens_per_step = program.total_steps, config["batch_size"] * config["seq_len"]
  say = print if leader else (lambda *_: None)
  if first >= total or stopper.should_stop:
    stream.close()
    checkpoints.close()
    say(finish_message(workdir, earlier or manifest, first, early=first < total))
    return dict((earlier or {"metrics": {}})["metrics"])
  if first:
    news = "; changed: " + ", ".join(f"{k} {a} → {b}" for k, (a, b) in changed.items()) if changed else ""
    say(f"resuming {workdir} at {first:,}/{total:,}{news}")
  else:
    corpus = f"{config['data']['corpus']['name']} (fingerprint {source.fingerprint}, {len(source):,} records)"
    part = "" if program.num_trainable == program.num_params else f"{program.num_trainable:,} of "
    count = f"{part}{program.num_params:,} parameters"
    say(f"training {count} for {total:,} steps of {tokens_per_step:,} tokens on {corpus}")
    if empty:
      say(f"of {seen:,} records looked at {empty:,} are left out: {program.objective.skip_reason}")
    say(f"in {workdir}; interrupted, the same command goes on where it was")
  if leader:
    with translate_storage_errors(workdir):
      workdir.mkdir(parents=True, exist_ok=True)
      (workdir / "config.json").write_text(json.dumps(config, indent=2, default=str))

  writer = MetricWriter(
    workdir if leader else None,
    start_step=first,
    tensorboard=config["log"]["tensorboard"],
    wandb=config["log"]["wandb"],
    config=config,
  )
  progress = Progress(total, first, tokens_per_step) if leader else None
  meter = Meter(program, writer, progress, tokens_per_step)
  key = jax.jit(lambda: jax.random.key(config["seed"]), out_shardings=program.replicated)()
  auxiliary = program.auxiliary_params
  results: dict[str, float] = {}  # the last of every evaluation
  measured: tuple[int, dict[str, float]] = (-1, {})  # at which step, and what

  def evaluate(step: int, which: Any = lambda when, step: when(step)) -> None:
    nonlocal measured
    if measured[0] != step:
      measured = (step, {})
    for name, (evaluator, when) in evals.items():
      if not which(when, step):
        continue
      for what, value in evaluator(program.eval_params(state)).items():
        if isinstance(value, str):
          writer.text(step, name, value)
          if progress:
            progress.say(f"[{name} at step {step:,}]\n{value}\n")
        else:
          measured[1][metric_name(name, what)] = float(value)
    new = measured[1]
    results.update(new)
    if best is not None:
      metric_value(best, new, "checkpoint.best")  # says when there is none
    if new:
      writer.write(step, new)
      if progress:
        progress.say(f"step {step:,}: " + ", ".join(f"{k.removeprefix('eval/')} {v:.4f}" for k, v in new.items()))

  def save(step: int) -> None:
    cursors = merge_cursors(gather_cursors(stream.cursor))
    said = manifest | {"early_stopping": stopper.state}
    writer.sync()  # a run that goes on from this checkpoint finds every line until it
    checkpoints.save(step, state, cursors, said, measured[1] if measured[0] == step else {})

  done, enough = first, False
  try:
    if first == 0:
      evaluate(0)
    elif any(when(first) for _, when in evals.values()) and not before["metrics"]:
      evaluate(first)  # the run was interrupted before it could
      enough = stopper.update(measured[1])
    with sharding.use_mesh(program.mesh, program.rules), interruption() as interrupted:
      for step in range(first, first if enough else total):
        profile(step)
        batch = program.put(next(stream), config["batch_size"])
        rate = replicate(np.float32(program.learning_rate(step)), program)
        if step == first:
          meter.step_flops = program.step_flops(batch)
        with jax.transfer_guard("disallow"):
          state, new = program.train_step(state, batch, key, rate, auxiliary)
        done = step + 1
        meter.add(done, new, done % log_every == 0 or step == first or done == total)
        stopping = interrupted(done) and done < total
        if not stopping and any(when(done) for _, when in evals.values()):
          with meter.paused(done):
            try:
              evaluate(done)
              enough = stopper.update(measured[1]) and done < total
              if enough:
                evaluate(done, lambda when, step: not when(step))
            except Exception:  # what was trained must outlive a broken evaluator
              if processes.barrier(f"evaluation/{done}", timeout=60):  # all save, or none
                save(done)
                checkpoints.wait()
              raise
        if stopping or enough or done == total or done % save_every == 0:
          with meter.paused(done):
            save(done)
        if stopping:
          checkpoints.wait()
          raise KeyboardInterrupt(f"interrupted at {done:,}/{total:,}; saved: the same command resumes there")
        if enough:
          break
    meter.flush()
    checkpoints.wait()
  finally:
    profile(None)
    stream.close()
    writer.close()
    if progress:
      progress.close()
    checkpoints.close()
  if enough:
    say(f"{stopper.metric} has not been better than {stopper.best} for {stopper.patience} evaluations")
  say(finish_message(workdir, manifest | {"metrics": results}, done, early=enough))
  return results


class Meter:
  """Metrics of the steps since the last log line; fetched one step late, so that the loop never waits for them."""

  def __init__(self, program: Program, writer: Any, progress: Any, tokens_per_step: int):
    self.program, self.writer, self.progress, self.tokens = program, writer, progress, tokens_per_step
    self.pending: list[Any] = []
    self.due: int | None = None
    self.step_flops = 0.0  # known with the first batch
    self.clock: float | None = None  # None until a step has been compiled and run

  def add(self, step: int, metrics: Any, due: bool) -> None:
    """Takes a step's metrics; writes those that were due before it, now that the device is busy with this one."""
    self.flush()
    self.pending.append(metrics)
    self.due = step if due else None

  def flush(self) -> None:
    """Writes what is due."""
    if self.due is None:
      return
    step, self.due = self.due, None
    fetched, self.pending = jax.device_get(self.pending), []
    now = time.perf_counter()
    total = fetched[0]
    for metrics in fetched[1:]:
      total = sums.add_metrics(total, metrics)
    means = sums.metric_means(total)
    check_finite(step, means)
    new = {f"train/{k}": v for k, v in means.items()}
    new["train/learning_rate"] = self.program.learning_rate(step - 1)
    speed = None
    if self.clock is not None:
      speed = self.tokens * len(fetched) / (now - self.clock)
      flops = speed / self.tokens * self.step_flops
      new |= {"train/tokens_per_second": speed, "train/model_flops_per_second": flops}
      peak = peak_flops(jax.devices()[0].device_kind, self.program.model.cfg.dtype)
      if peak:
        new["train/mfu"] = flops / (peak * self.program.mesh.size)
    self.clock = now
    self.writer.write(step, new)
    if self.progress:
      self.progress.update(step, means["loss" if "loss" in means else "objective"], speed)

  @contextlib.contextmanager
  def paused(self, step: int) -> Iterator[None]:
    """Around an evaluation or a save after `step`: their time is not training time, and a state that has diverged must
    not take the place of a sound checkpoint."""
    self.flush()
    if self.pending:
      check_finite(step, sums.metric_means(jax.device_get(self.pending[-1])))
    start = time.perf_counter()
    yield
    if self.clock is not None:
      self.clock += time.perf_counter() - start


def check_finite(step: int, means: dict[str, float]) -> None:
  """Raises Diverged if a loss is NaN or infinite."""
  for name in ("loss", "objective", "param_norm"):
    if name in means and not math.isfinite(means[name]):
      raise Diverged(f"{name} is {means[name]} at step {step:,}; the last checkpoint is kept (try a lower optim.lr)")


def make_stream(program: Program, source: Any, *, prefetch: int) -> TrainStream:
  """This host's rows of the training batches."""
  config = program.config
  return TrainStream(
    source,
    program.tokenizer,
    program.objective,
    batch_size=config["batch_size"],
    seq_len=config["seq_len"],
    seed=config["seed"],
    rows=program.local_rows(config["batch_size"]),
    pack=config["data"]["pack"],
    interleave=config["data"]["interleave"],
    workers=config["data"]["workers"],
    prefetch=prefetch,
  )


def replicate(value: np.generic, program: Program) -> jax.Array:
  """A number on every device; `jax.device_put` would have the processes compare theirs first, and wait for that."""
  return jax.make_array_from_process_local_data(program.replicated, np.asarray(value), ())


def interval_steps(program: Program, *keys: str) -> int:
  """The `every` of a part of the config, in steps; longer than the run where it is None."""
  key = ".".join((*keys, "every"))
  value = functools.reduce(lambda part, name: part[name], keys, program.config)["every"]
  steps = program.steps(value, key)
  if steps == 0:
    raise ConfigError(f"{key}={value!r} must be at least one step; none is never")
  return program.total_steps + 1 if steps is None else steps


def build_schedules(program: Program) -> tuple[dict[str, tuple[Any, Any]], int, int, EarlyStopping]:
  """What happens beside the steps: evaluations, the periods of saves and of log lines, when to stop early.

  Raises ConfigError for all of it that cannot be.
  """
  config = program.config
  evals = make_evals(program)
  stopper = EarlyStopping(**config["early_stopping"])
  check_metric(config["checkpoint"]["best"], config["checkpoint"]["best_is"], evals, "checkpoint.best")
  check_metric(stopper.metric, stopper.best_is, evals, "early_stopping.metric")
  return evals, interval_steps(program, "checkpoint"), interval_steps(program, "log"), stopper


def make_evals(program: Program) -> dict[str, tuple[Any, Any]]:
  """{name: (evaluator, is it due at this step?)}."""
  evals = {}
  for name, entry in program.config["evals"].items():
    spec = {k: v for k, v in entry.items() if k not in SCHEDULE_KEYS}
    evaluator = build(spec, EVALUATORS, f"evals.{name}", program=program)
    every = interval_steps(program, "evals", name)
    at = {program.steps(value, f"evals.{name}.at") for value in entry["at"]} | {program.total_steps}
    evals[name] = evaluator, lambda step, every=every, at=at: step in at or (step > 0 and step % every == 0)
  return evals


def gather_cursors(cursor: Any) -> list[Any]:
  """Every process's cursor."""
  if jax.process_count() == 1:
    return [cursor]
  data = np.frombuffer(json.dumps(cursor).encode(), np.uint8)
  longest = int(np.max(multihost_utils.process_allgather(np.asarray(len(data)))))
  padded = np.pad(data, (0, longest - len(data)), constant_values=ord(" "))
  return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


def run_fingerprint(program: Program, source: Any) -> dict[str, Any]:
  """What has to be the same on all processes, before anything is compiled."""
  shapes = jax.tree_util.tree_leaves_with_path(program.abstract_state)
  layout = [(jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), str(leaf.sharding)) for path, leaf in shapes]
  return processes.environment_fingerprint() | {
    "versions": package_versions(),
    "config": program.config,
    "data": {"fingerprint": source.fingerprint, "records": len(source)},
    "tokenizer": processes.short_digest(sorted(program.tokenizer.to_files().items())),
    "modules": {name: processes.short_digest(code) for name, code in own_modules(program.config).items()},
    "program": processes.short_digest((layout, program.mesh.devices.tolist())),
  }


def own_modules(config: Any) -> dict[str, bytes]:
  """The source of the modules that a config names as "module:function"."""
  named = (
    re.fullmatch(r"([\w.]+):[\w.]+", value) for value in flatten_config(config).values() if isinstance(value, str)
  )
  specs = {match[1]: importlib.util.find_spec(match[1]) for match in named if match}
  return {name: Path(spec.origin).read_bytes() for name, spec in specs.items() if spec and spec.origin}


@contextlib.contextmanager
def interruption() -> Iterator[Callable[[int], bool]]:
  """Turns the first Ctrl-C or SIGTERM into a request that the loop answers by saving; the second acts at once.

  Gives the question whether to stop after a step. Several processes stop after the same one: JAX hears a SIGTERM to any
  of them and agrees on a step that none has passed.
  """
  alone = jax.process_count() == 1
  asked: list[int] = []
  previous: dict[int, Any] = {}

  def handle(number, frame):
    asked.append(number)
    signal.signal(number, previous[number])
    if not alone:
      os.kill(os.getpid(), signal.SIGTERM)

  with contextlib.suppress(ValueError):  # handlers can be set in the main thread only
    for asking in (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,):
      previous[asking] = signal.signal(asking, handle)
  try:
    yield (lambda step: bool(asked)) if alone else multihost_utils.reached_preemption_sync_point
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def profiler(steps: str | None, workdir: Path) -> Any:
  """A function of the step that traces steps "first:last" into WORKDIR/profile; None ends a trace."""
  if steps is None:
    return lambda step: None
  try:
    first, last = (int(part) for part in steps.split(":"))
    if not 0 <= first < last:
      raise ValueError
  except ValueError:
    raise ConfigError(f"config.profile={steps!r} must be FIRST:LAST with FIRST < LAST, such as 10:15") from None
  tracing: Path | None = None

  def at(step: int | None) -> None:
    nonlocal tracing
    if step == first:
      tracing = staging_dir(workdir / "profile")
      jax.profiler.start_trace(str(tracing))
    elif tracing is not None and (step is None or step >= last):
      jax.profiler.stop_trace()
      upload_folder(tracing, workdir / "profile")
      tracing = None

  return at

"""A session of the train loop: what it opens, restores, saves, logs and prints around the steps."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from llmjax.checkpoints.init_from import INHERITED_ENTRIES, inherited_manifest_entries
from llmjax.checkpoints.manager import Checkpoints
from llmjax.checkpoints.manifest import make_manifest
from llmjax.config import ConfigLike, ConfigTree, Json, to_dict
from llmjax.data.pipeline import merge_cursors
from llmjax.data.sources.base import Source
from llmjax.distributed import processes
from llmjax.storage.buckets import as_path, translate_storage_errors
from llmjax.telemetry.progress import Progress
from llmjax.telemetry.writers import MetricWriter
from llmjax.training import resume
from llmjax.training.components import open_source
from llmjax.training.early_stopping import EarlyStopping, check_metric, metric_value
from llmjax.training.evals import Evaluation, EvaluationSchedule, interval_steps, metric_name
from llmjax.training.fingerprint import run_fingerprint
from llmjax.training.interruption import make_profiler
from llmjax.training.program import Program, make_program
from llmjax.training.step import TrainState
from llmjax.training.step_metrics import StepMetrics


@contextlib.contextmanager
def open_session(config: ConfigLike, workdir: str | Path, *, fresh: bool = False) -> Iterator[Session]:
  """Open a session for a config and a workdir, and close it at the end; arguments as in `loop.run`."""
  with contextlib.ExitStack() as stack:
    yield _open(to_dict(config), as_path(workdir), fresh, stack)


def _open(config: ConfigTree, workdir: Path, fresh: bool, stack: contextlib.ExitStack) -> Session:
  """Check everything, compare the processes, and only then change the workdir."""
  if fresh:
    resume.check_archivable(workdir)
  previous = None if fresh else resume.read_previous_manifest(workdir)
  config["objective"] |= resume.labels_to_reuse(config, previous)
  program = make_program(config, tokenizer=resume.tokenizer_to_reuse(config, previous))
  config = program.config
  source = open_source(config, config["data"]["train"])
  processes.preflight(lambda: run_fingerprint(program, source))
  if previous:
    inherited = {key: previous[key] for key in INHERITED_ENTRIES if key in previous}
  else:
    inherited = inherited_manifest_entries(config["init_from"])
  manifest = make_manifest(program) | inherited | {"data_fingerprint": source.fingerprint}
  changes = resume.check_resumable(previous, manifest, workdir) if previous else {}
  session = Session(program, workdir, source, manifest, previous)
  if fresh and processes.is_primary_process():
    resume.archive_run(workdir)
  processes.preflight(lambda: {"fresh": fresh})  # no process may look into the workdir before it is archived
  session.open_files(stack)
  if not session.is_finished:
    session.report_start(changes)
    session.open_writers(stack)
  return session


class RunSchedule:
  """When a run evaluates, saves, logs and stops.

  Attributes:
    evaluations: when each of config.evals is due.
    early_stopping: when the run stops early.
  """

  def __init__(self, program: Program) -> None:
    """Build the schedule of a config; raises ConfigError for any part that cannot work."""
    config, evals = program.config, program.config["evals"]
    self.evaluations = EvaluationSchedule(program)
    self.early_stopping = EarlyStopping(**config["early_stopping"])
    checkpoint, stopper = config["checkpoint"], self.early_stopping
    check_metric(checkpoint["best"], checkpoint["best_mode"], evals, "checkpoint.best", "checkpoint.best_mode")
    check_metric(stopper.metric, stopper.mode, evals, "early_stopping.metric", "early_stopping.mode")
    self._save_interval, self._log_interval = interval_steps(program, "checkpoint"), interval_steps(program, "log")
    self._total_steps = program.total_steps

  def is_save_due(self, done: int) -> bool:
    return done == self._total_steps or done % self._save_interval == 0

  def is_log_due(self, done: int, is_first: bool) -> bool:
    return is_first or done == self._total_steps or done % self._log_interval == 0


class Session:
  """The objects that a run needs beside its program, and what it does between steps.

  Attributes:
    program: the program.
    state: the train state at `first_step`.
    stream: this process's rows of the training batches.
    first_step: steps that had been made when this session began.
    done: steps that have been made.
    metrics: metrics of train steps.
    schedule: when to evaluate, save, log and stop.
    results: {metric: its last value} of all evaluations.
    should_stop: whether early stopping ends the run now.
    profile: function of the step that starts and ends a trace.
  """

  def __init__(
    self, program: Program, workdir: Path, source: Source, manifest: dict[str, Json], previous: dict[str, Json] | None
  ) -> None:
    """Build all schedules; raises ConfigError for any that cannot work. Writes nothing."""
    self.program, self.workdir = program, workdir
    self._source, self._manifest, self._previous = source, manifest, previous
    self.schedule = RunSchedule(program)
    self.profile = make_profiler(program.config["profile"], workdir)
    self._stopper, self._best = self.schedule.early_stopping, program.config["checkpoint"]["best"]
    self.results: dict[str, float] = {}
    self.should_stop = False
    self._measured: tuple[int, dict[str, float]] = (-1, {})  # the step of the newest evaluations, and their metrics
    self._is_primary = processes.is_primary_process()

  def open_files(self, stack: contextlib.ExitStack) -> None:
    """Open checkpoints and data, and restore the state, the data cursor and early stopping."""
    config = self.program.config
    self._checkpoints = Checkpoints(
      self.workdir,
      keep=config["checkpoint"]["keep"],
      write=True,
      keep_every=self.program.steps(config["checkpoint"]["keep_every"], "checkpoint.keep_every"),
      best=self._best,
      mode=config["checkpoint"]["best_mode"],
    )
    stack.callback(self._checkpoints.close)
    self.stream = self.program.make_stream(self._source, prefetch=config["data"]["prefetch"])
    stack.callback(self.stream.close)
    has_text_only = self.program.objective.fields == ("text",)
    self._skipped = (0, 0) if has_text_only else self.stream.filler.count_skipped()
    self.state, self.first_step, cursor = resume.restore_or_init(self.program, self._checkpoints)
    self.done = self.first_step
    if cursor is not None:
      self.stream.restore(cursor)
    self._restored: dict[str, Json] = self._checkpoints.read_manifest(self.first_step) if self.first_step else {}
    self._stopper.restore(self._restored.get("early_stopping"))
    self.is_finished = self.first_step >= self.program.total_steps or self._stopper.should_stop
    if self.is_finished:
      self.results = dict((self._previous or {"metrics": {}})["metrics"])

  def open_writers(self, stack: contextlib.ExitStack) -> None:
    """Write config.json, and open the metric writers and the progress line."""
    config = self.program.config
    if self._is_primary:
      with translate_storage_errors(self.workdir):
        self.workdir.mkdir(parents=True, exist_ok=True)
        (self.workdir / "config.json").write_text(json.dumps(config, indent=2, default=str))
    self._writer = MetricWriter(
      self.workdir if self._is_primary else None,
      start_step=self.first_step,
      tensorboard=config["log"]["tensorboard"],
      wandb=config["log"]["wandb"],
      config=config,
    )
    tokens_per_step = config["batch_size"] * config["seq_len"]
    total_steps, first_step = self.program.total_steps, self.first_step
    self._progress = Progress(total_steps, first_step, tokens_per_step) if self._is_primary else None
    if self._progress:
      stack.callback(self._progress.close)
    stack.callback(self._writer.close)
    stack.callback(self.profile, None)
    self.metrics = StepMetrics(self.program, self._writer, self._progress)
    make_key = jax.jit(lambda: jax.random.key(config["seed"]), out_shardings=self.program.replicated)
    self.key: jax.Array = make_key()
    self.auxiliary_params = self.program.auxiliary_params

  def remaining_steps(self) -> range:
    """Return the steps to make; none if early stopping ended the run before the first of them."""
    return range(self.first_step, self.first_step if self.should_stop else self.program.total_steps)

  def evaluate_at_start(self, state: TrainState) -> None:
    """Run the evaluations that are due before the first step, or that an interrupted run did not reach."""
    if self.first_step == 0:
      self._evaluate(0, self.schedule.evaluations.due(0), state)
    elif self.schedule.evaluations.is_any_due(self.first_step) and not self._restored["metrics"]:
      self._evaluate(self.first_step, self.schedule.evaluations.due(self.first_step), state)
      self.should_stop = self._stopper.update(self._measured[1])

  def evaluate(self, done: int, state: TrainState) -> None:
    """Run the evaluations that are due, and all others if early stopping ends the run; an error saves the state."""
    with self.metrics.paused(done):
      try:
        self._evaluate(done, self.schedule.evaluations.due(done), state)
        self.should_stop = self._stopper.update(self._measured[1]) and done < self.program.total_steps
        if self.should_stop:
          self._evaluate(done, self.schedule.evaluations.not_due(done), state)
      except Exception:  # a broken evaluator must not lose the training since the last checkpoint
        if processes.barrier(f"evaluation/{done}", timeout=60):  # all processes save, or none
          self._save(done, state)
          self._checkpoints.wait()
        raise

  def _evaluate(self, step: int, evaluations: Sequence[Evaluation], state: TrainState) -> None:
    if self._measured[0] != step:
      self._measured = (step, {})
    measured = self._measured[1]
    for evaluation in evaluations:
      for name, value in evaluation.evaluator(self.program.eval_params(state)).items():
        if isinstance(value, str):
          self._writer.write_text(step, evaluation.name, value)
          self._print_progress(f"[{evaluation.name} at step {step:,}]\n{value}\n")
        else:
          measured[metric_name(evaluation.name, name)] = float(value)
    self.results.update(measured)
    if self._best is not None:
      metric_value(self._best, measured, "checkpoint.best")  # raises if its evaluation does not measure it
    if measured:
      self._writer.write(step, measured)
      values = (f"{name.removeprefix('eval/')} {value:.4f}" for name, value in measured.items())
      self._print_progress(f"step {step:,}: " + ", ".join(values))

  def save(self, done: int, state: TrainState) -> None:
    """Save a checkpoint; blocks only while the state is copied off the devices."""
    with self.metrics.paused(done):
      self._save(done, state)

  def _save(self, done: int, state: TrainState) -> None:
    cursors = merge_cursors(processes.gather_json(self.stream.cursor))
    manifest = self._manifest | {"early_stopping": self._stopper.state}
    self._writer.sync()  # a run that resumes from this checkpoint finds every line up to it
    metrics = self._measured[1] if self._measured[0] == done else {}
    self._checkpoints.save(done, state, cursors, manifest, metrics)

  def stop_interrupted(self, done: int) -> None:
    """Wait for the checkpoint, and raise KeyboardInterrupt."""
    self._checkpoints.wait()
    raise KeyboardInterrupt(
      f"interrupted at {done:,}/{self.program.total_steps:,}; saved: the same command resumes there"
    )

  def flush(self) -> None:
    """Log what is pending, and wait for the checkpoints."""
    self.metrics.flush()
    self._checkpoints.wait()

  def report_start(self, changes: dict[str, tuple[Json, Json]]) -> None:
    """Print what is trained, or resumed with which changes."""
    program, config = self.program, self.program.config
    if self.first_step:
      changed = ", ".join(f"{key} {old} → {new}" for key, (old, new) in changes.items())
      suffix = f"; changed: {changed}" if changed else ""
      self._print(f"resuming {self.workdir} at {self.first_step:,}/{program.total_steps:,}{suffix}")
      return
    trained = "" if program.num_trainable == program.num_params else f"{program.num_trainable:,} of "
    corpus, source = config["data"]["corpus"]["name"], self._source
    self._print(
      f"training {trained}{program.num_params:,} parameters for {program.total_steps:,} steps of "
      f"{config['batch_size'] * config['seq_len']:,} tokens on {corpus} (fingerprint {source.fingerprint}, "
      f"{len(source):,} records)"
    )
    skipped, sampled = self._skipped
    if skipped:
      self._print(f"{skipped:,} of {sampled:,} sampled records are skipped: {program.objective.skip_reason}")
    self._print(f"in {self.workdir}; if interrupted, the same command resumes")

  def report_end(self) -> None:
    """Print why the run ended, and its last metrics."""
    manifest, stopped = self._manifest | {"metrics": self.results}, self.should_stop
    if self.is_finished:
      manifest, stopped = self._previous or self._manifest, self.done < self.program.total_steps
    elif stopped:
      stopper = self._stopper
      self._print(f"{stopper.metric} has not improved on {stopper.best} for {stopper.patience} evaluations")
    self._print(resume.finish_message(self.workdir, manifest, self.done, stopped_early=stopped))

  def _print(self, text: str) -> None:
    if self._is_primary:
      print(text)

  def _print_progress(self, text: str) -> None:
    if self._progress:
      self._progress.print_above(text)

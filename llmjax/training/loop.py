"""The train loop: steps, evaluations, saves. It never waits for the metrics of the current step."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from llmjax.config import ConfigLike
from llmjax.distributed import sharding
from llmjax.training.interruption import catch_interruption
from llmjax.training.session import Session, open_session


def run(config: ConfigLike, workdir: str | Path, *, fresh: bool = False) -> dict[str, float]:
  """Train `config` in `workdir`, or resume the run there, to the end.

  Args:
    config: a config as `llmjax.config.default_config` returns it.
    workdir: folder for checkpoints, metrics and samples, local or gs://BUCKET/FOLDER.
    fresh: archive an earlier run in `workdir` and start a new one.

  Returns:
    {metric: its value in the last evaluation that measured it}.

  Raises:
    ConfigError: a config that cannot work, or that differs from the run in `workdir` in what must not change.
    DivergenceError: the loss became NaN or infinite; the last checkpoint is kept.
  """
  with open_session(config, workdir, fresh=fresh) as session:
    if not session.is_finished:
      train(session)
  session.report_end()
  return session.results


def train(session: Session) -> None:
  """Train from the session's first step to its last."""
  program, state = session.program, session.state
  session.evaluate_at_start(state)
  with sharding.use_mesh(program.mesh, program.rules), catch_interruption() as is_interrupted:
    for step in session.remaining_steps():
      session.profile(step)
      batch = program.put(next(session.stream), program.config["batch_size"])
      learning_rate = program.replicate(np.float32(program.learning_rate(step)))
      if step == session.first_step:
        session.metrics.step_flops = program.step_flops(batch)
      with jax.transfer_guard("disallow"):
        state, metrics = program.train_step(state, batch, session.key, learning_rate, session.auxiliary_params)
      done = step + 1
      session.metrics.add(done, metrics, session.schedule.is_log_due(done, step == session.first_step))
      interrupted = is_interrupted(done) and done < program.total_steps
      if not interrupted and session.schedule.evaluations.is_any_due(done):
        session.evaluate(done, state)
      if interrupted or session.should_stop or session.schedule.is_save_due(done):
        session.save(done, state)
      session.done = done
      if interrupted:
        session.stop_interrupted(done)
      if session.should_stop:
        break
  session.flush()

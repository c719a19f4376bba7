"""Evaluators: what is measured beside the training loss.

An evaluator is built from an entry of `config.evals` and called with parameters (the average, where one is kept). It
returns {name: number}, recorded as eval/ENTRY/name or as it is where it holds a slash, or {name: text to show}. A new
one is a function and a config entry (`name` may be "module:function").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from llmjax import checkpoint, sharding
from llmjax import metrics as metriclib
from llmjax.config import build, resolve
from llmjax.data import pipeline
from llmjax.data import tokenizer as tokenizers
from llmjax.models.transformer import MODELS
from llmjax.objectives import OBJECTIVES
from llmjax.pretrained import open_checkpoint
from llmjax.program import Program, make_program, open_source
from llmjax.types import Batch

Evaluator = Callable[[Any], dict[str, Any]]

EVALUATORS = {
  "loss": "llmjax.evaluate:loss",
  "sample": "llmjax.evaluate:sample",
  "yardsticks": "llmjax.evaluate:yardsticks",
}

# Keys of an evals entry that say when, and are read by the train loop.
WHEN = ("every", "at")


def loss(
  program: Program, split: str | None = None, batch_size: int | None = None, max_batches: int | None = None
) -> Evaluator:
  """The objective's metrics over a whole split, every token counted once.

  Args:
    split: of config.data.corpus; None is config.data.eval.
    batch_size: global; None is config.batch_size.
    max_batches: a part of the split, for very large ones.
  """
  config = program.config
  size = batch_size or config["batch_size"]
  source = open_source(config, split or config["data"]["eval"])
  batches: list[Batch] = []  # made once, at the first use

  def evaluate(params: Any) -> dict[str, float]:
    if not batches:
      batches.extend(held_out_batches(program, source, size)[:max_batches])
    total: Any = {}
    with sharding.use(program.mesh, program.rules):
      for batch in batches:
        total = metriclib.add(total, program.eval_step(params, program.put(batch)))
    means = metriclib.means(jax.device_get(total))
    if "loss" in means:
      means["perplexity"] = float(np.exp(means["loss"]))
    return means

  return evaluate


def held_out_batches(program: Program, source: Any, batch_size: int) -> list[Batch]:
  """This host's rows of every batch of a split; all hosts get equally many."""
  make = lambda count: pipeline.eval_batches(  # noqa: E731
    source,
    program.tokenizer,
    program.objective,
    batch_size=batch_size,
    seq_len=program.config["seq_len"],
    seed=program.config["seed"],
    rows=program.local_rows(batch_size),
    num_batches=count,
  )
  batches = make(None)
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    most = int(np.max(multihost_utils.process_allgather(np.asarray(len(batches)))))
    batches = batches if most == len(batches) else make(most)
  return batches


def sample(
  program: Program, prompt: str, max_new_tokens: int, temperature: float, top_p: float | None = None
) -> Evaluator:
  """The same prompt continued, as text."""
  from llmjax.generation import generate

  ids = np.asarray(program.tokenizer.prompt(prompt))[None]

  def evaluate(params: Any) -> dict[str, str]:
    with sharding.use(program.mesh, program.rules):
      tokens = generate(
        program.model,
        params,
        ids,
        max_new_tokens=min(max_new_tokens, program.model.cfg.max_len - ids.shape[1]),  # type: ignore[attr-defined]
        temperature=temperature,
        top_p=top_p,
        eos_id=program.tokenizer.eos_id,
        seed=program.config["seed"],
      )
    new = np.asarray(tokens)[0, ids.shape[1] :].tolist()
    if program.tokenizer.eos_id in new:
      new = new[: new.index(program.tokenizer.eos_id)]
    return {"text": prompt + program.tokenizer.decode(new)}

  return evaluate


def yardsticks(program: Program, split: str | None = None) -> Evaluator:
  """Bits per byte of general compressors on the same held-out text; they do not depend on the model."""
  from llmjax.yardsticks import yardsticks as measure

  data = program.config["data"]

  def texts(name: str) -> Iterator[str]:
    source = open_source(program.config, name)
    return (source[i]["text"] for i in range(len(source)))

  measured: dict[str, float] = {}

  def evaluate(params: Any) -> dict[str, float]:
    if not measured:
      found = measure(texts(data["train"]), texts(split or data["eval"]))
      measured.update({f"yardstick/{name}": value for name, value in found.items()})
    return measured

  return evaluate


def evaluate_checkpoint(
  path: str, *, config: Any = None, data: str | None = None, trust: bool = False
) -> dict[str, Any]:
  """What `llmjax evaluate` prints.

  Args:
    path: a workdir or checkpoint.
    config: run its evaluations; None takes the checkpoint's config and measures the loss on `data`.
    data: a file or glob, every record of which is held-out text.
  """
  checkpoints, step, manifest = open_checkpoint(path)
  try:
    tokenizer = tokenizers.from_files(manifest["tokenizer"]["spec"], checkpoint.tokenizer_files(manifest))
    if config is None:
      config = manifest["config"]
      if not trust:
        resolve(config["model"]["name"], MODELS, "model", trust=False)
        resolve(config["objective"]["name"], OBJECTIVES, "objective", trust=False)
      config["data"] |= {"corpus": {"name": "files", "files": data}, "train": "all", "eval": "all"}
      config["evals"] = {"data": {"name": "loss", "every": None, "at": ()}}
      config["mesh"] = {"data": -1}
    program = make_program(config, tokenizer=tokenizer)
    part = "ema" if manifest["ema"] else "params"
    params = checkpoints.restore_part(step, part, program.abstract_state.params)
  finally:
    checkpoints.close()
  results = {}
  for name, entry in program.config["evals"].items():
    spec = {k: v for k, v in entry.items() if k not in WHEN}
    found = build(spec, EVALUATORS, f"evals.{name}", program=program)(params)
    results.update({f"{name}/{what}": value for what, value in found.items()})
  return results

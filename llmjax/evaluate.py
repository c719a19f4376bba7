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

from llmjax import metrics as metriclib
from llmjax import optim, sharding
from llmjax.config import ConfigError, build, resolve
from llmjax.data import pipeline
from llmjax.models.transformer import MODELS
from llmjax.objectives import OBJECTIVES
from llmjax.pretrained import open_checkpoint, read_tokenizer
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
  size = config["batch_size"] if batch_size is None else batch_size
  parts = sharding.batch_size_over(program.mesh, program.rules)
  if size < 1 or size % parts:
    raise ConfigError(f"evals.*.batch_size={size} must be a multiple of the {parts} devices that share a batch")
  source = open_source(config, split or config["data"]["eval"])
  batches: list[Batch] = []  # made once, at the first use

  def evaluate(params: Any) -> dict[str, float]:
    if not batches:
      batches.extend(held_out_batches(program, source, size, max_batches))
    with sharding.use(program.mesh, program.rules):
      each = jax.device_get([program.eval_step(params, program.put(batch, size)) for batch in batches])
    total: Any = {}  # added in float64: float32 counts tokens exactly only up to 2^24
    for metrics in each:
      total = metriclib.add(total, jax.tree.map(np.float64, metrics))
    means = metriclib.means(total)
    if "loss" in means:
      means["perplexity"] = float(np.exp(means["loss"]))
    return means

  return evaluate


def held_out_batches(program: Program, source: Any, batch_size: int, max_batches: int | None) -> list[Batch]:
  """This host's rows of every batch of a split; all hosts get equally many."""

  def make(count: int | None) -> list[Batch]:
    return pipeline.eval_batches(
      source,
      program.tokenizer,
      program.objective,
      batch_size=batch_size,
      seq_len=program.config["seq_len"],
      seed=program.config["seed"],
      rows=program.local_rows(batch_size),
      num_batches=count,
      max_batches=max_batches,
    )

  batches = make(None)
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    most = int(np.max(multihost_utils.process_allgather(np.asarray(len(batches)))))
    batches = batches if most == len(batches) else make(most)
  return batches


def sample(
  program: Program, prompt: str | None, max_new_tokens: int, temperature: float, top_p: float | None = None
) -> Evaluator:
  """The same prompt continued, as text; None takes the first words of the held-out text."""
  from llmjax.generation import generate

  if prompt is None:
    prompt = open_source(program.config, program.config["data"]["eval"])[0]["text"][:16]
  ids = program.tokenizer.prompt(prompt)[None]
  context = program.model.cfg.max_len
  room = min(max_new_tokens, context - ids.shape[1])
  if not ids.size or room < 1:
    raise ConfigError(f"evals.*.prompt={prompt!r} has {ids.size} tokens: it needs at least 1, and less than {context}")

  def evaluate(params: Any) -> dict[str, str]:
    with sharding.use(program.mesh, program.rules):
      tokens = generate(
        program.model,
        params,
        ids,
        max_new_tokens=room,
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
    tokenizer = read_tokenizer(manifest, trust=trust)
    if config is None:
      config = manifest["config"]
      if not trust:
        resolve(config["model"]["name"], MODELS, "model", trust=False)
        resolve(config["objective"]["name"], OBJECTIVES, "objective", trust=False)
      config["data"] |= {"corpus": {"name": "files", "files": data}, "train": "all", "eval": "all"}
      config["evals"] = {"data": {"name": "loss", "every": None, "at": ()}}
      # Evaluation uses neither of these, and a checkpoint's own may name code.
      config["optim"] |= {"name": "sgd", "decay_mask": ((".*", True),)}
      config["optim"] = {k: config["optim"][k] for k in ("name", *optim.COMMON)}
      config["schedule"] = {"name": "constant", "warmup": None}
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

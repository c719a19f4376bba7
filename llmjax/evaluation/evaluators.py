"""Evaluators: functions of the parameters that return metrics, or a text to show.

An evaluator is built from an entry of config.evals, which may name a function outside llmjax as "module:function". It
is called with all parameters (the moving average if there is one) and returns {metric: number or text}.
"""

from __future__ import annotations

import jax
import numpy as np

from llmjax.config import ConfigError
from llmjax.distributed import sharding
from llmjax.evaluation.baselines import token_term
from llmjax.evaluation.splits import held_out_batches, labelled_records
from llmjax.inference.batches import BATCH_TOKENS
from llmjax.inference.predict import PredictionSettings, check_task, predict
from llmjax.metrics.examples import require_libraries
from llmjax.metrics.sums import add_metrics, metric_means
from llmjax.training.components import open_source
from llmjax.training.evals import Evaluator
from llmjax.training.program import Program
from llmjax.trees import Params
from llmjax.types import Batch


def heldout_loss(
  program: Program, split: str | None = None, batch_size: int | None = None, max_batches: int | None = None
) -> Evaluator:
  """Evaluate the metrics of the objective on a split, in which every token counts once.

  Args:
    program: the program that is evaluated.
    split: split of config.data.corpus. None: config.data.eval.
    batch_size: global batch size. None: config.batch_size.
    max_batches: use only the first batches of a very large split. None: all.
  """
  config = program.config
  size = config["batch_size"] if batch_size is None else batch_size
  num_shards = sharding.num_batch_shards(program.mesh, program.rules)
  if size < 1 or size % num_shards:
    raise ConfigError(f"evals.*.batch_size={size} must be a multiple of the {num_shards} devices that share a batch")
  source = open_source(config, split or config["data"]["eval"])
  batches: list[Batch] = []  # filled at the first evaluation

  def evaluate(params: Params) -> dict[str, float]:
    if not batches:
      batches.extend(held_out_batches(program, source, size, max_batches))
    with sharding.use_mesh(program.mesh, program.rules):
      others = program.auxiliary_params
      each = jax.device_get([program.eval_step(params, program.put(batch, size), others) for batch in batches])
    total: dict[str, tuple[np.float64, np.float64]] = {}
    for metrics in each:  # added in float64, because float32 counts tokens exactly only up to 2^24
      total = add_metrics(total, jax.tree.map(np.float64, metrics))
    means = metric_means(total)
    if "loss" in means and token_term(program.objective)[1] is not None:
      means["perplexity"] = float(np.exp(means["loss"]))
    return means

  return evaluate


def sample_text(
  program: Program, prompt: str | None, max_new_tokens: int, temperature: float, top_p: float | None = None
) -> Evaluator:
  """Show a continuation of the same prompt at every evaluation.

  Args:
    program: the program that is evaluated.
    prompt: None: the first words of the held-out text.
    max_new_tokens: maximum number of new tokens; fewer if the context is shorter.
    temperature: see `llmjax.generate`.
    top_p: see `llmjax.generate`.
  """
  # Runs without samples start faster without this import.
  from llmjax.inference.generation import encode_prompt, generate

  if prompt is None:
    prompt = open_source(program.config, program.config["data"]["eval"])[0]["text"][:16]
  tokenizer = program.tokenizer
  ids = encode_prompt(program.model, tokenizer, prompt)[None]
  context = program.model.cfg.max_len
  is_separate = program.model.cfg.stacks == "both"  # the decoder's text does not continue the prompt
  count = min(max_new_tokens, context - (1 if is_separate else ids.shape[1]))
  if not ids.size or count < 1:
    raise ConfigError(f"evals.*.prompt={prompt!r} has {ids.size} tokens: it needs at least 1, and less than {context}")

  def evaluate(params: Params) -> dict[str, str]:
    with sharding.use_mesh(program.mesh, program.rules):
      tokens = generate(
        program.model,
        params,
        ids,
        max_new_tokens=count,
        temperature=temperature,
        top_p=top_p,
        eos_id=tokenizer.eos_id,
        start_id=tokenizer.pad_id,
        seed=program.config["seed"],
      )
    new = np.asarray(tokens)[0, -count:].tolist()
    if tokenizer.eos_id in new:
      new = new[: new.index(tokenizer.eos_id)]
    return {"text": f"{prompt} → {tokenizer.show(new)}" if is_separate else prompt + tokenizer.decode(new)}

  return evaluate


def task_answers(
  program: Program,
  split: str | None = None,
  limit: int | None = None,
  batch_tokens: int = BATCH_TOKENS,
  max_new_tokens: int | None = None,
  num_beams: int | None = None,
  length_penalty: float | None = None,
) -> Evaluator:
  """Evaluate the answers of a task to the records of a split, see `Task.compute_metrics`.

  All records are checked before anything is compiled.

  Args:
    program: the program that is evaluated.
    split: split of config.data.corpus. None: config.data.eval.
    limit: maximum number of records, evenly spaced. None: all.
    batch_tokens: maximum of rows times length of a batch.
    max_new_tokens: see `llmjax.generate`, for tasks whose answers are texts. None: the task's.
    num_beams: as `max_new_tokens`.
    length_penalty: as `max_new_tokens`.
  """
  task = check_task(program.objective)
  require_libraries(task.metric_packages)
  given = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "length_penalty": length_penalty}
  generation = {name: value for name, value in given.items() if value is not None}
  read_records = labelled_records(program, task, split, limit)
  settings = PredictionSettings(batch_tokens, program.mesh, program.rules, generation)

  def evaluate(params: Params) -> dict[str, float]:
    records = read_records()
    return task.compute_metrics(records, predict(program.model, params, task, records, settings))

  return evaluate

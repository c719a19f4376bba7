"""Evaluators: what is measured beside the training loss.

An evaluator is built from an entry of `config.evals` and called with parameters (the average, where one is kept). It
returns {name: number}, or {name: text to show}, see `record`. A new one is a function and a config entry (`name` may be
"module:function").
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from llmjax.checkpoints.sources import open_path, with_auto_attention
from llmjax.config import ConfigError, build, resolve_callable, to_dict
from llmjax.data import pipeline
from llmjax.data.sources.base import subsample_bytes
from llmjax.data.sources.paths import expand_files
from llmjax.data.sources.tables import record_fields
from llmjax.distributed import processes, sharding
from llmjax.inference.embeddings import BATCH_TOKENS, contrastive_part
from llmjax.inference.predict import PredictionSettings, check_task, predict
from llmjax.metrics import tasks
from llmjax.metrics.sums import add_metrics, metric_means
from llmjax.models.transformer import MODELS
from llmjax.objectives.seq2seq import Seq2Seq
from llmjax.objectives.task import Task
from llmjax.objectives.weighted_sum import WeightedSum
from llmjax.storage.cache import file_digest
from llmjax.training.components import open_source
from llmjax.training.evals import EVALUATORS, SCHEDULE_KEYS, metric_name
from llmjax.training.program import Program, make_program
from llmjax.types import Batch, Objective

Evaluator = Callable[[Any], dict[str, Any]]


# Terms of an objective that are tokens, and how much of the training text their frequencies are counted in.
TOKEN_TERMS = ("nll", "mlm")
UNIGRAM_BYTES = 1 << 22


def heldout_loss(
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
  parts = sharding.num_batch_shards(program.mesh, program.rules)
  if size < 1 or size % parts:
    raise ConfigError(f"evals.*.batch_size={size} must be a multiple of the {parts} devices that share a batch")
  source = open_source(config, split or config["data"]["eval"])
  batches: list[Batch] = []  # made once, at the first use

  def evaluate(params: Any) -> dict[str, float]:
    if not batches:
      batches.extend(held_out_batches(program, source, size, max_batches))
    with sharding.use_mesh(program.mesh, program.rules):
      others = program.auxiliary_params
      each = jax.device_get([program.eval_step(params, program.put(batch, size), others) for batch in batches])
    total: Any = {}  # added in float64: float32 counts tokens exactly only up to 2^24
    for metrics in each:
      total = add_metrics(total, jax.tree.map(np.float64, metrics))
    means = metric_means(total)
    if "loss" in means and token_term(program.objective)[1] is not None:
      means["perplexity"] = float(np.exp(means["loss"]))
    return means

  return evaluate


def make_split_batches(
  program: Program, source: Any, batch_size: int, rows: Iterable[int], **counts: Any
) -> list[Batch]:
  """Some rows of the batches of a whole split, see `pipeline.eval_batches`."""
  return pipeline.eval_batches(
    source,
    program.tokenizer,
    program.objective,
    batch_size=batch_size,
    seq_len=program.config["seq_len"],
    seed=program.config["seed"],
    rows=rows,
    **counts,
  )


def held_out_batches(program: Program, source: Any, batch_size: int, max_batches: int | None) -> list[Batch]:
  """This host's rows of every batch of a split; all hosts get equally many."""

  def make(count: int | None) -> list[Batch]:
    return make_split_batches(
      program, source, batch_size, program.local_rows(batch_size), num_batches=count, max_batches=max_batches
    )

  batches = make(None)
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    most = int(np.max(multihost_utils.process_allgather(np.asarray(len(batches)))))
    batches = batches if most == len(batches) else make(most)
  return batches


def sample_text(
  program: Program, prompt: str | None, max_new_tokens: int, temperature: float, top_p: float | None = None
) -> Evaluator:
  """The same prompt continued, as text; None takes the first words of the held-out text."""
  from llmjax.inference.generation import encode_prompt, generate

  if prompt is None:
    prompt = open_source(program.config, program.config["data"]["eval"])[0]["text"][:16]
  tokenizer = program.tokenizer
  ids = encode_prompt(program.model, tokenizer, prompt)[None]
  context = program.model.cfg.max_len
  separate = program.model.cfg.stacks == "both"  # what is written does not follow the prompt
  room = min(max_new_tokens, context - (1 if separate else ids.shape[1]))
  if not ids.size or room < 1:
    raise ConfigError(f"evals.*.prompt={prompt!r} has {ids.size} tokens: it needs at least 1, and less than {context}")

  def evaluate(params: Any) -> dict[str, str]:
    with sharding.use_mesh(program.mesh, program.rules):
      tokens = generate(
        program.model,
        params,
        ids,
        max_new_tokens=room,
        temperature=temperature,
        top_p=top_p,
        eos_id=tokenizer.eos_id,
        start_id=tokenizer.pad_id,
        seed=program.config["seed"],
      )
    new = np.asarray(tokens)[0, -room:].tolist()
    if tokenizer.eos_id in new:
      new = new[: new.index(tokenizer.eos_id)]
    return {"text": f"{prompt} → {tokenizer.show(new)}" if separate else prompt + tokenizer.decode(new)}

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
  """What the objective's task measures of its answers to a split; see `Task.measure`.

  All records are looked at before anything compiles.

  Args:
    split: of config.data.corpus; None is config.data.eval.
    limit: only so many records, evenly spaced.
    batch_tokens: rows times length of a batch.
    max_new_tokens, num_beams, length_penalty: of `llmjax.generate`, where the task writes texts; None as it has them.
  """
  task = check_task(program.objective)
  tasks.require(task.libraries)
  asked = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "length_penalty": length_penalty}
  generation = {name: value for name, value in asked.items() if value is not None}
  records = labelled_records(program, task, split, limit)
  settings = PredictionSettings(batch_tokens, program.mesh, program.rules, generation)

  def evaluate(params: Any) -> dict[str, float]:
    return task.measure(records(), predict(program.model, params, task, records(), settings))

  return evaluate


def labelled_records(program: Program, task: Task, split: str | None, limit: int | None) -> Callable[[], list[Any]]:
  """Checks the records of a split now, and gives those that have an answer when it is called; see `answers`."""
  split = split or program.config["data"]["eval"]
  source = open_source(program.config, split)
  count = len(source) if limit is None else min(limit, len(source))
  which = np.linspace(0, len(source) - 1, count).astype(np.int64)
  for index, record in enumerate(source):
    try:
      task.check(record, labelled=True)
    except ConfigError as error:
      raise ConfigError(f"{source.location(index)}, of split {split!r}: {error}") from error

  @functools.cache
  def records() -> list[Any]:
    found = [record for record in (source[int(i)] for i in which) if task.encode(record, labelled=True)]
    if not found:
      raise ConfigError(f"split {split!r}: no record has both something to read and an answer; set another data.eval")
    return found

  return records


def lead_baseline(program: Program, split: str | None = None, limit: int | None = None) -> Evaluator:
  """What is reached by giving the first sentence of each text for its summary; it does not depend on the model.

  A sentence ends with a stop, a line, or a full-width stop; arguments are those of `answers`.
  """
  task = check_task(program.objective)
  if not isinstance(task, Seq2Seq):
    raise ConfigError("evals.*.name='lead' needs objective.name='seq2seq'; take the entry away")
  records = labelled_records(program, task, split, limit)

  @functools.cache
  def measured() -> dict[str, float]:
    first = [{task.target: re.split(r"(?<=[.!?])\s|(?<=[。！？])|\n", r[task.source].strip())[0]} for r in records()]
    return {f"baseline/lead_{name}": value for name, value in task.measure(records(), first).items()}

  return lambda params: measured()


def baselines(program: Program, split: str | None = None) -> Evaluator:
  """Bits per byte of general compressors on the same held-out text; they do not depend on the model."""
  from llmjax.metrics.baselines import compressor_baselines as measure

  data = program.config["data"]

  def texts(name: str) -> Iterator[str]:
    source = open_source(program.config, name)
    return (source[i]["text"] for i in range(len(source)))

  measured: dict[str, float] = {}

  def evaluate(params: Any) -> dict[str, float]:
    if not measured:
      found = measure(texts(data["train"]), texts(split or data["eval"]))
      measured.update({f"baseline/{name}": value for name, value in found.items()})
    return measured

  return evaluate


def token_term(objective: Objective) -> tuple[str | None, str | None]:
  """(view of the batch, term of its labels) that an objective's tokens are in; the term is None where it has none."""
  part, view = objective, None
  if isinstance(objective, WeightedSum):
    view, part = objective.principal, objective.parts[objective.principal]
  return view, next((term for term in TOKEN_TERMS if term in part.coefficients), None)


def unigram_baseline(
  program: Program, split: str | None = None, batch_size: int | None = None, max_batches: int | None = None
) -> Evaluator:
  """What is reached by always guessing the same: on the labels of `loss`, whose arguments are these, the negative
  log-likelihood (nats) of the frequencies that labels have in the training split, each count plus one, and the accuracy
  of the most frequent. They do not depend on the model.
  """
  config = program.config
  view, term = token_term(program.objective)
  if term is None:
    raise ConfigError("evals.*.name='unigram' needs an objective that predicts tokens; take the entry away")
  size = config["batch_size"] if batch_size is None else batch_size
  heldout = open_source(config, split or config["data"]["eval"])
  training = open_source(config, config["data"]["train"])

  def counts(source: Any, most: int | None) -> np.ndarray:
    total = np.zeros(program.tokenizer.vocab_size)
    for batch in make_split_batches(program, source, size, range(size), max_batches=most):
      one = batch if view is None else batch.extras[view]
      total += np.bincount(one.labels[term].reshape(-1), one.weights[term].reshape(-1), len(total))
    return total

  measured: dict[str, float] = {}

  def evaluate(params: Any) -> dict[str, float]:
    if not measured:
      seen = counts(subsample_bytes(training, UNIGRAM_BYTES), None) + 1
      held = counts(heldout, max_batches)
      measured["baseline/unigram_loss"] = -float(held @ np.log(seen / seen.sum()) / held.sum())
      measured["baseline/unigram_accuracy"] = float(held[np.argmax(seen)] / held.sum())
    return measured

  return evaluate


def evaluate_checkpoint(
  path: str, *, config: Any = None, data: str | None = None, trust: bool = False
) -> dict[str, Any]:
  """What `llmjax evaluate` prints.

  Args:
    path: see `pretrained.open_path`.
    config: run its evaluations; None takes the checkpoint's config and measures on `data` what `data_evals` says.
    data: a file or glob, every record of which is held out.
  """
  with open_path(path) as source:
    if config is not None:
      config = to_dict(config)
      known = source.config["objective"]
      # What a run has found out counts, not what its data say now.
      if known is not None and known["name"] == config["objective"]["name"]:
        config["objective"] |= {k: known[k] for k, v in config["objective"].items() if v is None and k in known}
    else:
      config = source.config
      if not trust:
        resolve_callable(config["model"]["name"], MODELS, "model", trust=False)
      own = config["data"]["corpus"]
      column = own["column"] if "column" in own else "text"
      corpus, config["evals"] = data_evals(str(data), source.objective(trust), column)
      config["data"] |= {"corpus": corpus, "train": "all", "eval": "all"}
      # Evaluation uses neither of these, and a checkpoint's own may name code.
      config["optim"] = {"name": "sgd", "lr": 1.0}
      config["schedule"] = {"name": "constant", "warmup": None}
      config["mesh"] = {"data": -1}
      config["model"] = with_auto_attention(config["model"])
    program = make_program(config, tokenizer=source.tokenizer(trust))
    processes.preflight(
      lambda: {"model": processes.short_digest(source.manifest), "data": eval_fingerprint(program, data)}
    )
    params = source.read_params(program.model, program.abstract_params, None)
  results = {}
  for name, entry in program.config["evals"].items():
    spec = {k: v for k, v in entry.items() if k not in SCHEDULE_KEYS}
    found = build(spec, EVALUATORS, f"evals.{name}", program=program)(params)
    results.update({metric_name(name, what).removeprefix("eval/"): value for what, value in found.items()})
  return results


def eval_fingerprint(program: Program, data: str | None) -> str:
  """Of what is measured: the files of `data`, or the config's held-out split."""
  if data is not None:
    return processes.short_digest([file_digest(path) for path in expand_files(data, "")])
  return open_source(program.config, program.config["data"]["eval"]).fingerprint


def data_evals(data: str, objective: Objective, column: str = "text") -> tuple[dict[str, Any], dict[str, Any]]:
  """How a file is read, as a corpus, and what is measured on it, as evals.

  The loss; of a task what its answers are worth; where an objective learns from pairs, retrieval of the file's; where
  the file has the fields text_a, text_b and score, the correlation of an embedding's cosines with it. `column` is what
  the text was called in training.
  """
  corpus: dict[str, Any] = {"name": "files", "files": data}
  evals: dict[str, dict[str, Any]] = {"data": {"name": "loss"}}
  if objective.fields != ("text",):
    corpus |= {"column": None, "columns": tuple(field for field in objective.fields if field in record_fields(data))}
    if isinstance(objective, Task):
      evals["answers"] = {"name": "answers"}
  part = contrastive_part(objective)
  if part is not None:
    known = record_fields(data)
    text = column if column in known else "text"
    wanted = [text if field == "text" else field for field in (part.anchor, *part.views.values())]
    corpus |= {"column": text if text in wanted else part.anchor, "columns": tuple(wanted)}
    if not set(wanted) <= set(known):
      del evals["data"]
    elif part.positive is not None:
      evals["retrieval"] = {"name": "retrieval", "batch_tokens": BATCH_TOKENS}
    if {"text_a", "text_b", "score"} <= set(known):
      evals["similarity"] = {"name": "similarity", "files": data, "batch_tokens": BATCH_TOKENS}
    if not evals:
      raise ConfigError(
        f"--data={data} has the fields {', '.join(known)}; the model's objective needs {', '.join(wanted)} (for loss "
        "and retrieval), or text_a, text_b and score (for the correlation of its cosines)"
      )
  return corpus, {name: entry | {"every": None, "at": ()} for name, entry in evals.items()}

"""Evaluation of a checkpoint, for `llmjax evaluate`."""

from __future__ import annotations

from llmjax.checkpoints.paths import open_path
from llmjax.checkpoints.sources.base import PretrainedSource, with_auto_attention
from llmjax.config import ConfigError, ConfigLike, ConfigTree, Json, build, resolve_callable, to_dict
from llmjax.data.sources.paths import expand_files
from llmjax.data.sources.tables import record_fields
from llmjax.distributed import processes
from llmjax.inference.batches import BATCH_TOKENS
from llmjax.inference.embeddings import contrastive_objective
from llmjax.models.transformer import MODELS
from llmjax.objectives.task import Task
from llmjax.storage.cache import file_digest
from llmjax.training.components import open_source
from llmjax.training.evals import EVALUATORS, SCHEDULE_KEYS, Evaluator, metric_name
from llmjax.training.program import Program, make_program
from llmjax.types import Objective

SIMILARITY_FIELDS = ("text_a", "text_b", "score")


def evaluate_checkpoint(
  path: str, *, config: ConfigLike | None = None, data: str | None = None, trust: bool = False
) -> dict[str, float | str]:
  """Evaluate a pretrained model.

  Args:
    path: model, see `open_path`.
    config: evaluate its evals. None: evaluate on `data`, with the evaluators of `data_evals`.
    data: a file or a glob, all records of which are held out.
    trust: allow the checkpoint to run code outside llmjax.

  Returns:
    {"<entry>/<metric>" or "baseline/<name>": number or text}.

  Raises:
    ConfigError: a model, a config or data that cannot be used.
  """
  with open_path(path) as source:
    tree = _data_config(source, str(data), trust) if config is None else _run_config(source, config)
    program = make_program(tree, tokenizer=source.tokenizer(trust))
    processes.preflight(
      lambda: {"model": processes.short_digest(source.manifest), "data": heldout_fingerprint(program, data)}
    )
    params = source.read_params(program.model, program.abstract_params)
  results: dict[str, float | str] = {}
  for name, entry in program.config["evals"].items():
    spec = {key: value for key, value in entry.items() if key not in SCHEDULE_KEYS}
    evaluator: Evaluator = build(spec, EVALUATORS, f"evals.{name}", program=program)
    for metric, value in evaluator(params).items():
      results[metric_name(name, metric).removeprefix("eval/")] = value
  return results


def _run_config(source: PretrainedSource, config: ConfigLike) -> ConfigTree:
  """Return the config, with values of its objective that are None as the run of the checkpoint inferred them."""
  tree: ConfigTree = to_dict(config)
  known = source.config["objective"]
  if known is not None and known["name"] == tree["objective"]["name"]:
    inferred = {key: known[key] for key, value in tree["objective"].items() if value is None and key in known}
    tree["objective"] |= inferred
  return tree


def _data_config(source: PretrainedSource, data: str, trust: bool) -> ConfigTree:
  """Return the config of the checkpoint, with the files of `data` as its held-out corpus."""
  tree = source.config
  if not trust:
    resolve_callable(tree["model"]["name"], MODELS, "model", trust=False)
  corpus = tree["data"]["corpus"]
  column = corpus["column"] if "column" in corpus else "text"
  corpus, tree["evals"] = data_evals(data, source.objective(trust), column)
  tree["data"] |= {"corpus": corpus, "train": "all", "eval": "all"}
  # Evaluation uses neither optimizer nor schedule, and those of a checkpoint may name code.
  tree["optim"] = {"name": "sgd", "lr": 1.0}
  tree["schedule"] = {"name": "constant", "warmup": None}
  tree["mesh"] = {"data": -1}
  tree["model"] = with_auto_attention(tree["model"])
  return tree


def heldout_fingerprint(program: Program, data: str | None) -> str:
  """Return a digest of the held-out data: the files of `data`, or the config's held-out split."""
  if data is not None:
    return processes.short_digest([file_digest(path) for path in expand_files(data, "")])
  return open_source(program.config, program.config["data"]["eval"]).fingerprint


def data_evals(
  data: str, objective: Objective, column: str | None = "text"
) -> tuple[dict[str, Json], dict[str, dict[str, Json]]]:
  """Return config.data.corpus and config.evals for an evaluation on files.

  The evaluators are: the loss; for a task its answers; for a contrastive objective with pairs the retrieval of pairs;
  for files with the fields text_a, text_b and score the correlation of cosines with the scores.

  Args:
    data: a file or a glob.
    objective: the objective of the model.
    column: the field that was the text in training.

  Raises:
    ConfigError: the files have no fields that any evaluator needs.
  """
  corpus: dict[str, Json] = {"name": "files", "files": data}
  evals: dict[str, dict[str, Json]] = {"data": {"name": "loss"}}
  if objective.fields != ("text",):
    corpus |= {"column": None, "columns": tuple(field for field in objective.fields if field in record_fields(data))}
    if isinstance(objective, Task):
      evals["answers"] = {"name": "answers"}
  contrastive = contrastive_objective(objective)
  if contrastive is not None:
    known = record_fields(data)
    text = column if column in known else "text"
    fields = [text if field == "text" else field for field in (contrastive.anchor, *contrastive.view_fields.values())]
    corpus |= {"column": text if text in fields else contrastive.anchor, "columns": tuple(fields)}
    if not set(fields) <= set(known):
      del evals["data"]
    elif contrastive.positive is not None:
      evals["retrieval"] = {"name": "retrieval", "batch_tokens": BATCH_TOKENS}
    if set(SIMILARITY_FIELDS) <= set(known):
      evals["similarity"] = {"name": "similarity", "files": data, "batch_tokens": BATCH_TOKENS}
    if not evals:
      raise ConfigError(
        f"--data={data} has the fields {', '.join(known)}; the model's objective needs {', '.join(fields)} (for loss "
        "and retrieval), or text_a, text_b and score (for the correlation of cosines with scores)"
      )
  return corpus, {name: entry | {"every": None, "at": ()} for name, entry in evals.items()}

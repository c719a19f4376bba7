"""Shared parts of fine-tuning configs: a pretrained or a small model, labelled data, and a recipe."""

from typing import Any

from ml_collections import ConfigDict

from configs import base, common, corpora
from llmjax.config import ConfigError, optional, parse_arg


def parse(arg: str | None, corpus: str, **more: Any) -> ConfigDict:
  """Parse the argument of a config: the parts that all have, and `more` of its own."""
  own = {"init_from": None, "size": "nano", "train": None, "eval": None, "corpus": corpus}
  return parse_arg(arg, **own, debug=False, **more)


def make(
  arg: ConfigDict, stacks: str, fields: dict[str, str | None], *, seq_len: int = 128, longest: int = 128
) -> ConfigDict:
  """Return a config without the task's metrics: model, data, recipe, and the fields of its objective.

  Args:
    arg: the parsed argument.
    stacks: of a model that is trained from scratch.
    fields: {key of the objective: field of a record}; None: that of the corpus, else the key itself (no field for
      "pair").
    seq_len: of a model that is trained from scratch.
    longest: maximum seq_len of a pretrained model.
  """
  config = base.get_config()
  size = common.find_size(arg, stacks)
  config.seq_len, config.batch_size = longest if arg.init_from else seq_len, 32
  config.objective = ConfigDict(choose_data(config, arg, fields))
  config.data.tokenizer = ConfigDict({"name": "sentencepiece", "vocab_size": 4096, "path": optional(None, str)})
  if arg.init_from:
    config.init_from = arg.init_from
    config.model = common.pretrained()
    config.data.longest, config.seq_len = config.seq_len, optional(None, int)
  else:
    config.model.update(size["model"], head_bias=True, dropout=0.1)
    config.model.max_len = optional(None, int)
    config.model.pooling = "last" if stacks == "decoder" else "first"
  config.optim.lr = 5e-5 if arg.init_from else 1e-3
  config.optim.weight_decay = 0.01
  config.schedule = ConfigDict({"name": "linear", "warmup": optional("10%"), "final": 0.0})
  config.data.pack = False  # batch_size is then the number of examples
  config.total_steps = "3 epochs"
  base.task_evals(config)
  return config


def choose_data(config: ConfigDict, arg: ConfigDict, fields: dict[str, str | None]) -> dict[str, Any]:
  """Set the corpus and splits of config.data; return the fields of its records."""
  if arg.train is None:
    if arg.eval is not None:
      raise ConfigError("config argument eval=FILES needs train=FILES")
    corpora.choose(config, arg.corpus)
    known = corpora.CORPORA[arg.corpus].get("fields", {})
  else:
    known = {}
    files = arg.train if arg.eval is None else {"train": arg.train, "validation": arg.eval}
    config.data.corpus = ConfigDict({"name": "files", "files": files, "column": optional(None, str), "shuffle": True})
    config.data.train, config.data.eval = ("[:90%]", "[90%:]") if arg.eval is None else ("train", "validation")
  found = {key: field or known.get(key) or (None if key == "pair" else key) for key, field in fields.items()}
  if arg.train is not None:
    config.data.corpus.columns = tuple(sorted({field for field in found.values() if field}))
  return {key: optional(field, str) for key, field in found.items()}


def generation(config: ConfigDict) -> None:
  """Add how the answers of a generating task are generated for evaluation, and for how many records."""
  config.evals.answers.limit = 500
  config.evals.answers.update(num_beams=1, max_new_tokens=optional(None, int), length_penalty=optional(None, float))


def finish(config: ConfigDict, arg: ConfigDict, best: str | None) -> ConfigDict:
  """Return the config, which keeps the checkpoint with the highest `best` metric; with `debug`, reduce all that
  takes time."""
  config.checkpoint.best_mode = "max"
  if best is not None:
    config.checkpoint.best = f"eval/answers/{best}"
  if arg.debug:
    config.total_steps, config.batch_size = 2, 8
    if not arg.init_from:
      config.seq_len = min(config.seq_len, 128)
    config.data.tokenizer.vocab_size = 512
    config.evals.heldout.max_batches = 2
    config.evals.answers.limit = 8
    config.log.every = 1
  return config

"""Shared parts of language-model configs: size, corpus and optimizer by the config's argument."""

from typing import Any

from ml_collections import ConfigDict

from configs import base, corpora
from configs.sizes import SIZES, Size
from llmjax.config import ConfigError, optional, parse_arg, suggest_name

# Settings of each optimizer for sizes that have none for it.
OPTIMIZERS: dict[str, dict[str, Any]] = {
  "adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8},
  "adafactor": {},
  "lion": {"b1": 0.9, "b2": 0.99},
  "muon": {"beta": 0.95, "adam_lr_ratio": 0.5},
  "sgd": {"momentum": 0.9},
}


def pretrained() -> ConfigDict:
  """Return config.model for the model of init_from; keys that are set replace its own."""
  numbers = ("dropout", "attention_dropout", "mlp_dropout", "lora_alpha", "lora_dropout")
  return ConfigDict(
    {
      "name": "pretrained",
      **{key: optional(None, str) for key in ("dtype", "param_dtype", "remat", "attention", "pooling", "lora_targets")},
      **{key: optional(None, float) for key in numbers},
      **{key: optional(None, int) for key in ("max_len", "lora_rank")},
      **{key: optional(None, bool) for key in ("scan", "pooler")},
    }
  )


# Recipe for a pretrained model.
CONTINUED: dict[str, Any] = {"lr": 5e-5, "optim": {"name": "adamw", "weight_decay": 0.01}}


def parse(arg: str | None, corpus: str = "python_stdlib", **more: Any) -> ConfigDict:
  """Parse the argument of a config: the parts that all have, and `more` of its own."""
  own = {"size": "nano", "init_from": None, "corpus": corpus, "text": None, "column": "text", "optim": None}
  return parse_arg(arg, **own, debug=False, **more)


def choose(what: str, name: str, table: Any) -> Any:
  """Return an entry of a table; `what` is the config argument that names it."""
  if name not in table:
    raise ConfigError(f"config argument {what}={name!r} is unknown; {suggest_name(name, table)}")
  return table[name]


def find_size(arg: ConfigDict, stacks: str) -> Size:
  """Return the entry of `SIZES[stacks]` that the argument names."""
  size = choose("size", arg.size, SIZES[stacks])  # checked also if debug replaces it
  return SIZES[stacks]["debug"] if arg.debug else size


def make(arg: ConfigDict, size: Size, **tokenizer: Any) -> ConfigDict:
  """Return a config without objective and evaluations: a size's model and recipe, a corpus, and a tokenizer."""
  config = base.get_config()
  if arg.init_from:
    config.init_from = arg.init_from
    config.model = pretrained()
    size = {**size, **CONTINUED}
  else:
    config.model.update(size["model"])
  config.seq_len = size["seq_len"]
  config.total_steps = size.get("total_steps", 100_000)

  corpora.choose(config, arg.corpus, arg.text, arg.column)
  config.batch_size = size["batch_tokens"] // config.seq_len
  if config.batch_size < 64:
    config.data.interleave = 16  # few rows would otherwise show few documents at a time
  config.data.tokenizer = ConfigDict({"name": "sentencepiece", "vocab_size": 4096, "path": optional(None, str)})
  config.data.tokenizer.update(tokenizer)

  own = size.get("optim", {"name": "adamw"})
  name = own["name"] if arg.optim is None else arg.optim
  config.optim.update(choose("optim", name, OPTIMIZERS), name=name, lr=size["lr"])
  if name == own["name"]:
    config.optim.update(own)
  if "schedule" in size:
    config.schedule = ConfigDict(size["schedule"] | {"warmup": optional(size["schedule"]["warmup"])})
  return config


def finish(config: ConfigDict, arg: ConfigDict) -> ConfigDict:
  """Return the config; with `debug`, reduce all that takes time."""
  if arg.debug:
    config.data.tokenizer.vocab_size = 512
    config.evals.heldout.max_batches = 2
    if "unigram" in config.evals:
      del config.evals.unigram  # it reads much of the training text
    config.log.every = 1
  return config

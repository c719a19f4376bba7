"""The components of a program that a config names: data, model and auxiliary models, with their checks."""

from __future__ import annotations

from collections.abc import Callable

from llmjax.checkpoints.paths import open_path
from llmjax.config import ConfigError, ConfigTree, build, duration_to_steps
from llmjax.config.model import ModelConfig
from llmjax.data.sources.base import Source, parse_split
from llmjax.data.sources.registry import SOURCES
from llmjax.data.tokenizers.base import Tokenizer
from llmjax.data.tokenizers.registry import make_tokenizer
from llmjax.models.transformer import MODELS
from llmjax.objectives.task import Task
from llmjax.training.schedules import ToSteps
from llmjax.types import Model, Objective


def check_config(config: ConfigTree) -> None:
  """Raise ConfigError for values that are wrong whatever the data and the devices."""
  for key in ("seed", "batch_size", "accum", "seq_len", "total_steps"):
    if config[key] is None:
      raise ConfigError(f"config.{key} must be set")
  for key in ("batch_size", "accum", "seq_len", "logit_tiles"):
    if config[key] < 1:
      raise ConfigError(f"config.{key}={config[key]} must be at least 1")
  if config["batch_size"] % config["accum"]:
    raise ConfigError(f"config.batch_size={config['batch_size']} is not divisible by config.accum={config['accum']}")
  for part in ("model", "objective", "optim", "schedule"):
    if "name" not in config[part]:
      raise ConfigError(f"config.{part} has no name; see llmjax/config/defaults.py")
  for part, purpose in (("corpus", "what to train on"), ("tokenizer", "how text becomes tokens")):
    if "name" not in config["data"][part]:
      raise ConfigError(f"config.data.{part}.name must be set: it says {purpose}; see configs/gpt.py")


def check_model_fits_objective(objective: Objective, cfg: ModelConfig, config: ConfigTree) -> None:
  """Raise ConfigError if a model cannot be trained on an objective. A model whose stacks are unknown is trusted."""
  name = config["objective"]["name"]
  for stream, length in objective.row_lengths(config["seq_len"]).streams():
    if length > cfg.max_len:
      raise ConfigError(
        f"seq_len={config['seq_len']} makes rows of {length} {stream} by objective.name={name!r}, more "
        f"than model.max_len={cfg.max_len}; raise that, or lower seq_len"
      )
  stacks = cfg.stacks
  if stacks is None:
    return
  if stacks not in objective.stacks:
    layers = {"encoder": "encoder_layers only", "decoder": "decoder_layers only", "both": "both kinds of layers"}
    wanted = " or ".join(layers[stacks] for stacks in objective.stacks)
    raise ConfigError(f"objective.name={name!r} needs a model with {wanted}, not with {layers[stacks]}; change model.*")
  for key, value in objective.required_model_config.items():
    if getattr(cfg, key, value) != value:  # a custom config may lack the field
      raise ConfigError(
        f"objective.name={name!r} needs model.{key}={value}, got {getattr(cfg, key)}; change it, or the objective"
      )
  objective.check_model(cfg)


def make_model(spec: ConfigTree, vocab_size: int, seq_len: int, *, trust: bool = True) -> tuple[Model, ConfigTree]:
  """Build a model, and return its config with vocabulary and context set.

  Args:
    spec: config.model.
    vocab_size: the tokenizer's; the model's may be larger, never smaller.
    seq_len: longest sequence of training, in tokens.
    trust: whether the config may name code outside llmjax.
  """
  spec = dict(spec)
  if spec["vocab_size"] is None:
    spec["vocab_size"] = vocab_size
  elif spec["vocab_size"] < vocab_size:
    raise ConfigError(
      f"model.vocab_size={spec['vocab_size']} is smaller than the tokenizer's {vocab_size}; "
      f"set model.vocab_size={vocab_size} (or none, which takes the tokenizer's) or a smaller data.tokenizer"
    )
  if spec["max_len"] is None:
    spec["max_len"] = seq_len
  elif spec["max_len"] < seq_len:
    raise ConfigError(f"seq_len={seq_len} is longer than model.max_len={spec['max_len']}; lower one or raise the other")
  return build(spec, MODELS, "model", trust=trust), spec


def make_auxiliary(config: ConfigTree, objective: Objective) -> dict[str, Model]:
  """Build the models of config.auxiliary, by name: that of a PATH, or without one the run's own model."""
  entries = config["auxiliary"]
  for name in sorted({*objective.auxiliary, *entries}):
    if name not in entries or name not in objective.auxiliary:
      known = ", ".join(objective.auxiliary) or "none"
      raise ConfigError(
        f"auxiliary.{name}: objective.name={config['objective']['name']!r} needs {known}; fix auxiliary"
      )
  models: dict[str, Model] = {}
  for name, entry in entries.items():
    if set(entry) != {"init_from"}:
      raise ConfigError(f"auxiliary.{name}={entry!r} must be {{'init_from': a PATH, or None}}")
    if entry["init_from"] is None:
      models[name] = build(config["model"], MODELS, "model")
      continue
    with open_path(entry["init_from"]) as source:
      models[name] = source.make_model(dtype=config["model"]["dtype"])
  return models


def open_source(config: ConfigTree, split: str) -> Source:
  """Open a split of the config's corpus."""
  source: Source = build(config["data"]["corpus"], SOURCES, "data.corpus", split=split)
  return source


def make_config_tokenizer(config: ConfigTree) -> Tokenizer:
  """Return the tokenizer of a config. One that has to be trained is trained on the training split, once, and cached."""
  return make_tokenizer(config["data"]["tokenizer"], open_source(config, config["data"]["train"]))


def label_split(split: str) -> str:
  """Return the split to infer labels from: for files without named splits all records, since a rare label may lie
  outside the slice."""
  name, _, _ = parse_split(split)
  return split if name else ""


def count_examples(config: ConfigTree, objective: Objective, tokenizer: Tokenizer) -> int | None:
  """Return the rows of an epoch of the training split if each example has a row of its own, else None.

  Reads and tokenises the whole split.

  Raises:
    ConfigError: a record that gives no example, with its location.
  """
  if objective.packing != "never" and (config["data"]["pack"] or not isinstance(objective, Task)):
    return None
  count = 0
  source = open_source(config, config["data"]["train"])
  for index, record in enumerate(source):
    try:
      count += sum(1 for _ in objective.split_record(record, tokenizer, config["seq_len"], False))
    except ConfigError as error:
      raise ConfigError(f"{source.location(index)}: {error}") from error
  return count


def duration_converter(
  config: ConfigTree, total_steps: int | None, count_epoch_rows: Callable[[], int | None]
) -> ToSteps:
  """Return the function (duration, config key) -> steps of a config; None stays None."""
  return lambda value, key: duration_to_steps(
    value,
    key,
    batch_size=config["batch_size"],
    seq_len=config["seq_len"],
    total_steps=total_steps,
    epoch_tokens=config["data"]["epoch_tokens"],
    epoch_examples=count_epoch_rows,
  )

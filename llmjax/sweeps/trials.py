"""The algebra of trials: functions that make the list of trials of a sweep. Imports no JAX.

A trial is a plain dict of changes to a config: {"optim.lr": 3e-3, ":size": "nano"}. A key with a leading colon is an
argument of the config file. A sweep file is a config file that also defines `get_sweep`:

  def get_sweep():
    rates = {"adamw": [1e-3, 3e-3], "muon": [0.01, 0.02]}
    return Sweep(product(vary(":optim", rates), lambda trial: vary("optim.lr", rates[trial[":optim"]]), seeds(3)))
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from llmjax.config import ConfigError, Json, find_config_file

Trial: TypeAlias = dict[str, Json]
Draw: TypeAlias = Callable[[random.Random], Json]
COST_COLUMNS = ("parameters", "tokens", "flops", "seconds")
MAX_NAME_BYTES = 120


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Trials, the metric that compares them, and the axes of the figure.

  A column is a key of trials, a metric, or a cost of the training of a trial: "parameters", "tokens", "flops",
  "seconds".
  """

  trials: Sequence[Trial]
  metric: str = "eval/heldout/loss"  # its last value counts
  mode: str = "min"  # or "max": which values of the metric are best
  x: str = "flops"  # column on the horizontal axis
  lines: Sequence[str] = ()  # columns with a line for each of their values; other columns, such as seeds, are averaged

  def __post_init__(self) -> None:
    if self.mode not in ("min", "max"):
      raise ConfigError(f"Sweep.mode must be 'min' or 'max', got {self.mode!r}")
    if not self.trials:
      raise ConfigError("Sweep.trials is empty. Give at least one trial, such as vary('optim.lr', [1e-3]).")


def vary(key: str, values: Iterable[Json]) -> list[Trial]:
  """Return one trial for each value of a key."""
  return [{key: value} for value in values]


def seeds(count: int) -> list[Trial]:
  """Return one trial for each of the seeds 0 to `count` - 1."""
  return vary("seed", range(count))


def grid(values: Mapping[str, Iterable[Json]]) -> list[Trial]:
  """Return every combination of the values of several keys; the last key varies fastest."""
  return product(*(vary(key, options) for key, options in values.items()))


def zipped(values: Mapping[str, Sequence[Json]]) -> list[Trial]:
  """Return one trial for each position in the values of several keys, which vary together."""
  lengths = {key: len(options) for key, options in values.items()}
  if len(set(lengths.values())) > 1:
    raise ConfigError(f"zipped keys must have equally many values, got {lengths}")
  return [dict(zip(values, row)) for row in zip(*values.values())]


def product(*parts: Sequence[Trial] | Callable[[Trial], Sequence[Trial]]) -> list[Trial]:
  """Return every combination of one trial of each part; the last part varies fastest.

  Args:
    parts: trials, or a function of the trial that the parts before have made, which returns trials.
  Raises:
    ConfigError: two parts set a key to different values.
  """
  trials: list[Trial] = [{}]
  for part in parts:
    trials = [_merge_trials(first, second) for first in trials for second in (part(first) if callable(part) else part)]
  return trials


def chain(*parts: Sequence[Trial]) -> list[Trial]:
  """Return the trials of all parts in order, without repetitions."""
  trials: dict[str, Trial] = {}
  for trial in itertools.chain(*parts):
    trials.setdefault(identity(trial), trial)
  return list(trials.values())


def draws(count: int, values: Mapping[str, Draw], seed: int = 0) -> list[Trial]:
  """Return `count` random trials.

  The i-th value of a key depends on (seed, key, i) only. With a larger `count`, or one more key, earlier draws stay.

  Args:
    values: {key: distribution}, such as `uniform(0, 1)`.
  """
  return [{key: draw(random.Random(f"{seed}/{key}/{index}")) for key, draw in values.items()} for index in range(count)]


def uniform(low: float, high: float) -> Draw:
  """Return a uniform distribution, rounded to three digits."""
  return lambda rng: float(f"{rng.uniform(low, high):.3g}")


def log_uniform(low: float, high: float) -> Draw:
  """Return a distribution whose logarithm is uniform, rounded to three digits."""
  if not 0 < low <= high:
    raise ConfigError(f"log_uniform must have 0 < low <= high, got low={low}, high={high}")
  return lambda rng: float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.3g}")


def integers(low: int, high: int) -> Draw:
  """Return a uniform distribution over the integers from `low` to `high`, both included."""
  return lambda rng: rng.randint(low, high)


def choice(*values: Json) -> Draw:
  """Return a uniform distribution over values."""
  return lambda rng: rng.choice(values)


def _merge_trials(first: Trial, second: Trial) -> Trial:
  for key in sorted(first):
    if key in second and first[key] != second[key]:
      raise ConfigError(f"two parts of a product set {key}, to {first[key]!r} and {second[key]!r}. Set it once.")
  return {**first, **second}


def identity(trial: Trial) -> str:
  """Return a string that is equal for trials with equal changes in any order."""
  return json.dumps(trial, sort_keys=True, default=repr)


def plain_numbers(trial: Trial) -> Trial:
  """Return a trial with Python's numbers instead of NumPy's."""
  return {key: value.item() if hasattr(value, "item") else value for key, value in trial.items()}


def trial_flags(reference: str, trial: Trial) -> list[str]:
  """Return the flags of `llmjax train` for a trial.

  Args:
    reference: the sweep's config file, FILE[:argument].
    trial: changes to its config.
  """
  changes = plain_numbers(trial).items()
  arguments = [f"{key[1:]}={_quote_argument(value)}" for key, value in changes if key[0] == ":" and value is not None]
  given = find_config_file(reference)[1]
  file = reference.removesuffix(f":{given}") if given else reference
  argument = ",".join(filter(None, [given, *arguments]))
  keys = [f"--config.{key}={_flag_value(value)}" for key, value in changes if key[0] != ":"]
  return [f"--config={file}" + (f":{argument}" if argument else ""), *keys]


def _flag_value(value: Json) -> str:
  return "none" if value is None else value if isinstance(value, str) else repr(value)


def _quote_argument(value: Json) -> str:
  """Quote a value of a config argument, in which commas, brackets and quotes have a meaning."""
  text = str(value)
  if not isinstance(value, str) or re.fullmatch(r"[\w./+:@=-]*", text):
    return text
  return f"'{text}'" if '"' in text else f'"{text}"'


def short_keys(trials: Iterable[Trial]) -> dict[str, str]:
  """Return {key: its shortest suffix of dotted parts that no other key has}."""
  keys = list(dict.fromkeys(key for trial in trials for key in trial))

  def suffixes(key: str) -> list[str]:
    parts = key.removeprefix(":").split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]

  taken = [suffix for key in keys for suffix in suffixes(key)]
  return {key: next((suffix for suffix in suffixes(key) if taken.count(suffix) == 1), key) for key in keys}


def trial_names(trials: Sequence[Trial]) -> list[str]:
  """Return a folder name for each trial, made of its changes: "lr=0.003,seed=1".

  Raises:
    ConfigError: two trials are equal.
  """
  short = short_keys(trials)
  names: dict[str, str] = {}  # {identity: name}
  taken: set[str] = set()  # case-folded: some file systems do not distinguish A from a
  for trial in trials:
    text = ",".join(f"{short[key]}={_name_value(value)}" for key, value in trial.items()) or "plain"
    name = re.sub(r"[^\w.=,+-]+", "-", text).strip("-.")
    key = identity(trial)
    if key in names:
      raise ConfigError(f"trial {name} is there twice. Combine lists with `chain` instead of `+`.")
    if name.casefold() in taken or len(name.encode()) > MAX_NAME_BYTES:
      short_name = name.encode()[: MAX_NAME_BYTES - 9].decode(errors="ignore")
      name = f"{short_name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    names[key] = name
    taken.add(name.casefold())
  return list(names.values())


def _name_value(value: Json) -> str:
  if isinstance(value, float):
    return f"{value:.6g}"
  return "+".join(map(_name_value, value)) if isinstance(value, (list, tuple)) else str(value)

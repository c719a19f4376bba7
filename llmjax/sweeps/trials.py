"""What a sweep varies: trials, and the algebra that makes lists of them. Imports no JAX.

A trial is a plain dict of what it changes in a config: {"optim.lr": 3e-3, ":size": "nano"}, where a key that begins
with a colon is an argument of the config file. A sweep file is a config file that also says which trials there are:

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
from typing import Any

from llmjax.config import ConfigError, find_config_file

Trial = dict[str, Any]
Draw = Callable[[random.Random], Any]
COSTS = ("parameters", "tokens", "flops", "seconds")  # of a trial
LONGEST = 120  # bytes of a folder's name


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Trials and how they are judged and drawn.

  Columns are keys of trials, metrics, or what a trial costs: "parameters", "tokens", "flops" of its training,
  "seconds".
  """

  trials: Sequence[Trial]
  metric: str = "eval/heldout/loss"  # which last value decides
  mode: str = "min"  # or "max"
  x: str = "flops"  # the column along which trials are drawn
  lines: Sequence[str] = ()  # the columns that tell one line from another; what is left, such as seeds, is averaged

  def __post_init__(self) -> None:
    if self.mode not in ("min", "max"):
      raise ConfigError(f"Sweep.mode={self.mode!r} must be 'min' or 'max'")
    if not self.trials:
      raise ConfigError("Sweep.trials is empty; give at least one, such as vary('optim.lr', [1e-3])")


def vary(key: str, values: Iterable[Any]) -> list[Trial]:
  """One trial for each value of a key."""
  return [{key: value} for value in values]


def seeds(count: int) -> list[Trial]:
  """The same with `count` seeds."""
  return vary("seed", range(count))


def grid(values: Mapping[str, Iterable[Any]]) -> list[Trial]:
  """Every combination of the values of several keys, the last key varying fastest."""
  return product(*(vary(key, of) for key, of in values.items()))


def zipped(values: Mapping[str, Sequence[Any]]) -> list[Trial]:
  """Several keys that vary in step."""
  lengths = {key: len(of) for key, of in values.items()}
  if len(set(lengths.values())) > 1:
    raise ConfigError(f"zipped keys must have as many values each, not {lengths}")
  return [dict(zip(values, row)) for row in zip(*values.values())]


def product(*parts: Sequence[Trial] | Callable[[Trial], Sequence[Trial]]) -> list[Trial]:
  """Every combination of a trial of each part. A part that depends on what the parts before it chose is a function of
  that: trial so far -> trials, none of which drops it."""
  out: list[Trial] = [{}]
  for part in parts:
    out = [_join(first, second) for first in out for second in (part(first) if callable(part) else part)]
  return out


def chain(*parts: Sequence[Trial]) -> list[Trial]:
  """The trials of one part after those of another, each once."""
  found: dict[str, Trial] = {}
  for trial in itertools.chain(*parts):
    found.setdefault(identity(trial), trial)
  return list(found.values())


def draws(count: int, values: Mapping[str, Draw], seed: int = 0) -> list[Trial]:
  """Random trials. The i-th value of a key depends on (seed, key, i) alone: with a larger `count`, or one more key,
  what was drawn before stays."""

  def draw(key: str, index: int) -> Any:
    return values[key](random.Random(f"{seed}/{key}/{index}"))

  return [{key: draw(key, index) for key in values} for index in range(count)]


def uniform(low: float, high: float) -> Draw:
  """Between two numbers, to three digits."""
  return lambda rng: float(f"{rng.uniform(low, high):.3g}")


def log_uniform(low: float, high: float) -> Draw:
  """Between two positive numbers, every factor as likely as the next, to three digits."""
  if not 0 < low <= high:
    raise ConfigError(f"log_uniform({low}, {high}): it must be 0 < low <= high")
  return lambda rng: float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.3g}")


def integers(low: int, high: int) -> Draw:
  """From `low` to `high`, both included."""
  return lambda rng: rng.randint(low, high)


def choice(*values: Any) -> Draw:
  """One of these."""
  return lambda rng: rng.choice(values)


def _join(first: Trial, second: Trial) -> Trial:
  both = {key for key in first if key in second and first[key] != second[key]}
  if both:
    key = min(both)
    raise ConfigError(f"two parts of a product set {key}, to {first[key]!r} and {second[key]!r}; let one of them do it")
  return {**first, **second}


def identity(trial: Trial) -> str:
  """The same for the same changes, in whatever order."""
  return json.dumps(trial, sort_keys=True, default=repr)


def flags(reference: str, trial: Trial) -> list[str]:
  """The flags of `llmjax train` that make a trial of the config that `reference` names, FILE[:argument]."""
  plain = {key: value.item() if hasattr(value, "item") else value for key, value in trial.items()}  # NumPy's numbers
  arguments = [f"{key[1:]}={_quoted(value)}" for key, value in plain.items() if key[0] == ":" and value is not None]
  given = find_config_file(reference)[1]
  file = reference.removesuffix(f":{given}") if given else reference
  argument = ",".join(filter(None, [given, *arguments]))
  keys = [f"--config.{key}={_value(value)}" for key, value in plain.items() if key[0] != ":"]
  return [f"--config={file}" + (f":{argument}" if argument else ""), *keys]


def _value(value: Any) -> str:
  return "none" if value is None else value if isinstance(value, str) else repr(value)


def _quoted(value: Any) -> str:
  """A value of a config argument; commas, brackets and quotes would end it or change it."""
  text = str(value)
  if not isinstance(value, str) or re.fullmatch(r"[\w./+:@=-]*", text):
    return text
  return f"'{text}'" if '"' in text else f'"{text}"'


def short_keys(trials: Iterable[Trial]) -> dict[str, str]:
  """{key: the shortest end of it that no other key of these trials has}."""
  keys = list(dict.fromkeys(key for trial in trials for key in trial))

  def ends(key: str) -> list[str]:
    parts = key.removeprefix(":").split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]

  taken = [end for key in keys for end in ends(key)]
  return {key: next((end for end in ends(key) if taken.count(end) == 1), key) for key in keys}


def names(trials: Sequence[Trial]) -> list[str]:
  """A folder's name for each trial, from what it changes: "lr=0.003,seed=1".

  Raises ConfigError where two trials are the same.
  """
  short = short_keys(trials)
  found: dict[str, str] = {}  # {identity: name}
  taken: set[str] = set()
  for trial in trials:
    text = ",".join(f"{short[key]}={_text(value)}" for key, value in trial.items()) or "plain"
    name = re.sub(r"[^\w.=,+-]+", "-", text).strip("-.")
    mine = identity(trial)
    if mine in found:
      raise ConfigError(f"trial {name} is there twice; `chain` and not `+` leaves out what is there already")
    if name.casefold() in taken or len(name.encode()) > LONGEST:  # some file systems do not tell A from a
      short_name = name.encode()[: LONGEST - 9].decode(errors="ignore")
      name = f"{short_name}-{hashlib.sha256(mine.encode()).hexdigest()[:8]}"
    found[mine] = name
    taken.add(name.casefold())
  return list(found.values())


def _text(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:.6g}"
  return "+".join(map(_text, value)) if isinstance(value, (list, tuple)) else str(value)

"""Several objectives at once, each with features and denominators of its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llmjax.config import ConfigError, build, suggest_name
from llmjax.objectives import OBJECTIVES
from llmjax.objectives.task import Task
from llmjax.types import Batch, Features, Forward, Metrics, Objective, Sums


@dataclasses.dataclass(frozen=True, eq=False)
class WeightedSum(Objective):
  """The sum of objectives, each times its weight.

  The first is the principal one: it cuts the documents, and its metrics go by their plain names; those of the others
  begin with the part's name. The others see of a document what the principal one has cut, or as much of it as they can.
  """

  parts: Mapping[str, Objective]
  part_weights: Mapping[str, float]
  seq_len: int

  @property
  def packing(self) -> str:  # type: ignore[override]
    return "never" if any(part.packing == "never" for part in self.parts.values()) else "whole"

  @property
  def whole_batch(self) -> bool:  # type: ignore[override]
    return any(part.whole_batch for part in self.parts.values())

  @property
  def stacks(self) -> tuple[str, ...]:  # type: ignore[override]
    return tuple(s for s in Objective.stacks if all(s in part.stacks for part in self.parts.values()))

  @property
  def required_model_config(self) -> dict[str, Any]:
    return {key: value for part in self.parts.values() for key, value in part.required_model_config.items()}

  @property
  def coefficients(self) -> dict[str, float]:
    return {
      f"{name}/{term}": self.part_weights[name] * coefficient
      for name, part in self.parts.items()
      for term, coefficient in part.coefficients.items()
    }

  @property
  def principal(self) -> str:
    return next(iter(self.parts))

  def row_lengths(self, seq_len: int) -> dict[str, int]:
    return {
      f"extras/{name}/{stream}": length
      for name, part in self.parts.items()
      for stream, length in part.row_lengths(seq_len).items()
    }

  def window(self, ids: np.ndarray, length: int) -> list[np.ndarray]:
    return self.parts[self.principal].window(ids, length)

  def features(self, example: Mapping[str, Any], rng: np.random.Generator, corpus: Any) -> Features | None:
    each: dict[str, Features] = {}
    for name, part in self.parts.items():
      windows = [example["ids"]] if name == self.principal else part.window(example["ids"], self.seq_len)
      features = part.features({**example, "ids": windows[0]}, rng, corpus) if windows else None
      if features is None:
        return None
      each[name] = features
    return {"extras": each}

  def weights(self, batch: Batch) -> Sums:
    found = {name: part.weights(batch.extras[name]) for name, part in self.parts.items()}
    return {f"{name}/{term}": weight for name, each in found.items() for term, weight in each.items()}

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    sums: Sums = {}
    metrics: Metrics = {}
    for number, (name, part) in enumerate(self.parts.items()):
      folded = {kind: jax.random.fold_in(key, number) for kind, key in rngs.items()}  # parts drop out independently
      one = functools.partial(_loss, part, forward, folded)
      if self.whole_batch and not part.whole_batch:
        each = forward.map_microbatches(one, batch.extras[name])
        found, measured = jax.tree.map(functools.partial(jnp.sum, axis=0), each)
      else:
        found, measured = one(batch.extras[name])
      sums |= {f"{name}/{term}": total for term, total in found.items()}
      metrics |= {what if name == self.principal else f"{name}/{what}": pair for what, pair in measured.items()}
    return sums, metrics


def _loss(part: Objective, forward: Forward, rngs: Mapping[str, Array], batch: Batch) -> tuple[Sums, Metrics]:
  return part.loss(forward, batch, rngs)


def weighted_sum(parts: Mapping[str, Any], principal: str, tokenizer: Any, seq_len: int) -> WeightedSum:
  """From config: parts {NAME: {"weight": w, "name": an objective, ...}}, and which is the principal one.

  That is named because the parts have no order of their own: a ConfigDict sorts its keys.
  """
  if not parts:
    raise ConfigError("objective.parts is empty; give {NAME: {'weight': 1.0, 'name': 'masked_lm', ...}}")
  if principal not in parts:
    raise ConfigError(f"objective.principal={principal!r} is none of objective.parts; {suggest_name(principal, parts)}")
  objectives, weights = {}, {}
  for name, spec in {principal: parts[principal], **parts}.items():
    what = f"objective.parts.{name}"
    if not isinstance(spec, Mapping):
      raise ConfigError(f"{what} must be an objective with a weight, {{'weight': 1.0, 'name': ...}}, not {spec!r}")
    spec = dict(spec)
    weights[name] = spec.pop("weight", None)
    if not isinstance(weights[name], (int, float)) or not weights[name] > 0:
      raise ConfigError(f"{what}.weight={weights[name]!r} must be a positive number")
    objectives[name] = build(spec, OBJECTIVES, what, tokenizer=tokenizer, seq_len=seq_len)
  for name, part in objectives.items():
    if part.auxiliary or isinstance(part, Task):
      which = parts[name]["name"]
      raise ConfigError(f"objective.parts.{name}.name={which!r} cannot be a part of a sum; train on it alone")
  together = WeightedSum(objectives, weights, seq_len)
  if not together.stacks:
    said = "; ".join(f"{name}: {' or '.join(part.stacks)}" for name, part in objectives.items())
    raise ConfigError(f"objective.parts: no model can learn them together ({said}); take one of them away")
  return together

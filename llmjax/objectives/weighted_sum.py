"""A weighted sum of objectives, each with its own examples and denominators."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llmjax.config import ConfigError, Json, build, suggest_name
from llmjax.examples import Example, RecordSource, RowLengths, TextTokenizer, Window
from llmjax.objectives import OBJECTIVES
from llmjax.objectives.task import Task
from llmjax.types import Batch, Forward, Metrics, Objective, Sums


@dataclasses.dataclass(frozen=True, eq=False)
class WeightedSum(Objective):
  """The sum of objectives times their weights. Each has a view of its own in the batch's `extras`.

  The first objective is the principal one. It splits the documents, and its metrics have plain names; metrics of the
  others have the prefix "<name>/". The others see the principal's windows, truncated to what they can use.

  Attributes:
    parts: objectives by name.
    part_weights: the weight of each, by name.
    seq_len: input tokens of a row.
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
  def required_model_config(self) -> dict[str, Json]:
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
    """Name of the principal objective."""
    return next(iter(self.parts))

  # Host.

  def row_lengths(self, seq_len: int) -> RowLengths:
    return RowLengths(extras={name: part.row_lengths(seq_len) for name, part in self.parts.items()})

  def split_ids(self, ids: np.ndarray, seq_len: int) -> list[np.ndarray]:
    return self.parts[self.principal].split_ids(ids, seq_len)

  def make_example(self, window: Window, rng: np.random.Generator, corpus: RecordSource) -> Example | None:
    examples: dict[str, Example] = {}
    for name, part in self.parts.items():
      ids = [window.ids] if name == self.principal else part.split_ids(window.ids, self.seq_len)
      example = part.make_example(Window(window.record, ids[0]), rng, corpus) if ids else None
      if example is None:
        return None
      examples[name] = example
    return Example(None, extras=examples)

  # Device.

  def weights(self, batch: Batch) -> Sums:
    weights = {name: part.weights(batch.extras[name]) for name, part in self.parts.items()}
    return {f"{name}/{term}": weight for name, terms in weights.items() for term, weight in terms.items()}

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    sums: Sums = {}
    metrics: Metrics = {}
    for number, (name, part) in enumerate(self.parts.items()):
      own_rngs = {kind: jax.random.fold_in(key, number) for kind, key in rngs.items()}  # independent dropout
      part_loss = functools.partial(_part_loss, part, forward, own_rngs)
      if self.whole_batch and not part.whole_batch:
        each = forward.map_microbatches(part_loss, batch.extras[name])
        part_sums, part_metrics = jax.tree.map(functools.partial(jnp.sum, axis=0), each)
      else:
        part_sums, part_metrics = part_loss(batch.extras[name])
      sums |= {f"{name}/{term}": total for term, total in part_sums.items()}
      prefix = "" if name == self.principal else f"{name}/"
      metrics |= {f"{prefix}{metric}": pair for metric, pair in part_metrics.items()}
    return sums, metrics


def _part_loss(part: Objective, forward: Forward, rngs: Mapping[str, Array], batch: Batch) -> tuple[Sums, Metrics]:
  return part.loss(forward, batch, rngs)


def weighted_sum(parts: Mapping[str, Json], principal: str, tokenizer: TextTokenizer, seq_len: int) -> WeightedSum:
  """Build a weighted sum from a config.

  Args:
    parts: {NAME: {"weight": w, "name": an objective, ...}}.
    principal: name of the principal objective. It is named because a ConfigDict sorts its keys.
    tokenizer: tokenizer of the run.
    seq_len: input tokens of a row.

  Raises:
    ConfigError: an entry is wrong, or no kind of model can be trained on all objectives.
  """
  if not parts:
    raise ConfigError("objective.parts: must not be empty. Set it to {NAME: {'weight': 1.0, 'name': 'masked_lm', ...}}")
  if principal not in parts:
    raise ConfigError(
      f"objective.principal: must be in objective.parts, got {principal!r}; {suggest_name(principal, parts)}"
    )
  objectives, weights = {}, {}
  for name, spec in {principal: parts[principal], **parts}.items():
    objectives[name], weights[name] = _build_part(f"objective.parts.{name}", spec, tokenizer, seq_len)
  together = WeightedSum(objectives, weights, seq_len)
  if not together.stacks:
    kinds = "; ".join(f"{name}: {' or '.join(part.stacks)}" for name, part in objectives.items())
    raise ConfigError(f"objective.parts: no model can be trained on all of them ({kinds}). Remove one of them")
  return together


def _build_part(key: str, spec: Json, tokenizer: TextTokenizer, seq_len: int) -> tuple[Objective, float]:
  """Return the objective and the weight of an entry of config.objective.parts; `key` is for messages."""
  if not isinstance(spec, Mapping):
    raise ConfigError(f"{key}: must be an objective with a weight, {{'weight': 1.0, 'name': ...}}, got {spec!r}")
  spec = dict(spec)
  weight = spec.pop("weight", None)
  if not isinstance(weight, (int, float)) or not weight > 0:
    raise ConfigError(f"{key}.weight: must be a positive number, got {weight!r}")
  objective: Objective = build(spec, OBJECTIVES, key, tokenizer=tokenizer, seq_len=seq_len)
  if objective.auxiliary or isinstance(objective, Task):
    raise ConfigError(f"{key}.name: cannot be a part of a sum, got {spec['name']!r}. Train on it alone")
  return objective, weight

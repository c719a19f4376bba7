"""Checks of predictions and of installed libraries, which all task metrics share."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import SupportsFloat

from llmjax.config import ConfigError, suggest_name


def check_examples(
  metric: str, truths: Sequence[object], predictions: Sequence[object], list_of: str | None = None
) -> None:
  """Check that there are as many predictions as truths, and at least one.

  Args:
    metric: name of the metric, for messages.
    truths: one per example.
    predictions: one per example.
    list_of: what each truth is a list of, which therefore is not a string. None: anything is allowed.

  Raises:
    ConfigError: the numbers differ or are 0, or a string stands where a list is expected.
  """
  if len(truths) != len(predictions):
    raise ConfigError(f"{metric}: got {len(predictions)} predictions for {len(truths)} truths. Give one for each.")
  if not len(truths):
    raise ConfigError(f"{metric}: there are no examples to score. Choose a split that has some.")
  for i, truth in enumerate(truths):
    if list_of and isinstance(truth, str):
      raise ConfigError(f"{metric}: truth {i} must be a list of {list_of}, got the text {truth!r}. Write [{truth!r}].")


def index_labels(metric: str, labels: Sequence[str]) -> dict[str, int]:
  """Return {label: its index}. Raises ConfigError if a label occurs twice."""
  index = {label: i for i, label in enumerate(labels)}
  if len(index) < len(labels):
    twice = next(label for label, count in Counter(labels).items() if count > 1)
    raise ConfigError(f"{metric}: the label {twice!r} is given twice. Give each label once.")
  return index


def check_true_label(metric: str, i: int, label: str, index: Mapping[str, int]) -> None:
  """Raise ConfigError if truth `i` has a label that is not in `index`."""
  if label not in index:
    raise ConfigError(
      f"{metric}: truth {i} has {label!r}, which is not one of the {len(index)} labels; {suggest_name(label, index)}"
    )


def require_libraries(modules: Sequence[str]) -> None:
  """Raise ConfigError if a library that a metric needs is not installed."""
  for module in modules:
    import_library(module)


def import_library(module: str) -> ModuleType:
  """Import a library of the extra `eval`. Raises ConfigError if it is not installed."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    package = module.partition(".")[0]
    raise ConfigError(f"this metric needs the package {package}: pip install 'llmjax[eval]'") from error


def as_floats(scores: Mapping[str, SupportsFloat]) -> dict[str, float]:
  """Return the scores, which libraries give as NumPy scalars, as Python floats."""
  return {name: float(value) for name, value in scores.items()}

"""Parameters that a model takes from another: their names there, and which of them may be initialised instead."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

from llmjax.config import ConfigError
from llmjax.models.layer_stacks import HEAD_PREFIXES
from llmjax.models.lora import is_adapter
from llmjax.objectives.task import FRESH_HEAD_HINT
from llmjax.trees import Params, flatten_tree

# config.init_map: ((regex of a parameter's path, its path there as in `re.sub`, or None: initialise it), ...)
InitMap: TypeAlias = Sequence[tuple[str, str | None]]

# Paths of parameters that belong to one kind of head only.
OUTPUT_PREFIXES = ("head/", "head_bias/", "head_transform/", "head_norm/", "crf/")


def check_init_map(init_map: InitMap, abstract: Params) -> None:
  """Raise ConfigError for something that is not a rule, or a regex that matches no parameter."""
  paths = list(flatten_tree(abstract))
  for rule in init_map:
    is_pair = isinstance(rule, (tuple, list)) and len(rule) == 2
    if not is_pair or not isinstance(rule[0], str) or not isinstance(rule[1], (str, type(None))):
      raise ConfigError(f"init_map: {rule!r} is not a rule; a rule is (regex, name in init_from or None)")
    regex, replacement = rule
    try:
      matched = [re.sub(regex, replacement or "", path) for path in paths if re.fullmatch(regex, path)]
    except re.error as error:
      raise ConfigError(f"init_map: {rule!r} is not a regular expression and a replacement: {error}") from None
    if not matched:
      raise ConfigError(
        f"init_map: {regex!r} matches no parameter (a regex must match a whole path, such as {paths[0]!r}); fix or "
        "remove it"
      )


def source_name(init_map: InitMap, path: str) -> str | None:
  """Return the name of a parameter where it is read from, None if it is not read. The first matching rule counts."""
  for regex, replacement in init_map:
    if re.fullmatch(regex, path):
      return None if replacement is None else re.sub(regex, replacement, path)
  return path


def may_be_reinitialized(path: str) -> bool:
  """Whether a parameter may be initialised if the source does not have it: heads and adapters."""
  return path.startswith(HEAD_PREFIXES) or is_adapter(path)


def other_head_error(source: str, path: str, shape: Sequence[int], source_shape: Sequence[int]) -> ConfigError:
  """Return the error for a head whose size differs from that of the source."""
  return ConfigError(
    f"init_from={source}: {path} has shape {list(source_shape)} there and {list(shape)} here, a head for other "
    f"classes; {FRESH_HEAD_HINT}"
  )

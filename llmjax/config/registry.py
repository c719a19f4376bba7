"""From a config to an object: `build` calls what `spec["name"]` names."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from llmjax.config.errors import ConfigError, suggest_name
from llmjax.config.values import to_dict


def resolve_callable(name: str, table: Mapping[str, str], what: str, *, trust: bool = True) -> Callable[..., Any]:
  """A callable by its key in `table` ({key: "module:function"}) or as "module:function" itself."""
  path = table.get(str(name), str(name))  # a config's placeholder may be None
  if ":" not in path:
    raise ConfigError(f"{what}.name={name!r} is unknown; {suggest_name(str(name), table)} (or give 'module:function')")
  module, _, attribute = path.partition(":")
  if not trust and path not in table.values():  # among llmjax's own functions are some that call any other
    raise ConfigError(f"{what}.name={name!r} from a checkpoint is none of llmjax's own; pass --trust to run it")
  try:
    function = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError, ValueError) as error:
    raise ConfigError(f"{what}.name={name!r} cannot be imported: {error}") from error
  if not callable(function):
    raise ConfigError(f"{what}.name={name!r} is a {type(function).__name__}, not something to call")
  return function


def build(spec: Any, table: Mapping[str, str], what: str, *, trust: bool = True, **runtime: Any) -> Any:
  """The only way from config to code: calls what `spec["name"]` names with the rest of `spec`.

  Args:
    spec: {"name": key or "module:function", **kwargs}.
    table: {key: "module:function"}.
    what: the config key of `spec`, for error messages.
    trust: whether callables that are not in `table` may be named.
    runtime: values that only the program knows; passed to a callable that names them, ignored by others.
  Raises:
    ConfigError: an unknown name or key, with the nearest known one; a required key that is missing.
  """
  kwargs = to_dict(spec)
  if "name" not in kwargs:
    raise ConfigError(f"{what} has no `name`; {suggest_name('', table)}")
  name = kwargs.pop("name")
  function = resolve_callable(name, table, what, trust=trust)
  parameters = inspect.signature(function).parameters
  takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
  named = {k: p for k, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
  allowed = set(named) - set(runtime)
  for key in kwargs:
    if key in runtime or (key not in allowed and not takes_all):
      raise ConfigError(f"{what}.{key}: {name!r} has no such key; {suggest_name(key, allowed)}")
  given = kwargs | {k: v for k, v in runtime.items() if k in named or takes_all}
  missing = [k for k, p in named.items() if p.default is p.empty and k not in given]
  if missing:
    raise ConfigError(f"{what}.{missing[0]}: {name!r} needs it")
  return function(**given)

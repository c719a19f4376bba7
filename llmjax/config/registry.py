"""From a config to an object: `build` calls what `spec["name"]` names."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from llmjax.config.errors import ConfigError, suggest_name
from llmjax.config.values import ConfigLike, to_dict


def resolve_callable(name: str, registry: Mapping[str, str], key: str, *, trust: bool = True) -> Callable[..., Any]:
  """Return a callable by its name.

  Args:
    name: a key of `registry`, or "module:function".
    registry: {name: "module:function"}.
    key: config key of the spec, for messages.
    trust: whether callables that are not in `registry` may be named.

  Raises:
    ConfigError: an unknown name, one that cannot be imported, or one that is not trusted.
  """
  path = registry.get(str(name), str(name))  # a config's placeholder may be None
  if ":" not in path:
    raise ConfigError(
      f"{key}.name={name!r} is unknown; {suggest_name(str(name), registry)} (or give 'module:function')"
    )
  module, _, attribute = path.partition(":")
  if not trust and path not in registry.values():  # some functions of llmjax itself call any other
    raise ConfigError(f"{key}.name={name!r} from a checkpoint is not part of llmjax; pass --trust to run it")
  try:
    function = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError, ValueError) as error:
    raise ConfigError(f"{key}.name={name!r} cannot be imported: {error}") from error
  if not callable(function):
    raise ConfigError(f"{key}.name={name!r} is a {type(function).__name__}, which cannot be called")
  resolved: Callable[..., Any] = function
  return resolved


def build(spec: ConfigLike, registry: Mapping[str, str], key: str, *, trust: bool = True, **runtime: Any) -> Any:
  """Call what `spec["name"]` names with the rest of `spec`: the only way from a config to an object.

  Args:
    spec: {"name": key or "module:function", **kwargs}.
    registry: {name: "module:function"}.
    key: config key of `spec`, for messages.
    trust: whether callables that are not in `registry` may be named.
    runtime: values that only the program knows; passed to a callable that has them as parameters, else ignored.

  Raises:
    ConfigError: an unknown name or key, with the nearest known one; a required key that is missing.
  """
  kwargs = to_dict(spec)
  if "name" not in kwargs:
    raise ConfigError(f"{key} has no `name`; {suggest_name('', registry)}")
  name = kwargs.pop("name")
  function = resolve_callable(name, registry, key, trust=trust)
  parameters = inspect.signature(function).parameters
  takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
  named = {k: p for k, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
  allowed = set(named) - set(runtime)
  for argument in kwargs:
    if argument in runtime or (argument not in allowed and not takes_all):
      raise ConfigError(f"{key}.{argument}: {name!r} has no such key; {suggest_name(argument, allowed)}")
  given = kwargs | {k: v for k, v in runtime.items() if k in named or takes_all}
  missing = [k for k, p in named.items() if p.default is p.empty and k not in given]
  if missing:
    raise ConfigError(f"{key}.{missing[0]} is missing; {name!r} needs it")
  return function(**given)

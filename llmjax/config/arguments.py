"""The argument of a config file, such as `size=nano,debug`."""

from __future__ import annotations

import ast
import re
from typing import Any

from ml_collections import ConfigDict

from llmjax.config.errors import ConfigError, suggest_name


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
  """Parse the argument of a config file: "size=nano,debug" is {size: "nano", debug: True} over `defaults`.

  Values have the type of their default; a default of None takes a string; a boolean name alone means True. Commas in
  brackets and in quoted strings do not separate: text="a,b.txt".
  """
  out = ConfigDict(defaults)
  with out.unlocked():
    for item in _items(arg):
      key, given, text = item.partition("=")
      if key not in defaults:
        raise ConfigError(f"config argument `{key}` is unknown; {suggest_name(key, defaults)}")
      default = defaults[key]
      if isinstance(default, bool):
        if given and text.lower() not in ("true", "false", "1", "0"):
          raise ConfigError(f"config argument {key}={text!r} must be true or false")
        out[key] = not given or text.lower() in ("true", "1")
      elif not given:
        raise ConfigError(f"config argument `{key}` needs a value: {key}=VALUE")
      elif default is None or isinstance(default, str):
        quoted = re.fullmatch(r"""(["'])(.*)\1""", text, re.DOTALL)
        out[key] = quoted[2] if quoted else text
      else:
        try:
          value = ast.literal_eval(text)
          out[key] = type(default)(value)
        except (ValueError, SyntaxError, TypeError, OverflowError):
          value = None
        if value is None or (isinstance(default, int) and value != out[key]):  # int() would cut 3.7 to 3
          raise ConfigError(f"config argument {key}={text!r} must be of type {type(default).__name__}")
  return out


def _items(arg: str | None) -> list[str]:
  return re.findall(r"""(?:(?<==)"[^"]*"|(?<==)'[^']*'|,(?=[^(\[{]*[)\]}])|[^,])+""", arg or "")


def split_arg(arg: str | None, **defaults: Any) -> tuple[ConfigDict, str]:
  """Return `parse_arg` of the items that are in `defaults`, and all others as an argument for another config."""
  own = [item for item in _items(arg) if item.partition("=")[0] in defaults]
  rest = [item for item in _items(arg) if item.partition("=")[0] not in defaults]
  return parse_arg(",".join(own), **defaults), ",".join(rest)

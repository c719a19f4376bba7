"""Config files: find them, run them, and apply overrides from the command line."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags

from llmjax.config.errors import ConfigError, suggest_name
from llmjax.config.values import flatten_config

# What the code of a config file may raise by mistake.
CODE_ERRORS = (
  *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
  *(NameError, OSError, RuntimeError, TypeError, ValueError),
)


def config_roots() -> list[Path]:
  """Return the folders that hold `configs/`: the current one, then llmjax's own (a clone's root, or package data)."""
  package = Path(__file__).parents[1]
  own = package.parent if (package.parent / "configs" / "base.py").exists() else package / "shipped"
  return [Path.cwd(), own]


def find_config_file(reference: str) -> tuple[Path, str]:
  """Return (path, argument) of `FILE.py[:argument]` or of a shipped config's name, such as `gpt:size=nano`."""
  name, _, argument = reference.partition(":")
  candidates = [(name, argument)]
  for end in re.finditer(r"\.py(?=:|$)", reference):  # a folder may have a colon in its name: try the last split first
    candidates.insert(0, (reference[: end.end()], reference[end.end() + 1 :]))
  for file, rest in candidates:
    if file.endswith(".py"):
      paths = [Path(file), *(root / file for root in config_roots())]
    else:
      paths = [root / "configs" / f"{file}.py" for root in config_roots()]
    for path in paths:
      if path.is_file():
        return path.resolve(), rest
  raise ConfigError(f"--config={reference}: no such file; {suggest_name(name, shipped_configs())}")


def shipped_configs() -> dict[str, Path]:
  """Return {name: path} of llmjax's own configs that can be run: those whose first line shows the command."""
  folder = config_roots()[-1] / "configs"
  return {p.stem: p for p in sorted(folder.glob("*.py")) if "llmjax train" in p.read_text().split('"""')[1]}


def add_config_roots() -> None:
  """Put the config roots on sys.path, because config files import each other as `configs.NAME`.

  llmjax's own root comes first, so that a folder `configs` in the current one does not hide it.
  """
  first, last = str(config_roots()[-1]), str(config_roots()[0])
  sys.path[:] = [first, *(p for p in sys.path if p != first)]
  if last not in sys.path:
    sys.path.append(last)


def load_config(arguments: list[str]) -> ConfigDict:
  """Return the locked config of `--config=FILE_OR_NAME[:argument] [--config.a.b=value ...]`.

  `--config.KEY=none` sets an optional key to None, or removes an entry of `evals`. If KEY is a string, it is a value
  like any other. The last flag for a key counts.

  Raises:
    ConfigError: a missing file or a mistake in it, a mistyped key (with the nearest right one), a value of the wrong
      type, or anything that is not a config flag.
  """
  reference, rest = split_config_flag(arguments)
  path, argument = find_config_file(reference)
  add_config_roots()
  config = _call_get_config(path, argument)
  known = flatten_config(config)
  groups = {key[:i] for key in known for i, c in enumerate(key) if c == "."}
  overrides, unset = [], {}
  for text in rest:
    match = re.match(r"--?(?:no)?config\.([\w.]+)", text)
    if match is None and text.startswith("-"):
      raise ConfigError(f"unknown flag {text.split('=')[0]}; config keys are set as --config.KEY=VALUE")
    key = match[1] if match else ""
    if match and key not in known and key not in groups:
      entries = {g for g in groups if re.fullmatch(r"evals\.\w+", g)}
      raise ConfigError(f"config.{key} does not exist; {suggest_name(key, {*known, *entries})}")
    if text.partition("=")[2].lower() == "none" and _can_unset(config, key):
      unset[key] = True
    else:
      overrides.append(text)
      unset.pop(key, None)
  _apply_overrides(config, overrides)
  with config.unlocked():
    for key in unset:
      holder, leaf = _holder(config, key)
      if isinstance(holder[leaf], ConfigDict):
        del holder[leaf]
      else:
        holder[leaf] = None
  config.lock()
  return config


def split_config_flag(arguments: list[str]) -> tuple[str, list[str]]:
  """Return the value of --config and the other flags; `--config.KEY none` is joined to one flag."""
  references, rest, queue = [], [], list(arguments)
  while queue:
    argument = queue.pop(0)
    if match := re.fullmatch(r"--?config(?:=(.*))?", argument, re.DOTALL):
      references.append(match[1] if match[1] is not None else queue.pop(0) if queue else "")
    elif re.fullmatch(r"--?config\.[\w.]+", argument) and queue and queue[0].lower() == "none":
      rest.append(f"{argument}={queue.pop(0)}")
    else:
      rest.append(argument)
  if not references:
    raise ConfigError("--config is missing: give a file or a shipped config's name (see `llmjax configs`)")
  if len(references) > 1:
    raise ConfigError(f"--config is given {len(references)} times: {', '.join(references)}; give it once")
  return references[0], rest


def call_in_file(path: Path, function: str, *arguments: Any) -> Any:
  """Call a function of a Python file; a mistake in the file is a ConfigError with its line."""
  spec = importlib.util.spec_from_file_location(f"llmjax_config_{path.stem}", path)
  assert spec is not None and spec.loader is not None  # the file ends in .py
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses look themselves up there
  try:
    spec.loader.exec_module(module)
    if not hasattr(module, function):
      raise ConfigError(f"{path} has no {function}(); every such file needs one, see configs/ and experiments/")
    return getattr(module, function)(*arguments)
  except ConfigError:
    raise
  except SyntaxError as error:
    raise ConfigError(f"SyntaxError: {error.msg} ({error.filename}:{error.lineno})") from error
  except CODE_ERRORS as error:
    frames = traceback.extract_tb(error.__traceback__)
    location = next((f"{path}:{f.lineno}" for f in reversed(frames) if f.filename == str(path)), str(path))
    raise ConfigError(f"{type(error).__name__}: {' '.join(str(error).split())} ({location})") from error


def _call_get_config(path: Path, argument: str) -> ConfigDict:
  config = call_in_file(path, "get_config", *([argument] if argument else []))
  if not isinstance(config, ConfigDict):
    raise ConfigError(f"{path}: get_config must return a ConfigDict, not {type(config).__name__}")
  return config


def _holder(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
  """Return the part of a config that holds KEY, and the name of KEY there."""
  *parents, leaf = key.split(".")
  return functools.reduce(lambda part, name: part[name], parents, config), leaf


def _can_unset(config: ConfigDict, key: str) -> bool:
  """Whether `none` sets KEY to None; False if it is a string like any other.

  Raises:
    ConfigError: KEY cannot be None.
  """
  holder, leaf = _holder(config, key)
  value = dict(holder.items(preserve_field_references=True))[leaf]
  if isinstance(value, str):
    return False
  if value is None or isinstance(value, FieldReference) or re.fullmatch(r"evals\.\w+", key):
    return True
  if isinstance(value, ConfigDict):
    raise ConfigError(f"config.{key} cannot be none; it is a group of keys, set them one by one")
  raise ConfigError(f"config.{key} cannot be none; give a value of type {type(value).__name__}, such as {value!r}")


def _apply_overrides(config: ConfigDict, arguments: list[str]) -> None:
  """Set keys of `config` from flags, by absl with a flag registry of its own, and lock it."""
  values = flags.FlagValues()
  argv = ["llmjax", *arguments]
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    remaining = values(argv)[1:]
  except flags.IllegalFlagValueError as error:
    raise ConfigError(" ".join(str(error).removeprefix("flag --").split())) from None
  except (flags.Error, TypeError, AttributeError, KeyError) as error:
    raise ConfigError(f"{type(error).__name__} in {' '.join(arguments)}: {' '.join(str(error).split())}") from error
  if remaining:
    raise ConfigError(f"stray argument {remaining[0]!r}; config keys are set as --config.KEY=VALUE")

"""From configuration to code: `build`, config files and their arguments, durations. Imports no JAX."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags

from llmjax.config.errors import ConfigError, suggest_name
from llmjax.config.values import flatten_config, to_dict


def config_roots() -> list[Path]:
  """Folders that hold `configs/`: where the command runs, then what llmjax ships (a clone's root or package data)."""
  package = Path(__file__).parents[1]
  shipped = package.parent if (package.parent / "configs" / "base.py").exists() else package / "shipped"
  return [Path.cwd(), shipped]


def find_config_file(reference: str) -> tuple[Path, str]:
  """`FILE.py[:argument]` or a shipped config's name (`gpt:size=nano`) -> (path, argument)."""
  name, _, argument = reference.partition(":")
  cuts = [(name, argument)]
  for end in re.finditer(r"\.py(?=:|$)", reference):  # a folder may have a colon in its name: the last cut comes first
    cuts.insert(0, (reference[: end.end()], reference[end.end() + 1 :]))
  for file, rest in cuts:
    python = file.endswith(".py")
    for path in (
      [Path(file), *(r / file for r in config_roots())]
      if python
      else [r / "configs" / f"{file}.py" for r in config_roots()]
    ):
      if path.is_file():
        return path.resolve(), rest
  raise ConfigError(f"--config={reference}: no such file; {suggest_name(name, shipped_configs())}")


def add_config_roots() -> None:
  """Config files import each other as `configs.NAME`; a folder `configs` where the command runs must not hide ours."""
  first, last = str(config_roots()[-1]), str(config_roots()[0])
  sys.path[:] = [first, *(p for p in sys.path if p != first)]
  if last not in sys.path:
    sys.path.append(last)


def optional(value: Any = None, kind: type = object) -> FieldReference:
  """A key that may be None (so that a flag can set and unset it); `object` takes any literal, as durations need."""
  return FieldReference(value, field_type=kind)


def load_config(arguments: list[str]) -> ConfigDict:
  """`--config=FILE_OR_NAME[:argument] [--config.a.b=value ...]` -> a locked config.

  `--config.KEY=none` unsets a key that is optional, removes an entry of `evals`, and is a value like any other where
  KEY is a string. The last flag for a key counts.

  Raises ConfigError: a missing file or a mistake in it, a mistyped key (with the nearest right one and what other
  frameworks call it), a value of the wrong type, anything that is no config flag.
  """
  reference, rest = split_config_flag(arguments)
  path, argument = find_config_file(reference)
  add_config_roots()
  config = _run(path, argument)
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
      raise ConfigError(f"config.{key} is no key of this config; {suggest_name(key, {*known, *entries})}")
    if text.partition("=")[2].lower() == "none" and _can_unset(config, key):
      unset[key] = True
    else:
      overrides.append(text)
      unset.pop(key, None)
  _override(config, overrides)
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
  """What --config says, and the other flags; `--config.KEY none` is joined to one."""
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
  """What a function of a Python file returns; a mistake in the file is told with its place."""
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
  except (  # what Python code raises by mistake
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(NameError, OSError, RuntimeError, TypeError, ValueError),
  ) as error:
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f"{path}:{f.lineno}" for f in reversed(frames) if f.filename == str(path)), str(path))
    raise ConfigError(f"{type(error).__name__}: {' '.join(str(error).split())} ({place})") from error


def _run(path: Path, argument: str) -> ConfigDict:
  config = call_in_file(path, "get_config", *([argument] if argument else []))
  if not isinstance(config, ConfigDict):
    raise ConfigError(f"{path}: get_config must return a ConfigDict, not {type(config).__name__}")
  return config


def _holder(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
  """The part of a config that holds KEY, and KEY's name there."""
  *parents, leaf = key.split(".")
  return functools.reduce(lambda part, name: part[name], parents, config), leaf


def _can_unset(config: ConfigDict, key: str) -> bool:
  """Whether `none` unsets KEY; False where it is a string like any other, ConfigError where it makes no sense."""
  holder, leaf = _holder(config, key)
  value = dict(holder.items(preserve_field_references=True))[leaf]
  if isinstance(value, str):
    return False
  if value is None or isinstance(value, FieldReference) or re.fullmatch(r"evals\.\w+", key):
    return True
  if isinstance(value, ConfigDict):
    raise ConfigError(f"config.{key} cannot be none; it is a group of keys, set them one by one")
  raise ConfigError(f"config.{key} cannot be none; give a value of type {type(value).__name__}, such as {value!r}")


def _override(config: ConfigDict, arguments: list[str]) -> None:
  """Sets keys of `config` by absl's flags, in a flag registry of their own, and locks it."""
  values = flags.FlagValues()
  argv = ["llmjax", *arguments]
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    left = values(argv)[1:]
  except flags.IllegalFlagValueError as error:
    raise ConfigError(" ".join(str(error).removeprefix("flag --").split())) from None
  except (flags.Error, TypeError, AttributeError, KeyError) as error:
    raise ConfigError(f"{type(error).__name__} in {' '.join(arguments)}: {' '.join(str(error).split())}") from error
  if left:
    raise ConfigError(f"stray argument {left[0]!r}; config keys are set as --config.KEY=VALUE")


def default_config() -> dict[str, Any]:
  """Every key that the train loop reads, with its default, as plain data."""
  return to_dict(_run(config_roots()[-1] / "configs" / "base.py", ""))


def shipped_configs() -> dict[str, Path]:
  """{name: path} of the configs that can be run: those that ship and whose first line says how."""
  folder = config_roots()[-1] / "configs"
  return {p.stem: p for p in sorted(folder.glob("*.py")) if "llmjax train" in p.read_text().split('"""')[1]}

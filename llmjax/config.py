"""From configuration to code: `build`, config files and their arguments, durations. Imports no JAX."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import inspect
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags


class ConfigError(ValueError):
  """A mistake a user can make, told in one line; the command line turns it into exit code 2."""


# What other frameworks call our keys.
ALIASES = {
  "adam_beta1": "optim.b1",
  "adam_beta2": "optim.b2",
  "block_size": "seq_len",
  "context_length": "seq_len",
  "d_model": "model.d_model",
  "dropout": "model.dropout",
  "eval_interval": "evals.heldout.every",
  "eval_steps": "evals.heldout.every",
  "global_batch_size": "batch_size",
  "gradient_accumulation_steps": "accum",
  "gradient_clip_val": "optim.clip_norm",
  "grad_clip": "optim.clip_norm",
  "hidden_size": "model.d_model",
  "learning_rate": "optim.lr",
  "log_interval": "log.every",
  "logging_steps": "log.every",
  "lr": "optim.lr",
  "lr_scheduler_type": "schedule.name",
  "max_iters": "total_steps",
  "max_grad_norm": "optim.clip_norm",
  "max_length": "seq_len",
  "max_seq_length": "seq_len",
  "max_steps": "total_steps",
  "n_embd": "model.d_model",
  "n_head": "model.num_heads",
  "n_layer": "model.decoder_layers",
  "num_attention_heads": "model.num_heads",
  "num_hidden_layers": "model.decoder_layers",
  "num_layers": "model.decoder_layers",
  "num_train_epochs": "total_steps",
  "num_train_steps": "total_steps",
  "optimizer": "optim.name",
  "output_dir": "--workdir",
  "per_device_train_batch_size": "batch_size",
  "random_seed": "seed",
  "save_interval": "checkpoint.every",
  "save_steps": "checkpoint.every",
  "save_total_limit": "checkpoint.keep",
  "train_batch_size": "batch_size",
  "warmup_iters": "schedule.warmup",
  "warmup_ratio": "schedule.warmup",
  "warmup_steps": "schedule.warmup",
  "weight_decay": "optim.weight_decay",
}

# What other frameworks call our values.
VALUE_ALIASES = {
  "bf16": "bfloat16",
  "fp16": "float16",
  "fp32": "float32",
  "half": "float16",
  "rope": "rotary",
}


def nearest(name: str, known: Iterable[str]) -> str:
  """A hint for a mistyped name: what we call it, the nearest known names, or all of them when few."""
  known = sorted(known)
  alias = (ALIASES | VALUE_ALIASES).get(name.rsplit(".", 1)[-1])
  if alias is not None:
    for ours in (alias, alias.rsplit(".", 1)[-1]):  # `known` may be the keys of one part alone
      if ours in known or ours.startswith("--"):
        return f"here it is called `{ours}`"
  close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
  if not close:  # perhaps the last part is right and the path is not
    leaf = name.rsplit(".", 1)[-1]
    close = [k for k in known if k.rsplit(".", 1)[-1] == leaf][:3]
  if close:
    return "did you mean " + " or ".join(f"`{k}`" for k in close) + "?"
  return "known: " + ", ".join(known) if len(known) <= 40 else "see the config file for what exists"


def to_dict(spec: Any) -> Any:
  """A config as plain Python containers, references resolved (tuples stay tuples)."""
  if isinstance(spec, FieldReference):
    spec = spec.get()
  if isinstance(spec, (ConfigDict, Mapping)):
    return {str(k): to_dict(v) for k, v in spec.items()}
  if isinstance(spec, (list, tuple)):
    return tuple(to_dict(v) for v in spec)
  return spec


def flatten(spec: Any, prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": 1}} -> {"a.b": 1}; empty dicts stay as leaves."""
  flat: dict[str, Any] = {}
  for key, value in to_dict(spec).items():
    if isinstance(value, dict) and value:
      flat.update(flatten(value, f"{prefix}{key}."))
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def resolve(name: str, table: Mapping[str, str], what: str, *, trust: bool = True) -> Callable[..., Any]:
  """A callable by its key in `table` ({key: "module:function"}) or as "module:function" itself."""
  path = table.get(str(name), str(name))  # a config's placeholder may be None
  if ":" not in path:
    raise ConfigError(f"{what}.name={name!r} is unknown; {nearest(str(name), table)} (or give 'module:function')")
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
    raise ConfigError(f"{what} has no `name`; {nearest('', table)}")
  name = kwargs.pop("name")
  function = resolve(name, table, what, trust=trust)
  parameters = inspect.signature(function).parameters
  takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
  named = {k: p for k, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
  allowed = set(named) - set(runtime)
  for key in kwargs:
    if key in runtime or (key not in allowed and not takes_all):
      raise ConfigError(f"{what}.{key}: {name!r} has no such key; {nearest(key, allowed)}")
  given = kwargs | {k: v for k, v in runtime.items() if k in named or takes_all}
  missing = [k for k, p in named.items() if p.default is p.empty and k not in given]
  if missing:
    raise ConfigError(f"{what}.{missing[0]}: {name!r} needs it")
  return function(**given)


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
  """The argument of a config file: "size=nano,debug" -> {size: "nano", debug: True} over `defaults`.

  Values take the type of their default; a default of None takes a string; a bare boolean name means True. Commas stay
  inside brackets and inside a quoted string: text="a,b.txt".
  """
  out = ConfigDict(defaults)
  with out.unlocked():
    for item in _items(arg):
      key, given, text = item.partition("=")
      if key not in defaults:
        raise ConfigError(f"config argument `{key}` is unknown; {nearest(key, defaults)}")
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
          said = ast.literal_eval(text)
          out[key] = type(default)(said)
        except (ValueError, SyntaxError, TypeError, OverflowError):
          said = None
        if said is None or (isinstance(default, int) and said != out[key]):  # int() would cut 3.7 to 3
          raise ConfigError(f"config argument {key}={text!r} must be of type {type(default).__name__}")
  return out


def _items(arg: str | None) -> list[str]:
  return re.findall(r"""(?:(?<==)"[^"]*"|(?<==)'[^']*'|,(?=[^(\[{]*[)\]}])|[^,])+""", arg or "")


def split_arg(arg: str | None, **defaults: Any) -> tuple[ConfigDict, str]:
  """`parse_arg` of those items that are in `defaults`, and all others as an argument for another config."""
  own = [item for item in _items(arg) if item.partition("=")[0] in defaults]
  rest = [item for item in _items(arg) if item.partition("=")[0] not in defaults]
  return parse_arg(",".join(own), **defaults), ",".join(rest)


_SCALE = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def duration(
  value: int | float | str | None,
  key: str,
  *,
  batch_size: int,
  seq_len: int,
  total_steps: int | None = None,
  epoch_tokens: int | None = None,
  epoch_examples: Callable[[], int | None] = lambda: None,
) -> int | None:
  """A duration in optimizer steps, rounded up; None stays None.

  Args:
    value: 500, "500 steps", "10M tokens", "2k examples" (sequences), "1.5 epochs" or "5%" (of total_steps).
    key: its config key, for messages.
    batch_size: global sequences a step.
    seq_len: tokens a sequence.
    total_steps: what percents refer to.
    epoch_tokens: tokens in the training data; an epoch of packed data has no other length.
    epoch_examples: how many sequences an epoch is where none share a row, else None.
  Raises:
    ConfigError: not a duration, or a unit that cannot be turned into steps here.
  """
  if value is None:
    return None
  text = str(value).strip().replace("_", "").replace(",", "")
  match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmbt]?)\s*(step|token|example|epoch|%)?s?", text.lower())
  if match is None or isinstance(value, bool):
    raise ConfigError(
      f"{key}={value!r} is not a duration; say 500, '500 steps', '10M tokens', '2k examples', '2 epochs' or '5%'"
    )
  number = Fraction(match[1]) * _SCALE[match[2]]  # in floats, 7 % of 100 steps would be rounded up to 8
  unit = match[3] or "step"
  if unit == "%":
    if total_steps is None:
      raise ConfigError(f"{key}={value!r}: percents refer to total_steps, so it cannot be one itself")
    steps = number / 100 * total_steps
  elif unit == "token":
    steps = number / (batch_size * seq_len)
  elif unit == "example":
    steps = number / batch_size
  elif unit == "epoch":
    count = epoch_examples() if epoch_tokens is None else None
    if count is not None:
      steps = number * count / batch_size
    elif epoch_tokens is None:
      raise ConfigError(
        f"{key}={value!r}: an epoch of packed data has no known number of steps; "
        "set data.epoch_tokens (tokens in the training data) or data.pack=False, or say it in steps or tokens"
      )
    else:
      steps = number * epoch_tokens / (batch_size * seq_len)
  else:
    steps = number
  return math.ceil(steps)


def roots() -> list[Path]:
  """Folders that hold `configs/`: where the command runs, then what llmjax ships (a clone's root or package data)."""
  package = Path(__file__).parent
  shipped = package.parent if (package.parent / "configs" / "base.py").exists() else package / "shipped"
  return [Path.cwd(), shipped]


def find(reference: str) -> tuple[Path, str]:
  """`FILE.py[:argument]` or a shipped config's name (`gpt:size=nano`) -> (path, argument)."""
  name, _, argument = reference.partition(":")
  cuts = [(name, argument)]
  for end in re.finditer(r"\.py(?=:|$)", reference):  # a folder may have a colon in its name: the last cut comes first
    cuts.insert(0, (reference[: end.end()], reference[end.end() + 1 :]))
  for file, rest in cuts:
    python = file.endswith(".py")
    for path in (
      [Path(file), *(r / file for r in roots())] if python else [r / "configs" / f"{file}.py" for r in roots()]
    ):
      if path.is_file():
        return path.resolve(), rest
  raise ConfigError(f"--config={reference}: no such file; {nearest(name, shipped())}")


def open_roots() -> None:
  """Config files import each other as `configs.NAME`; a folder `configs` where the command runs must not hide ours."""
  first, last = str(roots()[-1]), str(roots()[0])
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
  reference, rest = split_reference(arguments)
  path, argument = find(reference)
  open_roots()
  config = _run(path, argument)
  known = flatten(config)
  groups = {key[:i] for key in known for i, c in enumerate(key) if c == "."}
  overrides, unset = [], {}
  for text in rest:
    match = re.match(r"--?(?:no)?config\.([\w.]+)", text)
    if match is None and text.startswith("-"):
      raise ConfigError(f"unknown flag {text.split('=')[0]}; config keys are set as --config.KEY=VALUE")
    key = match[1] if match else ""
    if match and key not in known and key not in groups:
      entries = {g for g in groups if re.fullmatch(r"evals\.\w+", g)}
      raise ConfigError(f"config.{key} is no key of this config; {nearest(key, {*known, *entries})}")
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


def split_reference(arguments: list[str]) -> tuple[str, list[str]]:
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


def run_file(path: Path, function: str, *arguments: Any) -> Any:
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
  config = run_file(path, "get_config", *([argument] if argument else []))
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
  return to_dict(_run(roots()[-1] / "configs" / "base.py", ""))


def shipped() -> dict[str, Path]:
  """{name: path} of the configs that can be run: those that ship and whose first line says how."""
  folder = roots()[-1] / "configs"
  return {p.stem: p for p in sorted(folder.glob("*.py")) if "llmjax train" in p.read_text().split('"""')[1]}


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
  """{key: (old, new)} of two configs, compared as JSON does (tuples equal lists)."""

  def normal(value):
    return json.loads(json.dumps(value, default=str))

  old, new = flatten(old), flatten(new)
  keys = [k for k in {**old, **new} if normal(old.get(k)) != normal(new.get(k))]
  return {k: (old.get(k), new.get(k)) for k in keys}

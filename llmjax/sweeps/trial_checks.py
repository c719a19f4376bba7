"""Build the program of every trial of a sweep, and compile each program once, to find trials that cannot run.

The compiled programs are then in the compilation cache, from which the trials load them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence

import jax

from llmjax.config import ConfigError, ConfigTree, Json, load_config, to_dict
from llmjax.diagnostics.dry_run import MEMORY_ADVICE, compiled_bytes, device_memory_bytes, format_bytes, prepare_run
from llmjax.models.attention.select import ACCELERATOR_KERNELS
from llmjax.sweeps.job import TrialFacts
from llmjax.telemetry.writers import import_wandb
from llmjax.training.program import Program
from llmjax.types import Batch

STEP_ARGUMENTS = ("seed", "optim.lr")  # the train step takes them as arguments: the program does not depend on them
HOST_KEYS = ("total_steps", "schedule", "data", "evals", "checkpoint", "early_stopping", "log", "profile")
RESUMABLE_KEYS = ("total_steps", "log", "checkpoint", "profile")  # a resumed or extended trial may change them
MAX_ERROR_LENGTH = 300


def check_trials(trials: Mapping[str, Sequence[str]], to_compile: Sequence[str]) -> dict[str, TrialFacts]:
  """Return {name: facts} of the trials; the facts of a trial that cannot run have an `error`.

  Args:
    trials: {name: flags of `llmjax train`}.
    to_compile: names of the trials to compile for the devices of this machine, whose memory they must fit in. If it is
      empty, the devices are elsewhere, and CPU devices stand for them.
  """
  facts: dict[str, TrialFacts] = {}
  configs: dict[str, ConfigTree] = {}
  for name, flags in trials.items():
    try:
      configs[name] = to_dict(load_config(list(flags)))
    except ConfigError as error:
      facts[name] = {"error": one_line(error)}
  if not to_compile:
    use_cpu_devices(max(map(num_mesh_devices, configs.values()), default=1))
  built: dict[str, TrialFacts] = {}  # {digest of all that building depends on: facts}
  memory_errors: dict[str, str] = {}  # {digest of the program: reason why it does not fit, ""}
  for name, config in sorted(configs.items(), key=lambda item: item[0] not in to_compile):
    try:
      check_values(config, has_devices=bool(to_compile))
      key = json_digest(replace_with_none(config, STEP_ARGUMENTS))
      if key not in built:
        program, batch = build_program(config, has_devices=bool(to_compile))
        built[key] = program_facts(program, batch)
        digest = built[key]["program"]
        if name in to_compile and digest not in memory_errors:
          memory_errors[digest] = memory_error(program, batch)
        if memory_errors.get(digest):
          built[key] = {"error": memory_errors[digest]}
      facts[name] = {**built[key], "config": json_digest(replace_with_none(config, RESUMABLE_KEYS))}
    except ConfigError as error:
      facts[name] = {"error": one_line(error)}
    except Exception as error:  # of any code that a config names; the message has to name the trial
      facts[name] = {"error": f"{type(error).__name__}: {one_line(error)[:MAX_ERROR_LENGTH]}"}
  return facts


def use_cpu_devices(count: int) -> None:
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", count)


def one_line(error: Exception) -> str:
  return " ".join(str(error).split())


def check_values(config: ConfigTree, has_devices: bool) -> None:
  """Raise ConfigError for values that building the program does not check."""
  rate = config["optim"]["lr"]
  if not isinstance(rate, (int, float)) or rate < 0:
    raise ConfigError(f"optim.lr must be a number, 0 or more, got {rate!r}")
  if has_devices and config["log"]["wandb"] is not None:
    import_wandb(config["log"]["wandb"])


def build_program(config: ConfigTree, has_devices: bool) -> tuple[Program, Batch]:
  """Return the program of a trial and a batch; without its devices, with as many CPU devices as its mesh names."""
  if has_devices:
    return prepare_run(config)
  model = config["model"]
  if model.get("attention") in ACCELERATOR_KERNELS:
    config = {**config, "model": {**model, "attention": "auto"}}
  return prepare_run(config, jax.devices()[: num_mesh_devices(config)])


def num_mesh_devices(config: ConfigTree) -> int:
  """Return the number of devices that a mesh names; an axis that takes the remaining devices counts as one."""
  return math.prod(max(size, 1) for size in config["mesh"].values())


def program_facts(program: Program, batch: Batch) -> TrialFacts:
  """Return the costs of a trial, and the digest of what determines its compiled program."""
  config = program.config
  leaves = jax.tree_util.tree_leaves_with_path(batch)
  arrays = [(jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype)) for path, leaf in leaves]
  return {
    "parameters": program.num_params,
    "steps": program.total_steps,
    "tokens": config["batch_size"] * config["seq_len"],
    "flops": program.step_flops(batch),
    "evals": list(config["evals"]),
    "program": json_digest((replace_with_none(config, (*STEP_ARGUMENTS, *HOST_KEYS)), arrays)),
  }


def memory_error(program: Program, batch: Batch) -> str:
  """Compile a program; return the reason why it does not fit on a device, "" if it does."""
  try:
    needed = sum(compiled_bytes(program, batch))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return f"does not fit: {one_line(error)[:200]}; {MEMORY_ADVICE}"
  limit = device_memory_bytes()
  if limit is None or needed < limit:
    return ""
  sizes = f"its step needs {format_bytes(needed)} of a device that has {format_bytes(limit)}"
  return f"does not fit: {sizes}; {MEMORY_ADVICE}"


def replace_with_none(config: ConfigTree, keys: Sequence[str]) -> ConfigTree:
  """Return a config in which the values of some keys are None."""
  out = dict(config)
  for key in keys:
    first, _, rest = key.partition(".")
    if first in out:
      out[first] = replace_with_none(out[first], [rest]) if rest else None
  return out


def json_digest(value: Json) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]

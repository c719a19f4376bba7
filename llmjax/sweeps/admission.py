"""Which trials of a sweep can run here, before any of them starts: each config is built, each program compiled once.

This is a process of its own, so that the device is free again when the trials start, and the compiled programs are in
the cache that they read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from llmjax.config import ConfigError, load_config, to_dict
from llmjax.diagnostics.dry_run import WAYS_OUT, checked, compiled_bytes, device_memory, size
from llmjax.models.attention.select import ACCELERATOR_KERNELS
from llmjax.telemetry.writers import import_wandb
from llmjax.training.program import Program
from llmjax.types import Batch

TRACED = ("seed", "optim.lr")  # arguments of the train step: nothing that is built depends on their values
HOST = ("total_steps", "schedule", "data", "evals", "checkpoint", "early_stopping", "log", "profile")  # not in the step

BOOKKEEPING = ("total_steps", "log", "checkpoint", "profile")  # what a finished trial may be asked for anew with


def admit(trials: Mapping[str, Sequence[str]], compiling: Sequence[str]) -> dict[str, dict[str, Any]]:
  """What each trial is, or why it cannot run.

  Args:
    trials: {name: flags of `llmjax train`}.
    compiling: the names of those to compile for the devices of this machine, whose memory they must fit in. Where there
      are none, the devices are elsewhere.
  Returns:
    {name: {"parameters", "steps", "tokens" a step, "flops" a step, "evals": their names, "config": what is equal where
    the config is but for its length and its bookkeeping, "program": what is equal where the compiled step is} or
    {"error": one line}}.
  """
  built: dict[str, dict[str, Any]] = {}
  compiled: dict[str, str] = {}
  configs, out = {}, {}
  for name, flags in trials.items():
    try:
      configs[name] = to_dict(load_config(list(flags)))
    except ConfigError as error:
      out[name] = {"error": " ".join(str(error).split())}
  if not compiling:  # the devices are elsewhere: as many as the meshes name stand for them
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max((named_devices(config) for config in configs.values()), default=1))
  for name, config in sorted(configs.items(), key=lambda item: item[0] not in compiling):
    try:
      if not isinstance(config["optim"]["lr"], (int, float)) or config["optim"]["lr"] < 0:
        raise ConfigError(f"optim.lr={config['optim']['lr']!r} must be a number, 0 or more")
      if compiling and config["log"]["wandb"] is not None:
        import_wandb(config["log"]["wandb"])
      key = trial_digest(without(config, TRACED))
      if key not in built:
        here = (config, None) if compiling else (elsewhere(config), jax.devices()[: named_devices(config)])
        program, batch = checked(*here)
        built[key] = facts(program, batch)
        step = built[key]["program"]
        if name in compiling and step not in compiled:
          compiled[step] = memory_error(program, batch)
        if compiled.get(step):
          built[key] = {"error": compiled[step]}
      out[name] = {**built[key], "config": trial_digest(without(config, BOOKKEEPING))}
    except ConfigError as error:
      out[name] = {"error": " ".join(str(error).split())}
    except Exception as error:  # whatever it is, the trial is named
      out[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
  return out


def elsewhere(config: Mapping[str, Any]) -> dict[str, Any]:
  """A config with which a CPU can stand for its devices."""
  model = config["model"]
  kernel = {"attention": "auto"} if model.get("attention") in ACCELERATOR_KERNELS else {}
  return {**config, "model": {**model, **kernel}}


def named_devices(config: Mapping[str, Any]) -> int:
  """How many devices a config's mesh asks for; where it takes what is left, that is one."""
  return math.prod(max(size, 1) for size in config["mesh"].values())


def facts(program: Program, batch: Batch) -> dict[str, Any]:
  """What a trial costs, and which program it is."""
  config = program.config
  arrays = [
    (jax.tree_util.keystr(path), x.shape, str(x.dtype)) for path, x in jax.tree_util.tree_leaves_with_path(batch)
  ]
  return {
    "parameters": program.num_params,
    "steps": program.total_steps,
    "tokens": config["batch_size"] * config["seq_len"],
    "flops": program.step_flops(batch),
    "evals": list(config["evals"]),
    "program": trial_digest((without(config, (*TRACED, *HOST)), arrays)),
  }


def memory_error(program: Program, batch: Batch) -> str:
  """Compiles; why the program does not fit on a device, "" where it does."""
  try:
    total = sum(compiled_bytes(program, batch))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return f"does not fit: {' '.join(str(error).split())[:200]}; {WAYS_OUT}"
  limit = device_memory()
  if limit is None or total < limit:
    return ""
  return f"does not fit: its step takes {size(total)} of a device that has {size(limit)}; {WAYS_OUT}"


def without(config: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
  """A config but for some keys."""
  out = dict(config)
  for key in keys:
    part, _, rest = key.partition(".")
    if part in out:
      out[part] = without(out[part], [rest]) if rest else None
  return out


def trial_digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]

"""One config under many meshes and process counts: whether anything but rounding changes.

A shrunk config makes its initial parameters, its losses, the gradient of every parameter, what it measures held out and
its parameters after some steps of gradient descent, in float32, on one device and on others, and all of them are
compared. Its own objective, model and clipping are what is run; so it finds a sum that was not taken over all devices.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llmjax import finetune, sharding
from llmjax import metrics as metriclib
from llmjax.config import ConfigError, build, to_dict
from llmjax.optim import COMMON, OPTIMIZERS
from llmjax.program import Program, make_program, open_source
from llmjax.train import make_stream, replicate
from llmjax.types import Batch

TOLERANCE = 1e-5  # of a leaf's norm
FLOOR = 1e-3  # of the whole tree's norm: a leaf that is smaller than this is mostly rounding, as a key's bias is
STEPS = 3
LENGTH = 128  # tokens of a sequence at most
MESHES = (
  "data=8",
  "fsdp=8",
  "tensor=2,data=4",
  "data=2,fsdp=2,tensor=2",
  "context=8",
  "data=2,context=2,tensor=2",
  "expert=4,data=2",
  "fsdp=2,expert=2,tensor=2",
  "fsdp=2,expert=2,context=2",
)
say = functools.partial(print, flush=True)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
Sizes = Mapping[str, int]


@dataclasses.dataclass
class Measured:
  """What a config gave under a mesh."""

  parts: dict[str, dict[str, np.ndarray]]  # {"initial", "loss", "gradient", "held out", "after"}: {name: array}
  rows: dict[str, str]  # {"STEP/ROW of the global batch": a hash of what it holds}, those of this process
  collectives: dict[str, int]  # in the compiled train step


def shrink(config: Any, devices: int) -> dict[str, Any]:
  """The same choices at the smallest size that cuts over `devices`: short sequences, few and narrow layers, float32.

  A model of one's own, and a pretrained one, keep their size. Shipped optimizers become gradient descent: Adam divides
  rounding noise by its own size.
  """
  config = to_dict(config)
  accum = min(config["accum"], 2)
  length = LENGTH if config["seq_len"] is None else min(config["seq_len"], LENGTH)
  config |= {"accum": accum, "batch_size": devices * accum, "seq_len": length, "total_steps": STEPS, "evals": {}}
  config["model"] = {**config["model"], "dtype": "float32", "param_dtype": "float32"}
  if config["model"]["name"] == "transformer" and config["init_from"] is None:
    config["model"] |= small(config["model"], length)
  optimizer = {key: value for key, value in config["optim"].items() if key not in COMMON}
  if optimizer["name"] in OPTIMIZERS:
    optimizer = {"name": "sgd", "momentum": 0.0}
    config["optim"] = {**config["optim"], "lr": 0.1}
  common = {key: config["optim"][key] for key in COMMON}
  config["optim"] = {**common, "name": "llmjax.verify:recording", "of": optimizer}
  config["schedule"] = {"name": "constant", "warmup": None}
  config["checkpoint"] = {**config["checkpoint"], "best": None, "every": None, "keep_every": None}
  config["early_stopping"] = {**config["early_stopping"], "metric": None}
  return config


def small(model: Mapping[str, Any], length: int) -> dict[str, Any]:
  """Sizes of a Transformer with the same choices: as many heads a key head, layers for two periods of kinds."""
  kv_heads = model["num_kv_heads"] or model["num_heads"]
  group = min(model["num_heads"] // kv_heads, 4)
  kv_heads = min(kv_heads, 4 if group == 1 else 2)
  heads = kv_heads * group
  depth = 2 * len(model["attention_pattern"]) + 1 if len(model["attention_pattern"]) > 1 else 2
  sizes = {
    "d_model": 8 * heads,
    "head_dim": 8,
    "num_heads": heads,
    "num_kv_heads": kv_heads,
    "d_ff": 64,
    "max_len": None if model["max_len"] is None else max(model["max_len"], length),
    **{key: min(model[key], depth) for key in ("decoder_layers", "encoder_layers")},
    **{key: min(model[key], 8) for key in ("num_experts", "lora_rank")},
    "experts_per_token": min(model["experts_per_token"], max(1, min(model["num_experts"], 8))),
  }
  for key in ("expert_d_ff", "shared_expert_d_ff", "embedding_width"):
    sizes[key] = None if model[key] is None else 32
  return sizes if model["window"] is None else {**sizes, "window": min(model["window"], length // 4)}


def measure(config: Mapping[str, Any], sizes: Sizes, devices: Sequence[Any] | None = None) -> Measured:
  """Runs a shrunk config on a mesh. Of several processes, each measures the same, and its own rows."""
  count = len(jax.devices() if devices is None else devices)
  config = {**config, "mesh": sharding.resolve(sizes, count)}
  program = make_program(config, devices=None if devices is None else list(devices))
  settings = program.config
  stream = make_stream(program, open_source(settings, settings["data"]["train"]), prefetch=0)
  local = [uneven(next(stream)) for _ in range(STEPS)]
  stream.close()
  batches = [program.put(batch, settings["batch_size"]) for batch in local]
  key = jax.jit(lambda: jax.random.key(settings["seed"]), out_shardings=program.replicated)()
  rate = replicate(np.float32(settings["optim"]["lr"]), program)
  auxiliary = program.auxiliary_params
  state = program.init(program.starting_params()[0])
  parts = {"initial": fetched(program, program.eval_params(state))}
  with sharding.use(program.mesh, program.rules):
    held_out = program.eval_step(program.eval_params(state), batches[1], auxiliary)
    parts["held out"] = ratios(held_out)
    train_step = program.train_step.lower(state, batches[0], key, rate, auxiliary).compile()
    parts["loss"] = {}
    for i, batch in enumerate(batches):  # one program for all of them: it would refuse a state that lies elsewhere
      state, metrics = train_step(state, batch, key, rate, auxiliary)
      parts["loss"] |= {f"{name} of step {i}": value for name, value in ratios(metrics).items()}
      if i == 0:
        parts["gradient"] = fetched(program, recorded(program, state))
  parts["after"] = fetched(program, program.eval_params(state))
  rows = {f"{i}/{row}": name for i, batch in enumerate(local) for row, name in row_hashes(batch)}
  return Measured(parts, rows, count_collectives(train_step.as_text()))


def uneven(batch: Batch) -> Batch:
  """A host's batch whose rows bear loss in unlike numbers of places: else a mean of means would be the mean."""

  def thin(weight: np.ndarray) -> np.ndarray:
    if weight.ndim < 2:
      return weight
    kept = weight.shape[1] - np.asarray(batch.rows) % 4 * weight.shape[1] // 8
    return weight * (np.arange(weight.shape[1]) < kept[:, None]).reshape(kept.shape[0], -1, *[1] * (weight.ndim - 2))

  return dataclasses.replace(batch, weights={term: thin(weight) for term, weight in batch.weights.items()})


def recording(axes: Any, of: Mapping[str, Any]) -> optax.GradientTransformation:
  """The optimizer `of` of one parameter, whose state also holds the gradient that it was given last."""
  tx = build(of, OPTIMIZERS, "optim", axes=axes)

  def update(grad: Any, state: Any, param: Any = None) -> tuple[Any, Any]:
    direction, inner = tx.update(grad, state["of"], param)
    return direction, {"of": inner, "gradient": grad}

  return optax.GradientTransformation(lambda x: {"of": tx.init(x), "gradient": jnp.zeros_like(x)}, update)


def recorded(program: Program, state: Any) -> Any:
  """The tree of gradients that `recording` has kept, after clipping."""
  return jax.tree.map(lambda _, kept: kept["gradient"], program.state_shapes.params, state.opt_state)


def fetched(program: Program, tree: Any) -> dict[str, np.ndarray]:
  """{path: the whole array}, in every process."""
  whole = jax.jit(whole_arrays, out_shardings=program.replicated)(tree)
  return {path: np.asarray(leaf, np.float32) for path, leaf in finetune.flatten(jax.device_get(whole)).items()}


def whole_arrays(tree: Any) -> Any:
  return tree


def ratios(metrics: Any) -> dict[str, np.ndarray]:
  """{metric: its value}; of what has no weight, nothing."""
  return {name: np.asarray(value, np.float32) for name, value in metriclib.means(jax.device_get(metrics)).items()}


def row_hashes(batch: Batch) -> Iterator[tuple[int, str]]:
  """(row of the global batch, a hash of all that it holds) of a host's batch."""
  leaves = jax.tree.leaves(batch)
  for i, row in enumerate(np.asarray(batch.rows)):
    content = b"".join(np.ascontiguousarray(leaf[i]).tobytes() for leaf in leaves)
    yield int(row), hashlib.sha256(content).hexdigest()[:16]


def count_collectives(text: str) -> dict[str, int]:
  """How many of each kind stand in a compiled program; those of a loop's body once."""
  found = collections.Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text))
  return {name: found[name] for name in COLLECTIVES if found[name]}


@dataclasses.dataclass(frozen=True)
class Difference:
  """How far a leaf is off, as a multiple of what is allowed."""

  part: str
  name: str
  excess: float


def differences(want: Measured, got: Measured) -> list[Difference]:
  """Of all leaves, the farthest off first: |got - want| over TOLERANCE * max(|leaf|, FLOOR * |tree|).

  Loss and metrics are compared each by itself. A leaf that one of the two does not have, or that is not finite, is
  infinitely far off.
  """
  found = []
  for part in {**want.parts, **got.parts}:
    ours, theirs = got.parts.get(part, {}), want.parts.get(part, {})
    tree = 0.0 if part in ("loss", "held out") else np.sqrt(sum(norm(x) ** 2 for x in theirs.values()))
    for name in sorted({**ours, **theirs}):
      if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
        found.append(Difference(part, name, np.inf))
        continue
      error = norm(ours[name] - theirs[name])
      allowed = TOLERANCE * max(norm(theirs[name]), FLOOR * tree)
      excess = 0.0 if error == 0 else error / max(allowed, np.finfo(float).tiny)
      found.append(Difference(part, name, excess if np.isfinite(excess) else np.inf))
  return sorted(found, key=lambda difference: -difference.excess)


def norm(x: np.ndarray) -> float:
  return float(np.sqrt(np.sum(np.square(x, dtype=float))))


def verify(
  config: Any, meshes: Sequence[str] | None = None, processes: Sequence[int] = (), flags: Sequence[str] = ()
) -> bool:
  """Whether one device, every mesh and every number of processes give the same; prints a table.

  Args:
    config: a config like configs/base.py.
    meshes: such as "data=2,tensor=4"; None is those of MESHES that the config can be cut over.
    processes: numbers of processes, each with its part of the devices, which `flags` of the command line configure.
  Raises:
    ConfigError: a config that cannot run, or a mesh of `meshes` that it cannot be cut over.
  """
  devices = jax.devices()
  small_config = shrink(config, len(devices))
  want = measure(small_config, {}, devices[:1])
  say(f"{len(want.parts['gradient'])} parameters' gradients, {STEPS} steps, against one device; off by how many times")
  say(f"the tolerance ({TOLERANCE:g} of a leaf's norm, of at least {FLOOR:g} of the whole tree's)\n")
  say(f"{'':<28}{'initial':>9}{'loss':>9}{'gradient':>9}{'held out':>9}{'after':>9}  ")
  sound = True
  for text in MESHES if meshes is None else meshes:
    try:
      got = measure(small_config, sharding.parse_mesh(text), devices)
    except ConfigError as error:
      if meshes is not None:
        raise
      say(f"{text:<28}not for this config: {error}")
      continue
    sound &= report(text, want, got)
  for count in processes:
    for got in measure_processes(flags, count, len(devices)):
      sound &= report(f"{count} processes", want, got)
  say("\nthe same everywhere" if sound else "\nNOT the same")
  return sound


def report(title: str, want: Measured, got: Measured) -> bool:
  """Prints a line, and of what is wrong the worst; whether nothing is."""
  found = differences(want, got)
  worst = {part: max((d.excess for d in found if d.part == part), default=0.0) for part in want.parts}
  counts = ", ".join(f"{count} {name}" for name, count in got.collectives.items())
  say(f"{title:<28}" + "".join(f"{value:>9.2g}" for value in worst.values()) + f"  {counts or 'no collectives'}")
  wrong = [d for d in found if not d.excess <= 1]
  for difference in wrong[:5]:
    say(f"  {difference.part} {difference.name}: {difference.excess:.3g} times the tolerance")
  other_rows = [place for place, name in got.rows.items() if want.rows.get(place) != name]
  if other_rows:
    say(f"  row {other_rows[0].split('/')[1]} of batch {other_rows[0].split('/')[0]} holds other data")
  return not wrong and not other_rows


# Several processes on this machine.


def measure_processes(flags: Sequence[str], count: int, devices: int) -> list[Measured]:
  """What `count` new processes on this machine measure together, each with its part of so many simulated devices."""
  if devices % count:
    raise ConfigError(f"--processes={count} must divide the {devices} devices")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    coordinator = f"127.0.0.1:{free.getsockname()[1]}"
  with tempfile.TemporaryDirectory() as folder:
    running = []
    for index in range(count):
      environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "LLMJAX_COORDINATOR": coordinator,
        "LLMJAX_NUM_PROCESSES": str(count),
        "LLMJAX_PROCESS_ID": str(index),
      }
      command = [
        sys.executable,
        "-m",
        "llmjax",
        "verify",
        *flags,
        f"--devices={devices // count}",
        f"--worker={folder}",
      ]
      running.append(
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
      )
    said = [process.communicate()[0] for process in running]
    for index, process in enumerate(running):
      if process.returncode:
        last = (said[index].strip().splitlines() or ["it said nothing"])[-1]
        raise ConfigError(f"process {index} of {count} ended with {process.returncode}: {last}")
    return [load(Path(folder), index) for index in range(count)]


def work(config: Any, folder: str | Path) -> None:
  """What one of several processes does for `measure_processes`."""
  got = measure(shrink(config, jax.device_count()), {"fsdp": 2, "data": -1})
  index = jax.process_index()
  arrays = {f"{part}:{name}": array for part, leaves in got.parts.items() for name, array in leaves.items()}
  said = {"rows": got.rows, "collectives": got.collectives}
  (Path(folder) / f"{index}.json").write_text(json.dumps(said), encoding="utf-8")
  np.savez(Path(folder) / f"{index}.npz", **arrays)  # type: ignore[arg-type]


def load(folder: Path, index: int) -> Measured:
  """What `work` of a process wrote."""
  parts: dict[str, dict[str, np.ndarray]] = {}
  with np.load(folder / f"{index}.npz") as file:
    for key in file.files:
      part, name = key.split(":", 1)
      parts.setdefault(part, {})[name] = file[key]
  return Measured(parts, **json.loads((folder / f"{index}.json").read_text(encoding="utf-8")))

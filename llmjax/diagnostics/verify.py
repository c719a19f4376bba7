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
import math
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

from llmjax import trees
from llmjax.config import ConfigError, build, to_dict
from llmjax.distributed import sharding
from llmjax.metrics.sums import metric_means
from llmjax.models.attention.select import ACCELERATOR_KERNELS
from llmjax.training.components import make_config_tokenizer, open_source
from llmjax.training.optimizers import DEFAULTS, OPTIMIZERS, with_optimizer
from llmjax.training.program import Program, make_program
from llmjax.training.resume import tokenizer_to_reuse
from llmjax.training.step import TrainState
from llmjax.types import Batch

TOLERANCE = 1e-5  # of a leaf's norm
FLOOR = 1e-3  # of the whole tree's norm: a leaf that is smaller than this is mostly rounding, as a key's bias is
STEPS = 3
LENGTH = 128  # tokens of a sequence at most
NOISE = 0.02  # what is added to every parameter: behind one that is 0, gradients are 0, and any two are the same
PARTS = ("initial", "held out", "loss", "gradient", "after")
TITLE = 44  # characters of a line before its numbers
say = functools.partial(print, flush=True)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
Sizes = Mapping[str, int]


@dataclasses.dataclass
class Measured:
  """What a config gave under a mesh."""

  parts: dict[str, dict[str, np.ndarray]]  # {each of PARTS: {name: array}}
  rows: dict[str, str]  # {"STEP/ROW of the global batch": a hash of what it holds}, those of this process
  collectives: dict[str, int]  # in the compiled train step


def meshes_of(devices: int) -> list[str]:
  """Every axis, and products of them, over so many devices."""
  found = [f"{axis}={devices}" for axis in ("data", "fsdp", "context")]
  if devices % 2 == 0:
    found += ["tensor=2", "expert=2"]
  if devices % 4 == 0:
    found += ["fsdp=2,tensor=2", "context=2,tensor=2", "fsdp=2,expert=2", "expert=2,context=2"]
  return found


def shrink(config: Any, devices: int) -> dict[str, Any]:
  """The same choices at the smallest size that cuts over `devices`: short sequences, few and narrow layers, float32.

  A model of one's own, and a pretrained one, keep their size. A kernel in `ACCELERATOR_KERNELS` gives way to one
  that these devices have. Shipped optimizers become gradient descent: Adam divides rounding noise by its own size.
  """
  config = to_dict(config)
  accum = min(config["accum"], 2)
  length = LENGTH if config["seq_len"] is None else min(config["seq_len"], LENGTH)
  config |= {"accum": accum, "batch_size": devices * accum, "seq_len": length, "total_steps": STEPS, "evals": {}}
  config["logit_tiles"] = math.gcd(config["logit_tiles"], length)
  plain = {"dtype": "float32", "param_dtype": "float32"}
  if config["model"].get("attention") in ACCELERATOR_KERNELS:
    plain["attention"] = "auto"
  config["model"] = {**config["model"], **{key: value for key, value in plain.items() if key in config["model"]}}
  if config["model"]["name"] == "transformer" and config["init_from"] is None:
    config["model"] |= shrink_model(config["model"], length)
  optimizer = {key: value for key, value in config["optim"].items() if key not in ("lr", *DEFAULTS)}
  lr = config["optim"]["lr"]
  if optimizer["name"] in OPTIMIZERS:  # others may depend on their name
    optimizer, lr = {"name": "sgd", "momentum": 0.0}, 0.1
  recording = {"name": "llmjax.diagnostics.verify:recording", "of": optimizer, "lr": lr}
  config["optim"] = with_optimizer(config["optim"], recording)
  config["schedule"] = {"name": "constant", "warmup": None}
  config["checkpoint"] = {**config["checkpoint"], "best": None, "every": None, "keep_every": None}
  config["early_stopping"] = {**config["early_stopping"], "metric": None}
  return config


def shrink_model(model: Mapping[str, Any], length: int) -> dict[str, Any]:
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


def measure_run(config: Mapping[str, Any], sizes: Sizes, devices: Sequence[Any] | None = None) -> Measured:
  """Runs a shrunk config on a mesh. Of several processes, each measures the same, and its own rows."""
  count = len(jax.devices() if devices is None else devices)
  config = {**config, "mesh": sharding.resolve_mesh_sizes(sizes, count)}
  tokenizer = tokenizer_to_reuse(config, None) or make_config_tokenizer(config)
  if config["model"]["name"] == "transformer" and config["init_from"] is None and config["model"]["vocab_size"] is None:
    config["model"] = {**config["model"], "vocab_size": -(-tokenizer.vocab_size // 8) * 8}  # so that it can be cut
  program = make_program(config, tokenizer=tokenizer, devices=None if devices is None else list(devices))
  settings = program.config
  stream = program.make_stream(open_source(settings, settings["data"]["train"]), prefetch=0)
  local = [with_uneven_weights(next(stream)) for _ in range(STEPS)]
  stream.close()
  batches = [program.put(batch, settings["batch_size"]) for batch in local]
  key = jax.jit(lambda: jax.random.key(settings["seed"]), out_shardings=program.replicated)()
  rate = program.replicate(np.float32(settings["optim"]["lr"]))
  auxiliary = program.auxiliary_params
  state = program.init(program.starting_params()[0])
  parts: dict[str, dict[str, np.ndarray]] = {part: {} for part in PARTS}
  parts["initial"] = fetched(program, program.eval_params(state))
  state = perturb(program, state)
  with sharding.use_mesh(program.mesh, program.rules):
    held_out = program.eval_step(program.eval_params(state), batches[1], auxiliary)
    parts["held out"] = ratios(held_out)
    train_step = program.train_step.lower(state, batches[0], key, rate, auxiliary).compile()
    for i, batch in enumerate(batches):  # one program for all of them: it would refuse a state that lies elsewhere
      state, metrics = jax.block_until_ready(train_step(state, batch, key, rate, auxiliary))
      parts["loss"] |= {f"{name} of step {i}": value for name, value in ratios(metrics).items()}
      if i == 0:
        parts["gradient"] = fetched(program, recorded(program, state))
  parts["after"] = fetched(program, trees.merge_trainable(state.params, state.frozen))
  average = {} if state.ema is None else fetched(program, state.ema)
  parts["after"] |= {f"average/{name}": array for name, array in average.items()}
  rows = {f"{i}/{row}": name for i, batch in enumerate(local) for row, name in row_hashes(batch)}
  return Measured(parts, rows, count_collectives(str(train_step.as_text())))


def perturb(program: Program, state: TrainState) -> TrainState:
  """The state with a little noise on every parameter."""

  def shake(tree: Any, key: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves)) if leaves else ()
    noise = (NOISE * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves))
    return jax.tree.unflatten(structure, [x + n for x, n in zip(leaves, noise)])

  def run(state: TrainState) -> TrainState:
    learned, frozen = jax.random.split(jax.random.key(1))
    average = None if state.ema is None else shake(state.ema, learned)
    return dataclasses.replace(
      state, params=shake(state.params, learned), ema=average, frozen=shake(state.frozen, frozen)
    )

  with sharding.use_mesh(program.mesh, program.rules):
    return jax.jit(run, out_shardings=program.state_shardings)(state)


def with_uneven_weights(batch: Batch) -> Batch:
  """A host's batch whose rows bear loss in unlike numbers of places, or unlike loss: else a mean of means would be the
  mean. A contrastive loss has no weights, and sees the whole batch."""

  def thin(weight: np.ndarray) -> np.ndarray:
    if weight.ndim < 2:
      return weight * (1 + np.asarray(batch.rows) % 4).astype(weight.dtype)
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
  return {path: np.asarray(leaf, np.float32) for path, leaf in trees.flatten_tree(jax.device_get(whole)).items()}


def whole_arrays(tree: Any) -> Any:
  return tree


def ratios(metrics: Any) -> dict[str, np.ndarray]:
  """{metric: its value}; of what has no weight, nothing."""
  return {name: np.asarray(value, np.float32) for name, value in metric_means(jax.device_get(metrics)).items()}


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


def compare_runs(want: Measured, got: Measured) -> list[Difference]:
  """Of all leaves, the farthest off first: |got - want| over TOLERANCE * max(|leaf|, FLOOR * |tree|).

  Loss and metrics are compared each by itself. A leaf that one of the two does not have, or that is not finite, is
  infinitely far off.
  """
  found = []
  for part in PARTS:
    ours, theirs = got.parts[part], want.parts[part]
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
    meshes: such as "data=2,tensor=4"; None is those of `meshes_of` that the config can be cut over.
    processes: numbers of processes, each with its part of the devices, which `flags` of the command line configure.
      They are compared on all of `meshes`, and where it is None, on some.
  Raises:
    ConfigError: a config that cannot run, or a mesh of `meshes` that it cannot be cut over.
  """
  devices = jax.devices()
  for count in processes:
    if count < 2 or len(devices) % count:
      raise ConfigError(f"--processes={count} must be at least 2 and divide the {len(devices)} devices")
  if processes and devices[0].platform != "cpu":
    raise ConfigError("--processes is for simulated devices of a CPU; set JAX_PLATFORMS=cpu")
  for text in meshes or ():
    sharding.resolve_mesh_sizes(sharding.parse_mesh(text, "--meshes"), len(devices))
  small_config = shrink(config, len(devices))
  want = measure_run(small_config, {}, devices[:1])
  gradient = want.parts["gradient"]
  zero = [name for name, array in gradient.items() if not np.any(array)]
  say(f"{len(gradient)} parameters' gradients, {STEPS} steps, against one device; off by how many times the tolerance")
  say(f"({TOLERANCE:g} of a leaf's norm, of at least {FLOOR:g} of the whole tree's)")
  if zero:
    say(f"zero, and so hardly compared: the gradients of {', '.join(zero)}")
  say(f"\n{'':<{TITLE}}" + "".join(f"{part:>9}" for part in PARTS))
  sound, compared = True, []
  for text in meshes_of(len(devices)) if meshes is None else meshes:
    try:
      got = measure_run(small_config, sharding.parse_mesh(text, "--meshes"), devices)
    except ConfigError as error:
      if meshes is not None:
        raise
      say(f"{text:<{TITLE}}not for this config: {error}")
      continue
    sound &= report_differences(text, want, got)
    compared.append(text)
  for count in processes:
    for mesh in compared if meshes is not None else compared[1::4] or compared:
      shared: set[str] = set()
      for index, got in enumerate(measure_processes(flags, count, mesh, len(devices))):
        sound &= report_differences(f"{mesh}, process {index} of {count}", want, got)
        shared |= got.rows.keys()
      if missing := want.rows.keys() - shared:
        say(f"  row {min(missing)} is no process's")
        sound = False
  if not compared:
    raise ConfigError(f"nothing was compared: none of the meshes is for this config on {len(devices)} devices")
  say(f"\nthe same on {len(compared)} meshes" if sound else "\nNOT the same")
  return sound


def report_differences(title: str, want: Measured, got: Measured) -> bool:
  """Prints a line, and of what is wrong the worst; whether nothing is."""
  found = compare_runs(want, got)
  worst = {part: max((d.excess for d in found if d.part == part), default=0.0) for part in PARTS}
  counts = ", ".join(f"{count} {name}" for name, count in got.collectives.items())
  say(f"{title:<{TITLE}}" + "".join(f"{value:>9.2g}" for value in worst.values()) + f"  {counts or 'no collectives'}")
  wrong = [d for d in found if not d.excess <= 1]
  for difference in wrong[:5]:
    say(f"  {difference.part} {difference.name}: {difference.excess:.3g} times the tolerance")
  other_rows = [place for place, name in got.rows.items() if want.rows.get(place) != name]
  if other_rows:
    say(f"  row {other_rows[0].split('/')[1]} of batch {other_rows[0].split('/')[0]} holds other data")
  return not wrong and not other_rows


# Several processes on this machine.


def measure_processes(flags: Sequence[str], count: int, mesh: str, devices: int) -> list[Measured]:
  """What `count` new processes on this machine measure together, each with its part of so many simulated devices."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    coordinator = f"127.0.0.1:{free.getsockname()[1]}"
  command = [sys.executable, "-m", "llmjax", "verify", *flags, f"--devices={devices // count}", f"--meshes={mesh}"]
  running: list[subprocess.Popen[bytes]] = []
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    try:
      for index in range(count):
        place = {"COORDINATOR": coordinator, "NUM_PROCESSES": str(count), "PROCESS_ID": str(index)}
        environment = os.environ | {"JAX_PLATFORMS": "cpu"} | {f"LLMJAX_{key}": value for key, value in place.items()}
        with open(folder / f"{index}.log", "wb") as log:
          asked = [*command, f"--worker={folder}"]
          running.append(subprocess.Popen(asked, env=environment, stdout=log, stderr=subprocess.STDOUT))
      codes = [process.wait() for process in running]
    finally:
      for process in running:
        process.kill()
    if any(codes):
      logs = [(folder / f"{index}.log").read_text(errors="replace").strip() for index in range(count)]
      last = [f"process {index} of {count}: {log.splitlines()[-1]}" for index, log in enumerate(logs) if log]
      raise ConfigError("; ".join(last) or f"processes ended with {codes}, and said nothing")
    return [load_measured(folder, index) for index in range(count)]


def work(config: Any, mesh: str, folder: str | Path) -> None:
  """What one of several processes does for `measure_processes`."""
  got = measure_run(shrink(config, jax.device_count()), sharding.parse_mesh(mesh))
  index = jax.process_index()
  arrays = {f"{part}:{name}": array for part, leaves in got.parts.items() for name, array in leaves.items()}
  said = {"rows": got.rows, "collectives": got.collectives}
  (Path(folder) / f"{index}.json").write_text(json.dumps(said), encoding="utf-8")
  np.savez(Path(folder) / f"{index}.npz", **arrays)  # type: ignore[arg-type]


def load_measured(folder: Path, index: int) -> Measured:
  """What `work` of a process wrote."""
  parts: dict[str, dict[str, np.ndarray]] = {part: {} for part in PARTS}
  with np.load(folder / f"{index}.npz") as file:
    for key in file.files:
      part, name = key.split(":", 1)
      parts[part][name] = file[key]
  return Measured(parts, **json.loads((folder / f"{index}.json").read_text(encoding="utf-8")))

"""Memory of a train step by sequence length and batch size; compiled, never run.

  python experiments/memory/run.py --output=DIR

Writes DIR/memory.json and DIR/memory.png. What is counted is what the compiled program needs on each device beside its
arguments: activations, and whatever the backward pass keeps of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax

from llmjax.cli.main import start_jax
from llmjax.config import load_config
from llmjax.distributed import sharding
from llmjax.training.components import open_source
from llmjax.training.loop import make_stream
from llmjax.training.program import Program, make_program

LENGTHS = (1024, 2048, 4096, 8192)
BATCHES = (32, 64, 128, 256)
DECODER = (
  *("--config=gpt:debug", "--config.model.d_model=64", "--config.model.num_heads=4", "--config.model.remat=full"),
  *("--config.batch_size=1", "--config.model.max_len=none"),
)
TILED = (
  *("--config=gpt:debug", "--config.model.vocab_size=32768"),
  *("--config.seq_len=128", "--config.model.max_len=none"),
)
PAIRS = (
  *("--config=contrastive:debug", "--config.model.d_model=128"),
  *("--config.seq_len=64", "--config.model.max_len=none"),
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--output", required=True)
  arguments = parser.parse_args()
  jax.config.update("jax_num_cpu_devices", 8)
  start_jax()
  one, ring = jax.devices()[:1], {"data": 1, "context": 8}

  def lengths(kernel: str, mesh: dict[str, int] | None = None) -> dict[int, float]:
    flags = (*DECODER, f"--config.model.attention={kernel}")
    return {n: mebibytes([*flags, f"--config.seq_len={n}"], mesh, None if mesh else one) for n in LENGTHS}

  def batches(flags: tuple[str, ...], changes: Any) -> dict[int, float]:
    return {n: mebibytes([*flags, f"--config.batch_size={n}", *changes(n)], None, one) for n in BATCHES}

  measured = {
    "tokens of a sequence": {
      "xla": lengths("xla"),
      "chunked": lengths("chunked"),
      "ring over 8 devices": lengths("ring", ring),
    },
    "sequences of 128 tokens, 32,768 entries": {
      "all logits": batches(TILED, lambda n: []),
      "logit_tiles=16": batches(TILED, lambda n: ["--config.logit_tiles=16"]),
    },
    "pairs of a contrastive batch": {
      "at once": batches(PAIRS, lambda n: []),
      "in chunks of 16": batches(PAIRS, lambda n: [f"--config.accum={n // 16}"]),
    },
  }
  folder = Path(arguments.output)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "memory.json").write_text(json.dumps(measured, indent=1) + "\n")
  draw(measured, folder / "memory.png")


def mebibytes(flags: list[str], mesh: dict[str, int] | None, devices: list[Any] | None) -> float:
  """Return the temporary memory of one device in MiB, besides the arguments of the step."""
  config = load_config(flags)
  config.mesh.update({"data": 1} if mesh is None else mesh)
  program = make_program(config, devices=devices)
  value = compiled(program).memory_analysis().temp_size_in_bytes / 2**20
  print(f"{value:10.1f} MiB  {' '.join(flags)}", flush=True)
  return value


def compiled(program: Program) -> Any:
  """Return the compiled train step."""
  config = program.config
  stream = make_stream(program, open_source(config, config["data"]["train"]), prefetch=0)
  batch = next(stream)
  stream.close()
  rate = jax.ShapeDtypeStruct((), "float32")
  with sharding.use_mesh(program.mesh, program.rules):
    step = program.train_step.lower(program.abstract_state, batch, jax.eval_shape(lambda: jax.random.key(0)), rate, {})
    return step.compile()


def draw(measured: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
  import matplotlib

  matplotlib.use("agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(1, len(measured), figsize=(4.6 * len(measured), 3.8), layout="constrained")
  for axis, (title, curves) in zip(axes, measured.items(), strict=True):
    for name, values in curves.items():
      axis.loglog(list(values), list(values.values()), "o-", label=name, base=2)
    axis.set_xlabel(title)
    axis.set_ylabel("MiB a device")
    axis.set_xticks(list(values), [f"{n:,}" for n in values])
    axis.grid(alpha=0.3)
    axis.legend()
  figure.savefig(path, dpi=130)


if __name__ == "__main__":
  main()

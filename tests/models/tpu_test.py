"""The train step, compiled ahead of time for TPUs on a machine without TPUs.

This needs libtpu: `pip install --target=FOLDER --no-deps libtpu` and LLMJAX_LIBTPU=FOLDER. A folder of its own keeps
other processes with JAX from importing it. Each program is compiled in its own process, which runs this file as a
script.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHANGES = {
  **{"model.d_model": 256, "model.num_heads": 4, "model.num_kv_heads": 2, "model.head_dim": 128},
  **{"model.decoder_layers": 4, "model.max_len": None, "model.remat": "attention", "model.dtype": "bfloat16"},
  **{"batch_size": 8, "seq_len": 512, "total_steps": 10},
}

PROGRAMS = {
  "one slice": ("v5e:2x2", 1, {"data": 2, "tensor": 2}, {}),
  "two slices": (
    *("v5e:2x2", 2, {"data": 2, "fsdp": 2, "tensor": 2}),
    {"model.attention_pattern": ("local", "global"), "model.window": 256},
  ),
  "ring": ("v5e:2x2", 1, {"data": 1, "context": 4}, {}),
}


def libtpu_environment() -> dict[str, str] | None:
  """Return the environment of a process that compiles for TPUs; None if libtpu is not installed."""
  folder = os.environ.get("LLMJAX_LIBTPU")
  if folder is None and importlib.util.find_spec("libtpu") is None:
    return None
  paths = [str(ROOT), *([folder] if folder else []), *filter(None, [os.environ.get("PYTHONPATH")])]
  settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  return {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(paths)}


def compile_step(topology: str, slices: int, mesh: dict[str, int], changes: dict[str, object]) -> dict[str, object]:
  """Return the compiled train step as text, and its memory on each device in bytes."""
  import jax
  import jax.numpy as jnp
  from jax.experimental import topologies

  from llmjax.config import load_config
  from llmjax.data.tokenizers.registry import make_tokenizer
  from llmjax.distributed import sharding
  from llmjax.training.program import make_program
  from llmjax.types import Batch, Tokens

  config = load_config(["--config=gpt:debug"])
  for key, value in {**CHANGES, **changes}.items():
    config.update_from_flattened_dict({key: value})
  config.mesh.update({"data": 1} | mesh)
  devices = topologies.get_topology_desc(topology, platform="tpu", num_slices=slices).devices
  program = make_program(config, tokenizer=make_tokenizer({"name": "bytes"}), devices=list(devices))
  shape = (config.batch_size, config.seq_len)
  integers, weights = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
  [term] = program.objective.coefficients
  batch = Batch(
    inputs=Tokens(integers, integers, integers),
    labels={term: integers},
    weights={term: weights},
    rows=jax.ShapeDtypeStruct(shape[:1], jnp.int32),
  )
  key, rate = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.float32)
  with sharding.use_mesh(program.mesh, program.rules):
    compiled = program.train_step.lower(program.state_shapes, batch, key, rate, {}).compile()
  memory = compiled.memory_analysis()
  sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")}
  return {"text": compiled.as_text(), "memory": sizes}


@pytest.mark.full("tpu")
@pytest.mark.parametrize("name", PROGRAMS)
def test_train_step_compiles_for_tpus(name):
  """One splash kernel per kind of layer, although layers are rematerialised; or a ring."""
  environment = libtpu_environment()
  if environment is None:
    pytest.skip("libtpu is not installed; LLMJAX_LIBTPU names a folder that has it")
  command = [sys.executable, __file__, json.dumps(PROGRAMS[name])]
  done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-4000:]
  compiled = json.loads(done.stdout.splitlines()[-1])
  print(name, {part: f"{size / 2**20:.1f} MiB" for part, size in compiled["memory"].items()})
  text = compiled["text"]
  forward_kernels = len(re.findall(r"%splash_mha_fwd\S* = .*tpu_custom_call", text))
  if name == "ring":
    assert not forward_kernels and " collective-permute" in text and " all-gather" not in text
  else:
    assert forward_kernels == (2 if name == "two slices" else 1)


if __name__ == "__main__":
  print(json.dumps(compile_step(*json.loads(sys.argv[1]))))

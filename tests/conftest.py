"""Test set-up: eight simulated devices, quick compilation, shape-checked annotations, and the tiers.

Tiers are chosen with `--tier`; `bash launch/test.sh` documents them:

- no marker: `fast`, every invariant once;
- `@pytest.mark.slow`: also in `default`, further instances of an invariant;
- `@pytest.mark.full("PART")`: only in `full`, of which `--part=PART` runs one part.
"""

import os
import signal
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jaxlib
import pytest
from absl import flags
from jaxtyping import install_import_hook

# Programs are tiny, so that compiling takes the time. Without XLA's newer fusion emitters, which run MLIR passes for
# every fusion, a training step compiles three to five times as fast. Later releases have no other emitters, and XLA
# aborts on a flag that it does not know. The variable is read when the first device is asked for.
XLA_FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11):
  XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(XLA_FLAGS))

CACHE = Path(os.environ.get("LLMJAX_TEST_CACHE", Path(__file__).parent.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))  # else commands compile into the user's cache

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_rank_promotion", "raise")

CHECKED = (
  "models",
  "objectives",
  "inference.generation",
  "inference.sampling",
  "inference.beam_search",
  "training.optimizers",
  "training.schedules",
)
install_import_hook([f"llmjax.{name}" for name in CHECKED], "beartype.beartype")

if not flags.FLAGS.is_parsed():  # grain reads absl flags
  flags.FLAGS.mark_as_parsed()

# A shell that starts the tests in the background ignores SIGINT, which some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)

TIERS = ("fast", "default", "full")
PARTS = {
  "families": "Hugging Face families, heads and options beyond one reference of each",
  "meshes": "further meshes, microbatches, kernels and kinds of models",
  "processes": "several real processes",
  "clusters": "SLURM, TPU VMs, GKE, sweeps that are killed",
  "transformers": "exports opened by Transformers and PEFT; needs the extra `references`",
  "tpu": "compilation for absent TPUs; needs libtpu",
}
SERIAL_PARTS = ("processes", "clusters")  # they run into time limits beside other tests
# Files go to the workers whole (`--dist loadfile`). The longest start first, so that the workers end at the same time.
LONGEST = (
  "smoke_test.py",
  "loop_test.py",
  "step_test.py",
  "verify_test.py",
  "finetune_run_test.py",
  "trainable_test.py",
  "families_test.py",
  "multi_process_test.py",
  "paths_test.py",
  "task_test.py",
  "attention_test.py",
)


def pytest_addoption(parser):
  parser.addoption("--tier", choices=TIERS, default="default", help="tests to run; a test named by its id always runs")
  parser.addoption("--part", choices=sorted(PARTS), action="append", help="only this part of the tier full")


def part_of(item):
  """Return the part of the tier full that a test belongs to, or None if it is also in the tier default."""
  marker = item.get_closest_marker("full")
  if marker is None:
    return None
  if len(marker.args) != 1 or marker.args[0] not in PARTS:
    raise pytest.UsageError(f"{item.nodeid}: the marker `full` takes one of {', '.join(PARTS)}, got {marker.args}")
  return marker.args[0]


@pytest.hookimpl(tryfirst=True)  # before `-m serial` selects
def pytest_collection_modifyitems(config, items):
  """Keep the tests of the tier, those of the longest files first; mark tests of several processes as serial."""
  tier, parts = config.getoption("tier"), config.getoption("part")
  named = tuple(argument for argument in config.args if "::" in argument)

  def is_selected(item):
    if parts:
      return part_of(item) in parts
    if tier == "full" or item.nodeid.startswith(named):
      return True
    return part_of(item) is None and (tier == "default" or item.get_closest_marker("slow") is None)

  selected, deselected = [], []
  for item in items:
    if part_of(item) in SERIAL_PARTS:
      item.add_marker(pytest.mark.serial)
    (selected if is_selected(item) else deselected).append(item)
  config.hook.pytest_deselected(items=deselected)
  order = {name: index for index, name in enumerate(LONGEST)}
  items[:] = sorted(selected, key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """Drop compiled programs after each file: each maps memory, and the number of maps of a process is limited."""
  yield
  jax.clear_caches()


@pytest.fixture
def home(tmp_path, monkeypatch):
  """Return a folder whose `cache` replaces the user's cache, so that no test reads or fills the real one."""
  monkeypatch.setenv("LLMJAX_CACHE", str(tmp_path / "cache"))
  return tmp_path

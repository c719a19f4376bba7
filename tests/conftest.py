"""Set before JAX starts: eight simulated devices, a persistent compilation cache, shape-checked annotations."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs are tiny, so that compiling them is what takes time. Without the newer fusion emitters, which run a pipeline of
# MLIR passes for every fusion, a training step compiles three to five times as fast.
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false",
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest
from absl import flags
from jaxtyping import install_import_hook

CACHE = Path(os.environ.get("LLMJAX_TEST_CACHE", Path(__file__).parent.parent / ".cache" / "jax"))

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_rank_promotion", "raise")

CHECKED = ("models", "objectives", "generation", "sampling", "beam_search", "optim")
install_import_hook([f"llmjax.{name}" for name in CHECKED], "beartype.beartype")

if not flags.FLAGS.is_parsed():  # grain reads absl flags
  flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """Every compiled program maps memory, and a process may have so many maps: the whole suite has more."""
  yield
  jax.clear_caches()


@pytest.fixture
def home(tmp_path, monkeypatch):
  """A user's cache of its own, so that no test reads or fills the real one."""
  monkeypatch.setenv("LLMJAX_CACHE", str(tmp_path / "cache"))
  return tmp_path

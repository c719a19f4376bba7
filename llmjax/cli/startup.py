"""Start of a command: settings of the process, and of several processes together. JAX is imported inside."""

from __future__ import annotations

import argparse
import os
import sys

from llmjax.config import ConfigLike, Json, to_dict
from llmjax.distributed import processes
from llmjax.distributed.cluster import ENVIRONMENT_VARIABLES


def start_jax(arguments: argparse.Namespace | None = None, config: ConfigLike = None) -> None:
  """Set up JAX before it is used.

  Args:
    arguments: of a command that several processes can run: joins them, and checks that they run the same. None: a
      command of one process.
    config: its config, which the processes compare.
  """
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  import jax
  from absl import flags

  from llmjax.storage.cache import cache_dir

  if not flags.FLAGS.is_parsed():  # grain reads absl's flags
    flags.FLAGS.mark_as_parsed()
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "jax"))
  if arguments is not None:
    _join_processes(arguments, config)


def _join_processes(arguments: argparse.Namespace, config: ConfigLike) -> None:
  processes.join_processes(
    arguments.coordinator,
    arguments.num_processes,
    arguments.process_id,
    timeout=arguments.start_timeout,
    preemptible=arguments.command == "train",
  )

  def fingerprint() -> dict[str, Json]:
    from llmjax.checkpoints.manifest import package_versions

    differing = (*ENVIRONMENT_VARIABLES, "start_timeout")  # flags that may differ between processes
    flags = {name: value for name, value in vars(arguments).items() if name not in differing}
    return processes.environment_fingerprint() | {
      "versions": package_versions(),
      "flags": flags,
      "config": to_dict(config or {}),
    }

  processes.preflight(fingerprint)
  if not processes.is_primary_process():
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # process 0 prints for all

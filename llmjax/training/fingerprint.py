"""The fingerprint of a run: what has to be equal on all processes before anything is compiled."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import jax

from llmjax.checkpoints.manifest import package_versions
from llmjax.config import ConfigTree, Json
from llmjax.config.values import flatten_config
from llmjax.data.sources.base import Source
from llmjax.distributed import processes
from llmjax.training.program import Program
from llmjax.trees import path_string


def run_fingerprint(program: Program, source: Source) -> dict[str, Json]:
  """Return {name: value} of environment, versions, config, data, tokenizer, modules of the user, and shardings."""
  leaves = jax.tree_util.tree_leaves_with_path(program.abstract_state)
  layout = [(path_string(path), leaf.shape, str(leaf.dtype), str(leaf.sharding)) for path, leaf in leaves]
  return processes.environment_fingerprint() | {
    "versions": package_versions(),
    "config": program.config,
    "data": {"fingerprint": source.fingerprint, "records": len(source)},
    "tokenizer": processes.short_digest(sorted(program.tokenizer.to_files().items())),
    "modules": {name: processes.short_digest(code) for name, code in read_user_modules(program.config).items()},
    "program": processes.short_digest((layout, program.mesh.devices.tolist())),
  }


def read_user_modules(config: ConfigTree) -> dict[str, bytes]:
  """Return {module: its source} of the modules that a config names as "module:function"."""
  strings = (value for value in flatten_config(config).values() if isinstance(value, str))
  matches = (re.fullmatch(r"([\w.]+):[\w.]+", value) for value in strings)
  specs = {match[1]: importlib.util.find_spec(match[1]) for match in matches if match}
  return {name: Path(spec.origin).read_bytes() for name, spec in specs.items() if spec and spec.origin}

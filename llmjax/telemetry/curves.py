"""Read the metrics and samples that a run wrote to its workdir."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmjax.config import ConfigError
from llmjax.storage.buckets import as_path

CURVES = "metrics.jsonl"  # in a workdir: a line is {"step", "time", name: number, ...}


SAMPLES = "samples.jsonl"  # in a workdir: a line is {"step", "name", "prompt", "text"}


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
  """The lines of a file. A last line that was cut off by a crash is left out; any other bad one is a ConfigError."""
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      try:
        record = json.loads(line.decode())
        record["step"] = int(record["step"])
      except (ValueError, TypeError, KeyError) as error:
        if not line.endswith(b"\n"):
          return
        raise ConfigError(f"{path}:{number} is not a JSON object with a `step`; mend or delete that line") from error
      yield record


def read_curves(workdir: str | Path) -> dict[str, tuple[list[int], list[float]]]:
  """{name: (steps, values)} of what was written to `workdir`, steps ascending, each once (the newest value counts).

  Raises:
    ConfigError: no such folder, or no metrics in it.
  """
  path = as_path(workdir) / CURVES
  if not path.is_file():
    lacks = f"has no {CURVES}, so nothing was trained there" if as_path(workdir).is_dir() else "does not exist"
    raise ConfigError(f"workdir {workdir} {lacks}; give the --workdir of a `llmjax train` that has logged a step")
  curves: dict[str, dict[int, float]] = {}
  for record in read_json_lines(path):
    for name, value in record.items():
      if name not in ("step", "time"):
        curves.setdefault(name, {})[record["step"]] = float(value)
  if not curves:
    raise ConfigError(f"{path} is empty: the run has not logged a step yet (config.log.every says when it does)")
  return {name: (sorted(curve), [curve[s] for s in sorted(curve)]) for name, curve in curves.items()}


def read_samples(workdir: str | Path) -> list[dict[str, Any]]:
  """The samples of a run ({"step", "name", "prompt", "text"}), steps ascending, each (step, name) once."""
  path = as_path(workdir) / SAMPLES
  newest = {(r["step"], r["name"]): r for r in read_json_lines(path)} if path.is_file() else {}
  return [newest[key] for key in sorted(newest)]

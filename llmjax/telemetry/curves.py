"""Read the metrics and samples that a run wrote to its workdir."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict, cast

from llmjax.config import ConfigError, Json
from llmjax.storage.buckets import as_path

METRICS_FILE = "metrics.jsonl"  # in a workdir: a line is {"step", "time", name: number, ...}
SAMPLES_FILE = "samples.jsonl"  # in a workdir: a line is a `Sample`

Curve = tuple[list[int], list[float]]  # (steps, values)


class Sample(TypedDict):
  """A text that the model generated during training."""

  step: int
  name: str  # of the entry of config.evals
  prompt: str | None
  text: str  # begins with the prompt


def read_json_lines(path: Path) -> Iterator[dict[str, Json]]:
  """Yield the records of a file. A last line that a crash cut off is skipped.

  Raises:
    ConfigError: another line is not a JSON object with a `step`.
  """
  with path.open("rb") as file:
    for number, line in enumerate(file, 1):
      try:
        record = json.loads(line.decode())
        record["step"] = int(record["step"])
      except (ValueError, TypeError, KeyError) as error:
        if not line.endswith(b"\n"):
          return
        raise ConfigError(f"{path}:{number} is not a JSON object with a `step`. Fix or delete that line.") from error
      yield record


def read_curves(workdir: str | Path) -> dict[str, Curve]:
  """Return {metric: (steps, values)}, steps ascending and unique; the newest value of a step counts.

  Raises:
    ConfigError: the folder does not exist, or has no metrics.
  """
  path = as_path(workdir) / METRICS_FILE
  if not path.is_file():
    lacks = f"has no {METRICS_FILE}, so nothing was trained there" if as_path(workdir).is_dir() else "does not exist"
    raise ConfigError(f"workdir {workdir} {lacks}. Give the --workdir of a `llmjax train` that has logged a step.")
  curves: dict[str, dict[int, float]] = {}
  for record in read_json_lines(path):
    for name, value in record.items():
      if name not in ("step", "time"):
        curves.setdefault(name, {})[record["step"]] = float(value)
  if not curves:
    raise ConfigError(f"{path} is empty: the run has not logged a step yet. config.log.every is its logging interval.")
  return {name: (sorted(curve), [curve[s] for s in sorted(curve)]) for name, curve in curves.items()}


def read_samples(workdir: str | Path) -> list[Sample]:
  """Return the samples of a run, sorted by step; of each (step, name) only the newest."""
  path = as_path(workdir) / SAMPLES_FILE
  newest = {(r["step"], r["name"]): cast(Sample, r) for r in read_json_lines(path)} if path.is_file() else {}
  return [newest[key] for key in sorted(newest)]

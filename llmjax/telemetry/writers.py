"""Numbers on their way out of a run: the (sum, weight) algebra, files of curves, the progress line, model FLOPs."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from llmjax.config import ConfigError
from llmjax.storage.buckets import BucketMirror, as_path, in_bucket
from llmjax.storage.cache import cache_dir
from llmjax.telemetry.curves import CURVES, SAMPLES, read_json_lines

WANDB = "wandb_run.txt"  # in a workdir: the id of its run


class MetricWriter:
  """Curves and samples of a run, as JSON lines and for TensorBoard. Every line is on disk when a call returns; in a
  bucket it is half a minute later, or when `sync` returns.

  What an earlier run wrote after `start_step` is dropped, so that a reader finds each step once; `start_step` 0 begins
  new files.

  Args:
    workdir: a folder, made where missing, or one in a bucket; None writes nothing, as on every process but the first.
    start_step: the step that this run begins at.
    tensorboard: also write `workdir`/tensorboard.
    wandb: also write to this project of Weights & Biases, PROJECT or ENTITY/PROJECT; the run is called as the folder,
      and grouped by the folder that holds it.
    config: what the run is of, for Weights & Biases.
  """

  def __init__(
    self,
    workdir: str | Path | None,
    start_step: int = 0,
    tensorboard: bool = True,
    wandb: str | None = None,
    config: Mapping[str, Any] | None = None,
  ):
    self._files: dict[str, TextIO] = {}
    self._tensorboard: Any = None
    self._wandb: Any = None
    self._mirror: BucketMirror | None = None
    if workdir is None:
      return
    workdir = as_path(workdir)
    if in_bucket(workdir):
      self._mirror = BucketMirror(workdir, (CURVES, SAMPLES))
    folder = workdir if self._mirror is None else self._mirror.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CURVES, SAMPLES):
      _rewind(folder / name, start_step)
      # A lone surrogate, from bytes that are no text, becomes a JSON escape.
      self._files[name] = open(folder / name, "a", encoding="utf-8", errors="backslashreplace", newline="\n")
    if tensorboard:
      from tensorboardX import SummaryWriter

      purge = start_step + 1 if start_step else 0
      self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=purge, flush_secs=10)
    if wandb is not None:
      self._wandb = start_wandb(wandb, workdir, config or {})

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Numbers measured after `step` updates. NaN and infinities are the strings "NaN", "Infinity", "-Infinity"."""
    numbers = {name: float(value) for name, value in values.items()}
    self._line(CURVES, {"step": int(step), "time": time.time(), **{k: _to_json(v) for k, v in numbers.items()}})
    if self._tensorboard is not None:
      for name, number in numbers.items():
        self._tensorboard.add_scalar(name, number, int(step))
    if self._wandb is not None:
      self._wandb.log({"step": int(step), **numbers})

  def text(self, step: int, name: str, text: str, prompt: str | None = None) -> None:
    """A text that the model wrote after `step` updates, with the `prompt` that it begins with where that is known."""
    self._line(SAMPLES, {"step": int(step), "name": name, "prompt": prompt, "text": text})
    if self._tensorboard is not None:
      indented = "\n".join("    " + line for line in text.encode("utf-8", "replace").decode().splitlines())
      self._tensorboard.add_text(name, indented, int(step))
    if self._wandb is not None:
      self._wandb.log({"step": int(step), f"sample/{name}": text})

  def sync(self) -> None:
    """Everything written so far is in the bucket when this returns."""
    if self._mirror is not None:
      if self._tensorboard is not None:
        self._tensorboard.flush()
      self._mirror.upload()

  def close(self) -> None:
    for file in self._files.values():
      file.close()
    self._files = {}
    if self._tensorboard is not None:
      self._tensorboard.close()
      self._tensorboard = None
    if self._wandb is not None:
      self._wandb.finish()
      self._wandb = None
    if self._mirror is not None:
      self._mirror.close()
      self._mirror = None

  def _line(self, name: str, record: Mapping[str, Any]) -> None:
    if name in self._files:
      self._files[name].write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
      self._files[name].flush()
    if self._mirror is not None:
      self._mirror.refresh()


def import_wandb(project: str) -> Any:
  """The library; raises ConfigError where it is missing."""
  try:
    import wandb
  except ImportError as error:
    raise ConfigError(f"log.wandb={project!r} needs `pip install wandb` (or set it to none)") from error
  return wandb


def start_wandb(project: str, workdir: Path, config: Mapping[str, Any]) -> Any:
  """A run of Weights & Biases; a resumed run goes on in the one that WANDB in its workdir names.

  Raises ConfigError where it cannot be begun.
  """
  wandb = import_wandb(project)
  workdir = workdir if in_bucket(workdir) else workdir.absolute()
  if not (workdir / WANDB).exists():
    (workdir / WANDB).write_text(uuid.uuid4().hex[:16])
  entity, _, name = project.rpartition("/")
  try:
    run = wandb.init(
      entity=entity or None,
      project=name,
      name=workdir.name,
      group=workdir.parent.name,
      id=(workdir / WANDB).read_text().strip(),
      resume="allow",
      dir=str(cache_dir() if in_bucket(workdir) else workdir),
      config=dict(config),
    )
  except Exception as error:  # its own, of the network, of a missing key
    why = " ".join(str(error).split())
    raise ConfigError(
      f"log.wandb={project!r} cannot be begun: {why}; mend that, set WANDB_MODE=offline, or set it to none"
    ) from error
  run.define_metric("*", step_metric="step")  # a resumed run repeats steps, and wandb's own count only grows
  return run


def _rewind(path: Path, step: int) -> None:
  """Drops the lines after `step`, all of them for step 0; a crash in the middle leaves the old file whole."""
  if not path.exists():
    return
  kept = [json.dumps(r, ensure_ascii=False) + "\n" for r in read_json_lines(path) if r["step"] <= step] if step else []
  new = path.with_name(path.name + ".new")
  with open(new, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
    file.writelines(kept)
    file.flush()
    os.fsync(file.fileno())
  os.replace(new, path)


def _to_json(value: float) -> float | str:
  """JSON has no NaN and no infinities; `float` reads these names back."""
  return value if math.isfinite(value) else {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")

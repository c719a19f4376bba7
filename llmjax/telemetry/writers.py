"""Write the metrics and samples of a run: as JSON lines, for TensorBoard, and to Weights & Biases."""

from __future__ import annotations

import abc
import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

from llmjax.config import ConfigError, ConfigTree, Json
from llmjax.storage.buckets import BucketMirror, as_path, in_bucket
from llmjax.storage.cache import cache_dir
from llmjax.telemetry.curves import METRICS_FILE, SAMPLES_FILE, Sample, read_json_lines

WANDB_ID_FILE = "wandb_run.txt"  # in a workdir: the id of its run


class Output(abc.ABC):
  """A destination of metrics and samples."""

  @abc.abstractmethod
  def write_metrics(self, step: int, values: Mapping[str, float]) -> None: ...

  @abc.abstractmethod
  def write_sample(self, sample: Sample) -> None: ...

  @abc.abstractmethod
  def close(self) -> None: ...

  def flush(self) -> None:  # noqa: B027
    """Write what is buffered to disk."""


class MetricWriter:
  """Writer of the metrics and samples of a run.

  Every line is on disk when a call returns. In a bucket it is there half a minute later, or when `sync` returns.
  Lines of an earlier run after `start_step` are deleted, so that readers find each step once.

  Args:
    workdir: folder, created if missing, or one in a bucket; None writes nothing, as on all processes but the first.
    start_step: step at which this process begins; 0 starts new files.
    tensorboard: also write `workdir`/tensorboard.
    wandb: also write to this project of Weights & Biases, PROJECT or ENTITY/PROJECT. The run is named after the folder,
      its group after the parent folder.
    config: config of the run, for Weights & Biases.
  """

  def __init__(
    self,
    workdir: str | Path | None,
    start_step: int = 0,
    tensorboard: bool = True,
    wandb: str | None = None,
    config: ConfigTree | None = None,
  ) -> None:
    self._outputs: list[Output] = []
    self._mirror: BucketMirror | None = None
    if workdir is None:
      return
    folder = workdir = as_path(workdir)
    if in_bucket(workdir):
      self._mirror = BucketMirror(workdir, (METRICS_FILE, SAMPLES_FILE))
      folder = self._mirror.folder
    folder.mkdir(parents=True, exist_ok=True)
    self._outputs.append(JsonLinesOutput(folder, start_step))
    if tensorboard:
      self._outputs.append(TensorBoardOutput(folder, start_step))
    if wandb is not None:
      self._outputs.append(WandbOutput(wandb, workdir, config or {}))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Write metrics measured after `step` updates."""
    numbers = {name: float(value) for name, value in values.items()}
    for output in self._outputs:
      output.write_metrics(int(step), numbers)
    self._refresh_mirror()

  def write_text(self, step: int, name: str, text: str, prompt: str | None = None) -> None:
    """Write a text that the model generated after `step` updates; it begins with `prompt` if that is known."""
    for output in self._outputs:
      output.write_sample({"step": int(step), "name": name, "prompt": prompt, "text": text})
    self._refresh_mirror()

  def sync(self) -> None:
    """Upload everything written so far, if the workdir is in a bucket."""
    if self._mirror is not None:
      for output in self._outputs:
        output.flush()
      self._mirror.upload()

  def close(self) -> None:
    for output in self._outputs:
      output.close()
    self._outputs = []
    if self._mirror is not None:
      self._mirror.close()
      self._mirror = None

  def _refresh_mirror(self) -> None:
    if self._mirror is not None:
      self._mirror.refresh()


class JsonLinesOutput(Output):
  """METRICS_FILE and SAMPLES_FILE in a folder, continued at `start_step`."""

  def __init__(self, folder: Path, start_step: int) -> None:
    for name in (METRICS_FILE, SAMPLES_FILE):
      truncate_after_step(folder / name, start_step)
    self._metrics, self._samples = (open_json_lines(folder / name, "a") for name in (METRICS_FILE, SAMPLES_FILE))

  def write_metrics(self, step: int, values: Mapping[str, float]) -> None:
    numbers = {name: json_number(value) for name, value in values.items()}
    self._write_line(self._metrics, {"step": step, "time": time.time(), **numbers})

  def write_sample(self, sample: Sample) -> None:
    self._write_line(self._samples, sample)

  def _write_line(self, file: TextIO, record: Json) -> None:
    file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    file.flush()

  def close(self) -> None:
    self._metrics.close()
    self._samples.close()


class TensorBoardOutput(Output):
  """Event files in `folder`/tensorboard; events of an earlier run after `start_step` are hidden."""

  def __init__(self, folder: Path, start_step: int) -> None:
    from tensorboardX import SummaryWriter

    purge_step = start_step + 1 if start_step else 0
    self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step, flush_secs=10)

  def write_metrics(self, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def write_sample(self, sample: Sample) -> None:
    lines = sample["text"].encode("utf-8", "replace").decode().splitlines()
    self._writer.add_text(sample["name"], "\n".join("    " + line for line in lines), sample["step"])

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class WandbOutput(Output):
  """A run of Weights & Biases; a resumed run continues the one whose id is in WANDB_ID_FILE.

  Raises:
    ConfigError: wandb is not installed, or the run cannot be started.
  """

  def __init__(self, project: str, workdir: Path, config: ConfigTree) -> None:
    wandb = import_wandb(project)
    workdir = workdir if in_bucket(workdir) else workdir.absolute()
    if not (workdir / WANDB_ID_FILE).exists():
      (workdir / WANDB_ID_FILE).write_text(uuid.uuid4().hex[:16])
    entity, _, name = project.rpartition("/")
    try:
      self._run = wandb.init(
        entity=entity or None,
        project=name,
        name=workdir.name,
        group=workdir.parent.name,
        id=(workdir / WANDB_ID_FILE).read_text().strip(),
        resume="allow",
        dir=str(cache_dir() if in_bucket(workdir) else workdir),
        config=dict(config),
      )
    except Exception as error:  # its own errors, of the network, of a missing key
      reason = " ".join(str(error).split())
      raise ConfigError(
        f"log.wandb={project!r} cannot start a run: {reason}. Fix that, set WANDB_MODE=offline, or set it to none."
      ) from error
    # A resumed run repeats steps, and wandb's own step counter only increases.
    self._run.define_metric("*", step_metric="step")

  def write_metrics(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log({"step": step, **values})

  def write_sample(self, sample: Sample) -> None:
    self._run.log({"step": sample["step"], f"sample/{sample['name']}": sample["text"]})

  def close(self) -> None:
    self._run.finish()


def import_wandb(project: str) -> Any:
  """Return the module wandb.

  Raises:
    ConfigError: it is not installed.
  """
  try:
    import wandb
  except ImportError as error:
    raise ConfigError(f"log.wandb={project!r} needs `pip install wandb`. Install it, or set it to none.") from error
  return wandb


def truncate_after_step(path: Path, step: int) -> None:
  """Delete the lines after `step`, or all lines if it is 0. A crash in between leaves the old file intact."""
  if not path.exists():
    return
  records = [r for r in read_json_lines(path) if r["step"] <= step] if step else []
  new = path.with_name(path.name + ".new")
  with open_json_lines(new, "w") as file:
    file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    file.flush()
    os.fsync(file.fileno())
  os.replace(new, path)


def open_json_lines(path: Path, mode: Literal["a", "w"]) -> TextIO:
  """Open a file of JSON lines; a lone surrogate, from bytes that are not text, becomes a JSON escape."""
  return open(path, mode, encoding="utf-8", errors="backslashreplace", newline="\n")


def json_number(value: float) -> float | str:
  """Return a number, or the string "NaN", "Infinity" or "-Infinity", which JSON lacks and `float` parses."""
  return value if math.isfinite(value) else {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")

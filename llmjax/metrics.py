"""Numbers on their way out of a run: the (sum, weight) algebra, files of curves, the progress line, model FLOPs."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from llmjax.config import ConfigError
from llmjax.data.buckets import Mirror, in_bucket, place
from llmjax.data.source import cache_dir

CURVES = "metrics.jsonl"  # in a workdir: a line is {"step", "time", name: number, ...}
WANDB = "wandb_run.txt"  # in a workdir: the id of its run
SAMPLES = "samples.jsonl"  # in a workdir: a line is {"step", "name", "prompt", "text"}


def add(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
  """{name: (sum, weight)} of two parts of the data together; a name that one of them lacks counts as nothing there."""
  both = {name: (a[name][0] + b[name][0], a[name][1] + b[name][1]) for name in a if name in b}
  return {**a, **b, **both}


def means(metrics: Mapping[str, Any]) -> dict[str, float]:
  """{name: (sum, weight)} to {name: sum / weight}, without the names of weight zero: they have measured nothing."""
  return {name: float(total) / float(weight) for name, (total, weight) in metrics.items() if float(weight) != 0}


class Writer:
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
    self._mirror: Mirror | None = None
    if workdir is None:
      return
    workdir = place(workdir)
    if in_bucket(workdir):
      self._mirror = Mirror(workdir, (CURVES, SAMPLES))
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
  kept = [json.dumps(r, ensure_ascii=False) + "\n" for r in _records(path) if r["step"] <= step] if step else []
  new = path.with_name(path.name + ".new")
  with open(new, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
    file.writelines(kept)
    file.flush()
    os.fsync(file.fileno())
  os.replace(new, path)


def _to_json(value: float) -> float | str:
  """JSON has no NaN and no infinities; `float` reads these names back."""
  return value if math.isfinite(value) else {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")


def _records(path: Path) -> Iterator[dict[str, Any]]:
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


def read(workdir: str | Path) -> dict[str, tuple[list[int], list[float]]]:
  """{name: (steps, values)} of what was written to `workdir`, steps ascending, each once (the newest value counts).

  Raises:
    ConfigError: no such folder, or no metrics in it.
  """
  path = place(workdir) / CURVES
  if not path.is_file():
    lacks = f"has no {CURVES}, so nothing was trained there" if place(workdir).is_dir() else "does not exist"
    raise ConfigError(f"workdir {workdir} {lacks}; give the --workdir of a `llmjax train` that has logged a step")
  curves: dict[str, dict[int, float]] = {}
  for record in _records(path):
    for name, value in record.items():
      if name not in ("step", "time"):
        curves.setdefault(name, {})[record["step"]] = float(value)
  if not curves:
    raise ConfigError(f"{path} is empty: the run has not logged a step yet (config.log.every says when it does)")
  return {name: (sorted(curve), [curve[s] for s in sorted(curve)]) for name, curve in curves.items()}


def read_samples(workdir: str | Path) -> list[dict[str, Any]]:
  """The samples of a run ({"step", "name", "prompt", "text"}), steps ascending, each (step, name) once."""
  path = place(workdir) / SAMPLES
  newest = {(r["step"], r["name"]): r for r in _records(path)} if path.is_file() else {}
  return [newest[key] for key in sorted(newest)]


_LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 20) -> str:
  """A curve in at most `width` characters; the early values, where a loss falls fast, get more room than the late.

  Values that are no finite numbers are left out.
  """
  heights = [v for v in values if math.isfinite(v)]
  if not heights or width < 1:
    return ""
  if (count := len(heights)) > width:
    edges = [int(count * (column / width) ** 2) for column in range(width + 1)]
    buckets = [heights[a : max(b, a + 1)] for a, b in itertools.pairwise(edges)]
    heights = [sum(bucket) / len(bucket) for bucket in buckets]
  low, high = min(heights), max(heights)
  return "".join(_LEVELS[round((h - low) / (high - low) * 7) if high > low else 0] for h in heights)


def printable(text: str) -> str:
  """Text that is safe on a terminal: a model may well write escape sequences. Newlines and tabs stay."""
  return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def human_time(seconds: float) -> str:
  """59 -> "0:59", 3661 -> "1:01:01", 200000 -> "2d 7h"."""
  whole = round(seconds)
  minutes, hours = whole // 60 % 60, whole // 3600
  if hours >= 48:
    return f"{hours // 24}d {hours % 24}h"
  return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def human_number(value: float) -> str:
  """Three digits and a unit: 1234 -> "1.23k", 5.6e9 -> "5.6G"."""
  for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if abs(value) >= scale:
      return f"{value / scale:.3g}{unit}" if abs(value) < 999.5 * scale else f"{value / scale:.0f}{unit}"
  return f"{value:.3g}"


class Progress:
  """How far a run is: one live line on a terminal, plain lines elsewhere, one for each update.

  Args:
    total_steps: of the whole run.
    first_step: where this run began.
    tokens_per_step: of the whole batch, for the time that is left.
    stream: where to write.
  """

  def __init__(self, total_steps: int, first_step: int, tokens_per_step: int, stream: TextIO | None = None):
    from rich.console import Console
    from rich.live import Live

    self._total, self._tokens = total_steps, tokens_per_step
    self._stream = sys.stderr if stream is None else stream
    self._console = Console(file=self._stream, highlight=False)
    self._losses: list[float] = []
    self._live: Live | None = None
    if self._stream.isatty() and not self._console.is_dumb_terminal:
      self._live = Live(self, console=self._console, auto_refresh=False)
      self._live.start()
    self._state: tuple[int, float | None, float | None] = (first_step, None, None)

  def __rich__(self) -> Any:
    from rich.text import Text

    return Text(self.line(self._console.width - 1), style="bold", no_wrap=True, overflow="crop")

  def line(self, width: int = 100) -> str:
    """The state of the run in at most `width` characters; what matters less gives way first."""
    step, loss, speed = self._state
    percent = f"{100 * step / self._total:.0f}%" if self._total else "100%"
    left = human_time((self._total - step) * self._tokens / speed) if speed else ""
    rate = human_number(speed) if speed else ""
    number = "" if loss is None else f"{loss:.4f}"
    count = f"{step:,}/{self._total:,}"
    words = (f"step {count}", number and f"loss {number}"), (percent, rate and f"{rate} tok/s", left and f"{left} left")
    brief = (count, number), (percent, rate and f"{rate}/s", left)
    for room, (head, tail) in ((20, words), (10, words), (10, brief), (6, brief), (0, brief)):
      line = "  ".join(filter(None, (*head, self._curve(room), *tail)))
      if len(line) <= width:
        return line
    return "  ".join(filter(None, (count, number)))[:width]

  def _curve(self, width: int) -> str:
    try:
      _LEVELS.encode(self._stream.encoding or "utf-8")
    except UnicodeEncodeError:
      return ""
    return sparkline(self._losses, width)

  def update(self, step: int, loss: float, tokens_per_second: float | None) -> None:
    """After `step` updates. A speed of None is not known yet."""
    self._state = step, float(loss), tokens_per_second
    self._losses.append(float(loss))
    if self._live is not None:
      self._live.refresh()
    else:
      print(self.line(), file=self._stream, flush=True)

  def say(self, text: str) -> None:
    """Prints above the live line."""
    if self._live is not None:
      self._console.print(printable(text), markup=False, soft_wrap=True)
    else:
      print(printable(text), file=self._stream, flush=True)

  def close(self) -> None:
    """Leaves the last state on the terminal."""
    if self._live is not None:
      self._live.stop()
      self._live = None


def forward_flops(function: Any, *arguments: Any) -> float:
  """Floating-point operations of all matrix products in one call of a function, counted from its traced program.

  Three times this is a training step's model FLOPs, as the PaLM paper counts them (arXiv:2204.02311, appendix B): twice
  as much for the backward pass, a causal mask does not halve attention, recomputation does not count.

  Args:
    arguments: arrays or jax.ShapeDtypeStructs.
  """
  import jax

  return _dot_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _dot_flops(jaxpr: Any) -> float:
  total = 0.0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
      total += 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
    times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
    for value in equation.params.values():  # the bodies of loops, calls and branches
      for part in value if isinstance(value, (tuple, list)) else (value,):
        body = getattr(part, "jaxpr", part)
        if hasattr(body, "eqns"):
          total += times * _dot_flops(body)
  return total


# Dense peaks in TFLOP/s of what JAX calls one device, from the vendors' spec sheets (Google Cloud TPU documentation;
# NVIDIA data sheets and architecture white papers, without sparsity, for GeForce with float32 accumulation; AMD
# Instinct data sheets). v2, v3 and 7x expose the two cores of a chip, MI250 its two dies, as devices of their own.
# The first pattern that is found in the device's kind counts.
_BF16 = ("bfloat16",)
_HALF = ("bfloat16", "float16")
_PEAKS: tuple[tuple[str, float, tuple[str, ...]], ...] = (
  (r"TPU v2", 46 / 2, _BF16),
  (r"TPU v3", 123 / 2, _BF16),
  (r"TPU v4$", 275, _BF16),
  (r"TPU v5 ?(lite|e)", 197, _BF16),
  (r"TPU v5p?$", 459, _BF16),
  (r"TPU v6 ?(lite|e)", 918, _BF16),
  (r"TPU ?v?7x", 2307 / 2, _BF16),
  (r"GB[23]00", 2500, _HALF),
  (r"B[23]00", 2250, _HALF),
  (r"H[12]00 NVL", 835.5, _HALF),
  (r"H100 PCIe", 756, _HALF),
  (r"H100|H200|GH200|H800", 989.4, _HALF),
  (r"H20\b", 148, _HALF),
  (r"A100|A800", 312, _HALF),
  (r"A10G", 70, _HALF),
  (r"A10\b", 125, _HALF),
  (r"A40\b", 149.7, _HALF),
  (r"RTX A6000", 154.8, _HALF),
  (r"RTX 6000 Ada", 364.2, _HALF),
  (r"L40S", 362, _HALF),
  (r"L40\b", 181, _HALF),
  (r"L4\b", 121, _HALF),
  (r"RTX 3090(?! Ti)", 71, _HALF),
  (r"RTX 4090(?! D| Laptop)", 165.2, _HALF),
  (r"RTX 5090(?! D| Laptop)", 209.5, _HALF),
  (r"V100", 125, ("float16",)),
  (r"\bT4\b", 65, ("float16",)),
  (r"MI210", 181, _HALF),
  (r"MI250X", 383 / 2, _HALF),
  (r"MI250\b", 362.1 / 2, _HALF),
  (r"MI300A", 980.6, _HALF),
  (r"MI3(00X|25X)", 1307.4, _HALF),
)


def peak_flops(device_kind: str, dtype: str) -> float | None:
  """The published dense matmul peak of a device in FLOP/s; None where there is none, as for CPUs and for float32.

  Args:
    device_kind: `jax.devices()[0].device_kind`.
    dtype: what matmuls are computed in, "bfloat16" or "float16".
  """
  for pattern, tera, dtypes in _PEAKS:
    if re.search(pattern, device_kind):
      return tera * 1e12 if str(dtype) in dtypes else None
  return None

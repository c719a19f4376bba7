"""Read a run from its workdir, and arrange its metrics, baselines and samples for reports."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from llmjax.config import ConfigError, ConfigTree, flatten_config
from llmjax.reporting.plots import Panel, format_metric, last_value
from llmjax.storage.buckets import as_path
from llmjax.telemetry.curves import METRICS_FILE, Curve, Sample, read_curves, read_samples
from llmjax.telemetry.progress import format_number, replace_control_characters

TITLES = {  # panels have this order; other metrics follow
  "bits_per_byte": "Bits per byte",
  "loss": "Loss",
  "accuracy": "Accuracy",
  "masked_accuracy": "Accuracy on hidden tokens",
  "span_accuracy": "Accuracy on tokens of hidden spans",
  "sentence_accuracy": "Accuracy on sentence pairs",
  "mrr": "Mean reciprocal rank",
  "recall_at_1": "Recall at 1",
  "recall_at_10": "Recall at 10",
  "learning_rate": "Learning rate",
  "norm": "Gradient and update norms",
  "tokens_per_second": "Tokens per second",
  "mfu": "Model FLOPs utilisation",
}
SHARED_PANELS = {"grad_norm": "norm", "update_norm": "norm"}
LABELS = {"heldout": "held-out", "grad_norm": "gradient", "update_norm": "update"}
REDUNDANT_METRICS = {"perplexity", "model_flops_per_second"}  # another panel has their shape; tables have their numbers
BASELINES = {  # {name: (metrics to compare with, of which the first that the run has counts; label)}
  "unigram": (("bits_per_byte",), "byte frequencies"),
  "gzip": (("bits_per_byte",), "gzip"),
  "lzma": (("bits_per_byte",), "xz"),
  "lzma_primed": (("bits_per_byte",), "xz after the training text"),
  "unigram_loss": (("loss",), "token frequencies"),
  "unigram_accuracy": (("masked_accuracy", "accuracy"), "most frequent token"),
  "bm25_mrr": (("mrr",), "BM25"),
  "bm25_recall_at_1": (("recall_at_1",), "BM25"),
  "bm25_recall_at_10": (("recall_at_10",), "BM25"),
}
RANKED_METRICS = {"bits_per_byte": "lower", "loss": "lower", "mrr": "higher"}  # {metric: which values are better}


@dataclasses.dataclass(frozen=True)
class Run:
  """The contents of a workdir."""

  workdir: Path
  curves: Mapping[str, Curve]
  baselines: Mapping[str, Mapping[str, float]]  # {metric: {label: value}}
  samples: list[Sample]
  config: ConfigTree  # flat: {"optim.lr": 1e-3}; empty if the workdir has none

  @property
  def step(self) -> int:
    """The last step that was logged."""
    return max(steps[-1] for steps, _ in self.curves.values())


class RankedValue(NamedTuple):
  """A value of the run or of a baseline."""

  label: str
  value: float
  is_run: bool
  fraction: float  # of the largest value in the ranking


def load_run(workdir: str | Path) -> Run:
  """Return the contents of a workdir.

  Raises:
    ConfigError: the folder is missing, has no metrics, or has a file that cannot be parsed.
  """
  workdir = as_path(workdir)
  curves = read_curves(workdir)
  config: ConfigTree = {}
  path = workdir / "config.json"
  if path.is_file():
    try:
      config = flatten_config(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
      raise ConfigError(f"{path} is not a JSON object ({error}). Fix it, or move it away.") from error
  baselines: dict[str, dict[str, float]] = {}
  measured = {split_metric_name(name)[0] for name in curves}
  for name in [name for name in curves if name.startswith("baseline/")]:
    key = name.removeprefix("baseline/")
    metrics, label = BASELINES.get(key, (("bits_per_byte",), key))
    metric = next((metric for metric in metrics if metric in measured), metrics[-1])
    baselines.setdefault(metric, {})[label] = curves.pop(name)[1][-1]
  if not curves:
    raise ConfigError(f"{workdir / METRICS_FILE} holds baselines only: the run has not logged a step yet")
  return Run(workdir, curves, baselines, read_samples(workdir), config)


def split_metric_name(name: str) -> tuple[str, str]:
  """Return (metric, source): ("loss", "heldout") for "eval/heldout/loss", ("loss", "train") for "train/loss"."""
  *source, metric = name.split("/")
  return metric, "/".join(source[1:] if len(source) > 1 and source[0] == "eval" else source)


def metric_title(metric: str) -> str:
  return TITLES.get(metric, metric.replace("_", " ").capitalize())


def metric_panels(run: Run) -> list[Panel]:
  """Return a panel for each metric that has a finite value, with the curves of all sources."""
  curves: dict[str, dict[str, Curve]] = {}
  for name in sorted(run.curves, key=lambda name: (not name.startswith("train/"), name)):
    metric, source = split_metric_name(name)
    if metric not in REDUNDANT_METRICS and any(math.isfinite(v) for v in run.curves[name][1]):
      key = SHARED_PANELS.get(metric, metric)
      label = LABELS.get(source, source) if key == metric else LABELS[metric]
      curves.setdefault(key, {})[label] = run.curves[name]
  keys = [*(key for key in TITLES if key in curves), *sorted(set(curves) - set(TITLES))]
  levels = {
    metric: {label: value for label, value in values.items() if math.isfinite(value)}
    for metric, values in run.baselines.items()
  }
  return [Panel(key, metric_title(key), curves[key], levels.get(key, {})) for key in keys]


def final_table(run: Run) -> tuple[list[str], list[list[str]]]:
  """Return the last values as a table: (sources, [[metric, value for each source], ...])."""
  values = {}
  for name, (_, curve) in run.curves.items():
    metric, source = split_metric_name(name)
    values[metric, source] = format_metric(last_value(curve, metric), metric)
  sources = sorted({source: None for _, source in values}, key=lambda s: s != "train")
  metrics = sorted({metric for metric, _ in values}, key=lambda m: ([*TITLES, m].index(m), m))
  return sources, [[metric, *(values.get((metric, source), "") for source in sources)] for metric in metrics]


def rankings(run: Run) -> dict[str, list[RankedValue]]:
  """Return {title: held-out values of the run and its baselines, the best first} of the metrics that have baselines."""
  ranked = {}
  for metric, better in RANKED_METRICS.items():
    if metric not in run.baselines:
      continue
    values = [(label, value, False) for label, value in run.baselines[metric].items()]
    for name, (_, curve) in run.curves.items():
      what, source = split_metric_name(name)
      if what == metric and source != "train" and "/" not in source:  # a slash: of one component of the objective
        values.append((f"this run, {LABELS.get(source, source)}", last_value(curve, metric), True))
    finite = sorted((v for v in values if math.isfinite(v[1])), key=lambda v: v[1], reverse=better == "higher")
    largest = max((value for _, value, _ in finite), default=1.0) or 1.0
    title = f"held-out {metric_title(metric).lower()}, {better} is better"
    ranked[title] = [RankedValue(label, value, is_run, value / largest) for label, value, is_run in finite]
  return ranked


def milestone_samples(run: Run) -> list[tuple[str, Sample]]:
  """Return (stage, sample) for each name: the first sample, one after about a tenth of the run, and the last."""
  milestones = []
  for name in dict.fromkeys(sample["name"] for sample in run.samples):
    samples = [sample for sample in run.samples if sample["name"] == name]
    early = min(samples[1:-1], key=lambda s: abs(s["step"] - run.step / 10), default=None)
    if len(samples) > 1:
      milestones.append(("start" if samples[0]["step"] == 0 else "first", samples[0]))
    if early:
      milestones.append(("early", early))
    milestones.append(("end" if samples[-1]["step"] == run.step else "last", samples[-1]))
  return milestones


def sample_prompt(run: Run, sample: Sample) -> str:
  """Return the prompt that a sample continues, "" if it is not known."""
  prompt = sample["prompt"] or run.config.get(f"evals.{sample['name']}.prompt") or ""
  return replace_control_characters(prompt) if sample["text"].startswith(prompt) else ""


def describe_run(run: Run) -> str:
  """Return steps, tokens, objective, data, optimizer and speed in one line."""
  config, total = run.config, run.config.get("total_steps")
  planned = f"of {total:,} " if isinstance(total, int) and total > run.step else ""
  parts = [f"{run.step:,} {planned}steps"]
  rows, length = config.get("batch_size"), config.get("seq_len")
  if isinstance(rows, int) and isinstance(length, int):
    parts.append(f"{format_number(run.step * rows * length)} tokens")
  parts += [str(config[key]) for key in ("objective.name", "data.corpus.name", "optim.name") if key in config]
  speeds = [v for v in run.curves.get("train/tokens_per_second", ([], []))[1] if math.isfinite(v)]
  parts += [f"{format_number(statistics.median(speeds))} tokens/s"] if speeds else []
  return " · ".join(parts)

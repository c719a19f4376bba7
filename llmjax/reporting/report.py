"""What a run has come to, from the files in its workdir: a picture, a page that stands alone, a block of text."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import os
import shlex
import shutil
import statistics
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmjax.config import ConfigError, flatten_config
from llmjax.reporting.html import fold, picture, section, table, whole
from llmjax.reporting.plots import Curve, Panel, last, number, poster, svg
from llmjax.storage.buckets import as_path
from llmjax.telemetry.curves import CURVES, SAMPLES, read_curves, read_samples
from llmjax.telemetry.progress import human_number, printable

TITLES = {  # panels come in this order, then those of other metrics
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
SHARED = {"grad_norm": "norm", "update_norm": "norm"}
LABELS = {"heldout": "held-out", "grad_norm": "gradient", "update_norm": "update"}
SAME_SHAPE = {"perplexity", "model_flops_per_second"}  # as another panel's; their numbers are in the tables
YARDSTICKS = {  # {name: (the metrics that it may be held against, of which the run's first counts; its label)}
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
RANKED = {"bits_per_byte": "less", "loss": "less", "mrr": "more"}  # in words and bars, and which is better


@dataclasses.dataclass(frozen=True)
class Run:
  """What a workdir holds."""

  workdir: Path
  curves: Mapping[str, Curve]
  baselines: Mapping[str, Mapping[str, float]]  # {metric: {label: value}}
  samples: list[dict[str, Any]]
  config: Mapping[str, Any]  # flat: {"optim.lr": 1e-3}; empty where the workdir has none

  @property
  def step(self) -> int:
    return max(steps[-1] for steps, _ in self.curves.values())


def load_run(workdir: str | Path) -> Run:
  """Reads a workdir.

  Raises:
    ConfigError: it is missing, has no metrics, or a file in it cannot be read.
  """
  workdir = as_path(workdir)
  curves = read_curves(workdir)
  config: dict[str, Any] = {}
  path = workdir / "config.json"
  if path.is_file():
    try:
      config = flatten_config(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
      raise ConfigError(f"{path} is not a JSON object ({error}); mend it, or move it away to do without") from error
  baselines: dict[str, dict[str, float]] = {}
  measured = {split(name)[0] for name in curves}
  for name in [name for name in curves if name.startswith("baseline/")]:
    key = name.removeprefix("baseline/")
    metrics, label = YARDSTICKS.get(key, (("bits_per_byte",), key))
    metric = next((metric for metric in metrics if metric in measured), metrics[-1])
    baselines.setdefault(metric, {})[label] = curves.pop(name)[1][-1]
  if not curves:
    raise ConfigError(f"{workdir / CURVES} holds baselines only: the run has not logged a step yet")
  return Run(workdir, curves, baselines, read_samples(workdir), config)


def split(name: str) -> tuple[str, str]:
  """A metric's name to (what, who): "eval/heldout/loss" -> ("loss", "heldout"), "train/loss" -> ("loss", "train")."""
  *who, what = name.split("/")
  return what, "/".join(who[1:] if len(who) > 1 and who[0] == "eval" else who)


def panels(run: Run) -> list[Panel]:
  """Metrics of one kind share a panel, whoever measured them. At least one, where any value is finite."""
  grouped: dict[str, dict[str, Curve]] = {}
  for name in sorted(run.curves, key=lambda name: (not name.startswith("train/"), name)):
    what, who = split(name)
    if what not in SAME_SHAPE and any(math.isfinite(v) for v in run.curves[name][1]):
      key = SHARED.get(what, what)
      grouped.setdefault(key, {})[LABELS.get(who, who) if key == what else LABELS[what]] = run.curves[name]
  levels = {what: {k: v for k, v in of.items() if math.isfinite(v)} for what, of in run.baselines.items()}
  order = [*(k for k in TITLES if k in grouped), *sorted(set(grouped) - set(TITLES))]
  return [Panel(k, heading(k), grouped[k], levels.get(k, {})) for k in order]


def heading(what: str) -> str:
  return TITLES.get(what, what.replace("_", " ").capitalize())


def finals(run: Run) -> tuple[list[str], list[list[str]]]:
  """The last numbers as a table: (who measured, [[what, a number for each who], ...])."""
  values = {split(name): number(last(curve[1], split(name)[0]), split(name)[0]) for name, curve in run.curves.items()}
  everyone = list(dict.fromkeys(who for _, who in values))
  who = sorted(everyone, key=lambda w: (w != "train", w))
  what = sorted({what for what, _ in values}, key=lambda w: ([*TITLES, w].index(w), w))
  return who, [[w, *(values.get((w, x), "") for x in who)] for w in what]


Ranking = list[tuple[str, float, bool]]  # (label, value, is it this run's)


def rankings(run: Run) -> dict[str, Ranking]:
  """{what is measured and which is better: the run beside its baselines, the best first}."""
  found = {}
  for metric in [metric for metric in RANKED if metric in run.baselines]:
    rows = [(label, value, False) for label, value in run.baselines[metric].items()]
    for name, curve in run.curves.items():
      what, who = split(name)
      if what == metric and who != "train" and "/" not in who:  # a slash: of one part of the objective
        rows.append((f"this run, {LABELS.get(who, who)}", last(curve[1], what), True))
    rows = sorted((row for row in rows if math.isfinite(row[1])), key=lambda row: row[1])
    title = f"held-out {heading(metric).lower()}, {RANKED[metric]} is better"
    found[title] = rows[::-1] if RANKED[metric] == "more" else rows
  return found


def stages(run: Run) -> list[tuple[str, dict[str, Any]]]:
  """A few samples in time order, of each name: the first, one after about a tenth of the run, the last."""
  out = []
  for name in dict.fromkeys(sample["name"] for sample in run.samples):
    mine = [sample for sample in run.samples if sample["name"] == name]
    early = min(mine[1:-1], key=lambda s: abs(s["step"] - run.step / 10), default=None)
    first, final = ("start" if mine[0]["step"] == 0 else "first"), ("end" if mine[-1]["step"] == run.step else "last")
    out += [(first, mine[0])] if len(mine) > 1 else []
    out += [("early", early)] if early else []
    out += [(final, mine[-1])]
  return out


def facts(run: Run) -> str:
  """The run in one line."""
  config, total = run.config, run.config.get("total_steps")
  of = f"of {total:,} " if isinstance(total, int) and total > run.step else ""
  parts = [f"{run.step:,} {of}steps"]
  rows, length = config.get("batch_size"), config.get("seq_len")
  if isinstance(rows, int) and isinstance(length, int):
    parts.append(f"{human_number(run.step * rows * length)} tokens")
  names = [str(config[key]) for key in ("objective.name", "data.corpus.name", "optim.name") if key in config]
  parts += [" · ".join(names)] if names else []
  speeds = [v for v in run.curves.get("train/tokens_per_second", ([], []))[1] if math.isfinite(v)]
  parts += [f"{human_number(statistics.median(speeds))} tokens/s"] if speeds else []
  return " · ".join(parts)


def write_report(workdir: str | Path) -> tuple[Path, Path]:
  """Writes `workdir`/report.png and report.html (one file, no network); returns their paths.

  Raises:
    ConfigError: no such folder, or nothing has been logged there.
  """
  run = load_run(workdir)
  shown = panels(run)
  png, page = run.workdir / "report.png", run.workdir / "report.html"
  if not shown:
    raise ConfigError(f"{run.workdir / CURVES} has no finite number to draw; every value is NaN or infinite")
  png.write_bytes(poster(shown[:7], run.workdir.resolve().name, facts(run)))
  page.write_bytes(_page(run, shown).encode("utf-8", "replace"))
  return png, page


def _page(run: Run, shown: list[Panel]) -> str:
  who, rows = finals(run)

  def drawn(i: int, panel: Panel) -> str:
    return picture(lambda theme: svg(panel, theme, i == 0), panel.title)

  first, *others = (drawn(i, panel) for i, panel in enumerate(shown))
  parts = [
    f'<div class="wide lead">{first}</div>',
    f'<div class="small">{"".join(others)}</div>' if others else "",
    section("Final numbers", table(["", *(LABELS.get(w, w) for w in who)], rows)),
    *(section(title.capitalize(), _bars(rows)) for title, rows in rankings(run).items()),
    section("What it writes", "".join(_sample(run, *stage) for stage in stages(run))) if run.samples else "",
    fold(f"All {len(run.samples)} samples", (_sample(run, "", s) for s in run.samples)) if run.samples else "",
    fold("Configuration", [table(["", ""], [[k, json.dumps(v)] for k, v in run.config.items()])]) if run.config else "",
  ]
  return whole(run.workdir.resolve().name, facts(run), parts)


def _bars(rows: Ranking) -> str:
  most = max((value for _, value, _ in rows), default=1.0) or 1.0
  lines = (
    f"<tr{' class=mine' if mine else ''}><td>{html.escape(label)}<td>{value:.3f}"
    f'<td><i style="width:{100 * value / most:.1f}%"></i>'
    for label, value, mine in rows
  )
  return f'<div class="wide"><table class="bars">{"".join(lines)}</table></div>'


def _sample(run: Run, stage: str, sample: Mapping[str, Any]) -> str:
  text, prompt = printable(sample["text"]), _prompt(run, sample)
  body = f"<b>{html.escape(prompt)}</b>{html.escape(text.removeprefix(prompt))}"
  label = html.escape(" · ".join(filter(None, (stage, sample["name"], f"step {sample['step']:,}"))))
  return f'<div class="sample"><span>{label}</span><pre>{body}</pre></div>'


def _prompt(run: Run, sample: Mapping[str, Any]) -> str:
  """What a sample was asked to continue, "" where that is not known."""
  prompt = sample["prompt"] or run.config.get(f"evals.{sample['name']}.prompt") or ""
  return printable(prompt) if sample["text"].startswith(prompt) else ""


def summary(workdir: str | Path) -> str:
  """A run in plain text: last numbers, baselines, samples, where things lie and what to do next.

  Raises:
    ConfigError: no such folder, or nothing has been logged there.
  """
  run = load_run(workdir)
  who, rows = finals(run)
  blocks = [f"{workdir}: {facts(run)}"]
  for title, ranked in rankings(run).items():
    most = max((value for _, value, _ in ranked), default=1.0) or 1.0
    bars = (f"  {v:6.3f}  {'█' * max(round(24 * v / most), 1):<24}  {'→ ' * me}{label}" for label, v, me in ranked)
    blocks.append("\n".join([title, *bars]))
  head = ["", *(LABELS.get(w, w) for w in who)]
  widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
  lines = ("  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in [head, *rows])
  blocks.append("\n".join(["last numbers", *(line.rstrip() for line in lines)]))
  for stage, sample in stages(run):
    blocks.append(f"{sample['name']} at step {sample['step']:,} ({stage})\n{_excerpt(sample['text'])}")
  there = [
    name for name in ("report.html", "report.png", CURVES, SAMPLES, "tensorboard") if (run.workdir / name).exists()
  ]
  blocks.append("\n".join(["in this folder: " + ", ".join(there), *_next(run)]))
  return "\n\n".join(blocks)


def _excerpt(text: str, lines: int = 8, width: int = 100) -> str:
  """The beginning of a text, indented, folded to `width`."""
  folded = [
    part for line in printable(text).rstrip().expandtabs(4).split("\n") for part in textwrap.wrap(line, width) or [""]
  ]
  return textwrap.indent("\n".join([*folded[:lines], *(["…"] if len(folded) > lines else [])]), "  │ ", lambda _: True)


def _next(run: Run) -> list[str]:
  """Commands to go on with, as they can be typed here."""
  script = "llmjax" if shutil.which("llmjax") else os.path.relpath(Path(sys.executable).with_name("llmjax"))
  prompts = [_prompt(run, sample).strip() for sample in run.samples]
  if not any(prompts):
    return []
  prompt = next(filter(None, reversed(prompts))).splitlines()[0]
  return [f"next: {script} generate --model={shlex.quote(str(run.workdir))} --prompt={shlex.quote(prompt)}"]

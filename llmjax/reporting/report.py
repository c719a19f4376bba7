"""Report a run from the files in its workdir: a figure, a page, and a text summary."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import sys
import textwrap
from pathlib import Path

from llmjax.config import ConfigError
from llmjax.reporting import runs
from llmjax.reporting.pages import render_page, themed_image
from llmjax.reporting.plots import Panel, draw_poster, panel_svg
from llmjax.reporting.runs import LABELS, Run, describe_run, load_run, sample_prompt
from llmjax.telemetry.curves import METRICS_FILE, SAMPLES_FILE, Sample
from llmjax.telemetry.progress import replace_control_characters

MAX_POSTER_PANELS = 7
OUTPUT_NAMES = ("report.html", "report.png", METRICS_FILE, SAMPLES_FILE, "tensorboard")


def write_report(workdir: str | Path) -> tuple[Path, Path]:
  """Write `workdir`/report.png and report.html, one file without links; return their paths.

  Raises:
    ConfigError: the folder does not exist, or nothing has been logged there.
  """
  run = load_run(workdir)
  panels = runs.metric_panels(run)
  png, page = run.workdir / "report.png", run.workdir / "report.html"
  if not panels:
    raise ConfigError(f"{run.workdir / METRICS_FILE} has no finite number to draw; every value is NaN or infinite")
  png.write_bytes(draw_poster(panels[:MAX_POSTER_PANELS], run.workdir.resolve().name, describe_run(run)))
  page.write_bytes(_render_run(run, panels))
  return png, page


def _render_run(run: Run, panels: list[Panel]) -> bytes:
  images = [
    themed_image(panel.title, functools.partial(panel_svg, panel, is_wide=panel is panels[0])) for panel in panels
  ]
  sources, rows = runs.final_table(run)
  return render_page(
    "reporting/run.html",
    title=run.workdir.resolve().name,
    subtitle=describe_run(run),
    images=images,
    final_head=["", *(LABELS.get(source, source) for source in sources)],
    final_rows=rows,
    rankings=runs.rankings(run),
    milestones=[_sample_fields(run, sample, stage) for stage, sample in runs.milestone_samples(run)],
    all_samples=[_sample_fields(run, sample) for sample in run.samples],
    config=[(key, json.dumps(value)) for key, value in run.config.items()],
  )


def _sample_fields(run: Run, sample: Sample, stage: str = "") -> dict[str, str]:
  prompt = sample_prompt(run, sample)
  return {
    "label": " · ".join(filter(None, (stage, sample["name"], f"step {sample['step']:,}"))),
    "prompt": prompt,
    "continuation": replace_control_characters(sample["text"]).removeprefix(prompt),
  }


def summary(workdir: str | Path) -> str:
  """Return a run as plain text: final numbers, baselines, samples, files, and a command to try next.

  Raises:
    ConfigError: the folder does not exist, or nothing has been logged there.
  """
  run = load_run(workdir)
  blocks = [f"{workdir}: {describe_run(run)}"]
  for title, ranked in runs.rankings(run).items():
    bars = (
      f"  {entry.value:6.3f}  {'█' * max(round(24 * entry.fraction), 1):<24}  {'→ ' * entry.is_run}{entry.label}"
      for entry in ranked
    )
    blocks.append("\n".join([title, *bars]))
  blocks.append("\n".join(["final numbers", *_final_lines(run)]))
  for stage, sample in runs.milestone_samples(run):
    blocks.append(f"{sample['name']} at step {sample['step']:,} ({stage})\n{_excerpt(sample['text'])}")
  files = [name for name in OUTPUT_NAMES if (run.workdir / name).exists()]
  blocks.append("\n".join(["in this folder: " + ", ".join(files), *_next_command(run)]))
  return "\n\n".join(blocks)


def _final_lines(run: Run) -> list[str]:
  sources, rows = runs.final_table(run)
  rows = [["", *(LABELS.get(source, source) for source in sources)], *rows]
  widths = [max(map(len, column)) for column in zip(*rows)]
  return ["  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def _excerpt(text: str, max_lines: int = 8, width: int = 100) -> str:
  """Return the beginning of a text, wrapped and indented."""
  lines = replace_control_characters(text).rstrip().expandtabs(4).split("\n")
  wrapped = [part for line in lines for part in textwrap.wrap(line, width) or [""]]
  shown = [*wrapped[:max_lines], *(["…"] if len(wrapped) > max_lines else [])]
  return textwrap.indent("\n".join(shown), "  │ ", lambda _: True)


def _next_command(run: Run) -> list[str]:
  """Return a command that generates from the newest prompt, if there is one."""
  prompts = [prompt for sample in run.samples if (prompt := sample_prompt(run, sample).strip())]
  if not prompts:
    return []
  script = "llmjax" if shutil.which("llmjax") else os.path.relpath(Path(sys.executable).with_name("llmjax"))
  prompt = shlex.quote(prompts[-1].splitlines()[0])
  return [f"next: {script} generate --model={shlex.quote(str(run.workdir))} --prompt={prompt}"]

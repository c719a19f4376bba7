"""The report of a run: its contents, a page without links, and unusual names and numbers."""

import json
import math
import re
import struct
from html.parser import HTMLParser

import pytest

from llmjax.config import ConfigError
from llmjax.reporting import report
from llmjax.reporting.plots import format_metric, last_value
from llmjax.reporting.runs import RankedValue, final_table, load_run, metric_panels, rankings
from llmjax.telemetry.writers import MetricWriter

PROMPT = "def f(x):\n"


def write_run(workdir, curves, samples=(), config=None):
  """Write a run.

  Args:
    curves: {name: {step: value}}.
    samples: (step, text) pairs.
  """
  writer = MetricWriter(workdir, tensorboard=False)
  for name, values in curves.items():
    for step, value in values.items():
      writer.write(step, {name: value})
  for step, text in samples:
    writer.write_text(step, "sample", text, prompt=PROMPT)
  writer.close()
  if config is not None:
    (workdir / "config.json").write_text(json.dumps(config))
  return workdir


@pytest.fixture
def workdir(tmp_path):
  falling = {s: 1.5 + 3 * math.exp(-s / 100) for s in range(0, 501, 5)}
  return write_run(
    tmp_path / "my $run$ <1>",
    {
      "train/loss": falling,
      "train/bits_per_byte": falling,
      "train/learning_rate": {s: 1e-3 for s in falling},
      "eval/heldout/bits_per_byte": {0: 5.0, 250: 2.0, 500: 1.75},
      "baseline/gzip": {0: 2.25},
      "baseline/lzma_primed": {0: 1.625},
    },
    [(s, PROMPT + f"  <b>{s}</b> & \x1b[2J") for s in range(0, 501, 50)],
    {"total_steps": 500, "batch_size": 4, "seq_len": 8, "optim": {"name": "adamw"}, "evals": {}},
  )


def test_summary_ranks_the_run_among_the_baselines(workdir):
  text = report.summary(workdir)
  ranks = [text.index(word) for word in ("1.625", "→ this run, held-out", "2.250")]
  assert ranks == sorted(ranks)
  assert "500 steps" in text and "16k tokens" in text
  assert [int(step) for step in re.findall(r"at step (\d+) \(", text)] == [0, 50, 500]  # start, early, end
  assert "\x1b" not in text
  assert f"generate --model='{workdir}' --prompt='def f(x):'" in text


def test_baselines_are_shown_with_their_metric(tmp_path):
  run = {"train/loss": 5.0, "eval/heldout/loss": 2.5, "eval/heldout/contrastive/loss": 1.0, "eval/pairs/mrr": 0.25}
  run |= {"eval/heldout/masked_accuracy": 0.5, "train/contrastive/accuracy": 1.0}
  baselines = {"unigram_loss": 6.0, "unigram_accuracy": 0.125, "bm25_mrr": 0.75}
  curves = {**run, **{f"baseline/{name}": value for name, value in baselines.items()}}
  write_run(tmp_path, {name: {1: value} for name, value in curves.items()})
  levels = {panel.metric: panel.levels for panel in metric_panels(load_run(tmp_path))}
  assert levels["loss"] == {"token frequencies": 6.0} and levels["mrr"] == {"BM25": 0.75}
  assert levels["masked_accuracy"] == {"most frequent token": 0.125} and not levels["accuracy"]
  loss, mrr = (
    rankings(load_run(tmp_path))[f"held-out {what} is better"]
    for what in ("loss, lower", "mean reciprocal rank, higher")
  )
  assert loss == [
    RankedValue("this run, held-out", 2.5, True, 2.5 / 6),
    RankedValue("token frequencies", 6.0, False, 1.0),
  ]
  assert mrr == [RankedValue("BM25", 0.75, False, 1.0), RankedValue("this run, pairs", 0.25, True, 1 / 3)]
  assert "bits per byte" not in report.summary(tmp_path)
  assert "Held-out loss, lower is better" in report.write_report(tmp_path)[1].read_text()


def test_report_png_is_1600_wide_and_its_page_has_no_links(workdir):
  png, page = report.write_report(workdir)
  assert png.read_bytes()[:4] == b"\x89PNG"
  assert struct.unpack(">I", png.read_bytes()[16:20]) == (1600,)
  text = page.read_text()
  assert text.count("<picture>") == 3  # bits per byte, loss, learning rate
  assert "&lt;b&gt;500&lt;/b&gt; &amp;" in text and "my $run$ &lt;1&gt;" in text
  assert "optim.name" in text and "All 11 samples" in text

  class Links(HTMLParser):
    def handle_starttag(self, tag, attributes):
      assert tag not in ("script", "link", "iframe")
      for name, value in attributes:
        if name in ("src", "srcset", "href"):
          assert value.startswith("data:"), value

  Links().feed(text)


def test_final_table_has_the_numbers_of_the_labels(workdir):
  run = load_run(workdir)
  columns, rows = final_table(run)
  assert columns == ["train", "heldout"]
  table = {row[0]: row[1:] for row in rows}
  assert table["bits_per_byte"] == [
    format_metric(last_value(run.curves["train/bits_per_byte"][1], "bits_per_byte")),
    "1.75",
  ]
  assert table["learning_rate"] == ["0.001", ""]


@pytest.mark.parametrize(
  "curves",
  [
    {"train/loss": {1: 2.0}},
    {"train/loss": {1: math.nan, 2: 3.0, 3: math.inf}},
    {"train/loss": {s: (math.nan if s % 3 else -s) for s in range(100)}},
    {"eval/a/b/f1": {10: 0.0}, "odd name": {3: 1e-30, 4: 1e30}},
    {"train/grad_norm": {s: 0.0 for s in range(50)}, "train/mfu": {1: 0.0}},
    {"eval/x/bits_per_byte": {0: 1.0}, "baseline/gzip": {0: math.nan}, "baseline/new": {0: 1.0}},
    {f"eval/split{i}/loss": {0: 1.0, 1: 1.0} for i in range(30)},
  ],
  ids=["a point", "nan", "negative", "odd names", "zeros", "equal levels", "many"],
)
def test_report_is_written_for_unusual_names_and_numbers(tmp_path, curves):
  png, page = report.write_report(write_run(tmp_path, curves))
  assert png.stat().st_size > 1000 and page.stat().st_size > 1000
  assert "final numbers" in report.summary(tmp_path)


@pytest.mark.parametrize(
  "curves, message",
  [
    ({}, "empty"),
    ({"baseline/gzip": {0: 2.0}}, "baselines only"),
    ({"train/loss": {1: math.nan}}, "no finite number"),
  ],
)
def test_report_without_curves_is_one_line_error(tmp_path, curves, message):
  with pytest.raises(ConfigError, match=message) as error:
    report.write_report(write_run(tmp_path, curves))
  assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_report_of_missing_or_broken_files_is_one_line_error(tmp_path, workdir):
  with pytest.raises(ConfigError, match="does not exist"):
    report.summary(tmp_path / "no")
  with pytest.raises(ConfigError, match=r"has no metrics\.jsonl"):
    report.write_report(tmp_path)
  (workdir / "config.json").write_text("{")
  with pytest.raises(ConfigError, match=r"config\.json is not a JSON object"):
    report.summary(workdir)

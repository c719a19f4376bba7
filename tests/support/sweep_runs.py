"""Runs of trials, as files of metrics without a training."""

import json
from pathlib import Path

METRIC = "eval/heldout/loss"
FACTS = {"parameters": 10, "steps": 5, "tokens": 8, "flops": 100.0}


def log_metrics(job, *records, mode="w"):
  """Write records to the metrics file of a trial."""
  path = Path(job.workdir) / "metrics.jsonl"
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, mode) as file:
    file.writelines(json.dumps(record) + "\n" for record in records)

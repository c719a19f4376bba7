"""Check all trials of a sweep before any starts, in a process that frees the devices when it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from llmjax.config import ConfigError
from llmjax.sweeps.job import Job, TrialFacts
from llmjax.sweeps.trials import Sweep
from llmjax.training.early_stopping import check_metric


def check_jobs(plan: Sweep, jobs: Sequence[Job], to_compile: Iterable[str], environment: Mapping[str, str]) -> None:
  """Set the facts of all trials.

  Args:
    plan: the sweep, whose metric all trials must measure.
    jobs: its trials.
    to_compile: names of the trials to compile for the devices of this machine; none if the devices are elsewhere.
    environment: environment variables of a trial, which select its devices.
  Raises:
    ConfigError: some trials cannot run, with the reasons.
  """
  flags = {job.name: [flag for flag in job.arguments[1:] if not flag.startswith("--workdir=")] for job in jobs}
  with tempfile.TemporaryDirectory() as folder:
    request, output = Path(folder) / "request.json", Path(folder) / "output.json"
    request.write_text(json.dumps({"trials": flags, "to_compile": list(to_compile)}), encoding="utf-8")
    words = [sys.executable, "-m", "llmjax", "sweep", f"--admit={request}", f"--workdir={output}"]
    code = subprocess.run(words, check=False, env={**os.environ, **environment}).returncode
    if code:
      raise ConfigError(f"the check of the trials ended with exit code {code}; no trial was started")
    facts: dict[str, TrialFacts] = json.loads(output.read_text(encoding="utf-8"))
  failed: dict[str, list[str]] = {}  # {reason: names}
  for job in jobs:
    job.facts = facts[job.name]
    error = job.facts.get("error") or metric_error(plan, job.facts["evals"])
    if error:
      failed.setdefault(error, []).append(job.name)
  if failed:
    reasons = []
    for error, names in failed.items():
      others = f" and {len(names) - 1} more" if names[1:] else ""
      reasons.append(f"trial {names[0]}{others}: {error}")
    raise ConfigError("no trial was started: " + "; ".join(reasons))


def check_request(request: str, output: str) -> None:
  """Check the trials of the file `request`, and write their facts: the process that `check_jobs` starts."""
  from llmjax.sweeps import trial_checks

  asked = json.loads(Path(request).read_text(encoding="utf-8"))
  facts = trial_checks.check_trials(asked["trials"], asked["to_compile"])
  Path(output).write_text(json.dumps(facts), encoding="utf-8")


def metric_error(plan: Sweep, evals: Iterable[str]) -> str:
  """Return the reason why a trial with these evaluations does not measure the sweep's metric, "" if it does."""
  try:
    if not plan.metric.startswith("train/"):
      check_metric(plan.metric, plan.mode, dict.fromkeys(evals), "Sweep.metric", "Sweep.mode")
  except ConfigError as error:
    return str(error)
  return ""

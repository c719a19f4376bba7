"""Answers to the records of a JSONL file, for `llmjax predict`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llmjax.checkpoints.paths import open_path
from llmjax.config import ConfigError, Json
from llmjax.config.mesh import RULES
from llmjax.data.sources.paths import json_error
from llmjax.data.sources.registry import source_kind
from llmjax.distributed import processes, sharding
from llmjax.inference.batches import BATCH_TOKENS
from llmjax.inference.output_files import check_output_path, replace_when_complete
from llmjax.inference.predict import PredictionSettings, check_generation, check_task, predict
from llmjax.objectives.task import Result, Task


@dataclasses.dataclass(frozen=True)
class InputLine:
  """A line of the input.

  Attributes:
    number: from 1.
    record: None if the task cannot read the line.
    error: why the task cannot read it, else empty.
  """

  number: int
  record: dict[str, Json] | None
  error: str = ""


def predict_file(
  path: str,
  input: str,
  output: str,
  *,
  min_confidence: float | None = None,
  batch_tokens: int = BATCH_TOKENS,
  mesh: Mapping[str, int] | None = None,
  generation: Mapping[str, Any] | None = None,
  trust: bool = False,
) -> tuple[int, int, list[str]]:
  """Write one line of JSON for every line of a JSONL file, in the same order.

  Args:
    path: model, see `open_path`.
    input: JSONL with the fields that the model's task reads. A field "id" is copied to the output.
    output: JSONL. A line is the result of `Task.make_result`, or {"line": number, "error": reason} for a line that
      cannot be read.
    min_confidence: write only records with at least this confidence, with all fields of the input, so that the output
      is labelled data for training. None: write all lines.
    batch_tokens: maximum of rows times length of a batch, padding included.
    mesh: sizes of the mesh axes, see `sharding.make_mesh`. None: all devices share the rows.
    generation: keywords of `llmjax.generate`, for tasks whose answers are texts.
    trust: allow the checkpoint to run code outside llmjax.

  Returns:
    The number of answers written, the number of lines of the input, and the errors of unreadable lines.

  Raises:
    ConfigError: a file, a model or a setting that cannot be used.
  """
  source_file = Path(input)
  target = _check_paths(source_file, output)
  if min_confidence is not None and not 0 <= min_confidence <= 1:
    raise ConfigError(f"--min_confidence={min_confidence} must be from 0 to 1")
  with open_path(path) as source:
    task = check_task(source.objective(trust))
    check_generation(task, generation or {})
    if min_confidence is not None and not task.has_confidence:
      raise ConfigError(f"--min_confidence={min_confidence}: the model's answers have no confidence; omit it")
    lines = list(_read_lines(source_file, task))
    if not lines:
      raise ConfigError(f"--input={input}: the file is empty")
    processes.preflight(
      lambda: {"model": processes.short_digest(source.manifest), "input": processes.short_digest(lines)}
    )
    rules = {**RULES, **source.config["rules"]}
    devices = sharding.make_mesh(mesh or {"data": -1})
    pretrained = source.load(trust, devices, rules)
  records = [line.record for line in lines if line.record is not None]
  errors = [f"{source_file}:{line.number}: {line.error}" for line in lines if line.record is None]
  settings = PredictionSettings(batch_tokens, devices, rules, generation or {})
  results = predict(pretrained.model, pretrained.params, task, records, settings)
  if min_confidence is None:
    rows = _answered_lines(lines, results)
    num_answers = len(rows) - len(errors)
  else:
    rows = _confident_records(records, results, min_confidence)
    num_answers = len(rows)
  if jax.process_index() == 0:
    with replace_when_complete(target) as partial:
      partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
  return num_answers, len(lines), errors


def _check_paths(source_file: Path, output: str) -> Path:
  """Return the path of the output, with links resolved. Raises ConfigError if one of the paths cannot be used."""
  if not source_file.is_file():
    raise ConfigError(f"--input={source_file}: the file does not exist")
  if source_kind(source_file) not in ("jsonl", "text"):
    raise ConfigError(f"--input={source_file}: predict reads JSONL, one object per line, not a file with this ending")
  if not Path(output).parent.is_dir():
    raise ConfigError(f"--output={output}: the folder {Path(output).parent} does not exist")
  return check_output_path(output, source_file)


def _answered_lines(lines: Sequence[InputLine], results: Sequence[Result]) -> list[dict[str, Json]]:
  """Return the result, or the error, of every line."""
  remaining = iter(results)
  rows: list[dict[str, Json]] = []
  for line in lines:
    if line.record is None:
      rows.append({"line": line.number, "error": line.error})
    else:
      rows.append(({"id": line.record["id"]} if "id" in line.record else {}) | next(remaining))
  return rows


def _confident_records(
  records: Sequence[dict[str, Json]], results: Sequence[Result], min_confidence: float
) -> list[dict[str, Json]]:
  """Return the records with at least this confidence, with their answers as further fields."""
  return [
    {**record, **{key: value for key, value in result.items() if key != "scores"}}
    for record, result in zip(records, results, strict=True)
    if result["confidence"] >= min_confidence
  ]


def _read_lines(path: Path, task: Task) -> Iterator[InputLine]:
  """Yield every line with its record or its error. Blank lines at the end of the file are skipped."""
  with path.open("rb") as file:
    num_blank = 0
    for number, line in enumerate(file, 1):
      if not line.strip():
        num_blank += 1
        continue
      yield from (InputLine(number - before, None, "the line is blank") for before in range(num_blank, 0, -1))
      num_blank = 0
      yield _parse_line(number, line, task)


def _parse_line(number: int, line: bytes, task: Task) -> InputLine:
  try:
    record = json.loads(line.decode("utf-8"))
    if not isinstance(record, dict):
      raise ConfigError(f"must be a JSON object, got {type(record).__name__}")
    task.check_record(record, labelled=False)
    if not task.encode_record(record, labelled=False):
      raise ConfigError("there are no tokens to read")
  except UnicodeDecodeError as error:
    return InputLine(number, None, f"byte {error.start} is not UTF-8")
  except json.JSONDecodeError as error:
    return InputLine(number, None, f"not a JSON object: {json_error(error)}")
  except ConfigError as error:
    return InputLine(number, None, str(error))
  return InputLine(number, record)

"""Embeddings of the texts of a file, for `llmjax embed`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from llmjax.checkpoints.paths import open_path
from llmjax.config import ConfigError, suggest_name
from llmjax.config.mesh import RULES
from llmjax.data.sources.registry import files_source, source_kind
from llmjax.data.sources.tables import record_fields
from llmjax.distributed import processes, sharding
from llmjax.inference.batches import BATCH_TOKENS
from llmjax.inference.embeddings import contrastive_objective, embed
from llmjax.inference.output_files import check_output_path, replace_when_complete


def embed_file(
  path: str,
  input: str,
  output: str,
  *,
  pooling: str | None = None,
  column: str | None = None,
  max_len: int | None = None,
  batch_tokens: int = BATCH_TOKENS,
  mesh: Mapping[str, int],
  trust: bool = False,
) -> tuple[Path, tuple[int, int]]:
  """Write the embeddings of a file's texts to OUTPUT.npy, and their ids, one per line, to OUTPUT.ids.txt.

  Args:
    path: model, see `open_path`.
    input: file with texts, see `read_texts`.
    output: OUTPUT.npy.
    pooling: see `embed`. None: the pooling of training, or "mean" if the model was not trained for embeddings.
    column: field with the text, see `read_texts`.
    max_len: maximum number of tokens of a text. None: seq_len of training.
    batch_tokens: see `embed`.
    mesh: sizes of the mesh axes, see `sharding.make_mesh`.
    trust: allow the checkpoint to run code outside llmjax.

  Returns:
    The path of the ids, and the shape (n, D) of the embeddings.

  Raises:
    ConfigError: a file or a setting that cannot be used.
  """
  target = Path(output)
  if target.suffix != ".npy" or not target.parent.is_dir():
    raise ConfigError(f"--output={output} must be a file FILE.npy in a folder that exists")
  target = check_output_path(target, input)
  ids_target = check_output_path(target.with_suffix(".ids.txt"), input)
  texts, ids = read_texts(input, column)
  devices = sharding.make_mesh(mesh)
  with open_path(path) as source:
    processes.preflight(
      lambda: {"model": processes.short_digest(source.manifest), "input": processes.short_digest((texts, ids))}
    )
    config = source.config
    rules = {**RULES, **config["rules"]}
    if pooling is None:
      trained = None if config["objective"] is None else contrastive_objective(source.objective(trust))
      pooling = "mean" if trained is None else trained.pooling
    source.tokenizer(trust)  # raises if there is none, before the parameters are read
    pretrained = source.load(trust, devices, rules)
  embeddings = embed(
    pretrained.model,
    pretrained.params,
    pretrained.tokenizer,
    texts,
    pooling=pooling,
    max_len=config["seq_len"] if max_len is None else max_len,
    batch_tokens=batch_tokens,
    mesh=devices,
    rules=rules,
  )
  if jax.process_index() == 0:
    with replace_when_complete(target) as partial, partial.open("wb") as file:
      np.save(file, embeddings)
    with replace_when_complete(ids_target) as partial:
      partial.write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
  count, width = embeddings.shape
  return Path(output).with_suffix(".ids.txt"), (count, width)


def read_texts(path: str, column: str | None = None) -> tuple[list[str], list[str]]:
  """Return the texts of a file, and the id of each: its field `id`, else its number from 0.

  Args:
    path: JSONL, CSV, TSV or Parquet by its ending; any other file is plain text, one text per line.
    column: the field with the text. None: "text".

  Raises:
    ConfigError: a text is empty or blank. It has no embedding, and without it all later rows would be shifted.
  """
  if not Path(path).is_file():
    raise ConfigError(f"--input={path}: the file does not exist")
  if source_kind(path) == "text":
    if column is not None:
      raise ConfigError(f"--column={column}: {path} is plain text, one text per line; omit it, or give JSONL or CSV")
    unit, texts = "line", _read_text_lines(path)
    ids = [str(i) for i in range(len(texts))]
  else:
    column = "text" if column is None else column
    known = record_fields(path)
    if column not in known:
      raise ConfigError(f"--input={path} has no field {column!r} (--column); {suggest_name(column, known)}")
    records = list(files_source("all", path, column, ["id"] if "id" in known else []))
    unit, texts = "record", [record["text"] for record in records]
    ids = [str(i if record.get("id") is None else record["id"]) for i, record in enumerate(records)]
  for number, (text, name) in enumerate(zip(texts, ids), 1):
    if not text.strip():
      raise ConfigError(f"{path}: {unit} {number} has no text, so it has no embedding; fill it, or remove it")
    if name.splitlines() != [name]:
      raise ConfigError(f"{path}: {unit} {number} has the id {name!r}, which is not one line; change it")
  return texts, ids


def _read_text_lines(path: str) -> list[str]:
  try:
    lines = Path(path).read_text(encoding="utf-8").split("\n")
  except UnicodeDecodeError as error:
    raise ConfigError(f"{path}: byte {error.start} is not UTF-8; convert the file (iconv -t UTF-8)") from error
  lines = lines[:-1] if lines[-1] == "" else lines
  if not lines:
    raise ConfigError(f"{path}: the file is empty")
  return lines

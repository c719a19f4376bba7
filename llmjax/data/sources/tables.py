"""Files of records as sources: Parquet, CSV and ArrayRecord."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmjax.config import ConfigError, suggest_name
from llmjax.data.sources.base import Record, Source, split_bounds
from llmjax.data.sources.labelled import FIELDS
from llmjax.data.sources.paths import OR_NONE, Files, expand_files, file_names, first_line, record_locator
from llmjax.data.sources.registry import source_kind
from llmjax.storage.cache import cache_dir, content_digest, file_digest, fill_cache

if TYPE_CHECKING:
  import pyarrow
  from pyarrow.dataset import Dataset

BATCH_ROWS = 8192  # rows in memory while a file is converted


def parquet_source(split: str, files: Files, text: str | None = "text", columns: Sequence[str] = ()) -> Source:
  """Return rows of Parquet files.

  Args:
    split: see `base.parse_split`.
    files: as of `text.text_source`.
    text: column to use as "text"; None: the rows need no text.
    columns: further columns to read.
  """
  return _table_source("parquet", split, files, text, tuple(columns))


def csv_source(split: str, files: Files, text: str | None = "text", columns: Sequence[str] = ()) -> Source:
  """Return rows of CSV files with a header, or of TSV files if they are named so.

  Quoted fields may contain line ends. All columns are read as text. Arguments are those of `parquet_source`.
  """
  return _table_source("csv", split, files, text, tuple(columns))


def record_fields(files: Files) -> list[str]:
  """Return the fields of a record, from the first record of the first file; "text" for plain text and ArrayRecord.

  Raises:
    ConfigError: no file matches, or the first record is not valid.
  """
  path = expand_files(files, "all")[0]
  kind = source_kind(path)
  if kind in FIELDS:
    return list(FIELDS[kind])
  if kind in ("parquet", "csv"):
    return list(_open_table(path, kind, ()).schema.names)
  if kind != "jsonl":
    return ["text"]
  try:
    with path.open("rb") as file:
      record = json.loads(next(line for line in file if line.strip()))
    if not isinstance(record, dict):
      raise ValueError(f"not an object but a {type(record).__name__}")
  except StopIteration:
    raise ConfigError(f"{path}: the file is empty. Choose a file with records") from None
  except ValueError as error:
    raise ConfigError(f"{path}: the first record is not JSON: {first_line(error)}. Fix the line") from error
  return list(record)


def _table_source(kind: str, split: str, files: Files, text: str | None, columns: tuple[str, ...]) -> Source:
  """Return rows of Arrow tables with the columns `text`, unless it is None, and `columns`.

  Parquet and CSV have no random access, so the columns are written to the cache, uncompressed, and memory-mapped.
  """
  import pyarrow

  paths = expand_files(files, split)
  wanted = tuple(dict.fromkeys((*([] if text is None else [text]), *columns)))
  if not wanted:
    known = ", ".join(record_fields([str(paths[0])]))
    raise ConfigError(f"data.corpus.columns: empty, and so is data.corpus.text. {paths[0]} has the columns {known}")

  def convert(target: Path) -> None:
    tables = [_open_table(path, kind, wanted) for path in paths]
    for path, table in zip(paths, tables):
      _check_columns(path, table.schema, text, wanted)
    schema = _cache_schema(tables[0].schema, text, wanted)
    with pyarrow.ipc.new_file(str(target), schema) as writer:
      for table in tables:
        # Arrow reads ahead by a few batches only, so that memory does not grow with the file.
        for batch in table.to_batches(columns=list(wanted), batch_size=BATCH_ROWS, batch_readahead=2):
          writer.write_table(pyarrow.Table.from_batches([batch]).cast(schema))

  name = content_digest(kind, *[None] * (text is None), wanted, [file_digest(p) for p in paths])
  try:
    path = fill_cache(cache_dir() / kind / f"{name}.arrow", convert)
  except pyarrow.ArrowException as error:
    raise ConfigError(f"data.corpus.files: cannot be read as one table: {first_line(error)}, got {files!r}") from error
  table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
  if not table.num_rows:
    raise ConfigError(f"{file_names(paths)}: no rows. Set data.corpus.files to files with rows")
  start, stop = split_bounds(split, table.num_rows)

  def read(index: int) -> Record:
    record = {column: table.column(column)[start + index].as_py() for column in wanted}
    return record if text is None else {**record, "text": record[text] or ""}

  return Source(stop - start, read, content_digest(name, start, stop), locate=record_locator(paths, start))


def _open_table(path: Path, kind: str, text_columns: Sequence[str]) -> Dataset:
  """Open a file for streaming; from CSV, `text_columns` are read as text whatever they contain."""
  import pyarrow
  from pyarrow import csv, dataset, fs

  layout = "parquet"
  if kind == "csv":
    layout = dataset.CsvFileFormat(
      csv.ParseOptions(delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True),
      convert_options=csv.ConvertOptions(column_types=dict.fromkeys(text_columns, pyarrow.string())),
    )
  try:
    return dataset.dataset(str(path.absolute()), format=layout, filesystem=fs.LocalFileSystem())
  except (pyarrow.ArrowException, OSError) as error:
    name = "Parquet" if kind == "parquet" else "CSV"
    raise ConfigError(f"{path}: cannot be read as {name}: {first_line(error)}. Check the file's format") from error


def _check_columns(path: Path, schema: pyarrow.Schema, text: str | None, wanted: tuple[str, ...]) -> None:
  """Check that the columns exist and that `text` holds strings."""
  import pyarrow

  for column in wanted:
    if column not in schema.names:
      key, way_out = ("text", f" {OR_NONE}") if column == text else ("columns", "")
      hint = suggest_name(column, schema.names)
      raise ConfigError(f"{path}: no column {column!r} (data.corpus.{key}); {hint}{way_out}")
  if text is None:
    return
  kind = _value_type(schema.field(text).type)
  if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
    raise ConfigError(
      f"{path}: column {text!r} (data.corpus.text) must hold strings, got {kind}. Choose another column"
    )


def _cache_schema(schema: pyarrow.Schema, text: str | None, wanted: tuple[str, ...]) -> pyarrow.Schema:
  """Return the schema of the wanted columns in the cache."""
  import pyarrow

  types = {column: _value_type(schema.field(column).type) for column in wanted}
  if text is not None:
    types[text] = pyarrow.large_string()  # a column may hold more than 2 GiB
  return pyarrow.schema(types.items())


def _value_type(kind: pyarrow.DataType) -> pyarrow.DataType:
  """Return the type of a column's values: Arrow files cannot hold a dictionary that grows between batches."""
  import pyarrow

  return kind.value_type if pyarrow.types.is_dictionary(kind) else kind


def array_record_source(split: str, files: Files, format: str = "text", text: str | None = "text") -> Source:
  """Return the records of ArrayRecord files.

  Args:
    split: see `base.parse_split`.
    files: as of `text.text_source`.
    format: "text": a record is UTF-8 text; "json": a JSON object.
    text: field of a JSON object to use as "text"; None: the records need no text.
  """
  from array_record.python.array_record_data_source import ArrayRecordDataSource

  if format not in ("text", "json"):
    raise ConfigError(f"data.corpus.format: must be 'text' or 'json', got {format!r}")
  paths = expand_files(files, split)
  try:
    data = ArrayRecordDataSource([str(p) for p in paths])
  except (RuntimeError, ValueError, OSError) as error:
    raise ConfigError(f"data.corpus.files: cannot be read as ArrayRecord: {error}, got {files!r}") from error
  start, stop = split_bounds(split, len(data))
  locate = record_locator(paths, start)

  def read(index: int) -> Record:
    try:
      content = data[start + index].decode("utf-8")
      if format == "text":
        return {"text": content}
      record = json.loads(content)
      return {**record} if text is None else {**record, "text": record[text]}
    except UnicodeDecodeError as error:
      raise ConfigError(f"{locate(index)}: byte {error.start} is not UTF-8. Remove the record") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
      field = "" if text is None else f" with a field {text!r} (data.corpus.text)"
      raise ConfigError(f"{locate(index)}: not a JSON object{field}. Fix the record or data.corpus.format") from error

  fingerprint = content_digest("array_record", format, text, start, stop, [file_digest(p) for p in paths])
  source = Source(stop - start, read, fingerprint, locate=locate)
  source[0]  # errors in the records are reported here, before training starts
  return source

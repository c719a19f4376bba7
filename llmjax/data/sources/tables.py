"""Sources over files of records: Parquet, CSV and ArrayRecord."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmjax.config import ConfigError, suggest_name
from llmjax.data.sources.base import Source, source_kind, split_bounds
from llmjax.data.sources.files import NO_TEXT, Files, expand, in_files
from llmjax.data.sources.labelled import FIELDS
from llmjax.storage.cache import cache_dir, content_digest, fill_cache
from llmjax.storage.digests import file_digest

Tables = Callable[[Path, tuple[str, ...]], Iterator[Any]]  # Arrow tables of a file, with at least the wanted columns


def parquet(split: str, files: Files, text: str | None = "text", columns: tuple[str, ...] = ()) -> Source:
  """Rows of Parquet files: the column `text` and further `columns`, or with text=None those alone; lists are lists."""

  def tables(path: Path, wanted: tuple[str, ...]) -> Iterator[Any]:
    with _open_parquet(path, text, wanted) as file:
      for group in range(file.num_row_groups):
        yield file.read_row_group(group, columns=list(wanted))

  return _columns("parquet", split, files, text, columns, tables)


def csv(split: str, files: Files, text: str | None = "text", columns: tuple[str, ...] = ()) -> Source:
  """Rows of CSV files with a header (TSV where the name ends so): the column `text` and further `columns`.

  With text=None the `columns` alone. Quoted fields may hold newlines; every column is read as text.
  """
  import pyarrow
  from pyarrow import csv as arrow

  def tables(path: Path, wanted: tuple[str, ...]) -> Iterator[Any]:
    convert = arrow.ConvertOptions(column_types=dict.fromkeys(wanted, pyarrow.string()))
    try:
      table = arrow.read_csv(path, parse_options=_parse_options(path), convert_options=convert)
    except pyarrow.ArrowException as error:
      raise ConfigError(f"{path}: cannot be read as CSV: {str(error).splitlines()[0]}") from error
    _check_columns(path, table.schema, text, wanted)
    yield table

  return _columns("csv", split, files, text, columns, tables)


def _parse_options(path: Path) -> Any:
  from pyarrow import csv as arrow

  return arrow.ParseOptions(delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True)


def fields(files: Files) -> list[str]:
  """What a record holds, by the first of the first file; "text" alone where that is plain text or ArrayRecord.

  Of CoNLL and SQuAD it is what `labelled.py` makes of any.

  Raises:
    ConfigError: there is no such file, or nothing of its kind in it.
  """
  import pyarrow
  from pyarrow import csv as arrow
  from pyarrow import parquet as pq

  path = expand(files, "all")[0]
  kind = source_kind(path)
  if kind in FIELDS:
    return list(FIELDS[kind])
  try:
    if kind == "parquet":
      return list(pq.read_schema(path).names)
    if kind == "csv":
      with arrow.open_csv(path, parse_options=_parse_options(path)) as reader:
        return list(reader.schema.names)
    if kind == "jsonl":
      with path.open("rb") as file:
        record = json.loads(next(line for line in file if line.strip()))
      if not isinstance(record, dict):
        raise ValueError(f"not an object but a {type(record).__name__}")
      return list(record)
  except StopIteration:
    raise ConfigError(f"{path}: the file is empty") from None
  except (pyarrow.ArrowException, ValueError) as error:
    raise ConfigError(f"{path}: the first record cannot be read as {kind}: {str(error).splitlines()[0]}") from error
  return ["text"]


def _columns(kind: str, split: str, files: Files, text: str | None, columns: tuple[str, ...], tables: Tables) -> Source:
  """Rows of the column `text`, where there is one, and `columns`.

  These formats have no random access, so the columns are written uncompressed to the cache once, and mapped from there.
  """
  import pyarrow

  paths = expand(files, split)
  wanted = tuple(dict.fromkeys((*([] if text is None else [text]), *columns)))
  if not wanted:
    known = ", ".join(fields([str(paths[0])]))
    raise ConfigError(f"data.corpus.columns is empty, and so is data.corpus.text; give some of {paths[0]}: {known}")

  def convert(target: Path) -> None:
    with contextlib.ExitStack() as stack:
      writer = None
      for path in paths:
        for table in tables(path, wanted):
          table = table.select(wanted)
          if text is not None:
            table = table.set_column(0, text, table.column(text).cast(pyarrow.large_string()))
          writer = writer or stack.enter_context(pyarrow.ipc.new_file(str(target), table.schema))
          writer.write_table(table)
      if writer is None:
        raise ConfigError(f"data.corpus.files={files!r}: no rows in {len(paths)} files")

  name = content_digest(kind, *[None] * (text is None), wanted, [file_digest(p) for p in paths])
  try:
    path = fill_cache(cache_dir() / kind / f"{name}.arrow", convert)
  except pyarrow.ArrowException as error:
    raise ConfigError(f"data.corpus.files={files!r} do not fit together: {str(error).splitlines()[0]}") from error
  table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
  if not table.num_rows:
    raise ConfigError(f"{paths[0]}{' and the others' if len(paths) > 1 else ''}: no rows (data.corpus.files)")
  start, stop = split_bounds(split, table.num_rows)

  def read(index: int) -> dict[str, Any]:
    record = {column: table.column(column)[start + index].as_py() for column in wanted}
    return record if text is None else {**record, "text": record[text] or ""}

  return Source(stop - start, read, content_digest(name, start, stop), where=in_files(paths, start))


def _open_parquet(path: Path, text: str | None, wanted: tuple[str, ...]) -> Any:
  """The file, after a look at its schema."""
  import pyarrow
  from pyarrow import parquet as pq

  try:
    file = pq.ParquetFile(path)
  except pyarrow.ArrowException as error:
    raise ConfigError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from error
  _check_columns(path, file.schema_arrow, text, wanted)
  return file


def _check_columns(path: Path, schema: Any, text: str | None, wanted: tuple[str, ...]) -> None:
  """All of them exist, and `text` holds text."""
  import pyarrow

  for column in wanted:
    if column not in schema.names:
      key, other = ("text", " " + NO_TEXT) if column == text else ("columns", "")
      raise ConfigError(
        f"{path}: no column {column!r} (data.corpus.{key}); {suggest_name(column, schema.names)}{other}"
      )
  if text is None:
    return
  kind = schema.field(text).type
  kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
  if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
    raise ConfigError(f"{path}: column {text!r} (data.corpus.text) holds {kind}, not strings")


def array_record(split: str, files: Files, format: str = "text", text: str | None = "text") -> Source:
  """Raw ArrayRecord files. `format` of a record: "text" is UTF-8, "json" an object whose field `text` is the text.

  With text=None no field of an object is.
  """
  from array_record.python.array_record_data_source import ArrayRecordDataSource

  if format not in ("text", "json"):
    raise ConfigError(f"data.corpus.format={format!r} must be 'text' or 'json'")
  paths = expand(files, split)
  try:
    data = ArrayRecordDataSource([str(p) for p in paths])
    start, stop = split_bounds(split, len(data))
  except (RuntimeError, ValueError, OSError) as error:
    if isinstance(error, ConfigError):
      raise
    raise ConfigError(f"data.corpus.files={files!r} cannot be read as ArrayRecord: {error}") from error

  def read(index: int) -> dict[str, Any]:
    where = f"record {start + index} of {paths[0]}{', ...' if len(paths) > 1 else ''}"
    try:
      content = data[start + index].decode("utf-8")
      if format == "text":
        return {"text": content}
      record = json.loads(content)
      return {**record} if text is None else {**record, "text": record[text]}
    except UnicodeDecodeError as error:
      raise ConfigError(f"{where} is not UTF-8 text (byte {error.start})") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
      field = "" if text is None else f" with a field {text!r} (data.corpus.text)"
      raise ConfigError(f"{where} is no JSON object{field}") from error

  source = Source(
    stop - start, read, content_digest("array_record", format, text, start, stop, [file_digest(p) for p in paths])
  )
  source[0]
  return source

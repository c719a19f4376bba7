"""Vectors of texts, whatever the batch, the order and the mesh.

Texts are sorted by their number of tokens, so that a batch holds little padding, and a batch is as long as the next
power of two, so that few programs compile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from llmjax.checkpoints.sources import abstract_params, load, open_path
from llmjax.config import ConfigError, suggest_name
from llmjax.data.sources.registry import files_source, source_kind
from llmjax.data.sources.tables import record_fields
from llmjax.distributed import processes, sharding
from llmjax.objectives.contrastive import POOLINGS, Contrastive, pool
from llmjax.objectives.weighted_sum import WeightedSum
from llmjax.types import Array, Batch, Objective, Outputs, Tokens

BATCH_TOKENS = 16384
SHORTEST = 16  # no batch is shorter


def embed(
  model: Any,
  params: Any,
  tokenizer: Any,
  texts: Sequence[str],
  *,
  pooling: str = "mean",
  max_len: int | None = None,
  batch_tokens: int = BATCH_TOKENS,
  mesh: Mesh | None = None,
  rules: sharding.Rules = sharding.RULES,
) -> np.ndarray:
  """Float32[n D]: a vector of length 1 for each text, in their order.

  Args:
    model: an encoder, a decoder, or both, whose encoder is then used alone.
    pooling: what a vector is made of, see `llmjax.objectives.contrastive.pool`.
    max_len: tokens of a text at most, bos and eos included; longer ones lose their end. None is all that the model
      reads.
    batch_tokens: rows times length of a batch, padding included; it holds one text a device at least.
    mesh: devices to share texts, and parameters by `rules`; None is wherever the parameters are.
  Raises:
    ConfigError: a text without tokens, or a setting that cannot work.
  """
  check_embedding_model(model.cfg, pooling, batch_tokens)
  max_len = model.cfg.max_len if max_len is None else max_len
  if max_len > model.cfg.max_len:
    raise ConfigError(f"max_len={max_len} exceeds the {model.cfg.max_len} tokens that the model reads; lower it")
  if mesh is not None:
    params = jax.device_put(params, jax.tree.map(lambda s: s.sharding, abstract_params(model, mesh, rules)))
  rows = tokenize(tokenizer, texts, max_len)
  return embed_tokens(model, params, rows, pooling=pooling, batch_tokens=batch_tokens, mesh=mesh, rules=rules)


def check_embedding_model(cfg: Any, pooling: str, batch_tokens: int) -> None:
  """What can be said before anything runs."""
  if batch_tokens < 1:
    raise ConfigError(f"batch_tokens={batch_tokens} must be at least 1")
  if pooling not in POOLINGS:
    raise ConfigError(f"pooling={pooling!r}; {suggest_name(pooling, POOLINGS)}")
  if pooling == "pooler" and not cfg.pooler:
    raise ConfigError("pooling='pooler' needs an encoder with model.pooler=True; take mean or last for this model")
  if pooling == "cls" and cfg.stacks == "decoder":
    raise ConfigError("pooling='cls' needs an encoder: a decoder's first token has seen no text; take mean or last")


def tokenize(tokenizer: Any, texts: Sequence[str], max_len: int) -> list[np.ndarray]:
  """Each text as it is in training, Int32[at most max_len], between bos and eos where there are such tokens."""
  room = max_len - len(tokenizer.frame(np.zeros(0, np.int32)))
  if room < 1:
    raise ConfigError(f"max_len={max_len} leaves no room for text between bos and eos; raise it")
  rows = [tokenizer.encode(text)[:room] for text in texts]
  for number, row in enumerate(rows):
    if not len(row):
      raise ConfigError(f"text {number} (from 0), {texts[number]!r}, has no tokens, so it has no vector; leave it out")
  return [tokenizer.frame(row) for row in rows]


def embed_tokens(
  model: Any,
  params: Any,
  rows: Sequence[np.ndarray],
  *,
  pooling: str,
  batch_tokens: int,
  mesh: Mesh | None = None,
  rules: sharding.Rules = sharding.RULES,
) -> np.ndarray:
  """`embed` of texts that are framed, and parameters that lie where they shall."""
  vectors = np.empty((len(rows), model.cfg.d_model), np.float32)

  def make(which: np.ndarray, size: int, length: int) -> Batch:
    return make_embedding_batch([rows[i] for i in which], size, length)

  def encode(batch: Batch) -> Array:
    return _encode(model, params, batch, pooling=pooling)

  lengths = np.array([len(row) for row in rows], int)
  for which, found in in_batches(encode, make, lengths, model.cfg.max_len, batch_tokens, mesh, rules):
    vectors[which] = found
  return vectors


def in_batches(
  compute: Callable[[Batch], Any],
  make: Callable[[np.ndarray, int, int], Batch],
  lengths: np.ndarray,
  longest: int,
  batch_tokens: int,
  mesh: Mesh | None,
  rules: sharding.Rules,
) -> Iterator[tuple[np.ndarray, Any]]:
  """(which rows, what `compute` gives for them, as NumPy) of each batch; the next is made while one is computed.

  Args:
    compute: a batch to arrays that are the same on every device, leaves [B ...].
    make: (which rows, rows of the batch, its length) -> the batch.
    lengths, longest, batch_tokens: see `batches`.
    mesh, rules: devices to share rows; None is wherever the parameters are.
  """
  waiting: list[tuple[np.ndarray, Any]] = []

  def fetch() -> tuple[np.ndarray, Any]:
    which, out = waiting.pop(0)
    return which, jax.tree.map(lambda x: np.asarray(x)[: len(which)], out)

  parts = 1 if mesh is None else sharding.num_batch_shards(mesh, rules)
  for which, size, length in batches(lengths, longest, batch_tokens, parts):
    batch = make(which, size, length)
    with contextlib.nullcontext() if mesh is None else sharding.use_mesh(mesh, rules):
      if mesh is not None:
        batch = put_on_mesh(batch, sharding.named_sharding(mesh, "act_batch", rules=rules))
      waiting.append((which, compute(batch)))
    if len(waiting) > 1:
      yield fetch()
  while waiting:
    yield fetch()


@functools.partial(jax.jit, static_argnames=("model", "pooling"))
def _encode(model: Any, params: Any, batch: Batch, *, pooling: str) -> Array:
  """Float[B D], the same on every device."""
  out = cast(Outputs, model.apply({"params": params}, batch, logits=False))
  hidden = out.hidden if out.encoder_hidden is None else out.encoder_hidden
  return sharding.constrain(pool(dataclasses.replace(out, hidden=hidden), batch.inputs, pooling), None, None)


def batches(lengths: np.ndarray, longest: int, batch_tokens: int, parts: int) -> Iterator[tuple[np.ndarray, int, int]]:
  """(which texts, rows, length) of each batch, the longest texts first.

  Args:
    lengths: Int[n], tokens of each text.
    longest: that a batch may be.
    parts: rows are a multiple of it.
  """
  order = np.argsort(-lengths, kind="stable")
  while len(order):
    length = min(max(_power(int(lengths[order[0]])), SHORTEST), longest)
    most = max(batch_tokens // (length * parts), 1)
    size = parts * min(most, _power(-(-len(order) // parts)))
    yield order[:size], size, length
    order = order[size:]


def _power(number: int) -> int:
  """The least power of two that is not smaller."""
  return 1 << (number - 1).bit_length()


def make_embedding_batch(rows: Sequence[np.ndarray], size: int, length: int) -> Batch:
  """Rows padded on the right, and empty ones behind them; an encoder–decoder's decoder gets a token to read."""
  ids, segments = np.zeros((2, size, length), np.int32)
  for i, row in enumerate(rows):
    ids[i, : len(row)], segments[i, : len(row)] = row, 1
  positions = np.arange(length, dtype=np.int32) * segments
  one = np.zeros((size, 1), np.int32)
  return Batch(Tokens(ids, positions, segments), Tokens(one, one, one + 1), rows=np.arange(size, dtype=np.int32))


def put_on_mesh(batch: Batch, where: jax.sharding.Sharding) -> Batch:
  """A batch that every process holds, as global arrays."""
  return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, where, lambda index: x[index]), batch)


def contrastive_part(objective: Objective) -> Contrastive | None:
  """What of an objective trains embeddings."""
  parts = objective.parts.values() if isinstance(objective, WeightedSum) else [objective]
  return next((part for part in parts if isinstance(part, Contrastive)), None)


# files


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
  """Writes the vectors of a file's texts to OUTPUT.npy, and their ids, one a line, to OUTPUT.ids.txt.

  Args:
    path: see `pretrained.open_path`.
    input, column: see `read_texts`.
    pooling: None is what the checkpoint was trained with, "mean" where it was not trained for embeddings.
    max_len: None is the length that the checkpoint was trained on.
    mesh: sizes of `sharding.make_mesh`.
  Returns:
    where the ids are, and the shape of the vectors.
  """
  target = Path(output)
  if target.suffix != ".npy" or not target.parent.is_dir():
    raise ConfigError(f"--output={output} must be a file FILE.npy in a folder that exists")
  target = check_output(target, input)
  names = check_output(target.with_suffix(".ids.txt"), input)
  texts, ids = read_texts(input, column)
  with open_path(path) as source:
    processes.preflight(
      lambda: {"model": processes.short_digest(source.manifest), "input": processes.short_digest((texts, ids))}
    )
    config = source.config
    devices, rules = sharding.make_mesh(mesh), {**sharding.RULES, **config["rules"]}
    if pooling is None:
      trained = None if config["objective"] is None else contrastive_part(source.objective(trust))
      pooling = "mean" if trained is None else trained.pooling
  vectors = embed(
    *load(path, trust=trust, mesh=devices, rules=rules),
    texts,
    pooling=pooling,
    max_len=config["seq_len"] if max_len is None else max_len,
    batch_tokens=batch_tokens,
    mesh=devices,
    rules=rules,
  )
  if jax.process_index() == 0:
    with replacing(target) as partial, partial.open("wb") as file:
      np.save(file, vectors)
    with replacing(names) as partial:
      partial.write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
  return Path(output).with_suffix(".ids.txt"), vectors.shape


def check_output(output: str | Path, input: str | Path) -> Path:
  """Where an output is written, links followed.

  Raises:
    ConfigError: it is the input, which would be lost, or no file.
  """
  target = Path(output).resolve()
  if target == Path(input).resolve():
    raise ConfigError(f"--output would write {output} over --input={input}; give another name")
  if target.exists() and not target.is_file():
    raise ConfigError(f"--output={output} is there, and is no file; give another name")
  return target


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
  """A file to write that takes the place of `target` once it is whole; where writing fails, that stays as it is."""
  partial = target.with_name(f".{target.name}.partial")
  try:
    yield partial
    partial.replace(target)
  finally:
    partial.unlink(missing_ok=True)


def read_texts(path: str, column: str | None = None) -> tuple[list[str], list[str]]:
  """The texts of a file, and the id of each: its field `id` where it has one, else its number, from 0.

  Args:
    path: JSONL, CSV, TSV or Parquet by its name; any other file is text, one a line.
    column: the field that is the text, "text" where it is None.
  Raises:
    ConfigError: a text that is empty or blank: no vector stands for it, and left out it would shift all others.
  """
  if not Path(path).is_file():
    raise ConfigError(f"--input={path}: there is no such file")
  if source_kind(path) == "text":
    if column is not None:
      raise ConfigError(f"--column={column}: {path} is plain text, one a line; leave it out, or give JSONL or CSV")
    unit, texts = "line", _jsonl_records(path)
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
      raise ConfigError(f"{path}: {unit} {number} has no text, and so no vector; fill it, or take it out")
    if name.splitlines() != [name]:
      raise ConfigError(f"{path}: {unit} {number} has the id {name!r}, which is not one line; change it")
  return texts, ids


def _jsonl_records(path: str) -> list[str]:
  try:
    lines = Path(path).read_text(encoding="utf-8").split("\n")
  except UnicodeDecodeError as error:
    raise ConfigError(f"{path}: byte {error.start} is not UTF-8; convert the file (iconv -t UTF-8)") from error
  lines = lines[:-1] if lines[-1] == "" else lines
  if not lines:
    raise ConfigError(f"{path}: the file is empty")
  return lines

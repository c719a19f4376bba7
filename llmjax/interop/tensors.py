"""Tensors of safetensors files: read lazily, and written as what they are elsewhere.

How a tensor holds parameters of ours is said by a pattern like "(H A) D -> D H A": its dimensions, then those of the
parameter. "[H A] D" is a part of a tensor in which several parameters follow each other along that dimension,
"(H [A]) D" one in which they do so within each H. "2+P D" is behind two rows that nothing reads.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llmjax.config import ConfigError

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
RENAMED = ((".gamma", ".weight"), (".beta", ".bias"))  # of norms, in files that were made from TensorFlow's


# patterns


@dataclasses.dataclass(frozen=True)
class Dimension:
  """One dimension of a tensor: letters, the last `own` of which are this parameter's part of it, behind `skip` rows."""

  letters: tuple[str, ...]
  own: int
  skip: int


@dataclasses.dataclass(frozen=True)
class Layout:
  """A parsed pattern."""

  tensor: tuple[Dimension, ...]
  parameter: tuple[str, ...]

  def sizes(self, shape: Sequence[int]) -> dict[str, int]:
    """{letter: size} of a parameter of this shape."""
    return dict(zip(self.parameter, shape, strict=True))

  def split(self, shape: Sequence[int]) -> list[tuple[int, int]]:
    """(size of what is around, size of this parameter's part) of every dimension of the tensor."""
    sizes = self.sizes(shape)
    cut = [(d.letters[: len(d.letters) - d.own], d.letters[len(d.letters) - d.own :]) for d in self.tensor]
    return [tuple(math.prod(sizes[letter] for letter in part) for part in parts) for parts in cut]  # type: ignore[misc]

  @property
  def concatenated(self) -> int | None:
    """The dimension along which parameters follow each other."""
    return next((i for i, d in enumerate(self.tensor) if d.own), None)

  @property
  def order(self) -> list[int]:
    """Where each letter of the parameter is among those of the tensor."""
    letters = [letter for d in self.tensor for letter in d.letters]
    return [letters.index(letter) for letter in self.parameter]


@functools.cache
def parse(pattern: str) -> Layout:
  """The layout that a pattern says."""
  left, _, right = pattern.partition(" -> ")
  dimensions = []
  for text in re.findall(r"\([^)]*\)|\[[^\]]*\]|\S+", left):
    skip, _, rest = text.partition("+") if "+" in text else ("0", "", text)
    own = re.search(r"\[([^\]]*)\]", rest)
    letters = tuple(re.sub(r"[()\[\]]", " ", rest).split())
    dimensions.append(Dimension(letters, len(own[1].split()) if own else 0, int(skip)))
  return Layout(tuple(dimensions), tuple(right.split()))


def tensor_shape(layouts: Sequence[Layout], shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
  """The shape of the tensor that holds parameters of these shapes."""
  splits = [layout.split(shape) for layout, shape in zip(layouts, shapes, strict=True)]
  concatenated = layouts[0].concatenated
  return tuple(
    layouts[0].tensor[i].skip + around * (sum(split[i][1] for split in splits) if i == concatenated else own)
    for i, (around, own) in enumerate(splits[0])
  )


def view(tensor: np.ndarray, layouts: Sequence[Layout], shapes: Sequence[Sequence[int]], which: int) -> np.ndarray:
  """The parameter `which` of a tensor that holds them, without a copy, so that a file is read where it is looked at."""
  layout, shape = layouts[which], shapes[which]
  along = layout.concatenated
  for axis, dimension in enumerate(layout.tensor):
    if dimension.skip:
      tensor = tensor[(slice(None),) * axis + (slice(dimension.skip, None),)]
  if along is not None:
    parts = [each.split(size)[along][1] for each, size in zip(layouts, shapes, strict=True)]
    around, start = layout.split(shape)[along][0], sum(parts[:which])
    tensor = tensor.reshape(*tensor.shape[:along], around, sum(parts), *tensor.shape[along + 1 :])
    tensor = tensor[(slice(None),) * (along + 1) + (slice(start, start + parts[which]),)]
  sizes = layout.sizes(shape)
  return tensor.reshape([sizes[letter] for d in layout.tensor for letter in d.letters]).transpose(layout.order)


def join(parameters: Sequence[np.ndarray], layouts: Sequence[Layout]) -> np.ndarray:
  """The tensor that holds these parameters: the inverse of `view`."""
  blocks: list[np.ndarray] = []
  for x, layout in zip(parameters, layouts, strict=True):
    x = x.transpose(np.argsort(layout.order))
    split = layout.split(parameters[len(blocks)].shape)
    along = layout.concatenated
    dims = [[around, own] if i == along else [around * own] for i, (around, own) in enumerate(split)]
    blocks.append(x.reshape([size for part in dims for size in part]))
  along = layouts[0].concatenated
  tensor = blocks[0] if along is None else np.concatenate(blocks, axis=along + 1)
  shape = tensor_shape(layouts, [x.shape for x in parameters])
  skips = [d.skip for d in layouts[0].tensor]
  tensor = tensor.reshape([size - skip for size, skip in zip(shape, skips, strict=True)])
  return np.pad(tensor, [(skip, 0) for skip in skips]) if any(skips) else np.ascontiguousarray(tensor)


# files


def open_tensors(folder: Path) -> dict[str, np.ndarray]:
  """{name: tensor} of a folder's safetensors, mapped into memory: what is not looked at is not read.

  Raises:
    ConfigError: there are none, a shard is missing, or a file is damaged.
  """
  if (folder / SINGLE).is_file():
    files = [SINGLE]
  elif (folder / INDEX).is_file():
    files = shards(folder)
  else:
    raise ConfigError(_no_tensors(folder))
  tensors: dict[str, np.ndarray] = {}
  for name in files:
    if not (folder / name).is_file():
      raise ConfigError(f"{folder}: {INDEX} names {name}, and there is no such file; fetch it")
    tensors.update(_open_file(folder / name))
  return {_renamed(name): tensor for name, tensor in tensors.items()}


def shards(folder: Path) -> list[str]:
  """The files that a folder's index names."""
  try:
    return sorted(
      {str(file) for file in json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()}
    )
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    raise ConfigError(f"{folder / INDEX} is damaged ({type(error).__name__}: {error}); fetch it again") from error


def _no_tensors(folder: Path) -> str:
  pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
  if pickled:
    return (
      f"{folder} has its weights in {pickled[0]}, a pickle, which may run code when it is opened; convert it where you "
      "trust it: python -c \"from transformers import AutoModel as M; M.from_pretrained('DIR').save_pretrained('NEW')\""
    )
  return f"{folder} has no {SINGLE} and no {INDEX}; a Hugging Face folder holds one of them beside its config.json"


def _renamed(name: str) -> str:
  for old, new in RENAMED:
    if name.endswith(old):
      return name.removesuffix(old) + new
  return name


def _open_file(path: Path) -> Iterator[tuple[str, np.ndarray]]:
  """The format: 8 bytes n, n bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.

  https://github.com/huggingface/safetensors#format
  """
  size = path.stat().st_size
  with path.open("rb") as file:
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
    try:
      header = json.loads(file.read(length)) if length <= size - 8 else None
    except ValueError:
      header = None
  if not isinstance(header, dict):
    raise ConfigError(f"{path} is no safetensors file, or its beginning is damaged; fetch it again")
  data = np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else np.zeros(0, np.uint8)
  for name, entry in header.items():
    if name == "__metadata__":
      continue
    try:
      begin, end = map(int, entry["data_offsets"])
      kind, shape = str(entry["dtype"]), [int(n) for n in entry["shape"]]
      if begin < 0 or end < begin or min(shape, default=0) < 0:
        raise ValueError("a negative number")
    except (LookupError, TypeError, ValueError) as error:
      raise ConfigError(f"{path} is damaged: what it says of tensor {name} is no such thing: {entry}") from error
    if kind not in DTYPES:
      raise ConfigError(f"{path}: tensor {name} is of type {kind}; known are {', '.join(DTYPES)}")
    if end > len(data):
      raise ConfigError(
        f"{path} is truncated: tensor {name} ends at byte {8 + length + end:,} of a file of {size:,}; fetch it again"
      )
    dtype = DTYPES[kind]
    if end - begin != dtype.itemsize * math.prod(shape):
      raise ConfigError(f"{path} is damaged: tensor {name} {shape} does not fit its {end - begin:,} bytes")
    yield name, data[begin:end].view(dtype).reshape(shape)


def write_tensors(folder: Path, tensors: Sequence[tuple[str, Any, int]], max_shard_bytes: int) -> list[Path]:
  """Writes (name, function that makes the tensor, bytes) in files of at most `max_shard_bytes`, with an index where
  there are several; one file's tensors are in memory at a time."""
  from safetensors.numpy import save_file

  shards: list[list[tuple[str, Any]]] = [[]]
  room = max_shard_bytes
  for name, make, size in tensors:
    if size > room and shards[-1]:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append((name, make))
    room -= size
  names = (
    [SINGLE]
    if len(shards) == 1
    else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
  )
  for file, shard in zip(names, shards, strict=True):
    save_file({name: make() for name, make in shard}, folder / file, metadata={"format": "pt"})
  if len(shards) > 1:
    where = {name: file for file, shard in zip(names, shards, strict=True) for name, _ in shard}
    index = {"metadata": {"total_size": sum(size for _, _, size in tensors)}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
  return [folder / name for name in names]

"""Tensors of Hugging Face folders: patterns of the parameters in a tensor, and safetensors files.

A pattern is "TENSOR -> PARAMETER": the dimensions of the tensor, then those of the parameter, by letters.

  "D F -> D F"             the tensor is the parameter
  "F D -> D F"             its transpose
  "(H A) D -> D H A"       one dimension of the tensor is two of the parameter: H heads of width A, one after the other
  "[H A] D -> D H A"       fused: along this dimension, the parameters of the tensor follow each other
  "(H [A]) D -> D H A"     fused head by head: for each of H heads, A rows of every parameter
  "2+P D -> P D"           the tensor starts with two rows that are not used

Example: GPT-NeoX stores query, key and value as one tensor [3 H A, D], with rows q_0 k_0 v_0 q_1 k_1 v_1 ... for heads
0, 1, ... Each of the three has the pattern "(H [A]) D -> D H A". `parameter_view` with index 1 reshapes the tensor to
[H, 3 A, D], slices rows A to 2 A, and transposes [H, A, D] to the key's [D, H, A], all without a copy.
`merge_parameters` is the inverse.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

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
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
TENSORFLOW_SUFFIXES = ((".gamma", ".weight"), (".beta", ".bias"))  # names of norms in files converted from TensorFlow
DIMENSION = r"\([^)]*\)|\[[^\]]*\]|\S+"  # one dimension in the left half of a pattern

Shape = tuple[int, ...]


# Patterns


@dataclasses.dataclass(frozen=True)
class Dimension:
  """One dimension of a tensor.

  Attributes:
    letters: dimensions of the parameter that it is the product of.
    num_fused: number of letters, from the last, within which the tensor's parameters follow each other; 0: not fused.
    skip: rows at its start that are not used.
  """

  letters: tuple[str, ...]
  num_fused: int
  skip: int


@dataclasses.dataclass(frozen=True)
class TensorPattern:
  """A parsed pattern: the dimensions of the tensor, and the letters of the parameter."""

  tensor: tuple[Dimension, ...]
  parameter: tuple[str, ...]

  def letter_sizes(self, shape: Sequence[int]) -> dict[str, int]:
    """Return {letter: size} for a parameter of this shape."""
    return dict(zip(self.parameter, shape, strict=True))

  def dimension_sizes(self, shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return (outer size, size of this parameter's part) of each tensor dimension; unfused ones have one part.

    For "(H [A]) D" they are [(H, A), (D, 1)]: the part of an unfused dimension is an empty product.
    """
    sizes = self.letter_sizes(shape)
    splits = [(d.letters, len(d.letters) - d.num_fused) for d in self.tensor]
    return [
      (math.prod(sizes[x] for x in letters[:cut]), math.prod(sizes[x] for x in letters[cut:]))
      for letters, cut in splits
    ]

  @property
  def fused_axis(self) -> int | None:
    """The dimension along which the tensor's parameters follow each other, None if it holds one."""
    return next((axis for axis, d in enumerate(self.tensor) if d.num_fused), None)

  @property
  def transposition(self) -> list[int]:
    """Positions of the parameter's letters among those of the tensor, for `np.transpose`."""
    letters = [letter for d in self.tensor for letter in d.letters]
    return [letters.index(letter) for letter in self.parameter]


@functools.cache
def parse_pattern(pattern: str) -> TensorPattern:
  """Return the TensorPattern of a text such as "(H A) D -> D H A"."""
  left, _, right = pattern.partition(" -> ")
  dimensions = []
  for text in re.findall(DIMENSION, left):
    skip, _, rest = text.partition("+") if "+" in text else ("0", "", text)
    fused = re.search(r"\[([^\]]*)\]", rest)
    letters = tuple(re.sub(r"[()\[\]]", " ", rest).split())
    dimensions.append(Dimension(letters, len(fused[1].split()) if fused else 0, int(skip)))
  return TensorPattern(tuple(dimensions), tuple(right.split()))


def tensor_shape(patterns: Sequence[TensorPattern], shapes: Sequence[Sequence[int]]) -> Shape:
  """Return the shape of the tensor that holds parameters of these shapes."""
  sizes = [pattern.dimension_sizes(shape) for pattern, shape in zip(patterns, shapes, strict=True)]
  fused_axis = patterns[0].fused_axis
  return tuple(
    dimension.skip + outer * (sum(each[axis][1] for each in sizes) if axis == fused_axis else part)
    for axis, (dimension, (outer, part)) in enumerate(zip(patterns[0].tensor, sizes[0], strict=True))
  )


def parameter_view(
  tensor: np.ndarray, patterns: Sequence[TensorPattern], shapes: Sequence[Sequence[int]], index: int
) -> np.ndarray:
  """Return one of the parameters that a tensor holds, as a view: a memory-mapped file is read when it is used.

  Args:
    patterns, shapes: of all parameters in the tensor, in their order.
    index: which of them.
  """
  pattern, shape = patterns[index], shapes[index]
  fused_axis = pattern.fused_axis
  for axis, dimension in enumerate(pattern.tensor):
    if dimension.skip:
      tensor = tensor[(slice(None),) * axis + (slice(dimension.skip, None),)]
  if fused_axis is not None:
    parts = [p.dimension_sizes(s)[fused_axis][1] for p, s in zip(patterns, shapes, strict=True)]
    outer, start = pattern.dimension_sizes(shape)[fused_axis][0], sum(parts[:index])
    tensor = tensor.reshape(*tensor.shape[:fused_axis], outer, sum(parts), *tensor.shape[fused_axis + 1 :])
    tensor = tensor[(slice(None),) * (fused_axis + 1) + (slice(start, start + parts[index]),)]
  sizes = pattern.letter_sizes(shape)
  return tensor.reshape([sizes[letter] for d in pattern.tensor for letter in d.letters]).transpose(
    pattern.transposition
  )


def merge_parameters(parameters: Sequence[np.ndarray], patterns: Sequence[TensorPattern]) -> np.ndarray:
  """Return the tensor that holds these parameters, the inverse of `parameter_view`. Unused rows are 0."""
  fused_axis = patterns[0].fused_axis
  blocks: list[np.ndarray] = []
  for parameter, pattern in zip(parameters, patterns, strict=True):
    sizes = pattern.dimension_sizes(parameter.shape)
    dims = [[outer, part] if axis == fused_axis else [outer * part] for axis, (outer, part) in enumerate(sizes)]
    transposed = parameter.transpose(np.argsort(pattern.transposition))
    blocks.append(transposed.reshape([size for group in dims for size in group]))
  tensor = blocks[0] if fused_axis is None else np.concatenate(blocks, axis=fused_axis + 1)
  shape = tensor_shape(patterns, [parameter.shape for parameter in parameters])
  skips = [d.skip for d in patterns[0].tensor]
  tensor = tensor.reshape([size - skip for size, skip in zip(shape, skips, strict=True)])
  return np.pad(tensor, [(skip, 0) for skip in skips]) if any(skips) else np.ascontiguousarray(tensor)


# Safetensors files


def open_tensors(folder: Path) -> dict[str, np.ndarray]:
  """Return {name: tensor} of a folder's safetensors files, memory-mapped: tensors that are not used are not read.

  Raises:
    ConfigError: no safetensors files, a missing shard, or a damaged file.
  """
  if (folder / WEIGHTS_FILE).is_file():
    files = [WEIGHTS_FILE]
  elif (folder / INDEX_FILE).is_file():
    files = read_shard_names(folder)
  else:
    raise ConfigError(_no_tensors_message(folder))
  tensors: dict[str, np.ndarray] = {}
  for name in files:
    if not (folder / name).is_file():
      raise ConfigError(f"{folder}: {INDEX_FILE} names {name}, which does not exist; download it")
    tensors.update(_map_safetensors(folder / name))
  return {_modern_name(name): tensor for name, tensor in tensors.items()}


def read_shard_names(folder: Path) -> list[str]:
  """Return the files that a folder's index names."""
  try:
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    return sorted({str(file) for file in index["weight_map"].values()})
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    raise ConfigError(
      f"{folder / INDEX_FILE} is damaged ({type(error).__name__}: {error}); download it again"
    ) from error


def _no_tensors_message(folder: Path) -> str:
  pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
  if pickles:
    return (
      f"{folder} has its weights in {pickles[0]}, a pickle, which may run code when it is opened; convert it where you "
      "trust it: python -c \"from transformers import AutoModel as M; M.from_pretrained('DIR').save_pretrained('NEW')\""
    )
  return f"{folder} has no {WEIGHTS_FILE} and no {INDEX_FILE}; a Hugging Face folder has one of them"


def _modern_name(name: str) -> str:
  for old, new in TENSORFLOW_SUFFIXES:
    if name.endswith(old):
      return name.removesuffix(old) + new
  return name


def _map_safetensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
  """Yield (name, memory-mapped tensor) of a file.

  The format: 8 bytes n, n bytes of JSON {name: {dtype, shape, data_offsets}}, then the data, see
  https://github.com/huggingface/safetensors#format. The library's NumPy interface copies every tensor that it is asked
  for, whereas a shard on one device needs a part of it only.
  """
  file_size = path.stat().st_size
  with path.open("rb") as file:
    start = file.read(8)
    header_size = struct.unpack("<Q", start)[0] if len(start) == 8 else file_size
    try:
      header = json.loads(file.read(header_size)) if header_size <= file_size - 8 else None
    except ValueError:
      header = None
  if not isinstance(header, dict):
    raise ConfigError(f"{path} is not a safetensors file, or its beginning is damaged; download it again")
  offset = 8 + header_size
  data = np.memmap(path, np.uint8, "r", offset=offset) if file_size > offset else np.zeros(0, np.uint8)
  for name, entry in header.items():
    if name == "__metadata__":
      continue
    try:
      begin, end = map(int, entry["data_offsets"])
      dtype_name, shape = str(entry["dtype"]), [int(n) for n in entry["shape"]]
      if begin < 0 or end < begin or min(shape, default=0) < 0:
        raise ValueError("a negative number")
    except (LookupError, TypeError, ValueError) as error:
      raise ConfigError(f"{path} is damaged: the header of tensor {name} is {entry}; download it again") from error
    if dtype_name not in DTYPES:
      raise ConfigError(f"{path}: tensor {name} has dtype {dtype_name}; allowed are {', '.join(DTYPES)}")
    if end > len(data):
      raise ConfigError(
        f"{path} is truncated: tensor {name} ends at byte {offset + end:,} of {file_size:,}; download it again"
      )
    dtype = DTYPES[dtype_name]
    if end - begin != dtype.itemsize * math.prod(shape):
      raise ConfigError(f"{path} is damaged: tensor {name} {shape} does not fit its {end - begin:,} bytes")
    yield name, data[begin:end].view(dtype).reshape(shape)


class TensorToWrite(NamedTuple):
  """A tensor that `write_tensors` asks for when it writes its file."""

  name: str
  make: Callable[[], np.ndarray]
  num_bytes: int


def write_tensors(folder: Path, tensors: Sequence[TensorToWrite], max_shard_bytes: int) -> list[Path]:
  """Write tensors to files of at most `max_shard_bytes`, with an index if there are several. Returns the files.

  The tensors of one file are in memory at a time. A larger tensor has a file of its own.
  """
  from safetensors.numpy import save_file

  shards: list[list[TensorToWrite]] = [[]]
  room = max_shard_bytes
  for tensor in tensors:
    if tensor.num_bytes > room and shards[-1]:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append(tensor)
    room -= tensor.num_bytes
  count = len(shards)
  names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [WEIGHTS_FILE]
  for file, shard in zip(names, shards, strict=True):
    save_file({tensor.name: tensor.make() for tensor in shard}, folder / file, metadata={"format": "pt"})
  if count > 1:
    weight_map = {tensor.name: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
  return [folder / name for name in names]

"""The data of the host: records, the windows that they are split into, and examples. NumPy only, no JAX.

Objectives make examples (`llmjax.types.Objective`), the data pipeline packs them into batches (`llmjax.data.packing`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np

from llmjax.config import Json

Record: TypeAlias = Mapping[str, Json]  # {field: value}


@runtime_checkable  # type checks in tests need it
class RecordSource(Protocol):
  """Records with random access, as objectives see a corpus; `llmjax.data.sources.base.Source` implements it."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Record: ...


@runtime_checkable  # type checks in tests need it
class TextTokenizer(Protocol):
  """A tokenizer as objectives use it; `llmjax.data.tokenizers.base.Tokenizer` implements it, and documents it."""

  @property
  def pad_id(self) -> int: ...

  @property
  def bos_id(self) -> int | None: ...

  @property
  def eos_id(self) -> int | None: ...

  @property
  def mask_id(self) -> int | None: ...

  @property
  def sentinels(self) -> tuple[int, ...]: ...

  @property
  def pieces(self) -> tuple[bytes, ...]: ...

  @property
  def special(self) -> np.ndarray: ...

  @property
  def chat_templates(self) -> Mapping[str, str]: ...

  @property
  def single(self) -> tuple[np.ndarray, np.ndarray]: ...

  def encode(self, text: str) -> np.ndarray: ...

  def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]: ...

  def decode(self, ids: Iterable[int] | np.ndarray) -> str: ...

  def document(self, text: str) -> np.ndarray: ...

  def prompt(self, text: str) -> np.ndarray: ...

  def chat(
    self,
    messages: Sequence[Mapping[str, Json]],
    *,
    add_generation_prompt: bool = False,
    template: str | None = None,
  ) -> np.ndarray: ...

  def frame(self, ids: np.ndarray) -> np.ndarray: ...

  def unframe(self, ids: np.ndarray) -> np.ndarray: ...

  def assemble(
    self, first: np.ndarray, second: np.ndarray | None, length: int
  ) -> tuple[np.ndarray, np.ndarray, tuple[int, int | None]]: ...

  def word_begins(self, ids: np.ndarray) -> np.ndarray: ...

  def byte_lengths(self) -> np.ndarray: ...

  def special_token_names(self) -> dict[str, str]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSequence:
  """One stream of an example, without padding. Arrays are converted to int32.

  Raises:
    ValueError: the arrays are not one-dimensional, or differ in length.
  """

  ids: np.ndarray  # Int[n]
  token_types: np.ndarray | None = None  # Int[n], as in `Tokens`
  prefix: np.ndarray | None = None  # Int[n], as in `Tokens`

  def __post_init__(self) -> None:
    shape = None
    for name in ("ids", "token_types", "prefix"):
      if getattr(self, name) is not None:
        values = np.asarray(getattr(self, name), np.int32)
        object.__setattr__(self, name, values)
        shape = values.shape if shape is None else shape
        if values.ndim != 1 or values.shape != shape:
          raise ValueError(f"{name}: must be one-dimensional and as long as ids {shape}, got shape {values.shape}")

  def __len__(self) -> int:
    return len(self.ids)

  def __getitem__(self, part: slice) -> TokenSequence:
    token_types = None if self.token_types is None else self.token_types[part]
    return TokenSequence(self.ids[part], token_types, None if self.prefix is None else self.prefix[part])


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """One example before packing: the NumPy counterpart of a row of `Batch`. Arrays are converted to int32 or float32.

  Labels and weights are aligned with the stream that is predicted: `targets` if there are any, else `inputs`. Row
  labels and row weights describe the example as a whole, in any shape; they need packing "never". Both kinds become
  `Batch.labels` and `Batch.weights`.

  Raises:
    ValueError: labels or weights are not aligned with the predicted stream.
  """

  inputs: TokenSequence | None  # None in an example that has only `extras`
  targets: TokenSequence | None = None
  labels: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # {term: Int[n]}
  weights: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # {term: Float[n]}, 0: no loss
  row_labels: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # {term: any shape}
  row_weights: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # {term: shape of its labels}
  extras: Mapping[str, Example] = dataclasses.field(default_factory=dict)  # {view: a further view of the example}

  def __post_init__(self) -> None:
    length = len(self.predicted) if self.predicted is not None else 0
    for group, dtype in (("labels", np.int32), ("weights", np.float32)):
      arrays = {term: np.asarray(values, dtype) for term, values in getattr(self, group).items()}
      object.__setattr__(self, group, arrays)
      for term, values in arrays.items():
        if values.shape != (length,):
          raise ValueError(f"{group}[{term!r}]: must have shape ({length},) as the predicted ids, got {values.shape}")
    for group in ("row_labels", "row_weights"):
      if getattr(self, group):
        object.__setattr__(self, group, {term: _as_32_bit(values) for term, values in getattr(self, group).items()})

  @property
  def predicted(self) -> TokenSequence | None:
    """The stream that labels are aligned with."""
    return self.inputs if self.targets is None else self.targets


def _as_32_bit(values: np.ndarray) -> np.ndarray:
  values = np.asarray(values)
  return values.astype(np.float32 if np.issubdtype(values.dtype, np.floating) else np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
  """A part of a record that becomes one example.

  Attributes:
    record: the whole record.
    ids: Int[n], the tokens of the part.
    example: the finished example, of objectives that make it from the record at once; `ids` is then empty.
  """

  record: Record
  ids: np.ndarray
  example: Example | None = None


@dataclasses.dataclass(frozen=True)
class RowLengths:
  """The length of a row in each stream, in tokens; None for streams that examples do not have."""

  inputs: int | None = None
  targets: int | None = None
  extras: Mapping[str, RowLengths] = dataclasses.field(default_factory=dict)  # {view: its lengths}

  def streams(self) -> list[tuple[str, int]]:
    """Return ("inputs" or "targets", length) of every stream: first its own, then those of each view."""
    own = [
      (name, length) for name, length in (("inputs", self.inputs), ("targets", self.targets)) if length is not None
    ]
    return own + [stream for view in self.extras.values() for stream in view.streams()]

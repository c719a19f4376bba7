"""The data that flows through a step, and the legend of dimension letters.

  B batch (global sequences)   L length            S source or cache length   D model width
  H query heads                K key/value heads   F feed-forward width       V vocabulary
  N layers                     E experts           C classes                  A head width
  T target length              R relative buckets

Signatures of public functions carry these letters as jaxtyping annotations; einsum strings use the same letters. In
this module they are comments. Annotated fields of a pytree would be checked in every tree transformation, where leaves
are shapes, shardings or scan slices rather than arrays.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array
Leaf: TypeAlias = Any  # an array; inside tree transformations also a shape, a sharding or a slice of it
Sums = dict[str, Array]  # {term: scalar sum}
Metrics = dict[str, tuple[Array, Array]]  # {name: (sum, weight)}: added over microbatches, batches and processes


@struct.dataclass
class Tokens:
  """One stream of token sequences; several documents may share a row.

  Attention masks are computed from `segments`, `positions` and `prefix`, never from token values.
  """

  ids: Leaf  # Int[B L]
  positions: Leaf  # Int[B L], counted from 0 inside each segment
  segments: Leaf  # Int[B L], 0: padding; 1, 2, ...: the documents of a row
  prefix: Leaf = None  # Int[B L], 1: all queries of the document attend to this token, also earlier ones; None: all 0
  token_types: Leaf = None  # Int[B L], for example which of two sentences; None: all 0

  @classmethod
  def from_ids(cls, ids: Any, mask: Any = None, token_types: Any = None) -> Tokens:
    """Return tokens with one document per row.

    Args:
      ids: Int[B L].
      mask: Int[B L], 1 for tokens, 0 for padding on either side; None: no padding.
      token_types: Int[B L], None: all 0.
    """
    ids = jnp.asarray(ids, jnp.int32)
    if ids.ndim != 2:
      raise ValueError(f"ids must have shape [B, L], got {ids.shape}")
    mask = jnp.ones_like(ids) if mask is None else jnp.asarray(mask, jnp.int32)
    token_types = None if token_types is None else jnp.asarray(token_types, jnp.int32)
    for name, other in (("mask", mask), ("token_types", token_types)):
      if other is not None and other.shape != ids.shape:
        raise ValueError(f"{name} {other.shape} must have the shape of ids {ids.shape}")
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return cls(ids=ids, positions=positions, segments=mask, token_types=token_types)

  def select(self, hidden: Array, which: str) -> Array:
    """Return one hidden state for every row.

    Args:
      hidden: Float[B L D].
      which: "first" or "last" token of the row, or the "mean" over its tokens, which is float32.

    Returns:
      Float[B D]. A row of padding gives any hidden state, and 0 for the mean.
    """
    is_token = self.segments > 0
    if which == "mean":
      total = jnp.sum(hidden.astype(jnp.float32) * is_token[:, :, None], axis=1)
      return total / jnp.maximum(jnp.sum(is_token, axis=1, keepdims=True), 1)
    if which == "first":
      index = jnp.argmax(is_token, axis=1)
    else:
      index = is_token.shape[1] - 1 - jnp.argmax(is_token[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]


@struct.dataclass
class Batch:
  """The input of a step. Every leaf has the (global) batch as its first axis.

  `inputs` feeds the only stack, or the encoder; `targets` feeds the decoder of an encoder-decoder. Labels and weights
  are aligned with the stream that is predicted: `targets` if there are any, else `inputs`.
  """

  inputs: Leaf  # Tokens; None in a batch that has only `extras`
  targets: Leaf = None  # Tokens, or None
  labels: Mapping[str, Leaf] = struct.field(default_factory=dict)  # {term: Int[B L]}; of a whole row [B] or [B C]
  weights: Mapping[str, Leaf] = struct.field(default_factory=dict)  # {term: shape of its labels}; 0: no loss
  rows: Leaf = None  # Int[B], the row's number in the global batch; dropout depends on it
  extras: Mapping[str, Leaf] = struct.field(default_factory=dict)  # {name: Batch}: further views of the same examples

  @classmethod
  def from_tokens(
    cls, ids: Any, mask: Any = None, target_ids: Any = None, target_mask: Any = None, token_types: Any = None
  ) -> Batch:
    """Return a batch for inference.

    Args:
      ids: Int[B L].
      mask: Int[B L], 1 for tokens, 0 for padding; None: no padding.
      target_ids: Int[B T], the input of an encoder-decoder's decoder (already shifted).
      target_mask: Int[B T], as `mask`.
      token_types: Int[B L], None: all 0.
    """
    inputs = Tokens.from_ids(ids, mask, token_types)
    targets = None if target_ids is None else Tokens.from_ids(target_ids, target_mask)
    return cls(inputs=inputs, targets=targets, rows=jnp.arange(inputs.ids.shape[0], dtype=jnp.int32))


def dummy_batch() -> Batch:
  """Return the smallest batch that any model reads, to initialise parameters."""
  zero = jnp.zeros((1, 1), jnp.int32)
  return Batch.from_tokens(zero, target_ids=zero)


@struct.dataclass
class Outputs:
  """The outputs of a model; None for outputs that it does not have. L is the length of the stream that is predicted."""

  logits: Leaf = None  # Float[B L V]; of a head on sequences [B C], on tokens [B L C], on spans [B L 2]
  hidden: Leaf = None  # Float[B L D], after the final norm
  pooled: Leaf = None  # Float[B D], output of the pooler for the first token of every row
  all_hidden: Leaf = None  # Float[N+1 B L D], the embeddings and the output of every layer; on request
  encoder_hidden: Leaf = None  # Float[B S D] of an encoder-decoder
  encoder_all_hidden: Leaf = None  # Float[N+1 B S D] of an encoder-decoder; on request
  transitions: Leaf = None  # of a CRF: {"start": Float[C], "matrix": Float[C C] (from, to), "end": Float[C]}
  routing: Leaf = ()  # routing statistics of each stack with experts, `models.moe.Routing`


@runtime_checkable  # type checks in tests need it
class Model(Protocol):
  """A Linen module that reads a `Batch` and returns `Outputs`; what a model of your own has to offer.

  Parameters carry logical axis names (`flax.linen.with_logical_partitioning`) that config.rules knows. Dropout runs if
  and only if `rngs` has the key "dropout". Only some objectives call `unembed` and `sentence_logits`.
  """

  cfg: Any  # a `llmjax.config.model.ModelConfig`

  def init(self, rngs: Any, batch: Batch) -> Mapping[str, Any]:
    """Return {"params": parameters in Linen's boxes with logical axis names}."""

  def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Return the outputs for a batch: `model.apply({"params": params}, batch, rngs={...})`."""


class Forward(abc.ABC):
  """A model with its parameters: what an objective receives instead of a model.

  Attributes:
    auxiliary: frozen models beside it, by the names of config.auxiliary.
  """

  auxiliary: Mapping[str, Forward] = {}

  @abc.abstractmethod
  def __call__(self, batch: Batch, rngs: Mapping[str, Array], **kwargs: Any) -> Outputs:
    """The model's outputs; dropout runs iff `rngs` has a key for it."""

  @abc.abstractmethod
  def unembed(self, hidden: Array) -> Array:
    """Float[B L V], the logits of hidden states [B L D]."""

  @abc.abstractmethod
  def sentence_logits(self, hidden: Array) -> Array:
    """Float[B L C], what the sentence head says of hidden states [B L D]."""

  def per_token(self, function: Callable[..., Any], out: Outputs, *aligned: Array) -> Any:
    """`function` of logits and of what is aligned with them [B L], a tree of [B L]; where config.logit_tiles says so of
    a part of the logits at a time, which are made again for the gradient."""
    return function(out.logits, *aligned)

  @abc.abstractmethod
  def map_microbatches(self, function: Callable[[Batch], Any], batch: Batch) -> Any:
    """`function` of strided chunks of a batch, one after the other, whose activations are not kept but made again for
    the gradient. Leaves are [chunks ...]; `merge_chunks` puts rows back in their order."""


def merge_microbatches(x: Array) -> Array:
  """[chunks B/chunks ...] -> [B ...], the inverse of strided chunks."""
  return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


Features = Mapping[str, Any]


class Objective(abc.ABC):
  """What is learned. Host and device halves stand side by side in one file and must agree.

  Attributes:
    packing: "split", features may be cut anywhere and share rows with others; "whole", they share rows uncut; "never",
      each has a row of its own.
    whole_batch: the loss must see the whole global batch at once (contrastive): `accum` becomes chunks inside it.
    stacks: which models can learn it: an "encoder", a "decoder", or "both" behind each other.
    required_model_config: {model key: value} that it needs besides.
    head: {model key: value} of what stands behind the last layer for it; no config says these.
    resolved_config: {key of its config: value} of what it found out where the config says None.
    auxiliary: names of the frozen models that it needs in config.auxiliary.
    fields: of a record that it reads.
    skip_reason: why a record may give no features, for messages.
  """

  packing: str = "whole"
  whole_batch: bool = False
  stacks: tuple[str, ...] = ("encoder", "decoder", "both")
  auxiliary: tuple[str, ...] = ()

  @property
  def fields(self) -> tuple[str, ...]:
    return ("text",)

  @property
  def skip_reason(self) -> str:
    return "the texts are empty or too short for the objective"

  @property
  def head(self) -> Mapping[str, Any]:
    return {"head": "lm", "num_classes": 0, "crf": False}

  @property
  def resolved_config(self) -> Mapping[str, Any]:
    return {}

  @property
  def required_model_config(self) -> Mapping[str, Any]:
    return {}

  def check_model(self, cfg: Any) -> None:
    """Raises ConfigError where a model's config does not fit for another reason than `stacks` and `needs`."""
    return None

  @property
  @abc.abstractmethod
  def coefficients(self) -> Mapping[str, float]:
    """The objective is the sum over terms of coefficient * sum / weight."""

  def row_lengths(self, seq_len: int) -> dict[str, int]:
    """{stream: its length in a row} where rows have `seq_len` input tokens (host)."""
    return {"inputs": seq_len}

  def examples(self, record: Mapping[str, Any], tokenizer: Any, length: int, whole: bool) -> Iterator[dict[str, Any]]:
    """What of a record `features` is given: the record with "ids" Int[n], for each piece that `window` gives (host).

    Args:
      length: input tokens of a row.
      whole: leave the text in one piece.
    """
    ids = tokenizer.document(record["text"])
    for window in [ids] if whole else self.window(ids, length):
      if len(window):
        yield {**record, "ids": window}

  def window(self, ids: np.ndarray, length: int) -> list[np.ndarray]:
    """Cuts a document's ids into pieces whose features fit in rows of `length` input tokens (host)."""
    return [ids]

  @abc.abstractmethod
  def features(self, example: Mapping[str, Any], rng: np.random.Generator, corpus: Any) -> Features | None:
    """One example to features, None to leave it out (host).

    Args:
      example: one that `examples` gave.
      rng: the example's own generator.
      corpus: the source that the record is from.
    Returns:
      {"inputs": Int[n], "labels": {term: Int[n]}, "weights": {term: Float[n]}}, with "targets": Int[m] where there are
      any (labels and weights are then [m]). A stream may be a dict {"ids": Int[n], "token_types": Int[n], "prefix":
      Int[n]}. Further views of the example are {"extras": {name: features}}. What labels the example as a whole is
      {"row": {"labels": {term: any shape}, "weights": {term: that shape}}}, with packing "never" alone.
    """

  def weights(self, batch: Batch) -> Sums:
    """The denominators, taken once on the whole global batch (device)."""
    return {term: jnp.sum(batch.weights[term]) for term in self.coefficients}

  @abc.abstractmethod
  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    """Named sums over a microbatch, and metrics as (sum, weight) (device, pure)."""

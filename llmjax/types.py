"""The data that flows through a step, and the legend of dimension letters.

  B batch (global sequences)   L length            S source or cache length   D model width
  H query heads                K key/value heads   F feed-forward width       V vocabulary
  N layers                     E experts           C classes                  A head width
  T target length              R relative buckets

Signatures of public functions carry these letters as jaxtyping annotations; einsum strings use the same letters. In
this module they are comments. Annotated fields of a pytree would be checked in every tree transformation, where leaves
are shapes, shardings or scan slices rather than arrays. The data of the host, in NumPy, is `llmjax/examples.py`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llmjax.config import Json
from llmjax.config.model import ModelConfig
from llmjax.examples import Example, Record, RecordSource, RowLengths, TextTokenizer, Window

T = TypeVar("T")
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
  labels: Mapping[str, Leaf] = dataclasses.field(default_factory=dict)  # {term: Int[B L]}; of a whole row [B] or [B C]
  weights: Mapping[str, Leaf] = dataclasses.field(default_factory=dict)  # {term: shape of its labels}; 0: no loss
  rows: Leaf = None  # Int[B], the row's number in the global batch; dropout depends on it
  extras: Mapping[str, Leaf] = dataclasses.field(default_factory=dict)  # {view: Batch} of the same examples

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
  """A model bound to its parameters. Objectives are given one instead of a model.

  Attributes:
    auxiliary: frozen models by their names in config.auxiliary, for example the reference of a preference objective.
  """

  auxiliary: Mapping[str, Forward] = {}

  @abc.abstractmethod
  def __call__(self, batch: Batch, rngs: Mapping[str, Array], *, logits: bool = True) -> Outputs:
    """Run the model.

    Args:
      batch: the rows to run it on.
      rngs: {"dropout": key}; without the key there is no dropout.
      logits: whether to compute logits. False saves the largest array, for objectives that need hidden states only.
    """

  @abc.abstractmethod
  def unembed(self, hidden: Array) -> Array:
    """Return the logits Float[B L V] of hidden states Float[B L D]."""

  @abc.abstractmethod
  def sentence_logits(self, hidden: Array) -> Array:
    """Return the logits Float[B L C] of the sentence head for hidden states Float[B L D]."""

  def per_token(self, function: Callable[..., T], out: Outputs, *aligned: Array) -> T:
    """Apply a function per token.

    With config.logit_tiles > 1, process one slice of the sequence at a time and rematerialise its logits in the
    backward pass, so that Float[B L V] never exists as a whole.

    Args:
      function: maps logits Float[B l V] and slices of `aligned` to a tree of arrays [B l].
      out: outputs for the batch.
      aligned: arrays [B L] with an entry for each token of `out`.

    Returns:
      The function's tree, with arrays [B L].
    """
    return function(out.logits, *aligned)

  @abc.abstractmethod
  def map_microbatches(self, function: Callable[[Batch], T], batch: Batch) -> T:
    """Apply a function to one microbatch at a time, and rematerialise its activations in the backward pass.

    Microbatch i of n holds rows i, i + n, i + 2 n, ...: a batch that is sharded over devices is then not moved.

    Args:
      function: maps a batch to a tree of arrays.
      batch: rows [B ...].

    Returns:
      The function's tree, with a leading axis of microbatches; `merge_microbatches` restores the order of rows.
    """


def merge_microbatches(x: Array) -> Array:
  """Reshape [microbatches rows ...] to [B ...], the inverse of the strided split of `Forward.map_microbatches`."""
  return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


class Objective(abc.ABC):
  """A training objective: it makes examples from records (host) and computes the loss of batches (device).

  Both halves stand in one file, because they share the names of label terms. The host half is `split_record`,
  `split_ids` and `make_example`; it uses NumPy and runs in threads of the data pipeline. The device half is `weights`
  and `loss`; JAX traces it, so it must be pure.

  Attributes:
    packing: how examples share rows. "split": they may be cut anywhere; "whole": several examples, uncut; "never": one
      example per row.
    whole_batch: whether the loss needs the whole global batch at once, as a contrastive loss does. config.accum then
      splits the batch inside the loss, see `Forward.map_microbatches`.
    stacks: the kinds of models that can be trained: "encoder", "decoder", or "both" for an encoder-decoder.
    auxiliary: names of frozen models that config.auxiliary must have.
  """

  packing: str = "whole"
  whole_batch: bool = False
  stacks: tuple[str, ...] = ("encoder", "decoder", "both")
  auxiliary: tuple[str, ...] = ()

  @property
  def fields(self) -> tuple[str, ...]:
    """Fields of a record that the objective reads."""
    return ("text",)

  @property
  def skip_reason(self) -> str:
    """Why a record may give no examples, for messages."""
    return "the texts are empty or too short for the objective"

  @property
  def head(self) -> Mapping[str, Json]:
    """Fields of the model's config that describe its head. The objective sets them, users do not."""
    return {"head": "lm", "num_classes": 0, "crf": False}

  @property
  def required_model_config(self) -> Mapping[str, Json]:
    """Fields of the model's config that must have these values."""
    return {}

  @property
  def resolved_config(self) -> Mapping[str, Json]:
    """Values inferred for keys of the objective's config that are None."""
    return {}

  @property
  @abc.abstractmethod
  def coefficients(self) -> Mapping[str, float]:
    """{term: coefficient}. The loss is the sum over terms of coefficient * sum / weight."""

  def check_model(self, cfg: ModelConfig) -> None:
    """Check what `stacks` and `required_model_config` cannot express.

    Raises:
      ConfigError: the model cannot be trained on the objective.
    """
    return None

  # Host.

  def row_lengths(self, seq_len: int) -> RowLengths:
    """Return the row length of each stream if rows have `seq_len` input tokens."""
    return RowLengths(seq_len)

  def split_record(self, record: Record, tokenizer: TextTokenizer, seq_len: int, whole: bool) -> Iterator[Window]:
    """Tokenize a record and yield the windows that `make_example` is given.

    Args:
      record: fields by name.
      tokenizer: the tokenizer of the run.
      seq_len: input tokens of a row.
      whole: yield the text as one window, whatever its length. The pipeline asks for it if packing is "split".
    """
    ids = tokenizer.document(record["text"])
    for part in [ids] if whole else self.split_ids(ids, seq_len):
      if len(part):
        yield Window(record, part)

  def split_ids(self, ids: np.ndarray, seq_len: int) -> list[np.ndarray]:
    """Split the ids Int[n] of a document into parts whose examples fit into rows of `seq_len` input tokens."""
    return [ids]

  @abc.abstractmethod
  def make_example(self, window: Window, rng: np.random.Generator, corpus: RecordSource) -> Example | None:
    """Make an example of a window, or return None to skip it.

    Args:
      window: a window of `split_record`.
      rng: a generator that depends on the seed, the epoch and the record only.
      corpus: the records that the window's record is from.
    """

  # Device.

  def weights(self, batch: Batch) -> Sums:
    """Return the denominator of each term. Computed once, on the whole global batch."""
    return {term: jnp.sum(batch.weights[term]) for term in self.coefficients}

  @abc.abstractmethod
  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    """Return the sum of each term over a microbatch, and metrics as (sum, weight).

    Args:
      forward: the model with its parameters.
      batch: a microbatch; with `whole_batch` the global batch.
      rngs: see `Forward.__call__`; empty in evaluation.
    """

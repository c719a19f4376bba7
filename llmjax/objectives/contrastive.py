"""Contrastive learning of text embeddings: the cosine of a pair is large, cosines with all other texts are small.

A pair is two views of one text that differ by dropout, or two texts with an optional hard negative (Gao et al. 2021a,
SimCSE). Both directions can be trained (Radford et al. 2021, CLIP). The loss uses the whole global batch on any mesh;
`accum` computes embeddings in microbatches and rematerialises their activations (Gao et al. 2021b, GradCache).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from llmjax.config import ConfigError, Json, suggest_name
from llmjax.config.model import ModelConfig, TransformerConfig
from llmjax.distributed.sharding import constrain
from llmjax.examples import Example, RecordSource, RowLengths, TextTokenizer, TokenSequence, Window
from llmjax.types import Batch, Forward, Metrics, Objective, Outputs, Sums, Tokens, merge_microbatches

POOLINGS = ("cls", "mean", "last", "pooler")


def pool_embeddings(out: Outputs, tokens: Tokens, pooling: str) -> Float[Array, "B D"]:
  """Return one L2-normalised float32 vector for each row; zeros for rows without tokens.

  Args:
    out: outputs of the model.
    tokens: the tokens that the model has read.
    pooling: hidden state of the first token ("cls") or the last ("last"), mean over tokens ("mean"), or the output of
      the model's pooler ("pooler").
  """
  pooled = out.pooled if pooling == "pooler" else tokens.select(out.hidden, "first" if pooling == "cls" else pooling)
  pooled = pooled.astype(jnp.float32) * jnp.any(tokens.segments > 0, axis=1, keepdims=True)
  squared_norm = jnp.sum(jnp.square(pooled), axis=1, keepdims=True)
  normalised: Array = pooled * jax.lax.rsqrt(jnp.maximum(squared_norm, 1e-24))
  return normalised


def info_nce(
  anchors: Float[Array, "B D"],
  candidates: Float[Array, "M D"],
  real: Bool[Array, " M"],
  temperature: float,
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
  """InfoNCE loss of each anchor, -log exp(z_i . c_i / t) / sum_k exp(z_i . c_k / t) (van den Oord et al. 2018).

  Args:
    anchors: normalised vectors z.
    candidates: normalised vectors c; candidate i is the positive of anchor i, all others are negatives.
    real: candidates that are not padding. Only these are in the sum.
    temperature: t.

  Returns:
    The losses in nats, and whether no other candidate is nearer to the anchor than its positive.
  """
  # Default precision of accelerators has errors of 4e-3 in a cosine, which a small temperature amplifies.
  cosines = jnp.matmul(anchors, candidates.T, precision="highest")
  scores = constrain(cosines / temperature, "act_batch", None)
  # A masked sum: the diagonal of a sharded matrix needs collectives, which can deadlock on CPU.
  rows, columns = scores.shape
  own = jnp.sum(jnp.where(jnp.eye(rows, columns, dtype=bool), scores, 0.0), axis=1)
  scores = jnp.where(real[None], scores, float(np.finfo(np.float32).min))
  return jax.nn.logsumexp(scores, axis=1) - own, own >= jnp.max(scores, axis=1)


def interleave_views(*views: Array) -> Array:
  """Return [views * B ...] with the views of a row next to each other, so that no row leaves its device."""
  return jnp.stack(views, axis=1).reshape(-1, *views[0].shape[1:])


@dataclasses.dataclass(frozen=True, eq=False)
class Contrastive(Objective):
  """Cross-entropy of an anchor's positive among the positives and hard negatives of the whole batch.

  Attributes:
    tokenizer: tokenizer of the run.
    seq_len: maximum number of tokens of a text, with bos and eos; longer texts are truncated at the end.
    anchor: field of the anchor's text.
    positive: field of the positive; None: the anchor again, with other dropout.
    negative: field of a hard negative; None: none.
    symmetric: use the mean of both directions; each positive is then also compared with all anchors.
    temperature: divisor of the cosines.
    pooling: see `pool_embeddings`.
  """

  tokenizer: TextTokenizer
  seq_len: int
  anchor: str = "text"
  positive: str | None = None
  negative: str | None = None
  symmetric: bool = False
  temperature: float = 0.05
  pooling: str = "mean"

  packing = "never"
  whole_batch = True

  @property
  def stacks(self) -> tuple[str, ...]:  # type: ignore[override]
    """In a decoder the first token attends to nothing else, so it cannot represent a text."""
    return ("encoder", "decoder") if self.pooling in ("mean", "last") else ("encoder",)

  def __post_init__(self) -> None:
    if self.text_room < 1:
      raise ConfigError(f"seq_len: leaves no room for text between bos and eos, got {self.seq_len}. Increase it")
    if not self.temperature > 0:
      raise ConfigError(f"objective.temperature: must be positive, got {self.temperature}")
    if self.pooling not in POOLINGS:
      raise ConfigError(
        f"objective.pooling: is not a known value, got {self.pooling!r}; {suggest_name(self.pooling, POOLINGS)}"
      )

  @property
  def text_room(self) -> int:
    """Maximum number of tokens of text between bos and eos."""
    return self.seq_len - len(self.tokenizer.frame(np.zeros(0, np.int32)))

  @property
  def required_model_config(self) -> dict[str, Json]:
    return {"pooler": True} if self.pooling == "pooler" else {}

  def check_model(self, cfg: ModelConfig) -> None:
    if self.positive is not None or not isinstance(cfg, TransformerConfig):
      return
    if not max(cfg.dropout, cfg.attention_dropout, cfg.mlp_dropout):
      raise ConfigError(
        "objective.positive: None makes two views of a text by dropout, which the model does not have. Set "
        "model.dropout=0.1, or set objective.positive to the field of a second text"
      )

  @property
  def coefficients(self) -> dict[str, float]:
    return {"contrastive": 1.0}

  # Host.

  @property
  def view_fields(self) -> dict[str, str]:
    """{view: field of its text} of the views besides the anchor."""
    fields = {"positive": self.positive, "negative": self.negative}
    return {view: field for view, field in fields.items() if field is not None}

  def row_lengths(self, seq_len: int) -> RowLengths:
    return RowLengths(seq_len, extras={view: RowLengths(seq_len) for view in self.view_fields})

  def split_ids(self, ids: np.ndarray, seq_len: int) -> list[np.ndarray]:
    """Return the document as one part; `make_example` truncates it."""
    return [ids]

  def make_example(self, window: Window, rng: np.random.Generator, corpus: RecordSource) -> Example | None:
    record = window.record
    fields = {"anchor": self.anchor, **self.view_fields}
    for key, field in fields.items():
      if field not in record:
        raise ConfigError(
          f"objective.{key}: must be a field of the corpus's records, got {field!r}; "
          f"{suggest_name(field, sorted(record))}"
        )
      if not isinstance(record[field] or "", str):
        raise ConfigError(f"objective.{key}: the field {field!r} must be text, got {record[field]!r} in a record")
    texts = [window.ids if field == "text" else self.tokenizer.encode(record[field] or "") for field in fields.values()]
    texts = [self.tokenizer.unframe(ids) for ids in texts]
    if not all(map(len, texts)):
      return None
    sequences = [TokenSequence(self.tokenizer.frame(ids[: self.text_room])) for ids in texts]
    extras = {view: Example(sequence) for view, sequence in zip(self.view_fields, sequences[1:], strict=True)}
    return Example(sequences[0], extras=extras)

  # Device.

  def weights(self, batch: Batch) -> Sums:
    return {"contrastive": jnp.sum(self.has_example(batch).astype(jnp.float32))}

  @staticmethod
  def has_example(batch: Batch) -> Bool[Array, " B"]:
    """Whether each row has an example, rather than padding only."""
    return jnp.any(batch.inputs.segments > 0, axis=1)

  def embed_views(
    self, forward: Forward, views: Sequence[Batch], rngs: Mapping[str, Array]
  ) -> Float[Array, "views B D"]:
    """Return the vectors of all views by one pass; each row of each view has its own dropout."""

    def embed(microbatch: Batch) -> Array:
      return pool_embeddings(forward(microbatch, rngs=rngs, logits=False), microbatch.inputs, self.pooling)

    together = Batch(
      inputs=jax.tree.map(interleave_views, *(view.inputs for view in views)),
      rows=interleave_views(*(view.rows * len(views) + i for i, view in enumerate(views))),
    )
    vectors = merge_microbatches(forward.map_microbatches(embed, together))
    return jnp.moveaxis(vectors.reshape(-1, len(views), vectors.shape[-1]), 1, 0)

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    views = [batch, batch.extras.get("positive", batch)]
    if self.negative is not None:
      views.append(batch.extras["negative"])
    anchors, positives, *negatives = self.embed_views(forward, views, rngs)
    real = self.has_example(batch)
    candidates, real_candidates = jnp.concatenate([positives, *negatives]), jnp.tile(real, 1 + len(negatives))
    nll, is_nearest = info_nce(anchors, candidates, real_candidates, self.temperature)
    if self.symmetric:
      reverse, _ = info_nce(positives, anchors, real, self.temperature)
      nll = (nll + reverse) / 2
    weight = real.astype(jnp.float32)
    total, count = jnp.sum(nll * weight), jnp.sum(weight)
    squared_distance = jnp.sum(jnp.square(anchors - positives), axis=1)
    metrics = {
      "loss": (total, count),
      "accuracy": (jnp.sum(is_nearest * weight), count),
      "alignment": (jnp.sum(squared_distance * weight), count),
    }
    return {"contrastive": total}, metrics

"""Contrastive learning of text embeddings: what belongs together is near, all else in the batch far.

Two views of a text by dropout alone, or pairs with hard negatives (Gao et al. 2021, SimCSE), in both directions where
asked for (Radford et al. 2021). The loss sees the whole global batch on any mesh; `accum` computes it in chunks whose
activations are not kept (Gao et al. 2021, GradCache).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from llmjax.config import ConfigError, suggest_name
from llmjax.distributed.sharding import constrain
from llmjax.types import Batch, Features, Forward, Metrics, Objective, Outputs, Sums, Tokens, merge_microbatches

POOLINGS = ("cls", "mean", "last", "pooler")


def pool(out: Outputs, tokens: Tokens, pooling: str) -> Float[Array, "B D"]:
  """One L2-normalised vector a row, float32; a row without tokens gives zeros.

  Args:
    pooling: the hidden state of the first token ("cls"), of the last ("last"), the mean over all ("mean"), or what the
      model's pooler makes of the first ("pooler").
  """
  if pooling == "pooler":
    pooled = out.pooled
  else:
    pooled = tokens.select(out.hidden, "first" if pooling == "cls" else pooling)
  pooled = pooled.astype(jnp.float32) * jnp.any(tokens.segments > 0, axis=1, keepdims=True)
  return pooled * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(pooled), axis=1, keepdims=True), 1e-24))


def info_nce(
  anchors: Float[Array, "B D"],
  candidates: Float[Array, "M D"],
  real: Bool[Array, " M"],
  temperature: float,
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
  """-log exp(z_i . c_i / t) / sum_k exp(z_i . c_k / t) over all real candidates (van den Oord et al. 2018), where
  candidate i belongs to anchor i; and whether no other candidate is nearer."""
  # Accelerators' default precision errs by 4e-3 in a cosine, which a small temperature makes large.
  cosines = jnp.matmul(anchors, candidates.T, precision="highest")
  scores = constrain(cosines / temperature, "act_batch", None)
  # As a masked sum: taking a diagonal of what is cut over devices costs collectives, and they can lock up on CPU.
  rows, columns = scores.shape
  own = jnp.sum(jnp.where(jnp.eye(rows, columns, dtype=bool), scores, 0.0), axis=1)
  scores = jnp.where(real[None], scores, jnp.finfo(jnp.float32).min)
  return jax.nn.logsumexp(scores, axis=1) - own, own >= jnp.max(scores, axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Contrastive(Objective):
  """Cross-entropy of an anchor's own positive among those of the whole batch and all hard negatives.

  Attributes:
    seq_len: a text's tokens at most, bos and eos included; longer ones lose their end.
    anchor: the field of a record that is the anchor.
    positive: the field that belongs to it; None is the anchor itself under other dropout.
    negative: the field of a hard negative; None is none.
    symmetric: the mean of both directions, each positive also among all anchors.
    temperature: divides the cosines.
    pooling: see `pool`.
  """

  tokenizer: Any
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
    """The first token of a decoder has seen nothing of the text."""
    return ("encoder", "decoder") if self.pooling in ("mean", "last") else ("encoder",)

  def __post_init__(self) -> None:
    if self.room < 1:
      raise ConfigError(f"seq_len={self.seq_len} leaves no room for text between bos and eos; raise it")
    if not self.temperature > 0:
      raise ConfigError(f"objective.temperature={self.temperature} must be positive")
    if self.pooling not in POOLINGS:
      raise ConfigError(f"objective.pooling={self.pooling!r}; {suggest_name(self.pooling, POOLINGS)}")

  @property
  def room(self) -> int:
    """Tokens of text that fit between bos and eos."""
    return self.seq_len - len(self.tokenizer.frame(np.zeros(0, np.int32)))

  @property
  def required_model_config(self) -> dict[str, Any]:
    return {"pooler": True} if self.pooling == "pooler" else {}

  def check_model(self, cfg: Any) -> None:
    if self.positive is None and not max(cfg.dropout, cfg.attention_dropout, cfg.mlp_dropout):
      raise ConfigError(
        "objective.positive=None makes two views of a text by dropout, and the model has none; set model.dropout=0.1, "
        "or the field of a second text"
      )

  @property
  def coefficients(self) -> dict[str, float]:
    return {"contrastive": 1.0}

  # host

  @property
  def views(self) -> dict[str, str]:
    """{view: its field} besides the anchor."""
    named = {"positive": self.positive, "negative": self.negative}
    return {view: field for view, field in named.items() if field is not None}

  def row_lengths(self, seq_len: int) -> dict[str, int]:
    return {"inputs": seq_len} | {f"extras/{view}/inputs": seq_len for view in self.views}

  def window(self, ids: np.ndarray, length: int) -> list[np.ndarray]:
    """The document as it is: `features` shortens what is too long."""
    return [ids]

  def features(self, example: Mapping[str, Any], rng: np.random.Generator, corpus: Any) -> Features | None:
    fields = {"anchor": self.anchor, **self.views}
    for key, field in fields.items():
      if field not in example:
        known = sorted(k for k in example if k != "ids")
        raise ConfigError(
          f"objective.{key}={field!r} is no field of the corpus's records; {suggest_name(field, known)}"
        )
      if not isinstance(example[field] or "", str):
        raise ConfigError(f"objective.{key}={field!r}: a record has {example[field]!r} there, which is no text")
    texts = [
      example["ids"] if field == "text" else self.tokenizer.encode(example[field] or "") for field in fields.values()
    ]
    texts = [self.tokenizer.unframe(ids) for ids in texts]
    if not all(map(len, texts)):
      return None
    anchor, *others = ({"inputs": self.tokenizer.frame(ids[: self.room])} for ids in texts)
    return {**anchor, "extras": dict(zip(self.views, others))}

  # device

  def weights(self, batch: Batch) -> Sums:
    return {"contrastive": jnp.sum(self.real(batch).astype(jnp.float32))}

  @staticmethod
  def real(batch: Batch) -> Bool[Array, " B"]:
    """Which rows hold an example."""
    return jnp.any(batch.inputs.segments > 0, axis=1)

  def embed(self, forward: Forward, views: Sequence[Batch], rngs: Mapping[str, Array]) -> Float[Array, "views B D"]:
    """The vectors of all views in one pass, each row of each view with dropout of its own."""

    def one(chunk: Batch) -> Array:
      return pool(forward(chunk, rngs=rngs, logits=False), chunk.inputs, self.pooling)

    def interleave(*xs: Array) -> Array:  # views of a row side by side, so that no row leaves its device
      return jnp.stack(xs, axis=1).reshape(-1, *xs[0].shape[1:])

    together = Batch(
      inputs=jax.tree.map(interleave, *(view.inputs for view in views)),
      rows=interleave(*(view.rows * len(views) + i for i, view in enumerate(views))),
    )
    vectors = merge_microbatches(forward.map_microbatches(one, together))
    return jnp.moveaxis(vectors.reshape(-1, len(views), vectors.shape[-1]), 1, 0)

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    views = [batch, batch.extras.get("positive", batch)]
    if self.negative is not None:
      views.append(batch.extras["negative"])
    anchors, positives, *negatives = self.embed(forward, views, rngs)
    real = self.real(batch)
    candidates, valid = jnp.concatenate([positives, *negatives]), jnp.tile(real, 1 + len(negatives))
    nll, nearest_is_own = info_nce(anchors, candidates, valid, self.temperature)
    if self.symmetric:
      back, _ = info_nce(positives, anchors, real, self.temperature)
      nll = (nll + back) / 2
    weight = real.astype(jnp.float32)
    total, count = jnp.sum(nll * weight), jnp.sum(weight)
    distance = jnp.sum(jnp.square(anchors - positives), axis=1)
    metrics = {
      "loss": (total, count),
      "accuracy": (jnp.sum(nearest_is_own * weight), count),
      "alignment": (jnp.sum(distance * weight), count),
    }
    return {"contrastive": total}, metrics

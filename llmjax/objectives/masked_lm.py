"""Masked language modelling, with the order of sentences where asked for (Devlin et al. 2019)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llmjax.config import ConfigError, suggest_name
from llmjax.objectives.losses import TokenLoss, correct, cross_entropy
from llmjax.types import Batch, Features, Forward, Metrics, Objective, Sums

PAIRS = ("none", "next", "order")


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedLM(Objective):
  """Negative log-likelihood of tokens that were chosen and mostly hidden, and of which sentence pairs belong together.

  Which tokens are chosen is drawn anew in every epoch (Liu et al. 2019). An example is bos, text, eos; BERT calls these
  [CLS] and [SEP]. A pair is bos, A, eos, B, eos, with token types 0 up to the first eos and 1 behind it.

  Attributes:
    rate: the share of tokens that are chosen; at least one is. Special tokens never are.
    masked, replaced: what becomes of them: the mask token, or a random ordinary token; the rest stays as it is.
    whole_words: choose words, all of whose tokens are then chosen.
    sentence_pairs: "next": B follows A in the document, or comes from another one (class 1), by a fair coin (BERT);
      "order": A and B follow each other, or are swapped (class 1; Lan et al. 2020, ALBERT); "none".
    sentence_weight: coefficient of the pairs' loss.
  """

  tokenizer: Any
  rate: float = 0.15
  masked: float = 0.8
  replaced: float = 0.1
  whole_words: bool = False
  sentence_pairs: str = "none"
  sentence_weight: float = 1.0

  stacks = ("encoder",)

  def __post_init__(self) -> None:
    if not 0 < self.rate < 1:
      raise ConfigError(f"objective.rate={self.rate} must be between 0 and 1")
    if min(self.masked, self.replaced) < 0 or self.masked + self.replaced > 1 + 1e-9:
      raise ConfigError(f"objective.masked={self.masked} and replaced={self.replaced} must be shares, at most 1 in all")
    if self.sentence_weight < 0:
      raise ConfigError(f"objective.sentence_weight={self.sentence_weight} must not be negative")
    if self.sentence_pairs not in PAIRS:
      raise ConfigError(f"objective.sentence_pairs={self.sentence_pairs!r}; {suggest_name(self.sentence_pairs, PAIRS)}")
    if self.tokenizer.mask_id is None:
      raise ConfigError(
        "objective.name='masked_lm' needs a mask token, which the tokenizer lacks; set data.tokenizer.mask=True"
      )
    if self.pairs and (self.tokenizer.bos_id is None or self.tokenizer.eos_id is None):
      raise ConfigError(
        f"objective.sentence_pairs={self.sentence_pairs!r} needs tokens that begin and end a text (bos, eos), which "
        "the tokenizer lacks; set sentence_pairs='none' or another data.tokenizer"
      )

  @property
  def pairs(self) -> bool:
    return self.sentence_pairs != "none"

  @property
  def required_model_config(self) -> dict[str, Any]:
    return {"sentence_classes": 2, "token_types": 2} if self.pairs else {}

  @property
  def coefficients(self) -> dict[str, float]:
    return {"mlm": 1.0, "sentence": self.sentence_weight} if self.pairs else {"mlm": 1.0}

  @functools.cached_property
  def ordinary(self) -> np.ndarray:
    """Int[n]: the tokens that stand for text."""
    return np.flatnonzero(~self.tokenizer.special)

  # host

  def window(self, ids: np.ndarray, length: int) -> list[np.ndarray]:
    """Pieces of the document without its bos and eos, which `features` puts around each; for pairs, whole sentences."""
    text = self.tokenizer.unframe(ids)
    room = length - len(self.frame(text[:0], text[:0] if self.pairs else None)[0])
    if room < 2:
      raise ConfigError(f"seq_len={length} leaves no room for text between bos and eos; raise it")
    ends = np.append(self.ends(text), len(text)) if self.pairs else np.zeros(0, int)
    pieces, start = [], 0
    while start < len(text):
      fitting = int(np.searchsorted(ends, start + room, side="right"))
      stop = int(ends[fitting - 1]) if fitting and ends[fitting - 1] > start else start + room
      pieces.append(text[start:stop])
      start = stop
    return pieces

  def frame(self, a: np.ndarray, b: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(ids, token types) of a text, or of two."""
    first = self.tokenizer.frame(a)
    second = a[:0] if b is None else np.append(b, self.tokenizer.eos_id).astype(np.int32)
    return np.concatenate([first, second]), np.repeat([0, 1], [len(first), len(second)]).astype(np.int32)

  def features(self, example: Mapping[str, Any], rng: np.random.Generator, corpus: Any) -> Features | None:
    text = example["ids"]
    if not self.pairs:
      ids, token_types = self.frame(text)
      label = None
    else:
      pair = self.draw_pair(text, example, rng, corpus)
      if pair is None:
        return None
      a, b, label = pair
      ids, token_types = self.frame(a, b)
    inputs, chosen = self.corrupt(ids, rng)
    features = {
      "inputs": {"ids": inputs, "token_types": token_types},
      "labels": {"mlm": np.where(chosen, ids, 0)},
      "weights": {"mlm": chosen},
    }
    if label is not None:  # at the first token, whose hidden state the pooler takes
      first = np.arange(len(ids)) == 0
      features["labels"]["sentence"] = label * first
      features["weights"]["sentence"] = first
    return features

  def draw_pair(
    self, text: np.ndarray, example: Mapping[str, Any], rng: np.random.Generator, corpus: Any
  ) -> tuple[np.ndarray, np.ndarray, int] | None:
    """A, B and the class of the pair; None where the text has a single sentence.

    Whatever the class, B begins behind a sentence's end, and its length was bounded before the coin was thrown: else
    how it begins and how long it is would tell the class.
    """
    ends = self.ends(text)
    if not len(ends):
      return None
    cut = int(rng.choice(ends))
    a, b = text[:cut], text[cut:]
    most = int(rng.integers(1, len(b) + 1))
    if rng.random() < 0.5:
      return a, b if self.sentence_pairs == "order" else self.bound(b, most), 0
    if self.sentence_pairs == "order":
      return b, a, 1
    other = self.draw_other(example, len(b), rng, corpus)
    return (a, self.bound(b, most), 0) if other is None else (a, self.bound(other, most), 1)

  def draw_other(
    self, example: Mapping[str, Any], length: int, rng: np.random.Generator, corpus: Any
  ) -> np.ndarray | None:
    """About `length` tokens of another document, from behind a sentence's end; None if none is found."""
    if len(corpus) < 2:
      raise ConfigError(
        "objective.sentence_pairs='next' takes false pairs from other documents, and the split has one alone; give "
        "more, or set sentence_pairs='order'"
      )
    for _ in range(10):
      other = corpus[int(rng.integers(len(corpus)))]["text"]
      if other == example["text"]:
        continue
      start = int(rng.integers(max(len(other) - 16 * length, 1)))
      ids = self.tokenizer.encode(other[start : start + 32 * length])  # few tokens have 16 characters
      ends = self.ends(ids)
      roomy = ends[ends <= len(ids) - length]
      if len(ends):
        return ids[int(rng.choice(roomy if len(roomy) else ends)) :][:length]
    return None

  def bound(self, ids: np.ndarray, most: int) -> np.ndarray:
    """As many whole sentences as have at most `most` tokens; a part of the first where that is longer."""
    ends = np.append(self.ends(ids), len(ids))
    fitting = ends[ends <= most]
    return ids[: int(fitting[-1]) if len(fitting) else most]

  def ends(self, ids: np.ndarray) -> np.ndarray:
    """Int[n]: behind which tokens sentences or lines end, but for the last."""
    return 1 + np.flatnonzero(self.sentence_end[ids[:-1]])

  @functools.cached_property
  def sentence_end(self) -> np.ndarray:
    """Bool[V]: whether a sentence or line may end with a token."""
    return np.array([b"\n" in piece or piece.rstrip().endswith((b".", b"!", b"?")) for piece in self.tokenizer.pieces])

  def corrupt(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The ids as the model sees them, and which of them were chosen to be predicted."""
    places = np.flatnonzero(~self.tokenizer.special[ids])
    count = min(max(1, round(self.rate * len(places))), len(places))
    chosen = np.zeros(len(ids), bool)
    chosen[self.choose_words(ids, places, count, rng) if self.whole_words else rng.permutation(places)[:count]] = True
    fate = rng.random(len(ids))
    random = self.ordinary[rng.integers(len(self.ordinary), size=len(ids))]
    hidden = np.where(
      fate < self.masked, self.tokenizer.mask_id, np.where(fate < self.masked + self.replaced, random, ids)
    )
    return np.where(chosen, hidden, ids).astype(np.int32), chosen

  def choose_words(self, ids: np.ndarray, places: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Places of whole words, up to `count` of them; the shortest word where all are longer."""
    begins = self.tokenizer.word_begins(ids[places]) | (np.diff(places, prepend=-2) > 1)
    words = np.split(places, np.flatnonzero(begins[1:]) + 1) if len(places) else []
    taken: list[np.ndarray] = []
    for i in rng.permutation(len(words)):
      if sum(map(len, taken)) + len(words[i]) <= count:
        taken.append(words[i])
    return np.concatenate(taken or [min(words, key=len)]) if words else places

  # device

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    out = forward(batch, rngs=rngs)
    sums, metrics = TokenLoss("mlm")(forward, out, batch)
    metrics["masked_accuracy"] = metrics.pop("accuracy")
    if self.pairs:
      logits = forward.sentence_logits(out.hidden)
      labels, weight = batch.labels["sentence"], batch.weights["sentence"]
      nll, _, _ = cross_entropy(logits, labels)
      count = jnp.sum(weight)
      sums["sentence"] = jnp.sum(nll * weight)
      metrics["sentence_loss"] = (sums["sentence"], count)
      metrics["sentence_accuracy"] = (jnp.sum(correct(logits, labels) * weight), count)
    return sums, metrics

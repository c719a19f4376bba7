"""Masked language modelling, with an optional loss on sentence pairs (Devlin et al. 2019)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llmjax.config import ConfigError, Json, suggest_name
from llmjax.examples import Example, Record, RecordSource, TextTokenizer, TokenSequence, Window
from llmjax.objectives.losses import TokenLoss, cross_entropy, is_correct
from llmjax.types import Batch, Forward, Metrics, Objective, Sums

SENTENCE_PAIRS = ("none", "next", "order")
MAX_DRAWS = 10  # documents to try for the second sentence of a false pair
MAX_TOKEN_CHARACTERS = 16  # few tokens are longer, so that this times a number of tokens is enough text for them


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedLM(Objective):
  """Negative log-likelihood of selected tokens, most of which are masked, and of the class of sentence pairs.

  Tokens are selected anew in every epoch (Liu et al. 2019). An example is bos, text, eos, which BERT calls [CLS] and
  [SEP]. A pair is bos, A, eos, B, eos, with token type 0 up to the first eos and 1 after it.

  Attributes:
    tokenizer: tokenizer of the run, with a mask token.
    rate: share of tokens that are selected, at least one. Special tokens are never selected.
    masked: share of the selected tokens that become the mask token.
    replaced: share of the selected tokens that become a random token of text; the rest is unchanged.
    whole_words: select words, that is all tokens of each.
    sentence_pairs: "next": B follows A in the document, or is from another document (class 1), with equal probability
      (BERT); "order": A and B follow each other, or are swapped (class 1; Lan et al. 2020, ALBERT); "none".
    sentence_weight: coefficient of the loss on pairs.
  """

  tokenizer: TextTokenizer
  rate: float = 0.15
  masked: float = 0.8
  replaced: float = 0.1
  whole_words: bool = False
  sentence_pairs: str = "none"
  sentence_weight: float = 1.0

  stacks = ("encoder",)

  def __post_init__(self) -> None:
    if not 0 < self.rate < 1:
      raise ConfigError(f"objective.rate: must be between 0 and 1, got {self.rate}")
    if min(self.masked, self.replaced) < 0 or self.masked + self.replaced > 1 + 1e-9:
      raise ConfigError(
        "objective.masked, objective.replaced: must be shares with a sum of at most 1, got "
        f"{self.masked} and {self.replaced}"
      )
    if self.sentence_weight < 0:
      raise ConfigError(f"objective.sentence_weight: must not be negative, got {self.sentence_weight}")
    if self.sentence_pairs not in SENTENCE_PAIRS:
      raise ConfigError(
        f"objective.sentence_pairs: is not a known value, got {self.sentence_pairs!r}; "
        f"{suggest_name(self.sentence_pairs, SENTENCE_PAIRS)}"
      )
    if self.tokenizer.mask_id is None:
      raise ConfigError(
        "data.tokenizer: objective.name='masked_lm' needs a mask token, which the tokenizer lacks. Set "
        "data.tokenizer.mask=True"
      )
    if self.has_pairs and (self.tokenizer.bos_id is None or self.tokenizer.eos_id is None):
      raise ConfigError(
        f"data.tokenizer: objective.sentence_pairs={self.sentence_pairs!r} needs tokens that begin and end a text "
        "(bos, eos), which the tokenizer lacks. Set objective.sentence_pairs='none', or choose another data.tokenizer"
      )

  @property
  def has_pairs(self) -> bool:
    """Whether examples are sentence pairs."""
    return self.sentence_pairs != "none"

  @property
  def required_model_config(self) -> dict[str, Json]:
    return {"sentence_classes": 2, "token_types": 2} if self.has_pairs else {}

  @property
  def coefficients(self) -> dict[str, float]:
    return {"mlm": 1.0, "sentence": self.sentence_weight} if self.has_pairs else {"mlm": 1.0}

  @functools.cached_property
  def text_tokens(self) -> np.ndarray:
    """Int[n], the tokens that are not special."""
    return np.flatnonzero(~self.tokenizer.special)

  @functools.cached_property
  def may_end_sentence(self) -> np.ndarray:
    """Bool[V], whether a sentence or line may end with a token."""
    return np.array([b"\n" in piece or piece.rstrip().endswith((b".", b"!", b"?")) for piece in self.tokenizer.pieces])

  # Host.

  def split_ids(self, ids: np.ndarray, seq_len: int) -> list[np.ndarray]:
    """Return consecutive parts of the document, without its bos and eos; for pairs, parts end with a sentence.

    Raises:
      ConfigError: a row has no room for text.
    """
    text = self.tokenizer.unframe(ids)
    room = seq_len - len(self.frame_texts(text[:0], text[:0] if self.has_pairs else None)[0])
    if room < 2:
      raise ConfigError(f"seq_len: leaves no room for text between bos and eos, got {seq_len}. Increase it")
    ends = np.append(self.sentence_ends(text), len(text)) if self.has_pairs else np.zeros(0, int)
    parts, start = [], 0
    while start < len(text):
      num_fitting = int(np.searchsorted(ends, start + room, side="right"))
      stop = int(ends[num_fitting - 1]) if num_fitting and ends[num_fitting - 1] > start else start + room
      parts.append(text[start:stop])
      start = stop
    return parts

  def frame_texts(self, first: np.ndarray, second: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, token types) of one or two texts with bos and eos."""
    a = self.tokenizer.frame(first)
    eos_id = self.tokenizer.eos_id
    b = first[:0] if second is None or eos_id is None else np.append(second, eos_id).astype(np.int32)
    return np.concatenate([a, b]), np.repeat([0, 1], [len(a), len(b)]).astype(np.int32)

  def make_example(self, window: Window, rng: np.random.Generator, corpus: RecordSource) -> Example | None:
    labels, weights = {}, {}
    if not self.has_pairs:
      ids, token_types = self.frame_texts(window.ids)
    else:
      pair = self.draw_pair(window.ids, window.record, rng, corpus)
      if pair is None:
        return None
      first, second, pair_class = pair
      ids, token_types = self.frame_texts(first, second)
      is_first = np.arange(len(ids)) == 0  # the pooler reads the hidden state of the first token
      labels["sentence"], weights["sentence"] = pair_class * is_first, is_first
    inputs, selected = self.corrupt_tokens(ids, rng)
    labels["mlm"], weights["mlm"] = np.where(selected, ids, 0), selected
    return Example(TokenSequence(inputs, token_types), labels=labels, weights=weights)

  def draw_pair(
    self, text: np.ndarray, record: Record, rng: np.random.Generator, corpus: RecordSource
  ) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Return A, B and the class of the pair; None if the text has a single sentence."""
    ends = self.sentence_ends(text)
    if not len(ends):
      return None
    cut = int(rng.choice(ends))
    first, second = text[:cut], text[cut:]
    # In both classes B follows the end of a sentence, and its length is limited before the class is drawn. Otherwise
    # how B begins, or how long it is, would tell the class.
    limit = int(rng.integers(1, len(second) + 1))
    if rng.random() < 0.5:
      return first, second if self.sentence_pairs == "order" else self.truncate_to_sentences(second, limit), 0
    if self.sentence_pairs == "order":
      return second, first, 1
    other = self.draw_other_text(record, len(second), rng, corpus)
    if other is None:
      return first, self.truncate_to_sentences(second, limit), 0
    return first, self.truncate_to_sentences(other, limit), 1

  def draw_other_text(
    self, record: Record, length: int, rng: np.random.Generator, corpus: RecordSource
  ) -> np.ndarray | None:
    """Return about `length` tokens of another document that follow the end of a sentence; None if none is drawn.

    Raises:
      ConfigError: the corpus has one document only.
    """
    if len(corpus) < 2:
      raise ConfigError(
        "objective.sentence_pairs: 'next' draws false pairs from other documents, and the split has one document. "
        "Add documents, or set objective.sentence_pairs='order'"
      )
    for _ in range(MAX_DRAWS):
      other: str = corpus[int(rng.integers(len(corpus)))]["text"]
      if other == record["text"]:
        continue
      start = int(rng.integers(max(len(other) - MAX_TOKEN_CHARACTERS * length, 1)))
      ids = self.tokenizer.encode(other[start : start + 2 * MAX_TOKEN_CHARACTERS * length])
      ends = self.sentence_ends(ids)
      roomy = ends[ends <= len(ids) - length]
      if len(ends):
        begin = int(rng.choice(roomy if len(roomy) else ends))
        return ids[begin:][:length]
    return None

  def truncate_to_sentences(self, ids: np.ndarray, limit: int) -> np.ndarray:
    """Return the first whole sentences with at most `limit` tokens together; a part of the first if it is longer."""
    ends = np.append(self.sentence_ends(ids), len(ids))
    fitting = ends[ends <= limit]
    return ids[: int(fitting[-1]) if len(fitting) else limit]

  def sentence_ends(self, ids: np.ndarray) -> np.ndarray:
    """Return the positions Int[n] after which a new sentence or line begins."""
    return 1 + np.flatnonzero(self.may_end_sentence[ids[:-1]])

  def corrupt_tokens(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids Int32[n] that the model reads, and which of them are predicted, Bool[n]."""
    candidates = np.flatnonzero(~self.tokenizer.special[ids])
    count = min(max(1, round(self.rate * len(candidates))), len(candidates))
    selected = np.zeros(len(ids), bool)
    if self.whole_words:
      selected[self.select_words(ids, candidates, count, rng)] = True
    else:
      selected[rng.permutation(candidates)[:count]] = True
    draw = rng.random(len(ids))
    random_tokens = self.text_tokens[rng.integers(len(self.text_tokens), size=len(ids))]
    replaced = np.where(draw < self.masked + self.replaced, random_tokens, ids)
    mask_id = self.tokenizer.mask_id
    assert mask_id is not None  # checked when the objective is built
    corrupted = np.where(draw < self.masked, mask_id, replaced)
    return np.where(selected, corrupted, ids).astype(np.int32), selected

  def select_words(self, ids: np.ndarray, candidates: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return the positions of random whole words with at most `count` tokens; the shortest word if all are longer."""
    begins = self.tokenizer.word_begins(ids[candidates]) | (np.diff(candidates, prepend=-2) > 1)
    words = np.split(candidates, np.flatnonzero(begins[1:]) + 1) if len(candidates) else []
    selected: list[np.ndarray] = []
    for i in rng.permutation(len(words)):
      if sum(map(len, selected)) + len(words[i]) <= count:
        selected.append(words[i])
    return np.concatenate(selected or [min(words, key=len)]) if words else candidates

  # Device.

  def loss(self, forward: Forward, batch: Batch, rngs: Mapping[str, Array]) -> tuple[Sums, Metrics]:
    out = forward(batch, rngs=rngs)
    sums, metrics = TokenLoss("mlm")(forward, out, batch)
    metrics["masked_accuracy"] = metrics.pop("accuracy")
    if self.has_pairs:
      logits = forward.sentence_logits(out.hidden)
      labels, weight = batch.labels["sentence"], batch.weights["sentence"]
      nll, _, _ = cross_entropy(logits, labels)
      count = jnp.sum(weight)
      sums["sentence"] = jnp.sum(nll * weight)
      metrics["sentence_loss"] = (sums["sentence"], count)
      metrics["sentence_accuracy"] = (jnp.sum(is_correct(logits, labels) * weight), count)
    return sums, metrics

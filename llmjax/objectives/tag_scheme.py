"""Tag schemes: how spans of text are written as one tag per word, and which tags may follow each other.

word    Ada  Lovelace  met  Babbage  in  London
iob1    I-P  I-P       O    I-P      O   I-L     B-X only if a span touches another of its type (Ramshaw & Marcus 1995)
iob2    B-P  I-P       O    B-P      O   B-L     B-X begins every span (Tjong Kim Sang & Veenstra 1999)
bioes   B-P  E-P       O    S-P      O   S-L     E-X ends a span, S-X is a span of one word
none    any tags, for example parts of speech, in any order
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from llmjax.config import ConfigError, suggest_name
from llmjax.objectives.crf import FORBIDDEN_SCORE, Transitions

PREFIXES = {"none": "BIES", "iob2": "BI", "bioes": "BIES"}
SCHEMES = tuple(PREFIXES)
OTHER_NAMES = {"bio": "iob2", "bio2": "iob2", "iobes": "bioes"}


class AllowedTransitions(NamedTuple):
  """Which tags may begin a sentence, follow each other, and end a sentence."""

  start: np.ndarray  # Bool[C]
  matrix: np.ndarray  # Bool[C C], from, to
  end: np.ndarray  # Bool[C]


class Violation(NamedTuple):
  """A place where a sentence violates its scheme."""

  position: int  # of `tag`; of the last tag if a span is open at the end
  previous: str | None  # None at the beginning of the sentence
  tag: str | None  # None at the end of the sentence


class SplitTag(NamedTuple):
  """A tag such as "B-PER" as ("B", "PER"); ("O", "") outside of spans."""

  prefix: str
  kind: str


def allowed_transitions(labels: Sequence[str], scheme: str) -> AllowedTransitions:
  """Return which transitions between labels a scheme allows.

  Raises:
    ConfigError: the scheme is unknown, or a label is not a tag of it.
  """
  check_tag_labels(labels, scheme)
  start = [_may_follow(None, label, scheme) for label in labels]
  matrix = [[_may_follow(previous, label, scheme) for label in labels] for previous in labels]
  end = [_may_follow(label, None, scheme) for label in labels]
  square = np.array(matrix, bool).reshape(len(labels), len(labels))
  return AllowedTransitions(np.array(start, bool), square, np.array(end, bool))


def transition_constraints(labels: Sequence[str], scheme: str) -> Transitions:
  """Return scores to be added to others: 0 for allowed transitions, else `crf.FORBIDDEN_SCORE`.

  Raises:
    ConfigError: the scheme is unknown, or a label is not a tag of it.
  """
  allowed = allowed_transitions(labels, scheme)
  return Transitions(*(np.where(each, 0, FORBIDDEN_SCORE).astype(np.float32) for each in allowed))


def first_violation(tags: Sequence[str], scheme: str) -> Violation | None:
  """Return the first place where a sentence violates its scheme, None if there is none."""
  check_tag_scheme(scheme)
  for position, tag in enumerate(tags):
    previous = tags[position - 1] if position else None
    if not (_belongs_to(tag, scheme) and _may_follow(previous, tag, scheme)):
      return Violation(position, previous, tag)
  if len(tags) and not _may_follow(tags[-1], None, scheme):
    return Violation(len(tags) - 1, tags[-1], None)
  return None


def check_tag_scheme(scheme: str) -> None:
  """Raise ConfigError for an unknown scheme."""
  if scheme not in SCHEMES:
    hint = f"here it is called `{OTHER_NAMES[scheme]}`" if scheme in OTHER_NAMES else suggest_name(scheme, SCHEMES)
    if scheme == "iob1":
      hint = "convert its tags to iob2 with `tag_scheme.iob1_to_iob2`"
    raise ConfigError(f"objective.scheme: is not a known value, got {scheme!r}; {hint}")


def check_tag_labels(labels: Sequence[str], scheme: str) -> None:
  """Raise ConfigError for an unknown scheme, or a label that is not a tag of it."""
  check_tag_scheme(scheme)
  wrong = [label for label in labels if not _belongs_to(label, scheme)]
  if not wrong:
    return
  kinds = dict.fromkeys(label.partition("-")[2] for label in labels if _belongs_to(label, scheme) and label != "O")
  known = ["O", *(f"{prefix}-{kind}" for kind in kinds for prefix in PREFIXES[scheme])]
  fitting = next(other for other in ("iob2", "bioes", "none") if all(_belongs_to(label, other) for label in labels))
  shapes = ", ".join(f"{prefix}-TYPE" for prefix in PREFIXES[scheme])
  hint = f"{suggest_name(wrong[0], known)}; " if kinds and fitting == "none" else ""
  raise ConfigError(
    f"objective.labels: must be O or one of {shapes} for objective.scheme={scheme!r}, got {wrong[0]!r}; {hint}"
    f"objective.scheme={fitting!r} accepts all labels as they are"
  )


def extract_spans(tags: Sequence[str], scheme: str) -> list[tuple[int, int, str]]:
  """Return the spans of a sentence as (start, stop, type).

  Tags that violate the scheme are read as conlleval of the CoNLL shared tasks does: a tag that continues no span begins
  one, and a span ends where the next tag does not continue it. The scheme "none" reads all prefixes; tags without a
  prefix of the scheme count as O.
  """
  check_tag_scheme(scheme)
  spans, start, previous = [], 0, SplitTag("O", "")
  for position, tag in enumerate([*tags, "O"]):
    current = _split_tag(tag, scheme)
    if not _continues(previous, current):
      if previous.prefix != "O":
        spans.append((start, position, previous.kind))
      start = position
    previous = current
  return spans


def iob1_to_iob2(tags: Sequence[str]) -> list[str]:
  """Return the tags of an iob1 sentence as iob2; iob2 tags are unchanged."""
  split = [SplitTag("O", ""), *(_split_tag(tag, "iob2") for tag in tags)]
  begins = [tag.prefix == "I" and not _continues(previous, tag) for previous, tag in itertools.pairwise(split)]
  return [f"B{tag[1:]}" if begin else tag for tag, begin in zip(tags, begins, strict=True)]


def infer_tag_scheme(labels: Iterable[str]) -> str:
  """Return the first of "iob2", "bioes" and "none" that all labels belong to.

  Sentences may still violate it; `first_violation` then tells where.
  """
  names = set(labels)
  return next(scheme for scheme in ("iob2", "bioes", "none") if all(_belongs_to(name, scheme) for name in names))


def _split_tag(tag: str, scheme: str) -> SplitTag:
  """Return the parts of a tag; tags outside of spans, or without a prefix of the scheme, give ("O", "")."""
  prefix, _, kind = tag.partition("-")
  return SplitTag(prefix, kind) if kind and prefix in tuple(PREFIXES[scheme]) else SplitTag("O", "")


def _belongs_to(tag: str, scheme: str) -> bool:
  """Whether a tag is one of the scheme's."""
  return scheme == "none" or tag == "O" or _split_tag(tag, scheme).prefix != "O"


def _continues(previous: SplitTag, tag: SplitTag) -> bool:
  """Whether a tag is in the same span as the tag before it."""
  return previous.prefix in ("B", "I") and tag.prefix in ("I", "E") and previous.kind == tag.kind


def _may_follow(previous: str | None, tag: str | None, scheme: str) -> bool:
  """Whether `tag` may follow `previous`; None is outside of the sentence."""
  if scheme == "none":
    return True
  before, current = _split_tag(previous or "O", scheme), _split_tag(tag or "O", scheme)
  must_continue = scheme == "bioes" and before.prefix in ("B", "I")
  return _continues(before, current) if must_continue or current.prefix in ("I", "E") else True

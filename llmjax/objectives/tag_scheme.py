"""How spans of text are written as one tag a word, and which tags may stand behind which.

word    Ada  Lovelace  met  Babbage  in  London
iob1    I-P  I-P       O    I-P      O   I-L     B-X only where a span touches one of its type (Ramshaw & Marcus 1995)
iob2    B-P  I-P       O    B-P      O   B-L     B-X begins every span (Tjong Kim Sang & Veenstra 1999)
bioes   B-P  E-P       O    S-P      O   S-L     and E-X ends it; S-X is a span of one word
none    tags are what they are, as parts of speech, and any may follow any
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from llmjax.config import ConfigError, suggest_name
from llmjax.objectives.crf import FORBIDDEN, Transitions

PREFIXES = {"none": "BIES", "iob2": "BI", "bioes": "BIES"}
SCHEMES = tuple(PREFIXES)
OTHER_NAMES = {"bio": "iob2", "bio2": "iob2", "iobes": "bioes"}


def allowed(labels: Sequence[str], scheme: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Which tags may begin a sentence, Bool[C]; stand behind each other, Bool[C C] (from, to); and end it, Bool[C]."""
  check_labels(labels, scheme)
  start = [_follows(None, label, scheme) for label in labels]
  matrix = [[_follows(previous, label, scheme) for label in labels] for previous in labels]
  end = [_follows(label, None, scheme) for label in labels]
  return np.array(start, bool), np.array(matrix, bool).reshape(len(labels), len(labels)), np.array(end, bool)


def constraints(labels: Sequence[str], scheme: str) -> Transitions:
  """Transitions of 0 where the scheme allows them and `crf.FORBIDDEN` where not, to be added to others."""
  return Transitions(*(np.where(legal, 0, FORBIDDEN).astype(np.float32) for legal in allowed(labels, scheme)))


def violation(tags: Sequence[str], scheme: str) -> tuple[int, str | None, str | None] | None:
  """The first place where a sentence breaks the scheme, None where it keeps it.

  Returns:
    (position, previous tag, tag). The previous tag is None at the beginning. The tag is None where a span is left open
    at the end; the position is then that of the last tag.
  """
  check_scheme(scheme)
  for position, tag in enumerate(tags):
    previous = tags[position - 1] if position else None
    if not (_belongs(tag, scheme) and _follows(previous, tag, scheme)):
      return position, previous, tag
  if len(tags) and not _follows(tags[-1], None, scheme):
    return len(tags) - 1, tags[-1], None
  return None


def check_scheme(scheme: str) -> None:
  """Raises ConfigError where there is no such scheme."""
  if scheme not in SCHEMES:
    way_out = f"here it is called `{OTHER_NAMES[scheme]}`" if scheme in OTHER_NAMES else suggest_name(scheme, SCHEMES)
    if scheme == "iob1":
      way_out = "turn its tags into iob2 with `tag_scheme.to_iob2`"
    raise ConfigError(f"objective.scheme={scheme!r}; {way_out}")


def check_labels(labels: Sequence[str], scheme: str) -> None:
  """Raises ConfigError where there is no such scheme, or a label does not belong to it."""
  check_scheme(scheme)
  wrong = [label for label in labels if not _belongs(label, scheme)]
  if not wrong:
    return
  kinds = dict.fromkeys(label.partition("-")[2] for label in labels if _belongs(label, scheme) and label != "O")
  known = ["O", *(f"{prefix}-{kind}" for kind in kinds for prefix in PREFIXES[scheme])]
  fitting = next(other for other in ("iob2", "bioes", "none") if all(_belongs(label, other) for label in labels))
  shapes = ", ".join(f"{prefix}-TYPE" for prefix in PREFIXES[scheme])
  hint = f"{suggest_name(wrong[0], known)}; " if kinds and fitting == "none" else ""
  raise ConfigError(
    f"objective.scheme={scheme!r}: the label {wrong[0]!r} must be O or one of {shapes}; {hint}"
    f"objective.scheme={fitting!r} takes all labels as they are"
  )


def spans(tags: Sequence[str], scheme: str) -> list[tuple[int, int, str]]:
  """(start, stop, type) of all spans, `stop` being the first position behind.

  Sequences that break the scheme are read as the shared tasks' conlleval does: what continues nothing begins a span,
  and a span ends where nothing continues it. "none" reads all prefixes; what has none of the scheme's counts as O.
  """
  check_scheme(scheme)
  found, start, previous = [], 0, ("O", "")
  for position, tag in enumerate([*tags, "O"]):
    here = _split(tag, scheme)
    if not _continues(previous, here):
      if previous[0] != "O":
        found.append((start, position, previous[1]))
      start = position
    previous = here
  return found


def to_iob2(tags: Sequence[str]) -> list[str]:
  """The tags of an iob1 sentence in iob2; those of an iob2 sentence stay as they are."""
  before = [("O", ""), *(_split(tag, "iob2") for tag in tags)]
  begins = [here[0] == "I" and not _continues(previous, here) for previous, here in itertools.pairwise(before)]
  return [f"B{tag[1:]}" if begin else tag for tag, begin in zip(tags, begins)]


def guess(labels: Iterable[str]) -> str:
  """The scheme of tags that do not say theirs: "iob2" or "bioes" where all of them could be of it, else "none".

  A sentence may break it all the same, and `violation` then says where.
  """
  found = set(labels)
  return next(scheme for scheme in ("iob2", "bioes", "none") if all(_belongs(label, scheme) for label in found))


def _split(tag: str, scheme: str) -> tuple[str, str]:
  """(prefix, type); ("O", "") for what is outside of spans, or has no prefix of the scheme."""
  prefix, _, kind = tag.partition("-")
  return (prefix, kind) if kind and prefix in tuple(PREFIXES[scheme]) else ("O", "")


def _belongs(tag: str, scheme: str) -> bool:
  return scheme == "none" or tag == "O" or _split(tag, scheme)[0] != "O"


def _continues(previous: tuple[str, str], here: tuple[str, str]) -> bool:
  """Whether a tag lies in the same span as the one before it."""
  return previous[0] in ("B", "I") and here[0] in ("I", "E") and previous[1] == here[1]


def _follows(previous: str | None, tag: str | None, scheme: str) -> bool:
  """Whether `tag` may stand behind `previous`; None is what lies outside of the sentence."""
  if scheme == "none":
    return True
  before, here = _split(previous or "O", scheme), _split(tag or "O", scheme)
  opened = scheme == "bioes" and before[0] in ("B", "I")
  return _continues(before, here) if opened or here[0] in ("I", "E") else True

"""Metrics of spans that tags mark, such as named entities, computed by seqeval."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from llmjax.config import ConfigError, suggest_name
from llmjax.metrics.examples import as_floats, check_examples, import_library

# {scheme: {prefix of a tag: the prefix of IOB2 or IOBES that seqeval knows}}
TAG_PREFIXES = {
  "iob1": {"B": "B", "I": "I"},
  "iob2": {"B": "B", "I": "I"},
  "iobes": {"B": "B", "I": "I", "E": "E", "S": "S"},
  "bilou": {"B": "B", "I": "I", "L": "E", "U": "S"},
}


def span_metrics(
  truths: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]], scheme: str = "iob2"
) -> dict[str, float]:
  """Score spans, which one tag per token marks: O, or a prefix for the position in the span and the span's type.

  - "precision", "recall", "f1": of spans with the right type and both the right boundaries, over all types.
  - "f1/TYPE": F1 of each type in truths or predictions, "_" for tags without a type.
  - "accuracy": share of tokens with the right tag.

  Spans are read as CoNLL's conlleval reads them, which is the default of seqeval and of Hugging Face's `evaluate`: a
  span also begins at I if no span of its type is open. Ill-formed predictions therefore count, unlike in the strict
  mode.

  Args:
    truths: per example the tags of its T tokens, such as "B-PER".
    predictions: the same, of the same lengths.
    scheme: "iob2" (every span begins with B), "iob1" (with I, and with B after a span of the same type), "iobes" (E
      ends a span, S is a span of one token) or "bilou" (L and U in place of E and S).

  Returns:
    {name: score in [0, 1]}.

  Raises:
    ConfigError: a tag is not in the scheme, lengths differ, or there are no tokens.
  """
  check_examples("spans", truths, predictions, list_of="tags")
  if scheme not in TAG_PREFIXES:
    raise ConfigError(f"spans: scheme={scheme!r} is unknown; {suggest_name(scheme, TAG_PREFIXES)}")
  for i, (truth, prediction) in enumerate(zip(truths, predictions)):
    if len(truth) != len(prediction):
      raise ConfigError(
        f"spans: got {len(prediction)} predicted tags for the {len(truth)} tags of truth {i}. Give one for each."
      )
  if not any(map(len, truths)):
    raise ConfigError("spans: there are no tokens to score. Choose a split that has some.")
  labeling = import_library("seqeval.metrics.sequence_labeling")
  true = [_seqeval_tags(f"truth {i}", row, scheme) for i, row in enumerate(truths)]
  predicted = [_seqeval_tags(f"prediction {i}", row, scheme) for i, row in enumerate(predictions)]
  score = functools.partial(labeling.precision_recall_fscore_support, true, predicted, zero_division=0)
  # seqeval returns the scores per type in sorted order.
  span_types = sorted({span_type for side in (true, predicted) for span_type, _, _ in labeling.get_entities(side)})
  scores = dict(zip(("precision", "recall", "f1"), score(average="micro")))
  scores["accuracy"] = labeling.accuracy_score(true, predicted)
  by_type = zip(span_types, score(average=None)[2])
  return as_floats({**scores, **{f"f1/{span_type}": f1 for span_type, f1 in by_type}})


def _seqeval_tags(name: str, tags: Sequence[str], scheme: str) -> list[str]:
  """Return the tags with prefixes that seqeval knows; `name` of the row is for messages."""
  prefixes = TAG_PREFIXES[scheme]
  for tag in tags:
    if not re.fullmatch(rf"O|[{''.join(prefixes)}](-.+)?", tag):
      known = ", ".join(f"{prefix}-TYPE" for prefix in prefixes)
      raise ConfigError(f"spans: {name} has the tag {tag!r}, but scheme={scheme!r} has only O, {known}")
  return [prefixes.get(tag[0], "O") + tag[1:] for tag in tags]

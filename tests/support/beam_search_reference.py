"""Beam search step by step in NumPy, for one prompt: the reference of the tests and of make_beam_search.py."""

import numpy as np

VOCAB_SIZE, PAD_ID = 9, 8


def log_softmax(logits):
  logits = logits - logits.max()
  return logits - np.log(np.exp(logits).sum())


def reference_beam_search(
  next_logits,
  prompt,
  *,
  num_beams,
  max_new_tokens,
  eos_id=(),
  length_penalty=1.0,
  early_stopping=False,
  repetition_penalty=1.0,
):
  """Return [(score, new tokens)] for one prompt, best first.

  Args:
    next_logits: list of tokens -> Float[V], logits of the next token.
    prompt: list of tokens, without padding.
  """
  live, finished, may_improve = [(0.0, [])], [], True
  for length in range(1, max_new_tokens + 1):
    candidates = []
    for total, tokens in live:
      scores = log_softmax(np.asarray(next_logits(prompt + tokens), np.float64))
      for token in set(prompt + tokens):
        scores[token] *= repetition_penalty  # log-probabilities are negative
      candidates += [(total + score, [*tokens, token]) for token, score in enumerate(scores)]
    candidates = sorted(candidates, key=lambda c: -c[0])[: max(2, 1 + len(eos_id)) * num_beams]
    ends = [tokens[-1] in eos_id or length == max_new_tokens for _, tokens in candidates]
    full = early_stopping is True and len(finished) == num_beams
    if may_improve and not full:
      new = [(total / length**length_penalty, tokens) for (total, tokens), end in zip(candidates, ends) if end]
      inside = [end for end in ends[:num_beams] if end]  # only the best `num_beams` candidates may end
      finished = sorted(finished + new[: len(inside)], key=lambda c: -c[0])[:num_beams]
    live = [c for c, end in zip(candidates, ends) if not end][:num_beams]
    if not live:
      break
    final_length = max_new_tokens if early_stopping == "never" and length_penalty > 0 else length
    if len(finished) == num_beams:
      may_improve &= live[0][0] / final_length**length_penalty > finished[-1][0]
      if not may_improve or early_stopping is True:
        break
  return finished


def biased_logits(table, bias, eos_id):
  """Return a table of logits with `bias` added to the end tokens."""
  table = table.copy()
  table[:, :, eos_id] += np.float32(bias)
  return table

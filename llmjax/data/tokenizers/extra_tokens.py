"""Tokens of pretraining objectives, a mask and sentinels, which any tokenizer can be extended by."""

from __future__ import annotations

import dataclasses
import json

from llmjax.config import ConfigError
from llmjax.data.tokenizers.base import Tokenizer

MASK, SENTINEL = "<mask>", "<extra_id_{}>"
EXTRA_FILE = "extra_tokens.json"  # file of a checkpoint with the arguments of `extend_vocabulary`


def extend_vocabulary(tokenizer: Tokenizer, mask: bool = False, sentinels: int = 0) -> Tokenizer:
  """Return the tokenizer with a mask token and sentinels. Tokens that the vocabulary already has are not added.

  New tokens follow the vocabulary, the mask first. Sentinel k has the id V - 1 - k of the new vocabulary size V, as in
  T5: with 100 sentinels after the 32,000 pieces of its model, <extra_id_0> is 32099. No text is encoded to a new token,
  and new tokens decode to no text.
  """
  if 0 < len(tokenizer.sentinels) < sentinels:
    raise ConfigError(
      f"data.tokenizer.sentinels: the vocabulary has only {len(tokenizer.sentinels)}, got {sentinels}. Decrease it or "
      "choose another tokenizer"
    )
  mask = mask and tokenizer.mask_id is None
  sentinels = 0 if tokenizer.sentinels else sentinels
  if not mask and not sentinels:
    return tokenizer
  old_size, new_size = tokenizer.vocab_size, tokenizer.vocab_size + mask + sentinels
  ids = tuple(new_size - 1 - k for k in range(sentinels))
  mask_name = {old_size: MASK} if mask else {}
  to_text = tokenizer.to_text
  return dataclasses.replace(
    tokenizer,
    pieces=tokenizer.pieces + (b"",) * (new_size - old_size),
    files={**tokenizer.files, EXTRA_FILE: json.dumps({"mask": mask, "sentinels": sentinels}).encode()},
    mask_id=old_size if mask else tokenizer.mask_id,
    sentinels=ids or tokenizer.sentinels,
    names={**tokenizer.names, **mask_name, **{token: SENTINEL.format(k) for k, token in enumerate(ids)}},
    to_text=None if to_text is None else lambda tokens: to_text([token for token in tokens if token < old_size]),
  )

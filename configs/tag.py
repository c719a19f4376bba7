"""Tagging of words:  llmjax train --config=tag

Without arguments, a small encoder is trained from scratch to tag names in Python code (called, defined, imported). The
tags are those of the training data, or of the tagger in init_from if it has all of them; they are saved with the model.
Predicted spans (B-X I-X) are always consistent with their scheme. The argument has, separated by commas:
  crf             a linear-chain CRF, which also scores transitions between tags
  init_from=PATH  the pretrained model: a run, a Hugging Face folder or a hub name
  size=NAME       without init_from: an encoder of configs/sizes.py, trained from scratch (nano)
  train=FILES     your own data: a file or glob of CoNLL columns (.conll), JSONL or Parquet
  eval=FILES      held-out data; without it, a random tenth of `train`
  tokens=FIELD    field of a record with the words (tokens); tags=FIELD with their tags (tags)
  corpus=NAME     an entry of configs/corpora.py instead: tokens (default, no download)
  debug           the smallest shape and two steps, to check that everything works
"""

from ml_collections import ConfigDict

from configs import tasks
from llmjax.config import optional


def get_config(arg: str | None = None) -> ConfigDict:
  arg = tasks.parse(arg, "tokens", tokens=None, tags=None, crf=False)
  config = tasks.make(arg, "encoder", {"tokens": arg.tokens, "tags": arg.tags})
  config.objective.update(name="tagging", use_crf=arg.crf, labels=optional(None, tuple), scheme=optional(None, str))
  config.optim.lr_scale = ((r"crf/.*", 10.0), (r".*", 1.0)) if arg.crf else ((r".*", 1.0),)
  return tasks.finish(config, arg, "f1")

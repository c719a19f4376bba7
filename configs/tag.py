"""Tags of words:  llmjax train --config=tag

As it stands, a small encoder from scratch learns what the names in Python code are: what is called, defined, imported.
Tags are those of the training data, or of the tagger that init_from names, if it knows them all, and are saved with the
model; spans (B-X I-X) never break their scheme. The argument chooses, separated by commas:
  crf             a linear-chain CRF: scores of one tag after another besides
  init_from=PATH  the pretrained model: a run, a Hugging Face folder or a hub name
  size=NAME       without one, an encoder of configs/sizes.py to start from scratch (nano)
  train=FILES     your own data: a file or glob of CoNLL columns (.conll), JSONL or Parquet
  eval=FILES      what is held out; without it, a random tenth of `train` is
  tokens=FIELD    the field of a record that holds the words (tokens), tags=FIELD their tags (tags)
  corpus=NAME     an entry of configs/corpora.py instead: tokens (default, no download)
  debug           the smallest shape and two steps, to see that everything works
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

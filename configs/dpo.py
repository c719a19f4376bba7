"""Preference tuning by DPO:  llmjax train --config=dpo

A decoder learns which of two answers is better, measured against the model that it starts from. As it stands, a small
one from scratch learns to tell what a Python function does from what another one of the same file does; in earnest:
  llmjax train --config=dpo:init_from=runs/sft,train=preferences.jsonl
The argument chooses, separated by commas:
  init_from=PATH  the pretrained model: a run, a Hugging Face folder or a hub name
  reference=PATH  the frozen model that it is measured against; without it, what the run starts from
  size=NAME       without a pretrained one, a decoder of configs/sizes.py to start from scratch (nano)
  train=FILES     your own data: a file or glob of JSONL or Parquet with prompt, chosen and rejected, texts or messages
  eval=FILES      what is held out; without it, a random tenth of `train` is
  variant=NAME    sigmoid (default, DPO), ipo or hinge
  prompt=FIELD, chosen=FIELD, rejected=FIELD  what the fields of a record are called; prompt=none where the answers are
                  whole chats
  corpus=NAME     an entry of configs/corpora.py instead: preferences (default, no download)
  debug           the smallest shape and two steps, to see that everything works
"""

from ml_collections import ConfigDict

from configs import tasks
from llmjax.config import optional


def get_config(arg: str | None = None) -> ConfigDict:
  own = {"prompt": None, "chosen": None, "rejected": None, "reference": None, "variant": "sigmoid"}
  arg = tasks.parse(arg, "preferences", **own)
  fields = {"prompt": arg.prompt, "chosen": arg.chosen, "rejected": arg.rejected}
  if arg.prompt == "none":
    del fields["prompt"]
  config = tasks.make(arg, "decoder", fields, seq_len=256, longest=512)
  if arg.init_from:
    config.optim.lr = 5e-6
  config.objective.update(
    name="preference",
    template=optional(None, str),
    beta=0.1,
    variant=arg.variant,
    label_smoothing=0.0,
    sft_weight=0.0,
  )
  config.auxiliary.reference = ConfigDict({"init_from": optional(arg.reference, str)})
  # The reference has no dropout, and the two would differ by it.
  config.model.update(dropout=0.0, attention_dropout=0.0, mlp_dropout=0.0)
  config = tasks.finish(config, arg, None)
  del config.evals.answers
  config.checkpoint.best = "eval/heldout/accuracy"
  return config

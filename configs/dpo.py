"""Preference tuning by DPO:  llmjax train --config=dpo

Trains a decoder to prefer the better of two answers, relative to the model that it starts from. Without arguments, a
small decoder is trained from scratch to tell the summary of a Python function from that of another. The usual command:
  llmjax train --config=dpo:init_from=runs/sft,train=preferences.jsonl
The argument has, separated by commas:
  init_from=PATH  the pretrained model: a run, a Hugging Face folder or a hub name
  reference=PATH  the frozen reference model; without it, what the run starts from
  size=NAME       without init_from: a decoder of configs/sizes.py, trained from scratch (nano)
  train=FILES     your own data: a file or glob of JSONL or Parquet with prompt, chosen and rejected, texts or messages
  eval=FILES      held-out data; without it, a random tenth of `train`
  variant=NAME    sigmoid (default, DPO), ipo or hinge
  prompt=FIELD, chosen=FIELD, rejected=FIELD  names of these fields; prompt=none if the answers are whole chats
  corpus=NAME     an entry of configs/corpora.py instead: preferences (default, no download)
  debug           the smallest shape and two steps, to check that everything works
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
  # The reference has no dropout, which would make the two models differ.
  config.model.update(dropout=0.0, attention_dropout=0.0, mlp_dropout=0.0)
  config = tasks.finish(config, arg, None)
  del config.evals.answers
  config.checkpoint.best = "eval/heldout/accuracy"
  return config

"""Instruction tuning:  llmjax train --config=sft

Trains a decoder on the assistant's messages in chats; the loss is on these messages only. Without arguments, a small
decoder is trained from scratch to describe Python functions. The argument has, separated by commas:
  init_from=PATH  the pretrained model: a run, a Hugging Face folder or a hub name
  size=NAME       without init_from: a decoder of configs/sizes.py, trained from scratch (nano)
  train=FILES     your own data: a file or glob of JSONL or Parquet with messages [{"role": ..., "content": ...}]
  eval=FILES      held-out data; without it, a random tenth of `train`
  messages=FIELD  field of a record that holds a chat (messages); or
  prompt=FIELD,response=FIELD  two fields of text: the user's message and the assistant's answer
  corpus=NAME     an entry of configs/corpora.py instead: docstring_pairs (default, no download)
  debug           the smallest shape and two steps, to check that everything works
"""

from ml_collections import ConfigDict

from configs import tasks
from llmjax.config import ConfigError, optional


def get_config(arg: str | None = None) -> ConfigDict:
  arg = tasks.parse(arg, "docstring_pairs", messages=None, prompt=None, response=None)
  if (arg.prompt is None) != (arg.response is None):
    raise ConfigError("config arguments prompt=FIELD and response=FIELD belong together; give both, or neither")
  pair = arg.prompt is not None or (arg.train is None and arg.messages is None)
  fields = {"source": arg.prompt, "target": arg.response} if pair else {"messages": arg.messages or "messages"}
  config = tasks.make(arg, "decoder", fields, seq_len=256, longest=512)
  tasks.generation(config)
  names = dict(config.objective)
  config.objective = ConfigDict(
    {
      "name": "sft",
      "messages": names.get("messages", "messages"),
      "prompt": optional(names.get("source"), str),
      "response": optional(names.get("target"), str),
      "system": optional(None, str),
      "template": optional(None, str),
      "last_only": False,
      "response_len": 64,
    }
  )
  config.data.pack = True  # many turns are short, and only answers have a loss
  config.data.interleave = 16
  config.total_steps = 1000
  config = tasks.finish(config, arg, "rougeL")
  if arg.debug:
    config.objective.response_len = 16
  return config

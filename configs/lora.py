"""Any of the others with low-rank adapters:  llmjax train --config=lora

Small matrices beside the projections are trained, and the model stays as it is (Hu et al. 2021,
https://arxiv.org/abs/2106.09685). Without arguments, adapters of a small decoder that starts from scratch are trained,
to check that it works. Usual commands:
  llmjax train --config=lora:task=sft,init_from=PATH
  llmjax train --config=lora:task=classify,init_from=PATH,train=my.csv,text=review,label=stars
  llmjax export --model=runs/... --output=DIR --adapter
The argument has, separated by commas:
  task=NAME       the config to train with adapters: gpt (default), bert, t5, classify, tag, qa, seq2seq, sft, dpo; all
                  other parts of the argument are passed to it
  rank=R          of the adapters (8); their products are scaled by alpha=A / rank (16)
  targets=REGEX   paths of the projections with adapters: ".*attention/(query|value)"; ".*(attention|mlp)/.*" is all
"""

from importlib import import_module

from ml_collections import ConfigDict

from llmjax.config import ConfigError, split_arg, suggest_name

TASKS = ("gpt", "bert", "t5", "classify", "tag", "qa", "seq2seq", "sft", "dpo")
TRAINABLE_WITH_HEAD = (  # the adapters, and what a task adds after the last layer
  (r".*/lora_[ab]|head.*|crf/.*|pooler/.*", True),
  (r".*", False),
)
ADAPTERS = ((r".*/lora_[ab]", True), (r".*", False))


def get_config(arg: str | None = None) -> ConfigDict:
  own, rest = split_arg(arg, task="gpt", rank=8, alpha=16.0, targets=r".*attention/(query|value)")
  if own.task not in TASKS:
    raise ConfigError(f"config argument task={own.task!r} is unknown; {suggest_name(own.task, TASKS)}")
  config = import_module(f"configs.{own.task}").get_config(rest)
  config.model.update(lora_rank=own.rank, lora_alpha=own.alpha, lora_dropout=0.05, lora_targets=own.targets)
  config.trainable = TRAINABLE_WITH_HEAD if own.task in ("classify", "tag", "qa") else ADAPTERS
  config.optim.weight_decay = 0.0
  if own.task == "dpo":
    config.model.lora_dropout = 0.0
  else:
    config.optim.lr = 1e-3 if config.init_from is None else 2e-4
  return config

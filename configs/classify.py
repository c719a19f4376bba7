"""Classes of texts:  llmjax train --config=classify

As it stands, a small encoder from scratch learns which package of Python's library a function is from. Labels are
those of the training data, or of the classifier that init_from names, if it knows them all, and are saved with the
model. The argument chooses, separated by commas:
  init_from=PATH  the pretrained model: a run, a Hugging Face folder or a hub name
  size=NAME       without one, an encoder of configs/sizes.py to start from scratch (nano)
  train=FILES     your own data: a file or glob of JSONL, CSV, TSV or Parquet
  eval=FILES      what is held out; without it, a random tenth of `train` is
  text=FIELD      the field of a record that is read (text); pair=FIELD a second text
  label=FIELD     what is learned (label)
  kind=KIND       single (default): one label; multi: any number of them, a list or a text with commas; regression
  corpus=NAME     an entry of configs/corpora.py instead: package (default, no download), glue_sst2, glue_mnli, ...
  debug           the smallest shape and two steps, to see that everything works
"""

from ml_collections import ConfigDict

from configs import tasks
from llmjax.config import optional

BEST = {"single": "accuracy", "multi": "f1_micro", "regression": "spearman"}


def get_config(arg: str | None = None) -> ConfigDict:
  arg = tasks.parse(arg, "package", text=None, pair=None, label=None, kind="single")
  config = tasks.make(arg, "encoder", {"text": arg.text, "pair": arg.pair, "label": arg.label})
  config.objective.update(name="classification", kind=arg.kind, labels=optional(None, tuple), label_smoothing=0.0)
  return tasks.finish(config, arg, BEST.get(arg.kind, "accuracy"))

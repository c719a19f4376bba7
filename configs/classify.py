"""Classification and regression of texts:  llmjax train --config=classify

Without arguments, a small encoder is trained from scratch to name the package of a Python function. The labels are
those of the training data, or of the classifier in init_from if it has all of them; they are saved with the model. The
argument has, separated by commas:
  init_from=PATH  the pretrained model: a run, a Hugging Face folder or a hub name
  size=NAME       without init_from: an encoder of configs/sizes.py, trained from scratch (nano)
  train=FILES     your own data: a file or glob of JSONL, CSV, TSV or Parquet
  eval=FILES      held-out data; without it, a random tenth of `train`
  text=FIELD      field of a record with the text (text); pair=FIELD with a second text
  label=FIELD     field with the label (label)
  kind=KIND       single (default): one label; multi: any number of labels, a list or a text with commas; regression
  corpus=NAME     an entry of configs/corpora.py instead: package (default, no download), glue_sst2, glue_mnli, ...
  debug           the smallest shape and two steps, to check that everything works
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

"""Texts from texts, such as summaries and translations:  llmjax train --config=seq2seq

As it stands, a small encoder–decoder from scratch learns to say what a Python function does. The argument chooses,
separated by commas:
  decoder         a decoder alone, which goes on from the source; a pretrained model is what it is
  metric=NAME     rouge (default), for summaries; bleu, for translations
  prefix=TEXT     stands before every source, such as "summarize: "
  init_from=PATH  the pretrained model: a run, a Hugging Face folder or a hub name
  size=NAME       without one, an entry of configs/sizes.py to start from scratch (nano)
  train=FILES     your own data: a file or glob of JSONL, CSV, TSV or Parquet
  targets=FILES   `train` is plain text, and its lines' targets are the lines of these
  eval=FILES      what is held out, eval_targets=FILES its targets; without it, a random tenth of `train` is
  source=FIELD    the field of a record that is read (source), target=FIELD what is learned (target)
  corpus=NAME     an entry of configs/corpora.py instead: docstring_pairs (default, no download), cnn_dailymail,
                  gigaword, wmt16_de_en
  debug           the smallest shape and two steps, to see that everything works
"""

from ml_collections import ConfigDict

from configs import tasks
from llmjax.config import ConfigError, optional

BEST = {"rouge": "rougeL", "bleu": "bleu"}


def get_config(arg: str | None = None) -> ConfigDict:
  own = {"source": None, "target": None, "targets": None, "eval_targets": None, "prefix": "", "metric": "rouge"}
  arg = tasks.parse(arg, "docstring_pairs", decoder=False, **own)
  fields = {"source": arg.source, "target": arg.target}
  config = tasks.make(arg, "decoder" if arg.decoder else "both", fields, seq_len=256, longest=512)
  tasks.generation(config)
  config.objective.update(
    name="seq2seq",
    prefix=arg.prefix,
    separator="\n",
    target_len=64,
    metric=arg.metric,
    bidirectional=False,
    label_smoothing=0.0,
    z_loss=0.0,
  )
  if arg.targets:
    config.data.corpus = parallel(arg, config)
  if arg.metric == "rouge":
    same = {key: config.evals.answers.get_oneway_ref(key) for key in ("split", "limit")}
    config.evals.lead = ConfigDict({"name": "lead", "every": optional(None), "at": (), **same})
  config = tasks.finish(config, arg, BEST.get(arg.metric))
  if arg.debug:
    config.objective.target_len = 16
  return config


def parallel(arg: ConfigDict, config: ConfigDict) -> ConfigDict:
  """Two files of lines that belong together."""
  if (arg.eval is None) != (arg.eval_targets is None):
    raise ConfigError("config arguments eval=FILES and eval_targets=FILES belong together; give both, or neither")
  one = {"files": arg.train, "targets": arg.targets}
  if arg.eval is not None:
    one = {
      "files": {"train": arg.train, "validation": arg.eval},
      "targets": {"train": arg.targets, "validation": arg.eval_targets},
    }
  fields = {key: optional(config.objective[key], str) for key in ("source", "target")}
  return ConfigDict({"name": "parallel", **one, **fields, "shuffle": True})

"""Text to text, such as summaries and translations:  llmjax train --config=seq2seq

Without arguments, a small encoder-decoder is trained from scratch to describe Python functions. The argument has,
separated by commas:
  decoder         a decoder, which continues the source; a pretrained model keeps its own stacks
  metric=NAME     rouge (default), for summaries; bleu, for translations
  prefix=TEXT     text before every source, such as "summarize: "
  init_from=PATH  the pretrained model: a run, a Hugging Face folder or a hub name
  size=NAME       without init_from: an entry of configs/sizes.py, trained from scratch (nano)
  train=FILES     your own data: a file or glob of JSONL, CSV, TSV or Parquet
  targets=FILES   `train` is plain text, and line i of these files is the target of its line i
  eval=FILES      held-out data, eval_targets=FILES its targets; without it, a random tenth of `train`
  source=FIELD    field of a record with the input (source); target=FIELD with the output (target)
  corpus=NAME     an entry of configs/corpora.py instead: docstring_pairs (default, no download), cnn_dailymail,
                  gigaword, wmt16_de_en
  debug           the smallest shape and two steps, to check that everything works
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
  """Return a corpus of two files whose lines match."""
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

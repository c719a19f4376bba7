"""BERT on text:  llmjax train --config=bert:size=nano

An encoder is trained to predict masked tokens. The argument has, separated by commas:
  size=NAME       an encoder of configs/sizes.py: nano (default), bert_tiny ... bert_large, roberta_base, roberta_large,
                  modernbert_base, modernbert_large
  pairs=KIND      a second task on two texts: next, whether the second follows the first; order, which of them comes
                  first; none. The default is as published: next for BERT, none for all others
  whole_words     mask whole words
  init_from=PATH  instead of a size: continue the training of a run, a Hugging Face folder or a hub name
  corpus=NAME     an entry of configs/corpora.py: python_stdlib (default, no download), lm1b, wiki40b, c4, ...
  text=FILES      your own text instead: a file or glob of text, JSONL, Parquet, CSV or TSV; the last tenth is held out
  column=NAME     field of a record with the text (text)
  optim=NAME      adamw, adafactor, lion, muon or sgd
  debug           the smallest shape and two steps, to check that everything works
"""

from ml_collections import ConfigDict

from configs import base, common

MASKED_LM = {
  "name": "masked_lm",
  "rate": 0.15,
  "masked": 0.8,
  "replaced": 0.1,
  "whole_words": False,
  "sentence_pairs": "none",
  "sentence_weight": 1.0,
}


def get_config(arg: str | None = None) -> ConfigDict:
  arg = common.parse(arg, pairs=None, whole_words=False)
  size = common.find_size(arg, "encoder")
  config = common.make(arg, size, mask=True)
  config.objective = ConfigDict(MASKED_LM | size.get("objective", {}))
  config.objective.whole_words = arg.whole_words
  if arg.pairs is not None:
    config.objective.sentence_pairs = arg.pairs
  if config.objective.sentence_pairs == "none":
    config.model.update(pooler=False, sentence_classes=0)  # no loss would train them
  else:
    config.model.update(pooler=True, sentence_classes=2, token_types=2)
  base.token_evals(config)
  return common.finish(config, arg)

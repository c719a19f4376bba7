"""Extractive question answering:  llmjax train --config=qa

Without arguments, a small encoder is trained from scratch to find the description of a parameter in a docstring. Long
contexts are read in windows. The argument has, separated by commas:
  no_answer       questions may have no answer, as in SQuAD 2.0
  init_from=PATH  the pretrained model: a run, a Hugging Face folder or a hub name
  size=NAME       without init_from: an encoder of configs/sizes.py, trained from scratch (nano)
  train=FILES     your own data: a file or glob of SQuAD's JSON (.json), JSONL or Parquet with question, context, and
                  answers [{"text": ..., "start": index of a character in the context}]
  eval=FILES      held-out data; without it, a random tenth of `train`
  question=FIELD, context=FIELD, answers=FIELD  names of these fields in a record
  corpus=NAME     an entry of configs/corpora.py instead: params (default, no download), squad, squad2
  debug           the smallest shape and two steps, to check that everything works
"""

from ml_collections import ConfigDict

from configs import tasks


def get_config(arg: str | None = None) -> ConfigDict:
  arg = tasks.parse(arg, "params", question=None, context=None, answers=None, no_answer=False)
  fields = {"question": arg.question, "context": arg.context, "answer": arg.answers or "answers"}
  config = tasks.make(arg, "encoder", fields, seq_len=256, longest=384)
  config.objective.update(
    name="span_qa", stride=128, max_question=64, max_answer=30, no_answer=arg.no_answer, no_answer_threshold=0.0
  )
  if not arg.init_from:
    config.objective.update(stride=32, max_question=32)
  config = tasks.finish(config, arg, "f1")
  if arg.debug:
    config.objective.update(stride=8, max_question=16)
  return config

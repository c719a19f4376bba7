"""Embeddings of text, by contrast:  llmjax train --config=contrastive:size=nano

An encoder learns to place what belongs together nearer than all else in the batch: by default, what Python functions do
(their summary) and the functions themselves. --config.init_from=WORKDIR starts from a run of configs/bert.py of the
same size (one with pairs needs --config.model.token_types=2 here). Published sizes keep the recipe of pretraining; from
a trained encoder, a rate like --config.optim.lr=3e-5 is right. The argument chooses, separated by commas:
  size=NAME       an encoder of configs/sizes.py: nano (default), bert_tiny ... bert_large, roberta_base, roberta_large,
                  modernbert_base, modernbert_large
  init_from=PATH  instead of a size: the model of a run, a Hugging Face folder or a hub name, trained further
  views=KIND      pairs (default): a field of a record and its text; dropout: a text and the same under other dropout
                  (Gao et al. 2021, SimCSE), for any text
  anchor=FIELD    the field that belongs to the text (pairs), or is taken for it (dropout); corpora of pairs name theirs
  negative=FIELD  a field that looks as if it belonged there and does not
  with_mlm        also predict hidden tokens, with equal weight; implies views=dropout
  corpus=NAME     an entry of configs/corpora.py: docstring_pairs (default, no download), gigaword, cnn_dailymail, ...
  text=FILES      your own text instead: a file or glob of text, JSONL, Parquet, CSV or TSV; the last tenth is held out
  column=NAME     which field of a record is the text (text)
  optim=NAME      adamw, adafactor, lion, muon or sgd
  debug           the smallest shape and two steps, to see that everything works
"""

from ml_collections import ConfigDict

from configs import base, common, corpora
from configs.bert import MASKED_LM
from llmjax.config import ConfigError, optional


def get_config(arg: str | None = None) -> ConfigDict:
  arg = common.parse(arg, corpus="docstring_pairs", views="pairs", anchor=None, negative=None, with_mlm=False)
  size = common.find_size(arg, "encoder")
  # Short rows, for as many of them as possible: each is told apart from all others.
  config = common.make(arg, size | {"seq_len": min(size["seq_len"], 64)}, mask=True)
  config.model.update(pooler=False, sentence_classes=0)  # nothing would train them
  pairs = common.choose("views", arg.views, {"pairs": True, "dropout": False}) and not arg.with_mlm
  contrastive = {
    "name": "contrastive",
    "anchor": anchor(arg, pairs),
    "positive": optional("text" if pairs else None, str),
    "negative": optional(arg.negative, str),
    "symmetric": pairs,
    "temperature": 0.05,
    "pooling": "mean",
  }
  if arg.text:
    fields = {contrastive["anchor"], arg.negative} - {"text", None}
    config.data.corpus.columns = tuple(sorted(fields))
  config.objective = ConfigDict(contrastive)
  base.retrieval_evals(config)
  if not pairs:
    config.model.update(dropout=0.1, attention_dropout=0.1)  # all that two views of a text differ in
    del config.evals.retrieval  # a text finds itself
  if arg.with_mlm:
    mlm = MASKED_LM | size.get("objective", {}) | {"sentence_pairs": "none"}
    parts = {"mlm": mlm | {"weight": 1.0}, "contrastive": contrastive | {"weight": 1.0}}
    # Masked language modelling is the one that cuts long texts into pieces.
    config.objective = ConfigDict({"name": "weighted_sum", "principal": "mlm", "parts": parts})
    base.token_evals(config)
  return common.finish(config, arg)


def anchor(arg: ConfigDict, pairs: bool) -> str:
  """The field that is the anchor: one that belongs to the text, or without pairs the text itself."""
  known = "text" if not pairs else None if arg.text else corpora.CORPORA[arg.corpus].get("pair")
  if arg.anchor is None and known is None:
    raise ConfigError("config argument anchor=FIELD is missing: which field belongs to the text? Or say views=dropout")
  return arg.anchor or known

"""Text embeddings by a contrastive loss:  llmjax train --config=contrastive:size=nano

An encoder is trained to place matching texts nearer to each other than to all other texts of the batch: by default, the
summaries of Python functions and the functions. --config.init_from=WORKDIR starts from a run of configs/bert.py of the
same size (one with pairs needs --config.model.token_types=2 here). Published sizes have the recipe of pretraining; a
trained encoder needs a learning rate such as --config.optim.lr=3e-5. The argument has, separated by commas:
  size=NAME       an encoder of configs/sizes.py: nano (default), bert_tiny ... bert_large, roberta_base, roberta_large,
                  modernbert_base, modernbert_large
  views=KIND      pairs (default): a field of a record and its text; dropout: a text twice with different dropout (Gao
                  et al. 2021, SimCSE), for any text
  anchor=FIELD    field that matches the text (pairs), or is used as the text (dropout); corpora of pairs name theirs
  negative=FIELD  field with a hard negative
  with_mlm        also predict masked tokens, with equal weight; implies views=dropout
  init_from=PATH  instead of a size: continue the training of a run, a Hugging Face folder or a hub name
  corpus=NAME     an entry of configs/corpora.py: docstring_pairs (default, no download), gigaword, ...
  text=FILES      your own text instead: a file or glob of text, JSONL, Parquet, CSV or TSV; the last tenth is held out
  column=NAME     field of a record with the text (text)
  optim=NAME      adamw, adafactor, lion, muon or sgd
  debug           the smallest shape and two steps, to check that everything works
"""

from ml_collections import ConfigDict

from configs import base, common, corpora
from configs.bert import MASKED_LM
from llmjax.config import ConfigError, optional


def get_config(arg: str | None = None) -> ConfigDict:
  arg = common.parse(arg, corpus="docstring_pairs", views="pairs", anchor=None, negative=None, with_mlm=False)
  size = common.find_size(arg, "encoder")
  # Short rows, and many of them: each is a negative for all others.
  config = common.make(arg, size | {"seq_len": min(size["seq_len"], 64)}, mask=True)
  config.model.update(pooler=False, sentence_classes=0)  # no loss would train them
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
    config.model.update(dropout=0.1, attention_dropout=0.1)  # the only difference between two views of a text
    del config.evals.retrieval  # a text would retrieve itself
  if arg.with_mlm:
    mlm = MASKED_LM | size.get("objective", {}) | {"sentence_pairs": "none"}
    parts = {"mlm": mlm | {"weight": 1.0}, "contrastive": contrastive | {"weight": 1.0}}
    # Of the two, masked language modelling divides long texts.
    config.objective = ConfigDict({"name": "weighted_sum", "principal": "mlm", "parts": parts})
    base.token_evals(config)
  return common.finish(config, arg)


def anchor(arg: ConfigDict, pairs: bool) -> str:
  """Return the field of the anchor: one that matches the text, or the text itself if there are no pairs."""
  known = "text" if not pairs else None if arg.text else corpora.CORPORA[arg.corpus].get("pair")
  if arg.anchor is None and known is None:
    raise ConfigError("config argument anchor=FIELD is missing: which field belongs to the text? Or say views=dropout")
  return arg.anchor or known

"""A GPT on text:  llmjax train --config=gpt:size=nano

The argument chooses, separated by commas:
  size=NAME      a shape of configs/sizes.py: nano (default), gpt2_124m ... gpt2_1.5b, gpt3_125m ... gpt3_175b,
                 llama2_7b ... llama2_70b, llama3_1b ... llama3_405b
  corpus=NAME    an entry of configs/corpora.py: python_stdlib (default, no download), lm1b, wiki40b, c4, ...
  text=FILES     your own text instead: a file or glob of text, JSONL, Parquet, CSV or TSV; the last tenth is held out
  column=NAME    which field of a record is the text (text)
  optim=NAME     adamw, adafactor, lion, muon or sgd
  debug          the smallest shape and two steps, to see that everything works
"""

from ml_collections import ConfigDict

from configs import base, corpora
from configs.sizes import SIZES
from llmjax.config import ConfigError, nearest, optional, parse_arg

# The keys of each optimizer.
OPTIMIZERS = {
  "adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8},
  "adafactor": {},
  "lion": {"b1": 0.9, "b2": 0.99},
  "muon": {"beta": 0.95, "adam_lr_ratio": 0.5},
  "sgd": {"momentum": 0.9},
}


def get_config(arg: str | None = None) -> ConfigDict:
  arg = parse_arg(arg, size="nano", corpus="python_stdlib", text=None, column="text", optim=None, debug=False)
  name = "debug" if arg.debug else arg.size
  if name not in SIZES:
    raise ConfigError(f"config argument size={name!r} is unknown; {nearest(name, SIZES)}")
  size = SIZES[name]
  config = base.get_config()
  config.model.update(size["model"])
  config.seq_len = size["seq_len"]
  config.batch_size = size["batch_tokens"] // size["seq_len"]
  config.total_steps = 600 if name == "nano" else 100_000

  corpora.choose(config, arg.corpus, arg.text, arg.column)
  config.data.tokenizer = ConfigDict({"name": "sentencepiece", "vocab_size": 4096, "path": optional(None, str)})

  if config.batch_size < 64:
    config.data.interleave = 16  # with few rows, few documents are seen at a time

  optim = arg.optim or size.get("optim", "adamw")
  if optim not in OPTIMIZERS:
    raise ConfigError(f"config argument optim={optim!r} is unknown; {nearest(optim, OPTIMIZERS)}")
  config.optim.update(OPTIMIZERS[optim], name=optim, lr=size["lr"])
  base.language_model_evals(config, prompt="def read_lines(path):\n")
  if name != "debug" and (arg.text or arg.corpus == "python_stdlib"):  # compressors read all of the text
    config.evals.yardsticks = ConfigDict({"name": "yardsticks", "every": optional(None), "at": ()})
  if name == "debug":
    config.total_steps = 2
    config.data.tokenizer.vocab_size = 512
    config.evals.heldout.max_batches = 2
    config.log.every = 1
  return config

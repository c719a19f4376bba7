"""GPT on text:  llmjax train --config=gpt:size=nano

The argument has, separated by commas:
  size=NAME       a decoder of configs/sizes.py: nano (default), nano_moe (eight experts), gpt2_124m ... gpt2_1.5b,
                  gpt3_125m ... gpt3_175b, llama2_7b ... llama2_70b, llama3_1b ... llama3_405b
  objective=NAME  causal_lm (default), or prefix_lm, where a first part of each text has bidirectional attention
  init_from=PATH  instead of a size: continue the training of a run, a Hugging Face folder or a hub name
  corpus=NAME     an entry of configs/corpora.py: python_stdlib (default, no download), lm1b, wiki40b, c4, ...
  text=FILES      your own text instead: a file or glob of text, JSONL, Parquet, CSV or TSV; the last tenth is held out
  column=NAME     field of a record with the text (text)
  optim=NAME      adamw, adafactor, lion, muon or sgd
  debug           the smallest shape and two steps, to check that everything works
"""

from ml_collections import ConfigDict

from configs import base, common
from llmjax.config import optional

# {objective: whether generation reads its prompt both ways}
OBJECTIVES = {"causal_lm": False, "prefix_lm": True}


def get_config(arg: str | None = None) -> ConfigDict:
  arg = common.parse(arg, objective="causal_lm")
  size = common.find_size(arg, "decoder")
  config = common.make(arg, size)
  both_ways = common.choose("objective", arg.objective, OBJECTIVES)
  if not arg.init_from:
    config.model.bidirectional_prompt = both_ways
    config.objective.update(size.get("objective", {}))
  config.objective.name = arg.objective
  base.language_model_evals(config, prompt="def read_lines(path):\n")
  if not arg.debug and (arg.text or arg.corpus == "python_stdlib"):  # compressors read all of the text
    config.evals.baselines = ConfigDict({"name": "baselines", "every": optional(None), "at": ()})
  return common.finish(config, arg)

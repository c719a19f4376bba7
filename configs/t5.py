"""T5 on text:  llmjax train --config=t5:size=nano

An encoder reads text with missing spans, a decoder is trained to write them. --config.objective.noise_density=0.15 is
the part that is missing, --config.objective.mean_span=3.0 the mean length of a span in tokens. The argument has,
separated by commas:
  size=NAME       an encoder-decoder of configs/sizes.py: nano (default), t5_small, t5_base, t5_large, t5_3b, t5_11b,
                  t5_v1.1_small, t5_v1.1_base, t5_v1.1_large, t5_v1.1_xl, t5_v1.1_xxl
  init_from=PATH  instead of a size: continue the training of a run, a Hugging Face folder or a hub name
  corpus=NAME     an entry of configs/corpora.py: python_stdlib (default, no download), lm1b, wiki40b, c4, ...
  text=FILES      your own text instead: a file or glob of text, JSONL, Parquet, CSV or TSV; the last tenth is held out
  column=NAME     field of a record with the text (text)
  optim=NAME      adamw, adafactor, lion, muon or sgd
  debug           the smallest shape and two steps, to check that everything works
"""

from ml_collections import ConfigDict

from configs import base, common

SPAN_CORRUPTION = {
  "name": "span_corruption",
  "noise_density": 0.15,
  "mean_span": 3.0,
  "label_smoothing": 0.0,
  "z_loss": 0.0,
}


def get_config(arg: str | None = None) -> ConfigDict:
  arg = common.parse(arg)
  size = common.find_size(arg, "both")
  config = common.make(arg, size, sentinels=8 if arg.debug else 100)
  config.objective = ConfigDict(SPAN_CORRUPTION | size.get("objective", {}))
  base.token_evals(config)
  return common.finish(config, arg)

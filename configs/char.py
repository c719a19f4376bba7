"""Character model of any text file:  llmjax train --config=char:text=my.txt

The first nine tenths of the characters are trained on; the last tenth is held out, all of it, in disjoint windows. The
default shape is that of nanoGPT's CPU example for tiny Shakespeare (4 layers, width 128, context 64, batch 12, 2000
steps), with a better recipe for the same number of parameters. The argument has, separated by commas:
  text=FILES         a file or a glob (default: Python's own help texts, pydoc_data/topics.py)
  recipe=nanogpt     AdamW, LayerNorm, learned positions and GELU, as in nanoGPT
  debug              two steps of the smallest shape
"""

from importlib.util import find_spec

from ml_collections import ConfigDict

from configs import base
from llmjax.config import ConfigError, optional, parse_arg, suggest_name

NANOGPT = {
  "norm": "layernorm",
  "norm_bias": False,
  "positions": "learned",
  "activation": "gelu_exact",
  "qkv_bias": False,
  "attention_out_bias": False,
  "mlp_bias": False,
  "embedding_stddev": 0.02,
}

MODERN = {
  "norm": "rmsnorm",
  "norm_bias": False,
  "positions": "rotary",
  "activation": "silu",
  "gated": True,
  "d_ff": 344,
  "qkv_bias": False,
  "attention_out_bias": False,
  "mlp_bias": False,
  "qk_norm": True,
  "init_stddev": None,
  "residual_init": "zeros",
}


def get_config(arg: str | None = None) -> ConfigDict:
  arg = parse_arg(arg, text=None, recipe="modern", debug=False)
  config = base.get_config()
  config.seq_len = 64
  config.batch_size = 12
  config.total_steps = 2000
  # Records of 65 characters that overlap by one are windows of 64 inputs and 64 labels.
  files = arg.text or find_spec("pydoc_data.topics").origin
  config.data.corpus = ConfigDict({"name": "text", "files": files, "records": "chunk", "chunk": 65, "overlap": 1})
  config.data.train, config.data.eval = "[:90%]", "[90%:]"
  config.data.tokenizer = ConfigDict({"name": "characters", "unknown": False})

  config.model.update({"d_model": 128, "decoder_layers": 4, "num_heads": 4})
  if arg.recipe == "nanogpt":
    config.model.update(NANOGPT)
    config.optim.update({"name": "adamw", "lr": 1e-3, "b1": 0.9, "b2": 0.99, "eps": 1e-8})
    config.optim.decay_mask = ((r".*norm.*", False), (r".*", True))
    config.schedule.update({"warmup": "5%", "final": 0.1})
  elif arg.recipe == "modern":
    config.model.update(MODERN)
    config.optim.update({"name": "muon", "lr": 0.02, "beta": 0.95, "adam_lr_ratio": 0.3, "weight_decay": 0.01})
    config.optim.decay_mask = ((r".*norm.*", False), (r".*", True))
    config.schedule = ConfigDict({"name": "linear", "warmup": optional("2.5%"), "final": 0.0})
  else:
    raise ConfigError(f"config argument recipe={arg.recipe!r}; {suggest_name(arg.recipe, ('modern', 'nanogpt'))}")

  base.language_model_evals(config, prompt=None)  # no character is in every text
  config.evals.heldout.batch_size = 128
  if arg.debug:
    config.model.update({"d_model": 32, "decoder_layers": 2, "num_heads": 2})
    config.total_steps = 2
    config.evals.heldout.max_batches = 2
  return config

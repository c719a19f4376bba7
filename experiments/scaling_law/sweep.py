"""How does the loss fall with parameters and data, and does what small runs say hold for one four times as large?

llmjax sweep --config=experiments/scaling_law/sweep.py --workdir=runs/scaling_law --max_parallel=2
python experiments/scaling_law/analyse.py runs/scaling_law
"""

from ml_collections import ConfigDict

from configs import gpt
from llmjax.config import parse_arg
from llmjax.sweeps.trials import Sweep, chain, product, vary

LAYERS, BYTES = 4, 256
# {FLOPs of a run: widths that it is spent on}
BUDGETS = {2.5e11: (24, 32, 48, 64), 5e11: (24, 32, 48, 64), 1e12: (32, 48, 64, 96), 2e12: (32, 48, 64, 96)}


def parameters(width: int) -> int:
  """Those of matrices that every byte is multiplied with: attention, a SwiGLU of 8/3 width, and the logits."""
  return LAYERS * (4 * width**2 + 3 * width * (8 * width // 3 // 8 * 8)) + BYTES * width


def get_config(arg: str | None = None) -> ConfigDict:
  arg = parse_arg(arg, width=64, flops=1e12)
  config = gpt.get_config("size=nano")
  config.seq_len, config.batch_size = 128, 8
  width = arg.width
  config.model.update(decoder_layers=LAYERS, d_model=width, d_ff=8 * width // 3 // 8 * 8)
  config.model.update(num_heads=max(width // 16, 2), num_kv_heads=None)
  config.data.tokenizer = ConfigDict({"name": "bytes"})
  config.total_steps = round(arg.flops / (6 * parameters(width) * config.batch_size * config.seq_len))
  config.schedule = ConfigDict({"name": "linear", "warmup": "5%", "final": 0.0})
  config.evals.heldout.update(every=None, batch_size=64, max_batches=20)  # the first 164 kB, the same for all
  del config.evals.sample, config.evals.baselines
  config.checkpoint.every = None
  config.log.tensorboard = False
  return config


def get_sweep() -> Sweep:
  trials = chain(*(product(vary(":flops", [flops]), vary(":width", widths)) for flops, widths in BUDGETS.items()))
  return Sweep(trials, metric="eval/heldout/bits_per_byte", x="parameters", lines=(":flops",))

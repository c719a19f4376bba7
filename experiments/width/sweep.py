"""Does the best learning rate of a narrow model hold for a wider one, with and without muP?

llmjax sweep --config=experiments/width/sweep.py --workdir=runs/width --max_parallel=2
"""

from ml_collections import ConfigDict

from configs import gpt
from llmjax.config import parse_arg
from llmjax.sweeps.trials import Sweep, chain, product, vary

BASE = 64  # where both parametrisations are the same
WIDTHS = (32, 64, 128, 256)
RATES = [2.0**-i for i in range(9, 2, -1)]


def get_config(arg: str | None = None) -> ConfigDict:
  arg = parse_arg(arg, width=BASE, parametrization="standard")
  config = gpt.get_config("size=nano,optim=adamw")
  config.seq_len, config.batch_size, config.total_steps = 64, 16, 150
  width = arg.width
  config.model.update(decoder_layers=3, d_model=width, num_heads=width // 16, num_kv_heads=None, d_ff=2 * width)
  config.model.update(residual_init="plain", tie_embeddings=False)
  if arg.parametrization == "mup":
    config.model.base_width = BASE
  config.data.tokenizer = ConfigDict({"name": "bytes"})
  config.optim.weight_decay = 0.0
  config.schedule = ConfigDict({"name": "linear", "warmup": "10%", "final": 0.0})
  config.evals.heldout.update(every=None, batch_size=64, max_batches=20)
  del config.evals.sample, config.evals.baselines
  config.checkpoint.every = None
  config.log.tensorboard = False
  return config


def get_sweep() -> Sweep:
  others = vary(":width", [width for width in WIDTHS if width != BASE])
  base = [{":parametrization": "standard", ":width": BASE}]
  both = product(vary(":parametrization", ["standard", "mup"]), others)
  trials = product(chain(base, both), vary("optim.lr", RATES))
  return Sweep(trials, x="optim.lr", lines=(":parametrization", ":width"))

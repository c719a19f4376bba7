"""Which optimizer gets furthest in the same number of steps, when the rate of each is tuned as finely?

llmjax sweep --config=experiments/optimizers/sweep.py --workdir=runs/optimizers --max_parallel=2
"""

from ml_collections import ConfigDict

from configs import char
from llmjax.config import parse_arg
from llmjax.sweeps.trials import Sweep, product, seeds, vary

# {optimizer: its settings, and the lowest of six rates, each twice the one before}
OPTIMIZERS = {
  "adamw": ({"b1": 0.9, "b2": 0.95, "eps": 1e-8}, 1e-3),
  "adafactor": ({"momentum": 0.9}, 1e-3),
  "lion": ({"b1": 0.9, "b2": 0.99}, 1e-4),
  "muon": ({"beta": 0.95, "adam_lr_ratio": 0.3}, 5e-3),
}


def get_config(arg: str | None = None) -> ConfigDict:
  arg = parse_arg(arg, optim="adamw")
  config = char.get_config()
  config.total_steps = 400
  config.optim = ConfigDict({"name": arg.optim, "lr": 1e-3, "clip_norm": 1.0, **OPTIMIZERS[arg.optim][0]})
  config.schedule.warmup = "10%"
  config.evals.heldout.every = "25%"
  del config.evals.sample
  config.log.tensorboard = False
  return config


def get_sweep() -> Sweep:
  def rates(trial):
    lowest = OPTIMIZERS[trial[":optim"]][1]
    return vary("optim.lr", [lowest * 2**i for i in range(6)])

  return Sweep(product(vary(":optim", OPTIMIZERS), rates, seeds(2)), x="optim.lr", lines=(":optim",))

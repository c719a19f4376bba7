"""How do temperature and batch size of a contrastive loss go together, at the same number of pairs seen?

llmjax sweep --config=experiments/temperature/sweep.py --workdir=runs/temperature --max_parallel=2
"""

from ml_collections import ConfigDict

from configs import contrastive
from llmjax.sweeps.trials import Sweep, product, seeds, vary

PAIRS = 8_000  # seen in training, whatever the batch


def get_config(arg: str | None = None) -> ConfigDict:
  config = contrastive.get_config(arg)
  config.model.update({"d_model": 96, "num_heads": 4, "num_kv_heads": None, "d_ff": 256, "encoder_layers": 2})
  config.total_steps = f"{PAIRS} examples"
  config.evals.heldout.every = "50%"
  config.evals.retrieval.every = "50%"
  config.evals.retrieval.bm25 = True
  config.log.tensorboard = False
  return config


def get_sweep() -> Sweep:
  temperatures = vary("objective.temperature", [0.02, 0.05, 0.1, 0.2, 0.5])
  trials = product(vary("batch_size", [16, 64, 256]), temperatures, seeds(3))
  metric = "eval/retrieval/mrr"
  return Sweep(trials, metric=metric, mode="max", x="objective.temperature", lines=("batch_size",))

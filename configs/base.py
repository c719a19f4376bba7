"""The defaults, and groups of evaluations. Other configs start from here; this one is not run itself.

All keys and their defaults are documented in `llmjax/config/defaults.py`, those of the model in `llmjax/config/model.py`.
"""

from ml_collections import ConfigDict

from llmjax.config import default_config, optional


def get_config(arg: str | None = None) -> ConfigDict:
  """Return the defaults."""
  return default_config()


def language_model_evals(config: ConfigDict, prompt: str | None) -> None:
  """Held-out loss over the whole split, and a prompt (None: the beginning of the held-out text) continued."""
  _heldout(config)
  config.evals.sample = ConfigDict(
    {
      "name": "sample",
      "every": optional(None),
      "at": (0, "10%"),
      "prompt": optional(prompt, str),
      "max_new_tokens": 100,
      "temperature": 0.8,
      "top_p": optional(0.95, float),
    }
  )


def token_evals(config: ConfigDict) -> None:
  """Held-out loss over the whole split, beside what guessing by frequency gives on the same labels."""
  _heldout(config)
  # Its keys follow those of `heldout`.
  same = {key: config.evals.heldout.get_oneway_ref(key) for key in ("split", "batch_size", "max_batches")}
  config.evals.unigram = ConfigDict({"name": "unigram", "every": optional(None), "at": (), **same})


def retrieval_evals(config: ConfigDict, bm25: bool = False) -> None:
  """Held-out loss, and each anchor's own positive looked for among all of the split, by BM25 too where asked for."""
  _heldout(config)
  config.evals.retrieval = ConfigDict(
    {
      "name": "retrieval",
      "every": optional("20%"),
      "at": (0,),  # what an untrained model finds
      "split": optional(None, str),
      "batch_tokens": 16384,
      "limit": optional(None, int),
      "bm25": bm25,
    }
  )


def task_evals(config: ConfigDict) -> None:
  """Held-out loss, and what the task measures of its answers to the same records."""
  _heldout(config)
  config.evals.answers = ConfigDict(
    {
      "name": "answers",
      "every": optional("20%"),
      "at": (),
      "split": optional(None, str),
      "limit": optional(None, int),
      "batch_tokens": 16384,
    }
  )


def _heldout(config: ConfigDict) -> None:
  config.evals.heldout = ConfigDict(
    {
      "name": "loss",
      "every": optional("20%"),
      "at": (),
      "split": optional(None, str),
      "batch_size": optional(None, int),
      "max_batches": optional(None, int),
    }
  )

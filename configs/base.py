"""The defaults, and groups of evaluations. Other configs start from here; this one is not run itself.

`llmjax/config/defaults.py` documents all keys and their defaults, `llmjax/config/model.py` those of the model.
"""

from ml_collections import ConfigDict

from llmjax.config import default_config, optional


def get_config(arg: str | None = None) -> ConfigDict:
  """Return the defaults."""
  return default_config()


def language_model_evals(config: ConfigDict, prompt: str | None) -> None:
  """Add the held-out loss, and the continuation of a prompt (None: the beginning of the held-out text)."""
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
  """Add the held-out loss, and as its baseline that of token frequencies on the same labels."""
  _heldout(config)
  # These keys follow those of `heldout`.
  same = {key: config.evals.heldout.get_oneway_ref(key) for key in ("split", "batch_size", "max_batches")}
  config.evals.unigram = ConfigDict({"name": "unigram", "every": optional(None), "at": (), **same})


def retrieval_evals(config: ConfigDict, bm25: bool = False) -> None:
  """Add the held-out loss, and retrieval of each anchor's positive among the whole split, optionally with BM25."""
  _heldout(config)
  config.evals.retrieval = ConfigDict(
    {
      "name": "retrieval",
      "every": optional("20%"),
      "at": (0,),  # as baseline: the untrained model
      "split": optional(None, str),
      "batch_tokens": 16384,
      "limit": optional(None, int),
      "bm25": bm25,
    }
  )


def task_evals(config: ConfigDict) -> None:
  """Add the held-out loss, and the task's metrics of answers to the same records."""
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

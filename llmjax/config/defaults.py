"""Every key that the train loop reads, with its default. `configs/base.py` starts from here."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from ml_collections import ConfigDict, FieldReference

from llmjax.config.mesh import MESH_AXES, RULES
from llmjax.config.model import TransformerConfig

# Fields of a model that its objective sets, so that they are not keys of a config.
SET_BY_OBJECTIVE = {"head": "lm", "num_classes": 0, "crf": False}


def optional(value: Any = None, kind: type = object) -> FieldReference:
  """Return a config value that a flag may set to None; `object` takes any literal, as durations need."""
  return FieldReference(value, field_type=kind)


def default_config() -> ConfigDict:
  """Return the defaults. Durations are in steps, tokens, examples, epochs or percent of total_steps."""
  config = ConfigDict()
  config.seed = 0
  config.total_steps = optional(1000)  # a duration
  config.batch_size = 16  # global sequences per update, whatever the mesh
  config.accum = 1  # microbatches per update, computed one after the other
  config.seq_len = 256  # tokens per sequence
  config.logit_tiles = (
    1  # slices of each sequence whose logits are computed one after the other: less memory, more time
  )
  config.ema_decay = optional(None, float)  # keep and evaluate an exponential moving average of the parameters
  config.init_from = optional(None, str)  # start from the parameters of this PATH
  # Regex of a parameter's path -> its name in init_from, as in re.sub, or None: initialise it. First match wins.
  config.init_map = ()
  config.trainable = ((r".*", True),)  # regex of a parameter's path -> whether it is trained; first match wins
  config.auxiliary = ConfigDict()  # {NAME: {"init_from": PATH, or None: what this run starts from}}: frozen models
  config.profile = optional(None, str)  # "10:15": write a trace of these steps
  config.model = default_model()
  config.data = default_data()
  config.objective = ConfigDict({"name": "causal_lm", "label_smoothing": 0.0, "z_loss": 0.0, "balance": 0.0})
  config.optim = default_optim()
  config.schedule = ConfigDict({"name": "cosine", "warmup": optional("2%"), "final": 0.1})
  config.mesh = ConfigDict({axis: -1 if axis == "data" else 1 for axis in MESH_AXES})  # -1: all devices that remain
  config.rules = ConfigDict({axis: optional(mesh_axes) for axis, mesh_axes in RULES.items()})
  config.evals = ConfigDict()  # {NAME: {"name": an evaluator, "every": duration, ...}}; all run at the end too
  config.checkpoint = ConfigDict()
  config.checkpoint.every = optional("20%")
  config.checkpoint.keep = 2  # the latest ones
  config.checkpoint.keep_every = optional(None)  # also keep those at multiples of this duration
  config.checkpoint.best = optional(None, str)  # also keep the best one by this metric, e.g. "eval/heldout/loss"
  config.checkpoint.best_mode = "min"  # or "max"
  # Stop if `metric` has not improved for `patience` of its evaluations in a row.
  config.early_stopping = ConfigDict({"metric": optional(None, str), "mode": "min", "patience": 3})
  config.log = ConfigDict({"every": optional(10), "tensorboard": True})
  config.log.wandb = optional(None, str)  # also log to this project of Weights & Biases
  return config


def default_model() -> ConfigDict:
  """Return config.model: the fields of `TransformerConfig`, where they are documented."""
  required = {"d_model": 256, "decoder_layers": 4, "num_heads": 4}
  types = typing.get_type_hints(TransformerConfig)
  model = ConfigDict({"name": "transformer"})
  model.vocab_size = optional(None, int)  # None: the tokenizer's
  model.max_len = optional(None, int)  # None: seq_len
  model.rotary_scaling = ConfigDict()  # fields of `RotaryScaling`; empty: none
  for field in dataclasses.fields(TransformerConfig):
    if field.name in model or field.name in SET_BY_OBJECTIVE:
      continue
    kinds = [kind for kind in typing.get_args(types[field.name]) if kind is not type(None)]
    default = required.get(field.name, field.default)
    is_optional = len(kinds) < len(typing.get_args(types[field.name])) and Ellipsis not in kinds
    model[field.name] = optional(default, kinds[0]) if is_optional else default
  return model


def default_data() -> ConfigDict:
  """Return config.data."""
  data = ConfigDict()
  data.corpus = ConfigDict()  # {"name": a source, ...}, see configs/corpora.py
  data.train = "train"  # split, or a slice of one: "train[:90%]"
  data.eval = "validation"
  data.tokenizer = ConfigDict()  # {"name": "sentencepiece" | "hf" | "bytes" | "characters", ...}
  data.pack = True  # put several documents in a row; none attends to another
  data.longest = 512  # if seq_len is None, it is the pretrained model's max_len, but at most this
  data.interleave = 1  # documents that a row reads in turn: more mix long documents better, and take memory
  data.epoch_tokens = optional(None, int)  # tokens in the training data; only durations in epochs need it
  data.workers = 2  # threads that read and tokenise
  data.prefetch = 2  # batches prepared ahead
  return data


def default_optim() -> ConfigDict:
  """Return config.optim: replacing it as a whole swaps the optimizer.

  Only `name` and `lr` are required; `llmjax.training.optimizers.DEFAULTS` has the values of the other common keys.
  """
  optim = ConfigDict()
  optim.name = "adamw"  # its own keys, such as b1, may be added
  optim.lr = 1e-3  # peak learning rate
  optim.weight_decay = 0.1
  optim.decay_mask = ((r".*(norm|bias|positions).*", False), (r".*", True))  # first match wins
  optim.lr_scale = ((r".*", 1.0),)  # regex of a parameter's path -> factor of its learning rate; first match wins
  optim.layer_decay = optional(None, float)  # factor of the learning rate once more for each layer above
  optim.clip_norm = optional(1.0, float)  # of the global gradient norm
  return optim

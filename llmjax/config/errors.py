"""`ConfigError`, and hints for mistyped names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
  """A mistake a user can make, told in one line; the command line turns it into exit code 2."""


# What other frameworks call our keys.
ALIASES = {
  "adam_beta1": "optim.b1",
  "adam_beta2": "optim.b2",
  "block_size": "seq_len",
  "context_length": "seq_len",
  "d_model": "model.d_model",
  "dropout": "model.dropout",
  "eval_interval": "evals.heldout.every",
  "eval_steps": "evals.heldout.every",
  "global_batch_size": "batch_size",
  "gradient_accumulation_steps": "accum",
  "gradient_clip_val": "optim.clip_norm",
  "grad_clip": "optim.clip_norm",
  "hidden_size": "model.d_model",
  "learning_rate": "optim.lr",
  "log_interval": "log.every",
  "logging_steps": "log.every",
  "lr": "optim.lr",
  "lr_scheduler_type": "schedule.name",
  "max_iters": "total_steps",
  "max_grad_norm": "optim.clip_norm",
  "max_length": "seq_len",
  "max_seq_length": "seq_len",
  "max_steps": "total_steps",
  "n_embd": "model.d_model",
  "n_head": "model.num_heads",
  "n_layer": "model.decoder_layers",
  "num_attention_heads": "model.num_heads",
  "num_hidden_layers": "model.decoder_layers",
  "num_layers": "model.decoder_layers",
  "num_train_epochs": "total_steps",
  "num_train_steps": "total_steps",
  "optimizer": "optim.name",
  "output_dir": "--workdir",
  "per_device_train_batch_size": "batch_size",
  "random_seed": "seed",
  "save_interval": "checkpoint.every",
  "save_steps": "checkpoint.every",
  "save_total_limit": "checkpoint.keep",
  "train_batch_size": "batch_size",
  "warmup_iters": "schedule.warmup",
  "warmup_ratio": "schedule.warmup",
  "warmup_steps": "schedule.warmup",
  "weight_decay": "optim.weight_decay",
}


# What other frameworks call our values.
VALUE_ALIASES = {
  "bf16": "bfloat16",
  "fp16": "float16",
  "fp32": "float32",
  "half": "float16",
  "rope": "rotary",
}


def suggest_name(name: str, known: Iterable[str]) -> str:
  """A hint for a mistyped name: what we call it, the nearest known names, or all of them when few."""
  known = sorted(known)
  alias = (ALIASES | VALUE_ALIASES).get(name.rsplit(".", 1)[-1])
  if alias is not None:
    for ours in (alias, alias.rsplit(".", 1)[-1]):  # `known` may be the keys of one part alone
      if ours in known or ours.startswith("--"):
        return f"here it is called `{ours}`"
  close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
  if not close:  # perhaps the last part is right and the path is not
    leaf = name.rsplit(".", 1)[-1]
    close = [k for k in known if k.rsplit(".", 1)[-1] == leaf][:3]
  if close:
    return "did you mean " + " or ".join(f"`{k}`" for k in close) + "?"
  return "known: " + ", ".join(known) if len(known) <= 40 else "see the config file for what exists"

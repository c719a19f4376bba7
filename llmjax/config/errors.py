"""`ConfigError`, and hints for mistyped names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
  """A mistake that the user can fix, described in one line; the command line exits with code 2."""


# Names of other frameworks, and former ones, for our keys; a full path counts before its last part.
ALIASES = {
  "best_is": "checkpoint.best_mode",
  "early_stopping.best_is": "early_stopping.mode",
  "ema_decay": "ema_decay",
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


# Names of other frameworks for our values.
VALUE_ALIASES = {
  "bf16": "bfloat16",
  "fp16": "float16",
  "fp32": "float32",
  "half": "float16",
  "rope": "rotary",
}


def suggest_name(name: str, known: Iterable[str]) -> str:
  """Return a hint for a mistyped name: our name for it, the nearest known names, or all of them if they are few."""
  known = sorted(known)
  names = ALIASES | VALUE_ALIASES
  alias = names.get(name) or names.get(name.rsplit(".", 1)[-1])
  if alias is not None:
    for candidate in (alias, alias.rsplit(".", 1)[-1]):  # `known` may be the keys of one part only
      if candidate in known or candidate.startswith("--"):
        return f"here it is called `{candidate}`"
  close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
  if not close:  # the last part may be right and the path wrong
    leaf = name.rsplit(".", 1)[-1]
    close = [k for k in known if k.rsplit(".", 1)[-1] == leaf][:3]
  if close:
    return "did you mean " + " or ".join(f"`{k}`" for k in close) + "?"
  return "known: " + ", ".join(known) if len(known) <= 40 else "see the config file for the keys that exist"

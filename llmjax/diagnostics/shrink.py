"""Configs shrunk for `llmjax verify`, and the meshes that it tries."""

from __future__ import annotations

import math
from collections.abc import Mapping

from llmjax.config import ConfigLike, ConfigTree, Json, to_dict
from llmjax.models.attention.select import ACCELERATOR_KERNELS
from llmjax.training.optimizers import DEFAULTS, OPTIMIZERS, with_optimizer

NUM_STEPS = 3
MAX_LENGTH = 128  # tokens of a sequence


def candidate_meshes(num_devices: int) -> list[str]:
  """Return meshes with every axis, and with pairs of axes, on `num_devices` devices."""
  meshes = [f"{axis}={num_devices}" for axis in ("data", "fsdp", "context")]
  if num_devices % 2 == 0:
    meshes += ["tensor=2", "expert=2"]
  if num_devices % 4 == 0:
    meshes += ["fsdp=2,tensor=2", "context=2,tensor=2", "fsdp=2,expert=2", "expert=2,context=2"]
  return meshes


def shrink_config(config: ConfigLike, num_devices: int) -> ConfigTree:
  """Return a small config with the same features, which can be sharded over `num_devices` devices.

  Sequences are short, a Transformer has few and narrow layers, and all is float32. A model of your own and a
  pretrained one keep their size. Attention kernels for accelerators are replaced by one that these devices support. An
  optimizer of llmjax is replaced by gradient descent, because Adam divides rounding errors by their own size.
  """
  tree: ConfigTree = to_dict(config)
  accum = min(tree["accum"], 2)
  length = MAX_LENGTH if tree["seq_len"] is None else min(tree["seq_len"], MAX_LENGTH)
  tree |= {
    "accum": accum,
    "batch_size": num_devices * accum,
    "seq_len": length,
    "total_steps": NUM_STEPS,
    "evals": {},
    "logit_tiles": math.gcd(tree["logit_tiles"], length),
  }
  overrides = {"dtype": "float32", "param_dtype": "float32"}
  if tree["model"].get("attention") in ACCELERATOR_KERNELS:
    overrides["attention"] = "auto"
  tree["model"] = {**tree["model"], **{key: value for key, value in overrides.items() if key in tree["model"]}}
  if tree["model"]["name"] == "transformer" and tree["init_from"] is None:
    tree["model"] |= shrink_model(tree["model"], length)
  optimizer = {key: value for key, value in tree["optim"].items() if key not in ("lr", *DEFAULTS)}
  lr = tree["optim"]["lr"]
  if optimizer["name"] in OPTIMIZERS:  # an optimizer outside llmjax may be what has to be verified
    optimizer, lr = {"name": "sgd", "momentum": 0.0}, 0.1
  recorder = {"name": "llmjax.diagnostics.measurement:record_gradient", "optimizer": optimizer, "lr": lr}
  tree["optim"] = with_optimizer(tree["optim"], recorder)
  tree["schedule"] = {"name": "constant", "warmup": None}
  tree["checkpoint"] = {**tree["checkpoint"], "best": None, "every": None, "keep_every": None}
  tree["early_stopping"] = {**tree["early_stopping"], "metric": None}
  return tree


def shrink_model(model: Mapping[str, Json], length: int) -> dict[str, Json]:
  """Return the sizes of a small Transformer with the same features.

  The ratio of query heads to key heads stays, up to 4, and layers cover the attention pattern twice.

  Args:
    model: config.model.
    length: tokens of a sequence.
  """
  kv_heads = model["num_kv_heads"] or model["num_heads"]
  queries_per_key = min(model["num_heads"] // kv_heads, 4)
  kv_heads = min(kv_heads, 4 if queries_per_key == 1 else 2)
  heads = kv_heads * queries_per_key
  depth = 2 * len(model["attention_pattern"]) + 1 if len(model["attention_pattern"]) > 1 else 2
  sizes = {
    "d_model": 8 * heads,
    "head_dim": 8,
    "num_heads": heads,
    "num_kv_heads": kv_heads,
    "d_ff": 64,
    "max_len": None if model["max_len"] is None else max(model["max_len"], length),
    **{key: min(model[key], depth) for key in ("decoder_layers", "encoder_layers")},
    **{key: min(model[key], 8) for key in ("num_experts", "lora_rank")},
    "experts_per_token": min(model["experts_per_token"], max(1, min(model["num_experts"], 8))),
  }
  for key in ("expert_d_ff", "shared_expert_d_ff", "embedding_width"):
    sizes[key] = None if model[key] is None else 32
  return sizes if model["window"] is None else {**sizes, "window": min(model["window"], length // 4)}

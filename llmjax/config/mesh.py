"""Mesh axes, and the rules from logical axis names to them. Imports no JAX."""

from __future__ import annotations

from collections.abc import Mapping

# From the outermost, whose neighbours communicate least, to the innermost.
MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")

Rules = Mapping[str, str | tuple[str, ...] | None]  # {logical axis: mesh axis or axes that shard it, None: replicated}

RULES: Rules = {
  # parameters
  "layers": None,
  "vocab": "tensor",
  "positions": None,
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "mlp": "tensor",
  "experts": "expert",
  "norm": None,
  "head": None,  # outputs of projections after the last layer
  "classes": None,
  "token_types": None,
  "buckets": None,
  "lora": None,
  # activations
  "act_batch": ("data", "fsdp", "expert"),
  "act_len": "context",
  "act_embed": None,
  "act_heads": "tensor",
  "act_kv_heads": "tensor",
  "act_head_dim": None,
  "act_mlp": "tensor",
  "act_vocab": "tensor",
}

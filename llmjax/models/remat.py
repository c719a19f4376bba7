"""Rematerialisation policies by name: what a layer keeps for the backward pass; the rest is computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import checkpoint_policies

from llmjax.models.attention.blockwise import RESIDUAL_NAME

REMAT: dict[str, Callable[..., Any] | None] = {
  "none": None,  # keep everything: no rematerialisation
  "full": checkpoint_policies.nothing_saveable,
  "attention": checkpoint_policies.save_only_these_names(RESIDUAL_NAME),  # residuals of "ring", "chunked" and "splash"
  "dots": checkpoint_policies.dots_saveable,
  "weight_dots": checkpoint_policies.dots_with_no_batch_dims_saveable,
}

"""Rematerialisation policies by their names in model.remat: which results of a layer the backward pass keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jax import checkpoint_policies

from llmjax.models.attention.blocks import RESIDUAL_NAME

# What a policy does not keep is computed again in the backward pass. None: no rematerialisation, everything is kept.
CHECKPOINT_POLICIES: Mapping[str, Callable[..., bool] | None] = {
  "none": None,
  "full": checkpoint_policies.nothing_saveable,
  "attention": checkpoint_policies.save_only_these_names(RESIDUAL_NAME),  # outputs of "ring", "chunked" and "splash"
  "dots": checkpoint_policies.dots_saveable,
  "weight_dots": checkpoint_policies.dots_with_no_batch_dims_saveable,
}

"""Sampling of the next token from logits."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from llmjax.config import ConfigError
from llmjax.types import Leaf


@struct.dataclass
class Sampling:
  """Settings of sampling. Numbers are traced, so that a change does not recompile."""

  temperature: Leaf  # Float[], > 0
  top_p: Leaf  # Float[], 1: off
  min_p: Leaf  # Float[], 0: off
  repetition_penalty: Leaf  # Float[], 1: off
  is_greedy: bool = dataclasses.field(metadata={"pytree_node": False})
  top_k: int | None = dataclasses.field(metadata={"pytree_node": False})
  has_top_p: bool = dataclasses.field(metadata={"pytree_node": False})
  has_penalty: bool = dataclasses.field(metadata={"pytree_node": False})


def make_sampling(
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  repetition_penalty: float = 1.0,
  min_p: float = 0.0,
) -> Sampling:
  """Check settings of sampling and return them.

  Args:
    temperature: divides the logits; 0 is greedy decoding.
    top_k: sample from the k most probable tokens, None: all.
    top_p: sample from the smallest set of tokens with at least this probability, None: all.
    repetition_penalty: factor for the logits of tokens seen, 1: off.
    min_p: sample from tokens with at least this fraction of the highest probability, 0: all.

  Raises:
    ConfigError: a value is out of range.
  """
  if not 0 <= temperature < math.inf:
    raise ConfigError(f"temperature={temperature} must be a number that is not negative; 0 is greedy")
  if top_k is not None and top_k < 1:
    raise ConfigError(f"top_k={top_k} must be at least 1")
  if top_p is not None and not 0 < top_p <= 1:
    raise ConfigError(f"top_p={top_p} must be in (0, 1]")
  if not 0 <= min_p <= 1:
    raise ConfigError(f"min_p={min_p} must be in [0, 1]; 0 turns it off")
  if not 0 < repetition_penalty < math.inf:
    raise ConfigError(f"repetition_penalty={repetition_penalty} must be positive; 1 turns it off")
  return Sampling(
    temperature=np.float32(temperature or 1.0),
    top_p=np.float32(1.0 if top_p is None else top_p),
    min_p=np.float32(min_p),
    repetition_penalty=np.float32(repetition_penalty),
    is_greedy=temperature == 0,
    top_k=top_k,
    has_top_p=top_p is not None and top_p < 1,
    has_penalty=repetition_penalty != 1.0,
  )


def filter_logits(
  logits: Float[Array, "B V"], sampling: Sampling, seen: Bool[Array, "B V"] | None
) -> Float[Array, "B V"]:
  """Apply repetition penalty, temperature, top-k, top-p and min-p, in this order.

  The penalty divides positive logits of seen tokens and multiplies negative ones (Keskar et al. 2019). Top-p keeps the
  smallest set of tokens whose probability reaches p (Holtzman et al. 2020). Min-p keeps the tokens with at least the
  fraction p of the highest probability (Nguyen et al. 2024).

  Args:
    logits: of the next token.
    sampling: settings.
    seen: tokens that the penalty applies to, None: no penalty.

  Returns:
    The logits, -inf for tokens that are excluded.
  """
  if seen is not None:
    penalized = jnp.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
    logits = jnp.where(seen, penalized, logits)
  if sampling.is_greedy:
    return logits
  logits = logits / sampling.temperature
  if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
    threshold = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
    logits = jnp.where(logits < threshold, -jnp.inf, logits)
  if sampling.has_top_p:
    order = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(order, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # probability of all likelier tokens
    threshold = jnp.min(jnp.where(before < sampling.top_p, order, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < threshold, -jnp.inf, logits)
  threshold = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
  return jnp.where(logits < threshold, -jnp.inf, logits)


def sample_token(
  logits: Float[Array, "B V"], sampling: Sampling, keys: Key[Array, " B"], seen: Bool[Array, "B V"] | None
) -> Int[Array, " B"]:
  """Return the next token of every row, sampled with the row's own key; arguments as in `filter_logits`."""
  logits = filter_logits(logits, sampling, seen)
  if sampling.is_greedy:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
